"""Data sets, by the spec of --data, and batches of them.

A source is a module here with `load(argument, data_dir, size, rule, cache, bad_images) -> Splits`.
`NAME:ARGUMENT` or `NAME` selects it; any other name is a data set of TensorFlow Datasets.
"""

import importlib
import pkgutil
import sys

from keras_cifar.core.errors import UsageError, one_line, unknown
from keras_cifar.core.image_size import image_sides, resize_rule
from keras_cifar.data.augmentation import crops_files
from keras_cifar.data.balance import class_weights
from keras_cifar.data.batches import (
    evaluation_batches,
    evaluation_steps,
    steps_per_epoch,
    training_batches,
)
from keras_cifar.data.cache import Cache
from keras_cifar.data.splits import BadImages, Dataset, Split, Splits, finish

__all__ = [
    "BadImages",
    "Dataset",
    "Split",
    "Splits",
    "class_weights",
    "evaluation_batches",
    "evaluation_steps",
    "load",
    "steps_per_epoch",
    "training_batches",
]

NO_SOURCES = {
    *("augmentation", "balance", "batches", "cache", "crops", "exif", "images", "splits", "tfds"),
    "transformations",
}


def load(
    spec: str,
    data_dir: str | None = None,
    image_size: int | str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    cache_dir: str | None = None,
    bad_images: BadImages | None = None,
    resize: str = "auto",
    augment: str = "",
) -> Dataset:
    """Loads a data set as uint8 pixels, in memory or memory-mapped from a cache of decoded images.

    Args:
        spec: a TFDS name such as `cifar10`, `folder:PATH`, `archive:PATH` or `digits`.
        data_dir: where TFDS keeps its data sets; None is TFDS's default.
        image_size: the sides in pixels to resize to, N or "HEIGHTxWIDTH"; None: all images must have
            one size.
        val_fraction: the fraction of each class of train that becomes the validation split where the
            source has none.
        seed: selects the images held out.
        cache_dir: where decoded images of folders and TFDS are kept; None is `Cache`'s default.
        bad_images: what to do about images that cannot be read; None stops at the first.
        resize: how to resize: `stretch`, `crop`, or `auto`, which depends on `image_size`.
        augment: the augmentation of training. If it begins with `resized_crop`, the training images of
            a folder stay in their files, which `training_batches` reads.

    Raises:
        UsageError: the spec names no source, or the size or the rule is invalid.
        UserError: the data is missing or damaged; the message names the file.
    """
    size, rule = image_sides(image_size), resize_rule(resize, image_size)
    name, colon, argument = spec.partition(":")
    sources = {m.name for m in pkgutil.iter_modules(__path__)} - NO_SOURCES
    if not spec or (colon and name not in sources):
        raise unknown("data source", spec, {"folder:PATH", "archive:PATH", "digits", "a TFDS name"})
    if name in sources and (bool(argument) != (name != "digits") or spec == "digits:"):
        raise UsageError(f"--data={spec}: write {'digits' if name == 'digits' else name + ':PATH'}")
    source = importlib.import_module(f"{__name__}.{name if name in sources else 'tfds'}")
    argument, cache = argument if colon else spec, Cache(cache_dir)
    options = {"in_files": True} if name == "folder" and crops_files(augment) else {}
    splits = source.load(
        argument, data_dir, size, rule, cache, bad_images or BadImages(), **options
    )
    dataset = finish(splits, val_fraction, seed)
    skipped = dataset.left_out()
    if skipped:
        first = "; ".join(f"{s.file}: {s.reason}" for s in skipped[:3])
        more = "; ..." if len(skipped) > 3 else ""
        line = f"skipped   {len(skipped):,} images that cannot be read: {first}{more}"
        print(one_line(line), file=sys.stderr, flush=True)
    return dataset
