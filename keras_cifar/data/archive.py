"""The official CIFAR-10 and CIFAR-100 archives (https://www.cs.toronto.edu/~kriz/cifar.html).

They are read in their python and binary forms, packed or unpacked. Nothing is written, no link is
followed, and a pickle can neither call nor import anything.
"""

import bz2
import dataclasses
import gzip
import lzma
import pathlib
import re
import tarfile
from typing import BinaryIO, cast

import numpy as np

from keras_cifar.core import pickles
from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import open_file
from keras_cifar.core.image_size import STRETCH
from keras_cifar.data.cache import Cache
from keras_cifar.data.images import resize_images
from keras_cifar.data.splits import BadImages, Split, Splits, allocate

SIZE = (32, 32)
PIXELS = 32 * 32 * 3  # bytes of an image: all red, then all green, then all blue, row by row

# Unpacked bytes. The largest member is CIFAR-100's train (155 MB), the largest archive CIFAR-10's
# (186 MB). The official archives have up to 9 members.
MAX_MEMBER = 200_000_000
MAX_ARCHIVE = 500_000_000
MAX_MEMBERS = 1000


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of the four forms: its member files and where the labels are."""

    train: tuple[str, ...]
    test: str
    names: str
    images: tuple[int, int]  # in each official training member and in the test member
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
MEMBERS = frozenset(name for layout in LAYOUTS for name in layout.members)


def load(
    argument: str,
    data_dir: str | None,
    size: tuple[int, int] | None,
    rule: str,
    cache: Cache,
    bad_images: BadImages,
) -> Splits:
    """Reads an archive, or the folder it was unpacked to."""
    path = pathlib.Path(argument).expanduser()
    try:
        if not path.exists():
            raise UserError(f"archive {path} does not exist")
        members = _folder_members(path) if path.is_dir() else _tar_members(path)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {reason(error)}") from None
    except MemoryError:
        raise UserError(f"{path} cannot be read: there is too little memory for it") from None
    layout = _layout(path, members)

    def parse(name, parser, *arguments):
        try:
            return parser(members[name], layout, *arguments)
        except Exception as error:  # Damage can raise almost anything.
            raise UserError(
                f"{path}: {name} cannot be read: {reason(error)}; download it again"
            ) from None

    names = parse(layout.names, _class_names)
    batches = {name: parse(name, _batch, len(names)) for name in (*layout.train, layout.test)}
    _check_counts(path, layout, {name: len(labels) for name, (_, labels) in batches.items()})
    train = _split([batches[name] for name in layout.train], size, rule, str(path))
    test = _split([batches[layout.test]], size, rule, str(path))
    return Splits(train, None, test, names, where=str(path))


def _folder_members(path: pathlib.Path) -> dict[str, bytes]:
    """Base name -> contents, from the folder itself or the one folder in it that has them."""
    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        names = MEMBERS & {p.name for p in folder.iterdir() if p.is_file()}
        if any({*layout.train, layout.test} & names for layout in LAYOUTS):
            for name in names:
                if (folder / name).stat().st_size > MAX_MEMBER:
                    raise UserError(f"{folder / name} is too large for a CIFAR file")
            return {name: (folder / name).read_bytes() for name in names}
    return {}


class _Bounded:
    """An unpacked archive that refuses to be read beyond MAX_ARCHIVE, whatever its headers claim."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_MEMBER or self.tell() + size > MAX_ARCHIVE:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_ARCHIVE:,} bytes")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if position > MAX_ARCHIVE:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_ARCHIVE:,} bytes")
        return self._file.seek(position)


def _unpacked(file: BinaryIO) -> BinaryIO:
    start = file.read(6)
    file.seek(0)
    for magic, opener in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\0", lzma)):
        if start.startswith(magic):
            return opener.open(file)
    return file


def _tar_members(path: pathlib.Path) -> dict[str, bytes]:
    """Base name -> contents of the files that a CIFAR archive has.

    An archive with a member that would harm whoever unpacks it is refused as a whole.
    """
    members, current = {}, "its first member"
    try:
        with open_file(path) as file:
            tar = tarfile.TarFile(fileobj=cast(BinaryIO, _Bounded(_unpacked(file))))
            for number, member in enumerate(tar):
                name = pathlib.PurePosixPath(member.name).name
                if number >= MAX_MEMBERS:
                    raise UserError(f"{path} has more than {MAX_MEMBERS} members; none was used")
                _check_member(path, member, name in members)
                contents = tar.extractfile(member) if name in MEMBERS else None
                if contents:
                    current = name
                    members[name] = contents.read()
                    if len(members[name]) != member.size:
                        raise EOFError("it is truncated")
    except UserError:
        raise
    except Exception as error:  # tarfile and the decompressors raise a dozen classes.
        raise UserError(
            f"{path} cannot be read at {current}: {reason(error)}; download it again"
        ) from None
    return members


