"""State dicts of PyTorch as NumPy arrays, without PyTorch: `.safetensors`, `.pth`, `.pt` and `.bin`.

A `.pth` file holds a pickle, which can name any function. Here nothing is called.
"""

import io
import pathlib
import zipfile
from collections.abc import Callable
from typing import BinaryIO

import ml_dtypes
import numpy as np

from keras_cifar.core import pickles, tensors
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
# Keys under which training programs save it.
_WRAPPERS = (b"state_dict", b"model", b"model_state_dict")
_PREFIX = "module."  # of all names, where a DistributedDataParallel model was saved


_REBUILD, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_FUNCTIONS = (pickles.ORDERED_DICT, _REBUILD, _PARAMETER)
_NAMES = tuple(f"torch.{name}" for name in _DTYPES)


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as views of its contents.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    path = pathlib.Path(path).expanduser()
    try:
        data = read(path, MAX_BYTES)
        found = tensors.load_all(data) if path.suffix == ".safetensors" else _load_pickle(data)
    except Exception as error:  # A damaged file can raise almost anything.
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    return {name.removeprefix(_PREFIX): array for name, array in found.items()}


def _load_pickle(data: bytes) -> dict[str, np.ndarray]:
    if zipfile.is_zipfile(io.BytesIO(data)):
        return _load_archive(zipfile.ZipFile(io.BytesIO(data)))
    file = io.BytesIO(data)  # of PyTorch before 1.6: five pickles, then the storages
    if _unpickle(file) != _MAGIC:
        raise ValueError("it is not a file of torch.save")
    _unpickle(file), _unpickle(file)  # the version, and facts about the machine
    outside: list[tuple] = []
    found, storages = _tensors(_unpickle(file, outside)), {}
    dtypes = {key: dtype for dtype, key in map(_storage, outside)}
    for key in _unpickle(file):
        count = int.from_bytes(file.read(8), "little")
        storages[key] = file.read(count * dtypes[key].itemsize)
    return {name: _array(tensor, storages.__getitem__) for name, tensor in found.items()}


def _load_archive(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    if "data.pkl" not in names:
        raise ValueError("it is not a file of torch.save")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError("its files are compressed, which PyTorch does not do")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise ValueError("it was written on a big-endian machine")
    found = _tensors(_unpickle(io.BytesIO(archive.read(names["data.pkl"])), []))

    def storages(key):
        return archive.read(names[f"data/{key.decode()}"])

    return {name: _array(tensor, storages) for name, tensor in found.items()}


def _unpickle(file: BinaryIO, outside: list | None = None):
    return pickles.load(file, _FUNCTIONS, _NAMES, "state dict", outside)


def _tensors(stored) -> dict[str, pickles.Object]:
    """The tensors of a state dict by name, also where it is in a dictionary with other things."""
    for key in _WRAPPERS:
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    found = {}
    for name, value in stored.items() if isinstance(stored, dict) else ():
        if isinstance(value, pickles.Object) and value.name == _PARAMETER:
            value = value.arguments[0]
        if isinstance(value, pickles.Object) and value.name == _REBUILD:
            found[name.decode()] = value
    if not found:
        raise ValueError("it holds no tensors by name")
    return found


def _storage(outside: tuple) -> tuple[np.dtype, bytes]:
    """(dtype, key) of a storage."""
    _, kind, key, *_ = outside
    return np.dtype(_DTYPES[kind.name.removeprefix("torch.")]), key


def _array(tensor: pickles.Object, storages: Callable[[bytes], bytes]) -> np.ndarray:
    """A tensor as a view of its storage."""
    storage, offset, shape, strides, *_ = tensor.arguments
    dtype, key = _storage(storage)
    values = np.frombuffer(storages(key), dtype)
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or last >= len(values):
        raise ValueError("a tensor reaches beyond its storage")
    steps = [dtype.itemsize * step for step in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
