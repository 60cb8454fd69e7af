"""Folders of images: `train/<class>/*`, `test/<class>/*` and optionally `val/<class>/*`, or
`<class>/*` alone, of which one file in ten is the test split.
"""

import concurrent.futures
import contextlib
import copy
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from keras_cifar.core import environment, files
from keras_cifar.core.errors import UsageError, UserError, check_directory, one_line, reason
from keras_cifar.core.image_size import STRETCH
from keras_cifar.data.cache import BLOCK, Cache, Write, in_block
from keras_cifar.data.images import (
    MAX_FILE,
    SUFFIXES,
    ImageError,
    load_image,
    resize_each,
    stored_size,
)
from keras_cifar.data.splits import BadImages, Skipped, Split, Splits, check_class_name

SPLIT_FOLDERS = {  # name of a folder -> split
    "train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test",
}  # fmt: skip
TEST_SHARE = 10  # one file in so many, where there is no test folder

SAMPLE = 64  # files of a split whose contents are part of its cache key; `_state` is of all

SIZED = 256  # files of train whose sizes are read where images are resized

# Mean bytes of a file, below which threads mostly wait for Python's lock: two took 1.3 times as long
# as one for 32 x 32 pixels, and half as long for 256 x 256.
SMALL = 4096


def load(
    argument: str,
    data_dir: str | None,
    size: tuple[int, int] | None,
    rule: str,
    cache: Cache,
    bad_images: BadImages,
    in_files: bool = False,
) -> Splits:
    """Reads every image below the folder `argument`; the classes are the folders' names, sorted.

    `in_files`: those for training stay in their files.
    """
    root = check_directory(argument, "folder")
    below = {name: path for name, path, is_folder in _entries(str(root)) if is_folder}
    folders = {split: below[name] for name, split in SPLIT_FOLDERS.items() if name in below}
    if folders and "train" not in folders:
        raise UserError(f"{root} has a {' and a '.join(folders)} folder but no train folder")
    found = {split: _classes(path) for split, path in (folders or {"train": str(root)}).items()}
    names = tuple(sorted(set().union(*found.values())))
    for split, classes in found.items():
        for name in classes.keys() - found["train"].keys():
            raise UserError(
                f"class {name!r} is in {folders[split]} but not in {folders['train']}; add training "
                "images of it or remove it"
            )
    if "test" not in found:
        found["train"], found["test"] = _split_by_hash(found["train"])
        if not found["train"]:
            raise UserError(f"{root} has no training images: it has too few to split")

    resize, splits, skipped = rule if size else None, {}, []
    file_sizes: tuple[tuple[int, int], ...] = ()
    for split in ("train", *sorted(found.keys() - {"train"})):  # The size is that of train.
        source = _Files(found[split], names, f"{root} {split}", bad_images)
        if in_files and split == "train":
            splits[split] = _in_files(source, size, rule, cache)
        else:
            splits[split] = _read(source, size, resize, cache)
        skipped += [Skipped(split, source.paths[row], why) for row, why in source.invalid.items()]
        if resize and split == "train":
            file_sizes = source.sizes()
        size = splits[split].image_shape[:2]
    train, val, test = splits["train"], splits.get("val"), splits["test"]
    return Splits(train, val, test, names, str(root), tuple(skipped), file_sizes)


def _classes(folder: str) -> dict[str, list[str]]:
    """Class name -> the paths of its image files, sorted by name."""
    classes = {}
    for name, directory, is_folder in _entries(folder):
        if is_folder:
            check_class_name(name, folder)
            classes[name] = [
                path
                for file, path, _ in _entries(directory)
                if os.path.splitext(file)[1].lower() in SUFFIXES
            ]
            if not classes[name]:
                raise UserError(f"class folder {directory} has no images; fill it or remove it")
    if not classes:
        raise UserError(
            f"{folder} has no class folders; expected {folder}/<class>/*.jpg, "
            "or train/<class>/* and test/<class>/* below it"
        )
    return classes


def _entries(folder: str) -> list[tuple[str, str, bool]]:
    """(name, path, whether it is a folder) of all that is not hidden in a folder, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e.name, e.path, _is_folder(e)) for e in entries if e.name[0] != ".")
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {reason(error)}") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link in a circle; reading it will say why.
        return False


def _split_by_hash(classes: dict) -> tuple[dict, dict]:
    """(train, test): a file's split depends on its class and name alone, so adding files moves none."""
    train: dict[str, list] = {}
    test: dict[str, list] = {}
    for name, paths in classes.items():
        for path in paths:
            digest = hashlib.sha256(os.fsencode(_relative(path))).digest()
            is_test = int.from_bytes(digest[:8], "big") % TEST_SHARE == 0
            (test if is_test else train).setdefault(name, []).append(path)
    return train, test


