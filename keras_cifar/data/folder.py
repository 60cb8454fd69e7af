"""Folders of images: `train/<class>/*`, `test/<class>/*` and optionally `val/<class>/*`, or
`<class>/*` alone, of which one file in ten is the test split.
"""

import concurrent.futures
import hashlib
import os
import pathlib

import numpy as np
import tqdm

from keras_cifar import image
from keras_cifar.data.splits import Split, Splits, allocate
from keras_cifar.errors import UserError, check_directory, reason

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
TEST_SHARE = 10  # one file in so many, where there is no test folder


def load(argument: str, data_dir: str | None, image_size: int | None) -> Splits:
    """Reads every image below the folder `argument`; the classes are the folders' names, sorted.

    Raises:
        UserError: a folder or a file cannot be read; the message names it.
    """
    root = check_directory(argument, "folder")
    below = {p.name: p for p in _entries(root)}
    try:
        parts = {
            split: below[name]
            for split, names in SPLIT_FOLDERS.items()
            for name in names
            if name in below and below[name].is_dir()
        }
    except OSError as error:
        raise UserError(f"folder {root} cannot be read: {reason(error)}") from None
    if parts and "train" not in parts:
        raise UserError(f"{root} has a {' and a '.join(parts)} folder but no train folder")
    files = {split: _classes(folder) for split, folder in (parts or {"train": root}).items()}
    names = tuple(sorted(set().union(*files.values())))
    for split, classes in files.items():
        for name in classes.keys() - files["train"].keys():
            raise UserError(
                f"class {name!r} is in {parts[split]} but not in {parts['train']}; add training "
                "images of it or take it out"
            )
    if "test" not in files:
        files["train"], files["test"] = _by_hash(files["train"])
        if not files["train"]:
            raise UserError(f"{root} has no training images: it has too few to split")

    size = (image_size, image_size) if image_size else _size_of_first(files["train"])
    splits = {
        split: _read(classes, names, size, given=image_size is not None, what=f"{root} {split}")
        for split, classes in files.items()
    }
    return Splits(splits["train"], splits.get("val"), splits["test"], names, where=str(root))


def _classes(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Class name -> its image files, sorted by name."""
    classes = {}
    for directory in _entries(folder):
        if directory.is_dir():
            if not directory.name.isprintable():
                raise UserError(f"folder {str(directory)!r}: a class name must be printable text")
            paths = [p for p in _entries(directory) if p.suffix.lower() in image.SUFFIXES]
            if not paths:
                raise UserError(f"class folder {directory} has no images; fill it or remove it")
            classes[directory.name] = paths
    if not classes:
        raise UserError(
            f"{folder} has no class folders; expected {folder}/<class>/*.jpg, "
            "or train/<class>/* and test/<class>/* below it"
        )
    return classes


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {reason(error)}") from None


def _by_hash(classes: dict) -> tuple[dict, dict]:
    """(train, test): a file's split depends on its class and name alone, so adding files moves none."""

    def is_test(path):
        name = os.fsencode(f"{path.parent.name}/{path.name}")
        return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") % TEST_SHARE == 0

    train, test = {}, {}
    for name, paths in classes.items():
        for path in paths:
            (test if is_test(path) else train).setdefault(name, []).append(path)
    return train, test


def _size_of_first(classes: dict) -> tuple[int, int]:
    path = next(paths[0] for paths in classes.values())
    return _load(path, None).shape[:2]


def _load(path: pathlib.Path, size: tuple[int, int] | None) -> np.ndarray:
    try:
        return image.load(path, size)
    except image.ImageError as error:
        raise UserError(f"{path} cannot be used: {error}; mend it or take it out") from None


def _read(classes: dict, names: tuple, size: tuple[int, int], given: bool, what: str) -> Split:
    """Decodes the files, several at a time (Pillow releases the GIL), in their order."""
    paths = [path for name in names for path in classes.get(name, ())]
    labels = [index for index, name in enumerate(names) for _ in classes.get(name, ())]
    images = allocate(len(paths), (*size, 3), what)

    def read(index):
        pixels = _load(paths[index], size if given else None)
        if pixels.shape != images.shape[1:]:
            raise UserError(
                f"{paths[index]} has {pixels.shape[1]} x {pixels.shape[0]} pixels and others have "
                f"{size[1]} x {size[0]}: say which size with --image_size"
            )
        images[index] = pixels

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            results = pool.map(read, range(len(paths)))
            for _ in tqdm.tqdm(results, f"reading {what}", len(paths), leave=False, disable=None):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Split(images, np.array(labels, np.int64))
