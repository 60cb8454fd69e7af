"""Folders of images: `train/<class>/*`, `test/<class>/*` and optionally `val/<class>/*`, or
`<class>/*` alone, of which one file in ten is the test split.
"""

import concurrent.futures
import contextlib
import hashlib
import os
from collections.abc import Iterator

import numpy as np
import tqdm

from keras_cifar.core import files
from keras_cifar.core.errors import UserError, check_directory, reason
from keras_cifar.data.cache import BLOCK, Cache, Write, in_block
from keras_cifar.data.images import MAX_FILE, SUFFIXES, ImageError, load_image, resize_each
from keras_cifar.data.splits import BadImages, Skipped, Split, Splits, check_class_name

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
TEST_SHARE = 10  # one file in so many, where there is no test folder

AHEAD = 64  # files that the system is told of before they are read

# Bytes of a file, on average. Below, threads that decode mostly wait for Python's lock: two of them
# took 1.3 times as long as one for 32 x 32 pixels, and half as long for 256 x 256.
SMALL = 4096


def load(
    argument: str, data_dir: str | None, image_size: int | None, cache: Cache, bad_images: BadImages
) -> Splits:
    """Reads every image below the folder `argument`; the classes are the folders' names, sorted.

    All files are read at each start, to know that they are those that were decoded.

    Raises:
        UserError: a folder or a file cannot be used, or too many files; the message names it.
    """
    root = check_directory(argument, "folder")
    below = {name: path for name, path, is_folder in _entries(str(root)) if is_folder}
    parts = {
        split: below[name]
        for split, names in SPLIT_FOLDERS.items()
        for name in names
        if name in below
    }
    if parts and "train" not in parts:
        raise UserError(f"{root} has a {' and a '.join(parts)} folder but no train folder")
    found = {split: _classes(folder) for split, folder in (parts or {"train": str(root)}).items()}
    names = tuple(sorted(set().union(*found.values())))
    for split, classes in found.items():
        for name in classes.keys() - found["train"].keys():
            raise UserError(
                f"class {name!r} is in {parts[split]} but not in {parts['train']}; add training "
                "images of it or take it out"
            )
    if "test" not in found:
        found["train"], found["test"] = _by_hash(found["train"])
        if not found["train"]:
            raise UserError(f"{root} has no training images: it has too few to split")

    size = (image_size, image_size) if image_size else None
    splits, skipped = {}, []
    for split in ("train", *sorted(found.keys() - {"train"})):  # train first: it decides the size
        splits[split], unreadable = _read(
            found[split],
            names,
            size,
            given=image_size is not None,
            what=f"{root} {split}",
            cache=cache,
            bad_images=bad_images,
        )
        skipped += [Skipped(split, path, why) for path, why in unreadable]
        size = splits[split].image_shape[:2]
    return Splits(
        splits["train"], splits.get("val"), splits["test"], names, str(root), tuple(skipped)
    )


def _classes(folder: str) -> dict[str, list[str]]:
    """Class name -> the paths of its image files, sorted by name."""
    classes = {}
    for name, directory, is_folder in _entries(folder):
        if is_folder:
            check_class_name(name, folder)
            paths = [
                path
                for file, path, _ in _entries(directory)
                if os.path.splitext(file)[1].lower() in SUFFIXES
            ]
            if not paths:
                raise UserError(f"class folder {directory} has no images; fill it or remove it")
            classes[name] = paths
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
    """Whether it is one; not so a link that leads nowhere or in a circle: reading will say why."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _by_hash(classes: dict) -> tuple[dict, dict]:
    """(train, test): a file's split depends on its class and name alone, so adding files moves none."""

    def is_test(path):
        digest = hashlib.sha256(os.fsencode(_relative(path))).digest()
        return int.from_bytes(digest[:8], "big") % TEST_SHARE == 0

    train, test = {}, {}
    for name, paths in classes.items():
        for path in paths:
            (test if is_test(path) else train).setdefault(name, []).append(path)
    return train, test


def _relative(path: str) -> str:
    """`class/name` of a file."""
    return "/".join(path.rsplit("/", 2)[1:])


class _Unreadable:
    """The pictures of a split that cannot be used: each is added once it is found.

    Attributes:
        found: row -> why.
    """

    def __init__(self, paths: list[str], what: str, bad_images: BadImages):
        self.found: dict[int, str] = {}
        self._paths, self._what, self._bad_images = paths, what, bad_images

    def add(self, row: int, why: str) -> None:
        """Notes a picture.

        Raises:
            UserError: none is to be left out, or so many are not.
        """
        path, share = self._paths[row], self._bad_images.max_share
        if not self._bad_images.skip:
            raise UserError(
                f"{path} cannot be used: {why}; mend it, take it out or give --on_bad_image=skip"
            )
        self.found[row] = why
        if len(self.found) > share * len(self._paths):
            raise UserError(
                f"{self._what}: more than --max_bad_share={share:g} of its {len(self._paths):,} "
                f"pictures cannot be used, such as {path}: {why}; mend them, take them out or allow "
                "more"
            )