def _relative(path: str) -> str:
    return "/".join(path.rsplit("/", 2)[1:])


class _Encoded:
    """`splits.ImageFiles` of a folder."""

    def __init__(self, source: "_Files", size: tuple[int, int], rule: str, cache: Cache):
        self._source, self._how = source, (size, rule, cache)
        self.paths: Sequence[str] = source.paths
        self.failure: UserError | None = None

    def read(self, row: int) -> tuple[np.ndarray, bool]:
        try:
            return self._read_or_skip(int(row))
        except UserError as error:
            self.failure = error
            raise

    def decoded(self, rows: np.ndarray | None) -> Split:
        rows = np.arange(len(self.paths)) if rows is None else rows
        taken = self._source.take(rows)
        split = _read(taken, *self._how)
        self._source.invalid.update({int(rows[row]): why for row, why in taken.invalid.items()})
        return split

    def skipped(self) -> list[Skipped]:
        return [Skipped("train", self.paths[row], why) for row, why in self._source.invalid.items()]

    def _read_or_skip(self, row: int) -> tuple[np.ndarray, bool]:
        try:
            return self._source.image(row, None), True
        except ImageError as error:
            known, why = row in self._source.invalid, str(error)
            self._source.reject(row, why)
        if not known:
            print(one_line(f"skipped   {self.paths[row]}: {why}"), file=sys.stderr, flush=True)
        return np.zeros((1, 1, 3), np.uint8), False


def _in_files(source: "_Files", size: tuple[int, int] | None, rule: str, cache: Cache) -> Split:
    """A split whose images stay in their files."""
    if size is None:
        raise UsageError("--augment=resized_crop crops files of any size: it needs --image_size")
    stored = np.empty((0, *size, 3), np.uint8)
    files = _Encoded(source, size, rule, cache)
    return Split(stored, source.labels, digests=source.digests(), files=files)


class _Files:
    """The image files of a split, by class and name; `invalid` is row -> why of those that are none."""

    def __init__(self, classes: dict, names: tuple, where: str, bad_images: BadImages):
        self.paths = [path for name in names for path in classes.get(name, ())]
        counts = [len(classes.get(name, ())) for name in names]
        self.labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
        self.states = [_state(path) for path in self.paths]
        self.names, self.where, self._bad_images = names, where, bad_images
        self.invalid: dict[int, str] = {}

    def take(self, rows: np.ndarray) -> "_Files":
        """The files of these rows alone, all of them valid as far as is known."""
        taken = copy.copy(self)
        taken.paths, taken.states = (
            [every[row] for row in rows] for every in (self.paths, self.states)
        )
        taken.labels, taken.invalid = self.labels[rows], {}
        return taken

    def reject(self, row: int, why: str) -> None:
        """Notes that a file is no image, or raises UserError where no more may be skipped."""
        path, share = self.paths[row], self._bad_images.max_share
        if not self._bad_images.skip:
            raise UserError(
                f"{path} cannot be read: {why}; repair it, remove it or give --on_bad_image=skip"
            )
        self.invalid[row] = why
        if len(self.invalid) > share * len(self.paths):
            raise UserError(
                f"{self.where}: more than --max_bad_share={share:g} of its {len(self.paths):,} "
                f"images cannot be read, such as {path}: {why}; repair them, remove them or allow more"
            )

    def image(self, row: int, size: tuple[int, int] | None, rule: str = STRETCH) -> np.ndarray:
        path = self.paths[row]
        image = load_image(_contents(path), size, rule, exact=False)
        if _state(path) != self.states[row]:
            raise UserError(f"{path} was changed while the folder was read; start again")
        return image

    def first_size(self) -> tuple[int, int]:
        for row in range(len(self.paths)):
            try:
                return self.image(row, None).shape[:2]
            except ImageError as error:
                self.reject(row, str(error))
        raise AssertionError("no share is so large that all are skipped")

    def digests(self) -> np.ndarray:
        """uint8 [M, 16]: a hash of the class, the name and the size in bytes of each file."""
        each = zip(self.labels, self.paths, self.states, strict=True)
        texts = (
            b"%d/%s/%s" % (n, os.fsencode(_relative(p)), s.partition(b" ")[0]) for n, p, s in each
        )
        joined = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
        return np.frombuffer(joined, np.uint8).reshape(-1, 16)

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of files that are evenly spread over all, by their headers."""
        rows, found = np.linspace(0, len(self.paths) - 1, SIZED).astype(int), []
        for row in np.setdiff1d(rows, list(self.invalid)):
            with contextlib.suppress(ImageError):
                found.append(stored_size(self.paths[row]))
        return tuple(found)

    def key(self) -> str:
        """A hash that tells whether these files were decoded before, wherever they are."""
        digest = hashlib.sha256()
        for label, path, state in zip(self.labels, self.paths, self.states, strict=True):
            digest.update(b"%d/%s/%s\0" % (label, os.fsencode(_relative(path)), state))
        for row in np.unique(np.linspace(0, len(self.paths) - 1, SAMPLE).astype(int)):
            with contextlib.suppress(ImageError):  # Decoding it will say why.
                digest.update(hashlib.sha256(_contents(self.paths[row])).digest())
        return digest.hexdigest()


def _state(path: str) -> bytes:
    """What changes with a file's contents or with whether they can be read."""
    try:
        found = os.stat(path)
    except OSError:  # Reading it will say why.
        return b""
    return b"%d %d %o" % (found.st_size, found.st_mtime_ns, found.st_mode)


