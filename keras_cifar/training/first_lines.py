"""The first lines of a run: the sizes of its images, its classes, what is frozen or resized."""

import math
from collections.abc import Sequence

import numpy as np

from keras_cifar import data
from keras_cifar.core.config import BALANCED, TrainConfig
from keras_cifar.core.image_size import CROP
from keras_cifar.data.images import covered
from keras_cifar.models.resizing import Size
from keras_cifar.training.resizing import Stage

# So many times as many images in the largest class as in the smallest are worth a line. Below that the
# held-out fraction of each class, rounded, may be the reason. No measurement is behind it.
UNEVEN = 1.5


def describe_sizes(dataset: data.Dataset, rule: str) -> list[str]:
    """A line if sizes of the files are known: the smallest, the largest, and how all are resized."""
    if not dataset.file_sizes:
        return []
    by_area, size = sorted(dataset.file_sizes, key=math.prod), dataset.image_shape[:2]
    ends = dict.fromkeys(map(_by, (by_area[0], by_area[-1])))  # one if they are equal
    how = f"stretch: all become {_by(size)}, whatever their aspect ratio"
    if rule == CROP:
        high, wide = covered(size)
        scaled = "the short side becomes" if high == wide else f"all are scaled to cover {wide:,} x"
        how = f"crop: {scaled} {high:,} and the middle {_by(size)} stays"
    if dataset.train.files is not None:
        how = f"random parts to {_by(size)} in training; else {how}"
    return [f"images    {' to '.join(ends)} pixels (of {len(by_area)} sampled), {how}"]


def _by(size: Size) -> str:
    return f"{size[1]:,} x {size[0]:,}"


def describe_classes(labels: np.ndarray, names: Sequence[str], config: TrainConfig) -> list[str]:
    """A line with the classes of fewest and most training images; none for a single class."""
    if len(names) < 2:
        return []
    counts = np.bincount(labels, minlength=len(names))
    most = counts.argmax()
    fewest = np.where(counts, counts, counts[most]).argmin()
    if config.data.sampling == BALANCED:
        remedy = "; all are drawn equally often (--sampling balanced)"
    elif config.optimizer.class_weight == BALANCED:
        remedy = "; all count alike in the loss (--class_weight balanced)"
    elif counts[most] < UNEVEN * counts[fewest]:
        remedy = ""
    else:
        remedy = "; --class_weight balanced or --sampling balanced evens them out"
    images = "image" if counts[fewest] == 1 else "images"
    span = f"{names[fewest]} to {counts[most]:,} of {names[most]}"
    if counts[fewest] == counts[most]:
        span = "each"
    return [f"classes   {counts[fewest]:,} {images} of {span}{remedy}"]


def describe_frozen(config: TrainConfig) -> list[str]:
    """A line if layers are frozen: which, and how long."""
    name, epochs = config.model.freeze, config.model.unfreeze_epoch
    for_epochs = f", for the first {epochs} of {config.fit.epochs} epochs" if epochs else ""
    return [f"frozen    up to {name}{for_epochs}"] if name else []


def describe_resizing(stages: Sequence[Stage], size: Size, config: TrainConfig) -> list[str]:
    """A line with --progressive_resizing: the sizes of images and their ends; `size` is their own."""
    if not config.fit.progressive_resizing:
        return []
    parts = [f"{_by(smaller)} up to epoch {end}" for smaller, end in stages]
    return [f"resizing  {', '.join([*parts, f'{_by(size)} to the end'])}"]
