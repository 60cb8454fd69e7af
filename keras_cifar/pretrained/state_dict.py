"""State dicts of PyTorch as NumPy arrays, without PyTorch: `.safetensors`, `.pth`, `.pt` and `.bin`.

A `.pth` file holds a pickle, which can name any function. Only those that a state dict consists of are
called here.
"""

import collections
import io
import pathlib
import pickle
import typing
import zipfile
from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import read

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
MAX_BYTES = 2**32  # the largest of timm's networks has 2.4 GB

# The first value in files of PyTorch before 1.6: torch.serialization.MAGIC_NUMBER.
_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
)  # keys under which training programs save it
_PREFIX = "module."  # of all names, where a DistributedDataParallel model was saved


class _Tensor(typing.NamedTuple):
    """A tensor of a pickle, whose storage may come later in the file."""

    storage: tuple  # (dtype, key)
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def array(self, storages: Callable[[str], bytes]) -> np.ndarray:
        """A view of its storage."""
        dtype, key = self.storage
        values = np.frombuffer(storages(key), dtype)
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((size - 1) * step for size, step in steps)
        if min((self.offset, *self.shape, *self.strides)) < 0 or last >= len(values):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [dtype.itemsize * step for step in self.strides]
        values = values[self.offset :]
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of tensors and containers, and nothing else."""

    def __init__(self, data: bytes | io.BytesIO):
        super().__init__(io.BytesIO(data) if isinstance(data, bytes) else data)
        self.dtypes: dict[str, np.dtype] = {}  # of all storages that it names

    def find_class(self, module, name):
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda s, *rest: _Tensor(s, *rest[:3]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise ValueError(
                f"it names {module}.{name}, which no state dict does; save model.state_dict() alone"
            )
        return known[module, name]

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        self.dtypes[str(key)] = dtype
        return dtype, str(key)


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as views of its contents.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    path = pathlib.Path(path).expanduser()
    try:
        data = read(path, MAX_BYTES)
        found = _load_safetensors(data) if path.suffix == ".safetensors" else _load_pickle(data)
    except Exception as error:  # A damaged file can raise almost anything.
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    return {name.removeprefix(_PREFIX): array for name, array in found.items()}


def _load_safetensors(data: bytes) -> dict[str, np.ndarray]:
    try:
        return safetensors_numpy.load(data)
    except safetensors.SafetensorError:
        raise ValueError("it is not a safetensors file") from None
    except KeyError as error:
        raise ValueError(f"NumPy has no type {error}; save it as float32") from None


def _load_pickle(data: bytes) -> dict[str, np.ndarray]:
    if zipfile.is_zipfile(io.BytesIO(data)):
        return _load_archive(zipfile.ZipFile(io.BytesIO(data)))
    file = io.BytesIO(data)  # of PyTorch before 1.6: five pickles, then the storages
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("it is not a file of torch.save")
    _Unpickler(file).load(), _Unpickler(file).load()  # the version, and facts about the machine
    reader = _Unpickler(file)
    stored, storages = reader.load(), {}
    for key in map(str, _Unpickler(file).load()):
        count = int.from_bytes(file.read(8), "little")
        storages[key] = file.read(count * reader.dtypes[key].itemsize)
    return _arrays(stored, storages.__getitem__)


def _load_archive(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in names:
        raise ValueError("it is not a file of torch.save")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError("its files are compressed, which PyTorch does not do")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise ValueError("it was written on a big-endian machine")
    stored = _Unpickler(archive.read(names["data.pkl"])).load()
    return _arrays(stored, lambda key: archive.read(names[f"data/{key}"]))


def _tensors(stored) -> dict[str, _Tensor]:
    for key in _WRAPPERS:
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    tensors = stored.items() if isinstance(stored, dict) else ()
    found = {str(name): value for name, value in tensors if isinstance(value, _Tensor)}
    if not found:
        raise ValueError("it holds no tensors by name")
    return found


def _arrays(stored, storages: Callable[[str], bytes]) -> dict[str, np.ndarray]:
    return {name: tensor.array(storages) for name, tensor in _tensors(stored).items()}