def _contents(path: str) -> bytes:
    try:
        return files.read(path, MAX_FILE)
    except OSError as error:
        raise ImageError(reason(error)) from None


def _read(source: _Files, size: tuple[int, int] | None, resize: str | None, cache: Cache) -> Split:
    """The images of a split, in the order of their files, decoded unless `cache` has them.

    An entry has every file, the invalid ones black, so it does not depend on `bad_images`. All images
    have `size`, or that of the first, unless there is a rule to `resize` them to it.
    """
    if not source.paths:  # Only a test split of too few files can be empty; `finish` says so.
        return Split(np.empty((0, *(size or (0, 0)), 3), np.uint8), source.labels)
    key = {"source": "folder", "files": source.key(), "image_size": size if resize else None}
    key |= {"resize": resize} if resize not in (None, STRETCH) else {}  # as in earlier entries
    split = cache.find(key)
    if split is None:
        shape = (len(source.paths), *(size or source.first_size()), 3)

        def fill(write):
            _decode(source, shape, resize, write)
            return source.labels

        split = cache.make(key, shape, source.where, fill, source.invalid)
    if size and split.image_shape[:2] != size:  # It was made beside another train.
        raise _other_size(source.paths[0], split.image_shape, size)
    if not split.unreadable:
        return split
    for row, why in split.unreadable:
        source.reject(row, why)
    split = split.take(np.setdiff1d(np.arange(len(split)), list(source.invalid)))
    for label in np.setdiff1d(source.labels, split.labels):
        raise UserError(f"class {source.names[label]!r} of {source.where} has no image left")
    return split


def _decode(source: _Files, shape: tuple, resize: str | None, write: Write) -> None:
    """Decodes the files into rows of `shape` [N, H, W, 3], in blocks; invalid ones are black."""
    count, size = shape[0], shape[1:3]
    block = in_block(shape[1:])

    def images(rows):
        for row in rows:
            try:
                image = source.image(row, size, resize) if resize else source.image(row, None)
            except ImageError as error:
                source.reject(row, str(error))
                image = np.zeros(shape[1:], np.uint8)
            if not resize and image.shape[:2] != size:
                raise _other_size(source.paths[row], image.shape, size)
            yield image

    def decode(start):
        rows = range(start, min(start + block, count))
        _announce(source.paths[start : start + block])
        groups = _grouped(images(rows))
        write(
            start, np.concatenate([resize_each(group, size, resize or STRETCH) for group in groups])
        )

    length = sum(int(state.split()[0]) for state in source.states if state)
    workers = 1 if length < SMALL * count else environment.usable_cpus()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for _ in pool.map(decode, range(0, count, block)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _announce(paths: list[str]) -> None:
    """Has the system read files ahead, all at once: five times as fast where they are on a disk."""
    for path in paths if hasattr(os, "posix_fadvise") else ():
        with contextlib.suppress(OSError), files.open_file(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _grouped(images: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Lists of images in order, each of at most BLOCK bytes or one image."""
    group: list[np.ndarray] = []
    held = 0
    for image in images:
        if group and held + image.nbytes > BLOCK:
            yield group
            group, held = [], 0
        group.append(image)
        held += image.nbytes
    yield group


def _other_size(path: str, shape: tuple, size: tuple[int, int]) -> UserError:
    return UserError(
        f"{path} has {shape[1]} x {shape[0]} pixels and others have {size[1]} x {size[0]}: "
        "say which size with --image_size"
    )
