"""What every data source yields, and how its splits are completed and checked."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import psutil

from keras_cifar.core.errors import UserError


class ImageFiles(Protocol):
    """Files of M images that are decoded when they are needed. Their bad ones are skipped, or stop."""

    paths: Sequence[str]
    failure: UserError | None  # what stopped `read`, whose error TensorFlow hides

    def read(self, row: int) -> tuple[np.ndarray, bool]:
        """(uint8 [height, width, 3], the image upright; whether it can be read)."""

    def decoded(self, rows: np.ndarray | None) -> "Split":
        """These rows, decoded, resized and cached, without the bad ones."""

    def skipped(self) -> "list[Skipped]":
        """The bad ones that were found until now."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images and labels: some rows, in some order, of images in memory, mapped or in files.

    Attributes:
        stored: uint8 [M, H, W, 3], RGB in [0, 255]; splits that `take` made share it. [0, H, W, 3]
            of images in `files`.
        labels: int64 [N], indices into the class names.
        rows: int64 [N], the rows of `stored` in this split; None is all of them.
        digests: uint8 [M, 16], `pixel_digests` of `stored` where they are known.
        unreadable: (row of `stored`, why) of images that could not be decoded; black there.
    """

    stored: np.ndarray
    labels: np.ndarray
    rows: np.ndarray | None = None
    digests: np.ndarray | None = None
    unreadable: tuple[tuple[int, str], ...] = ()
    files: ImageFiles | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, H, W, 3]: a copy in memory, unless the split is all of what is stored."""
        if self.files is not None:
            return self.decoded().images
        return self.stored if self.rows is None else self.stored[self.rows]

    def decoded(self) -> "Split":
        """The split itself, or, if its images are in files, the same with images that are decoded."""
        return self if self.files is None else self.files.decoded(self.rows)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.stored.shape[1:]

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at `indices`, in that order; no pixels are copied."""
        rows = np.asarray(indices if self.rows is None else self.rows[indices], np.int64)
        return dataclasses.replace(self, labels=self.labels[indices], rows=rows)

    def spread(self, count: int) -> "Split":
        """That many examples, or all where there are fewer, evenly spread over the split."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).round()
        return self.take(rows.astype(np.int64))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the pixels (of images in files, the names and sizes) and labels in order."""
        if self.digests is None:
            digests = pixel_digests(self.stored, self.rows)
        else:
            digests = self.digests if self.rows is None else self.digests[self.rows]
        digest = hashlib.sha256(repr(tuple(self.image_shape)).encode())
        digest.update(np.ascontiguousarray(digests).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()[:16]


def pixel_digests(images: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """uint8 [n, 16]: a hash of each image uint8 [H, W, 3], or of those in `rows`."""
    joined = b"".join(
        hashlib.blake2b(np.ascontiguousarray(images[row]).data, digest_size=16).digest()
        for row in (range(len(images)) if rows is None else rows)
    )
    return np.frombuffer(joined, np.uint8).reshape(-1, 16)


@dataclasses.dataclass(frozen=True)
class BadImages:
    """What to do about images that cannot be read."""

    skip: bool = False  # instead of stopping at the first
    max_share: float = 0.0  # of a split's images, that may be skipped


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An image that was skipped: in which split of the source, its file, and why."""

    split: str
    file: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """The splits of a source; `val` is None where it has none."""

    train: Split
    val: Split | None
    test: Split
    class_names: tuple[str, ...]
    where: str  # for messages
    skipped: tuple[Skipped, ...] = ()
    # (height, width) of some files of train, before they were resized.
    file_sizes: tuple[tuple[int, int], ...] = ()


class Dataset(Splits):
    """Three disjoint splits; `val` is None where nothing was held out."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train.image_shape

    def split(self, name: str) -> Split:
        """The split called train, val or test; UserError if nothing was held out for val."""
        split = getattr(self, name)
        if split is None:
            raise UserError("there is no validation split: the run was made with --val_fraction=0")
        return split

    def left_out(self) -> "list[Skipped]":
        """The images that were skipped until now."""
        files = self.train.files
        return [*self.skipped, *(files.skipped() if files else ())]

    def describe(self) -> dict:
        """The size and fingerprint of each split, for config.json."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {
            name: {"count": len(split), "fingerprint": split.fingerprint}
            for name, split in splits.items()
            if split is not None
        }


def finish(splits: Splits, val_fraction: float, seed: int) -> Dataset:
    """Checks a source's splits and holds validation out of train where it is missing."""
    train, val, test = splits.train, splits.val, splits.test
    for name in splits.class_names:
        check_class_name(name, splits.where)
    for name, split in (("training", train), ("test", test)):
        if len(split) == 0:
            raise UserError(f"{splits.where} has no {name} images")
    for name, other in (("val", val), ("test", test)):
        for label in np.setdiff1d(other.labels if other else [], train.labels).astype(int):
            raise UserError(
                f"class {splits.class_names[label]!r} of {splits.where} is in {name} but not in "
                "train; add training images of it or remove it"
            )
    if val is None and val_fraction > 0:
        held_out = hold_out(train.labels, val_fraction, seed)
        if not held_out.any():
            raise UserError(
                f"--val_fraction={val_fraction} of {splits.where} holds out no image: no class has "
                f"as many as {1 / val_fraction:.0f}; use a larger share, or 0"
            )
        val = train.take(np.flatnonzero(held_out)).decoded()
        train = train.take(np.flatnonzero(~held_out))
    return Dataset(
        train, val, test, splits.class_names, splits.where, splits.skipped, splits.file_sizes
    )


def check_class_name(name: str, where: str) -> None:
    """Raises UserError unless a class name is printable text: labels.txt has a name a line."""
    if not name.isprintable() or not name.strip():
        raise UserError(f"{where}: a class name must be printable text, not {name!r}")


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: a random fraction of each class, the same for the same seed; never a whole class."""
    random = np.random.default_rng([seed, 0x5B117])
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(round(fraction * len(members)), len(members) - 1)
        held_out[random.permutation(members)[:count]] = True
    return held_out


def allocate(count: int, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """uint8 [count, *shape] in memory, or a UserError where the memory is too small."""
    needed = count * int(np.prod(shape))
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{where}: {count} images of {shape[0]} x {shape[1]} pixels need {needed / 1e9:.1f} GB "
            f"of memory and {available / 1e9:.1f} GB are free: choose a smaller --image_size"
        )
    return np.empty((count, *shape), np.uint8)
