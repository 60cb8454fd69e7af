"""The official CIFAR-10 and CIFAR-100 archives (https://www.cs.toronto.edu/~kriz/cifar.html), in
python and in binary form, packed or unpacked. Nothing is written, no link is followed, and pickles
are read without executing anything.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import pathlib
import pickle
import pickletools
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import open_file
from keras_cifar.data.cache import Cache
from keras_cifar.data.images import resize_images
from keras_cifar.data.splits import BadImages, Split, Splits, allocate

PIXELS = 32 * 32 * 3  # bytes of an image: all red, then all green, then all blue, row by row

# Bytes of a member and of all that an archive holds, unpacked. The largest member is CIFAR-100's train
# at 155 MB, the largest archive CIFAR-10's at 186 MB.
MAX_MEMBER = 200_000_000
MAX_ARCHIVE = 500_000_000

# Members of an archive; the official ones have up to 9.
MAX_MEMBERS = 1000

# Operations in a pickle: 4 to 9 for each image of CIFAR-100's train, which has 50,000, as written by
# Python 2 and by Python 3. Each takes up to some 100 bytes of memory. And tuples among them, of which a
# batch has a handful: hashing a tuple in a tuple ... takes C's stack.
MAX_OPERATIONS = 1_000_000
MAX_TUPLES = 100
TOO_MUCH = "it asks for more memory than a CIFAR file does"


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
        UserError: the archive is missing, truncated, not one of the four or made to do harm; the
            message names the member.
    """
    path = pathlib.Path(argument).expanduser()
    try:
        if not path.exists():
            raise UserError(f"archive {path} does not exist")
        members = _folder_members(path) if path.is_dir() else _tar_members(path)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {reason(error)}") from None
    except MemoryError:
        raise UserError(f"{path} cannot be read: it is too large for the memory") from None
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
                if (folder / name).stat().st_size > MAX_MEMBER:
                    raise UserError(f"{folder / name} is too large for a CIFAR file")
            return {name: (folder / name).read_bytes() for name in names}
    return {}


class _Bounded:
    """The unpacked bytes of an archive, of which no more is read than a CIFAR archive has.

    A few megabytes can unpack to terabytes, and a header can claim that so many belong to a name.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        self._check(size <= MAX_MEMBER and self.tell() + size <= MAX_ARCHIVE)
        return self._file.read(size)

    def seek(self, position: int) -> int:
        self._check(position <= MAX_ARCHIVE)
        return self._file.seek(position)

    @staticmethod
    def _check(condition: bool) -> None:
        if not condition:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_ARCHIVE:,} bytes")


@contextlib.contextmanager
def _unpacked(path: pathlib.Path) -> Iterator[BinaryIO]:
    """The tar file in an archive, whatever it is compressed with."""
    with open_file(path) as file:
        start = file.read(6)
        file.seek(0)
        for magic, opener in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\0", lzma)):
            if start.startswith(magic):
                with opener.open(file) as unpacked:
                    yield unpacked
                return
        yield file


def _tar_members(path: pathlib.Path) -> dict[str, bytes]:
    """Base name -> contents of the files that a CIFAR archive has; nothing is written to disk.

    An archive with anything but files and folders below itself is refused as a whole: whoever unpacked
    it would be harmed.
    """
    members = {}
    current = "its first member"
    try:
        with _unpacked(path) as file, tarfile.TarFile(fileobj=_Bounded(file)) as tar:
            for number, member in enumerate(tar):
                where = pathlib.PurePosixPath(member.name)
                name = where.name
                if number >= MAX_MEMBERS:
                    raise UserError(f"{path} has more than {MAX_MEMBERS} members; none was used")
                if where.is_absolute() or ".." in where.parts:
                    raise UserError(
                        f"{path}: the member {member.name!r} would be written outside of the folder; "
                        "no CIFAR archive has one, nothing was read from it"
                    )
                if not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"{path}: the member {member.name!r} is a link or a device; no CIFAR archive "
                        "has one, nothing was read from it"
                    )
                if member.size > MAX_MEMBER:
                    raise UserError(f"{path}: {name} is too large for a CIFAR file")
                if not member.isfile() or name not in _WANTED:
                    continue
                current = name
                if name in members:
                    raise UserError(f"{path} has {name} twice; download it again")
                members[name] = tar.extractfile(member).read()
                if len(members[name]) != member.size:
                    raise EOFError("it is truncated")
    except UserError:
        raise
    except Exception as error:  # tarfile and the decompressors raise a dozen classes.
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
            names = _unpickle(where, members[layout.names])[layout.names_key]
            # Nothing but a list of names: what is nested may refer to itself a billion times.
            if type(names) is not list or any(type(name) is not bytes for name in names):
                raise TypeError("a list of bytes was expected")
            names = [name.decode() for name in names]
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
            pixels, labels = _values(batch[b"data"]), _values(batch[layout.labels_key])
        except Exception as error:  # Damage shows as any of a dozen classes.
            raise UserError(
                f"{where} is not a CIFAR batch; data or labels: {reason(error)}"
            ) from None
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
            images[part] = resize_images(small[part], (image_size, image_size))
    return Split(images, np.concatenate([labels for _, labels in batches]))


# ---- Pickles


class _Array:
    """Takes the state of a pickled `numpy.ndarray`, which is checked before an array is made of it."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state


