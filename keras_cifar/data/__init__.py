"""Data sources. `load` takes the spec of --data; a new source is one new file here.

A source is a module with `load(argument, data_dir, image_size, cache) -> Splits`. `NAME:ARGUMENT`
and the bare NAME of a module find it; any other name is a data set of TensorFlow Datasets.
"""

import importlib
import pkgutil

from keras_cifar.data.cache import Cache
from keras_cifar.data.splits import Dataset, Split, Splits, finish
from keras_cifar.errors import UsageError, unknown

__all__ = ["Dataset", "Split", "Splits", "load"]


def load(
    spec: str,
    data_dir: str | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    cache_dir: str | None = None,
) -> Dataset:
    """Loads a data set as uint8 pixels: into memory, or decoded once into files that are mapped.

    Args:
        spec: a TFDS name such as `cifar10`, `folder:PATH`, `archive:PATH` or `digits`.
        data_dir: where TFDS keeps its data sets; None is TFDS's default.
        image_size: height and width that images are resized to, in pixels; None keeps their size,
            which must then be the same for all.
        val_fraction: the share of each class of train that becomes the validation split where the
            source has none of its own; 0 holds nothing out.
        seed: of that choice; the same seed gives the same split.
        cache_dir: where decoded images of folders and TFDS are kept; None is `Cache`'s default.

    Raises:
        UsageError: the spec names no source.
        UserError: the data cannot be had, or is damaged; the message names the file.
    """
    name, colon, argument = spec.partition(":")
    sources = {m.name for m in pkgutil.iter_modules(__path__)} - {"cache", "splits", "tfds"}
    if not spec or (colon and name not in sources):
        raise unknown("data source", spec, {"folder:PATH", "archive:PATH", "digits", "a TFDS name"})
    if name in sources and (bool(argument) != (name != "digits") or spec == "digits:"):
        raise UsageError(f"--data={spec}: write {'digits' if name == 'digits' else name + ':PATH'}")
    source = importlib.import_module(f"{__name__}.{name if name in sources else 'tfds'}")
    splits = source.load(argument if colon else spec, data_dir, image_size, Cache(cache_dir))
    return finish(splits, val_fraction, seed)