def _check_member(path: pathlib.Path, member: tarfile.TarInfo, known: bool) -> None:
    where = pathlib.PurePosixPath(member.name)
    if where.is_absolute() or ".." in where.parts:
        problem = "would be written outside of the folder"
    elif not (member.isfile() or member.isdir()):
        problem = "is a link or a device"
    elif member.size > MAX_MEMBER:
        problem = "is too large for a CIFAR file"
    elif member.isfile() and known:
        problem = "is there twice"
    else:
        return
    raise UserError(f"{path}: the member {member.name!r} {problem}; nothing was read from it")


def _layout(path: pathlib.Path, members: dict) -> Layout:
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
    """Refuses members that lost whole records, also of data sets of one's own in these layouts."""
    expected = dict.fromkeys(layout.train, layout.images[0]) | {layout.test: layout.images[1]}
    if not any(counts[name] == count for name, count in expected.items()):
        expected = dict.fromkeys(layout.train, max(counts[name] for name in layout.train))
    for name, count in expected.items():
        if counts[name] != count:
            raise UserError(
                f"{path}: {name} has {counts[name]} images instead of {count}; download it again"
            )


def _class_names(contents: bytes, layout: Layout) -> tuple[str, ...]:
    if layout.names_key:
        (names,) = _unpickle(contents, layout.names_key)
        if type(names) is not list or any(type(name) is not bytes for name in names):
            raise TypeError("a list of class names was expected")
        if sum(map(len, names)) > len(contents):  # A pickle can repeat one for a few bytes.
            raise ValueError("it repeats class names")
        names = [name.decode() for name in names]
    else:
        names = contents.decode().split()
    if not names or len(set(names)) != len(names):
        raise ValueError("it has no class names, or one of them twice")
    return tuple(names)


def _batch(contents: bytes, layout: Layout, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, 3072] pixels, int64 [N] labels) of a member."""
    if layout.label_bytes:
        record = layout.label_bytes + PIXELS
        if not contents or len(contents) % record:
            raise ValueError(f"its {len(contents)} bytes are not a number of {record}-byte records")
        records = np.frombuffer(contents, np.uint8).reshape(-1, record)
        pixels, labels = records[:, layout.label_bytes :], records[:, layout.label_bytes - 1]
    else:
        pixels, labels = map(_array, _unpickle(contents, b"data", layout.labels_key))
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
            raise ValueError(
                f"data is {pixels.dtype} {list(pixels.shape)} instead of uint8 [N, {PIXELS}]"
            )
        if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(f"it has {len(pixels)} images and not as many integer labels")
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"it has a label outside 0 ... {classes - 1}")
    return pixels, labels


def _split(batches: list, size: tuple[int, int] | None, rule: str, where: str) -> Split:
    size = size or SIZE
    labels = np.concatenate([labels for _, labels in batches])
    images = allocate(len(labels), (*size, 3), where)
    position = 0
    for pixels, _ in batches:
        for start in range(0, len(pixels), 1000):
            block = pixels[start : start + 1000].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            stop = position + len(block)
            done = rule == STRETCH and size == SIZE
            images[position:stop] = block if done else resize_images(block, size, rule)
            position = stop
    return Split(images, labels)


# What pickles of arrays name in NumPy 1 and 2, and pickles of bytes in protocol 2.
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_FUNCTIONS = (*_ARRAYS, "numpy.dtype", "_codecs.encode")
_NAMES = ("numpy.ndarray",)  # an argument of `_reconstruct`


def _unpickle(contents: bytes, *keys: bytes) -> list:
    """The values at these keys of a pickled dictionary; any exception means that it is invalid."""
    value = pickles.load(contents, _FUNCTIONS, _NAMES, "CIFAR file")
    if type(value) is not dict or not value.keys() >= set(keys):
        raise TypeError(f"a dict with {' and '.join(key.decode() for key in keys)} was expected")
    return [value[key] for key in keys]


def _array(value: object) -> np.ndarray:
    if isinstance(value, pickles.Object) and value.name in _ARRAYS:
        _, shape, dtype, fortran, contents = value.state
        text, order = dtype.arguments[0], dtype.state[1] if dtype.state else b"="
        if not re.fullmatch(b"[biuf][1248]", text):
            raise TypeError("an array of numbers was expected")
        # A view of the bytes: `reshape` refuses a shape of any other number of them.
        values = np.frombuffer(contents, np.dtype(text.decode()).newbyteorder(order.decode()))
        return values.reshape(shape, order="F" if fortran else "C")
    if type(value) is not list or any(type(item) is not int for item in value):
        raise TypeError("a list of integers or an array was expected")
    return np.array(value, np.int64)