class _Dtype(_Array):
    """Takes the state of a pickled `numpy.dtype`."""

    def __init__(self, text, *_):
        super().__init__()
        self.text = text.decode() if isinstance(text, bytes) else text


def _values(value: object) -> np.ndarray:
    """An array from a pickle's array, or from its list of integers.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if isinstance(value, _Array):
        _, shape, dtype, fortran, contents = value.state
        if not re.fullmatch("[biuf][1248]", dtype.text) or type(contents) is not bytes:
            raise TypeError("an array of numbers was expected")
        order = dtype.state[1] if dtype.state else b"="
        order = order.decode() if isinstance(order, bytes) else order
        values = np.frombuffer(contents, np.dtype(dtype.text).newbyteorder(order))
        return values.reshape(shape, order="F" if fortran else "C")
    if type(value) is not list or any(type(item) is not int for item in value):
        raise TypeError("a list of integers or an array was expected")
    return np.array(value, np.int64)


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and `_Array`; refuses to look up anything else, so that nothing a
    pickle names is ever called.
    """

    _encoded = 0

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("numpy", "ndarray"):
            return _no_array
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return self._latin1
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file does")

    def _latin1(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError("it names an encoding that no CIFAR file does")
        self._encoded += len(text)  # A text can be named again and again.
        if self._encoded > MAX_MEMBER:
            raise pickle.UnpicklingError(TOO_MUCH)
        return text.encode("latin1")


def _no_array(*_):
    """In place of `numpy.ndarray`, which is an argument of `_reconstruct` and never called."""
    raise pickle.UnpicklingError("it calls numpy.ndarray, which no CIFAR file does")


# What Python writes containers, numbers, text and arrays with, in protocols 2 to 4.
_OPERATIONS = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *(
            "BINSTRING",
            "SHORT_BINSTRING",
            "BINBYTES",
            "SHORT_BINBYTES",
            "BINUNICODE",
            "SHORT_BINUNICODE",
        ),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    )
)


def _check_operations(contents: bytes) -> None:
    """Raises UnpicklingError where reading a pickle would take more memory or stack than CIFAR's."""
    tuples, last = 0, ""
    for number, (operation, argument, _) in enumerate(pickletools.genops(contents)):
        name = operation.name
        if name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"it has the operation {name}, which no CIFAR file does")
        tuples += "TUPLE" in name
        if name == "REDUCE" and "TUPLE" in last:
            tuples -= 1  # Arguments of a call, as of each text of bytes, go no deeper.
        last = last if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE") else name
        # The places of a memo are allocated up to the highest.
        place = argument if name.endswith("BINPUT") else 0
        if max(number, place) > MAX_OPERATIONS or tuples > MAX_TUPLES:
            raise pickle.UnpicklingError(TOO_MUCH)


def _unpickle(where: str, contents: bytes) -> dict:
    try:
        _check_operations(contents)
        value = _Unpickler(io.BytesIO(contents), encoding="bytes").load()
    except Exception as error:  # A damaged pickle can raise almost anything.
        raise UserError(f"{where} cannot be read: {reason(error)}; download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a CIFAR file: a dict was expected")
    return value