def _read(
    classes: dict,
    names: tuple,
    size: tuple[int, int] | None,
    given: bool,
    what: str,
    cache: Cache,
    bad_images: BadImages,
) -> tuple[Split, list[tuple[str, str]]]:
    """The images of a split, in the order of their files, and (path, why) of those left out.

    They are decoded unless `cache` has them. There, as in the order, is every file: an entry does not
    depend on what is done about bad ones.

    Args:
        size: that all have, or are resized to if it was `given`; None is that of the first.
    """
    paths = [path for name in names for path in classes.get(name, ())]
    labels = [index for index, name in enumerate(names) for _ in classes.get(name, ())]
    if not paths:  # Only a test split of too few files can be empty; `finish` says so.
        return Split(np.empty((0, *size, 3), np.uint8), np.array(labels, np.int64)), []
    unreadable = _Unreadable(paths, what, bad_images)
    digests, length = _digest(paths, what, unreadable)
    contents = hashlib.sha256()
    for label, path, digest in zip(labels, paths, digests, strict=True):
        contents.update(b"%d/%s/%s" % (label, os.fsencode(_relative(path)), digest))
    cache_key = {
        "source": "folder",
        "contents": contents.hexdigest(),
        "image_size": size if given else None,
    }

    def fill(write):
        workers = 1 if length < SMALL * len(paths) else os.cpu_count()
        _decode(paths, digests, shape, given, workers, write, unreadable)
        return np.array(labels, np.int64)

    split = cache.find(cache_key)
    if split is None:
        shape = (len(paths), *(size or _first_size(paths, digests, unreadable)), 3)
        split = cache.make(cache_key, shape, what, fill, unreadable.found)
    if size and split.image_shape[:2] != size:  # It was made beside another train.
        raise _other_size(paths[0], split.image_shape, size)
    if not split.unreadable:
        return split, []
    for row, why in split.unreadable:
        unreadable.add(row, why)
    rows = np.setdiff1d(np.arange(len(paths)), [row for row, _ in split.unreadable])
    split = split.take(rows)
    for label in np.setdiff1d(labels, split.labels):
        raise UserError(f"class {names[label]!r} of {what} has no picture that can be used")
    return split, [(paths[row], why) for row, why in split.unreadable]


def _first_size(paths: list[str], digests: list[bytes], unreadable: _Unreadable) -> tuple[int, int]:
    """(height, width) of the first picture that can be used."""
    for row, path in enumerate(paths):
        try:
            return _picture(path, digests[row], None).shape[:2]
        except ImageError as error:
            unreadable.add(row, str(error))
    raise AssertionError("no share is so large that all are left out")


def _digest(paths: list[str], what: str, unreadable: _Unreadable) -> tuple[list[bytes], int]:
    """A hash of the contents of each file, and the bytes of all of them together.

    A file that cannot be read has the hash of the reason.
    """
    digests, length = [], 0
    with tqdm.tqdm(total=len(paths), desc=f"checking {what}", leave=False, disable=None) as bar:
        for start in range(0, len(paths), AHEAD):
            block = paths[start : start + AHEAD]
            _announce(block)
            for row, path in enumerate(block, start):
                try:
                    contents = _contents(path)
                except ImageError as error:
                    unreadable.add(row, str(error))
                    contents = b"unreadable: " + str(error).encode()
                digests.append(_hash(contents))
                length += len(contents)
            bar.update(len(block))
    return digests, length


def _announce(paths: list[str]) -> None:
    """Has the system read files ahead, all at once: five times as fast where they are on a disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(OSError):  # Reading it will say why.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # It may be a pipe.
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _contents(path: str) -> bytes:
    """All bytes of a file, or an ImageError."""
    try:
        return files.read(path, MAX_FILE)
    except OSError as error:
        raise ImageError(reason(error)) from None


def _hash(contents: bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=16).digest()


def _decode(
    paths: list[str],
    digests: list[bytes],
    shape: tuple,
    given: bool,
    workers: int,
    write: Write,
    unreadable: _Unreadable,
) -> None:
    """Decodes the files into rows of `shape` [N, H, W, 3], in blocks; unreadable ones are black."""
    size = shape[1:3]
    block = in_block(shape[1:])

    def pictures(part):
        for index in part:
            try:
                picture = _picture(paths[index], digests[index], size if given else None)
            except ImageError as error:
                unreadable.add(index, str(error))
                picture = np.zeros((*size, 3), np.uint8)
            if not given and picture.shape[:2] != size:
                raise _other_size(paths[index], picture.shape, size)
            yield picture

    def decode(start):
        part = range(start, min(start + block, len(paths)))
        groups = _together(pictures(part))
        write(start, np.concatenate([resize_each(group, size) for group in groups]))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for _ in pool.map(decode, range(0, len(paths), block)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _together(pictures: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Lists of pictures in order, each of at most BLOCK bytes or one picture."""
    group, held = [], 0
    for picture in pictures:
        if group and held + picture.nbytes > BLOCK:
            yield group
            group, held = [], 0
        group.append(picture)
        held += picture.nbytes
    yield group


def _picture(path: str, digest: bytes, size: tuple[int, int] | None) -> np.ndarray:
    """Decodes a file, unless it is no longer the one that was hashed; not quite to `size` yet.

    Raises:
        ImageError: it cannot be used.
        UserError: it was changed.
    """
    contents = _contents(path)
    if _hash(contents) != digest:
        raise UserError(f"{path} was changed while the folder was read; start again")
    return load_image(contents, size, exact=False)


def _other_size(path: str, shape: tuple, size: tuple[int, int]) -> UserError:
    return UserError(
        f"{path} has {shape[1]} x {shape[0]} pixels and others have {size[1]} x {size[0]}: "
        "say which size with --image_size"
    )
