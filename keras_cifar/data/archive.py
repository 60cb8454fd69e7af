"""The official CIFAR-10 and CIFAR-100 archives (https://www.cs.toronto.edu/~kriz/cifar.html), in
python and in binary form, packed or unpacked. Pickles are read without executing anything.
"""

import dataclasses
import io
import lzma
import pathlib
import pickle
import tarfile
import zlib

import numpy as np

from keras_cifar import image
from keras_cifar.data.cache import Cache
from keras_cifar.data.splits import BadImages, Split, Splits, allocate
from keras_cifar.errors import UserError, reason

PIXELS = 32 * 32 * 3  # bytes of an image: all red, then all green, then all blue, row by row

# The largest member is CIFAR-100's train at 155 MB.
LARGEST_MEMBER = 200_000_000


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of the four forms: its member files and where the labels are."""

    train: tuple[str, ...]
    test: str
    names: str
    images: tuple[int, int]  # officially, in each training member and in the test member
    names_key: bytes = b""  # python: the names' key in the `names` member
    labels_key: bytes = b""  # python: the labels' key in a batch
    label_bytes: int = 0  # binary: bytes before the pixels, the last of which is the label

    @property
    def members(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.names)


_TEN, _HUNDRED = (10_000, 10_000), (50_000, 10_000)
LAYOUTS = (
    Layout(
        tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", _TEN,
        names_key=b"label_names", labels_key=b"labels",
    ),
    Layout(
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt",
        _TEN, label_bytes=1,
    ),
    Layout(
        ("train",), "test", "meta", _HUNDRED,
        names_key=b"fine_label_names", labels_key=b"fine_labels",
    ),
    Layout(("train.bin",), "test.bin", "fine_label_names.txt", _HUNDRED, label_bytes=2),
)  # fmt: skip


def load(
    argument: str, data_dir: str | None, image_size: int | None, cache: Cache, bad_images: BadImages
) -> Splits:
    """Reads an archive, or the folder it was unpacked to.

    Raises:
        UserError: the archive is missing, truncated or not one of the four; the message names
            the member.
    """
    path = pathlib.Path(argument).expanduser()
    if not path.exists():
        raise UserError(f"archive {path} does not exist")
    members = _folder_members(path) if path.is_dir() else _tar_members(path)
    layout = _layout(path, members)
    names = _class_names(path, members, layout)
    batches = {
        name: _batch(f"{path}: {name}", members[name], layout, len(names))
        for name in (*layout.train, layout.test)
    }
    _check_counts(path, layout, {name: len(labels) for name, (_, labels) in batches.items()})

    def split(wanted):
        return _split([batches[name] for name in wanted], image_size, str(path))

    return Splits(split(layout.train), None, split([layout.test]), names, where=str(path))


# ---- Members


_WANTED = frozenset(name for layout in LAYOUTS for name in layout.members)


def _folder_members(path: pathlib.Path) -> dict[str, bytes]:
    """Base name -> contents, from the folder itself or the one folder in it that has them."""
    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        names = _WANTED & {p.name for p in folder.iterdir() if p.is_file()}
        if any({*layout.train, layout.test} & names for layout in LAYOUTS):
            for name in names:
                if (folder / name).stat().st_size > LARGEST_MEMBER:
                    raise UserError(f"{folder / name} is too large for a CIFAR file")
            return {name: (folder / name).read_bytes() for name in names}
    return {}


def _tar_members(path: pathlib.Path) -> dict[str, bytes]:
    """Base name -> contents of the regular files; nothing is written to disk."""
    members = {}
    current = "its first member"
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = pathlib.PurePosixPath(member.name).name
                if not member.isfile() or name not in _WANTED:
                    continue
                current = name
                if member.size > LARGEST_MEMBER:
                    raise UserError(f"{path}: {name} is too large for a CIFAR file")
                members[name] = tar.extractfile(member).read()
                if len(members[name]) != member.size:
                    raise EOFError("it is truncated")
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"{path} cannot be read at {current}: {reason(error)}; download it again"
        ) from None
    return members


def _layout(path: pathlib.Path, members: dict) -> Layout:
    """The layout of which the most members are there; all of them must be."""
    layout = max(LAYOUTS, key=lambda layout: sum(name in members for name in layout.members))
    missing = [name for name in layout.members if name not in members]
    if len(missing) == len(layout.members):
        raise UserError(
            f"{path} is none of cifar-10-python, cifar-10-binary, cifar-100-python and "
            "cifar-100-binary, neither packed nor unpacked"
        )
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; download it again")
    return layout


def _check_counts(path: pathlib.Path, layout: Layout, counts: dict[str, int]) -> None:
    """Refuses members that lost whole records: all have the official number, or, in a set of
    one's own in this layout, all training members have the same.
    """
    official = dict.fromkeys(layout.train, layout.images[0]) | {layout.test: layout.images[1]}
    if any(counts[name] == official[name] for name in official):
        expected = official
    else:
        expected = dict.fromkeys(layout.train, max(counts[name] for name in layout.train))
    for name, count in expected.items():
        if counts[name] != count:
            raise UserError(
                f"{path}: {name} has {counts[name]} images instead of {count}; download it again"
            )


# ---- Contents


def _class_names(path: pathlib.Path, members: dict, layout: Layout) -> tuple[str, ...]:
    where = f"{path}: {layout.names}"
    try:
        if layout.names_key:
            names = [n.decode() for n in _unpickle(where, members[layout.names])[layout.names_key]]
        else:
            names = members[layout.names].decode().split()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} has no class names: {reason(error)}") from None
    if not names or len(set(names)) != len(names):
        raise UserError(f"{where} has no class names, or some twice")
    return tuple(names)


def _batch(where: str, contents: bytes, layout: Layout, classes: int) -> tuple:
    """(uint8 [N, 3072] pixels, int64 [N] labels) of a member."""
    if layout.label_bytes:
        record = layout.label_bytes + PIXELS
        if not contents or len(contents) % record:
            raise UserError(
                f"{where} has {len(contents)} bytes, not a whole number of {record}-byte records; "
                "download it again"
            )
        records = np.frombuffer(contents, np.uint8).reshape(-1, record)
        pixels, labels = records[:, layout.label_bytes :], records[:, layout.label_bytes - 1]
    else:
        batch = _unpickle(where, contents)
        try:
            pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[layout.labels_key])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} is not a CIFAR batch: it lacks {reason(error)}") from None
        if (
            pixels.dtype != np.uint8
            or pixels.ndim != 2
            or pixels.shape[1] != PIXELS
            or not len(pixels)
        ):
            raise UserError(
                f"{where} has data of {pixels.dtype} {list(pixels.shape)} instead of "
                f"uint8 [N, {PIXELS}]"
            )
        if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"{where} has {len(pixels)} images and other than as many integer labels"
            )
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{where} has a label outside 0 ... {classes - 1}")
    return pixels, labels


def _split(batches: list, image_size: int | None, where: str) -> Split:
    count = sum(len(labels) for _, labels in batches)
    images = allocate(count, (32, 32, 3), where)
    position = 0
    for pixels, labels in batches:
        stop = position + len(labels)
        images[position:stop] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        position = stop
    if image_size and image_size != 32:
        small, images = images, allocate(count, (image_size, image_size, 3), where)
        for start in range(0, count, 1000):
            part = slice(start, start + 1000)
            images[part] = image.resize(small[part], (image_size, image_size))
    return Split(images, np.concatenate([labels for _, labels in batches]))


# ---- Pickles


class _Unpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers; refuses to look up anything else, so that
    nothing a pickle names is ever called.
    """

    def find_class(self, module, name):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return _latin1
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file does")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError("it names an encoding that no CIFAR file does")
    return text.encode("latin1")


def _unpickle(where: str, contents: bytes) -> dict:
    try:
        value = _Unpickler(io.BytesIO(contents), encoding="bytes").load()
    except MemoryError:
        raise UserError(
            f"{where} cannot be read: it claims more data than there is memory"
        ) from None
    except Exception as error:  # A damaged pickle can raise almost anything.
        raise UserError(f"{where} cannot be read: {reason(error)}; download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a CIFAR file: a dict was expected")
    return value
