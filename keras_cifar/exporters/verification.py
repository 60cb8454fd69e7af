"""Whether an export says what the model says: the check that every format must pass to appear."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import to_json
from keras_cifar.data import Dataset

FILE = pathlib.Path("assets.extra", "verification.json")  # below an export's directory

IMAGES = 256  # that are compared: a second or two of ResNet-32 on two cores

# The largest difference between probabilities. In float32, folding and other kernels make up to 1e-5
# (tests/test_folding.py); what is wrong, such as a scale, makes 1e-2 and more.
BOUND = 1e-4
# Half precision rounds by 2**-9 (bfloat16) in each layer, and what is exported computes in float32.
HALF_BOUND = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Images of the run.

    Attributes:
        images: uint8 [N, H, W, 3], to compare with.
        origin: what they are, in words.
        training: uint8 [M, H, W, 3], of the training split: what formats with integers measure their
            ranges on; None where there are none.
    """

    images: np.ndarray
    origin: str
    training: np.ndarray | None = None


def of_dataset(dataset: Dataset, spec: str) -> Samples:
    """Images of validation, or of test where nothing was held out, evenly spread over the split.

    No label is looked at, so test stays a test.
    """
    name = "test" if dataset.val is None else "val"
    split = dataset.split(name)
    training = dataset.train.spread(IMAGES).images
    return Samples(split.spread(IMAGES).images, f"{name} images of {spec}", training)


def noise(size: tuple[int, int]) -> Samples:
    """Random pixels, where no real images are at hand."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES // 8, *size, 3), np.uint8)
    return Samples(pixels, "images of random pixels")


def bound(model: keras.Model) -> float:
    """The largest difference that an export in float32 may have from the model."""
    half = any(layer.compute_dtype in ("float16", "bfloat16") for layer in model.layers)
    return HALF_BOUND if half else BOUND


def reference(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Probabilities float32 [N, K] of the model in memory, of uint8 [N, H, W, 3]."""
    return in_batches(lambda batch: model(batch, training=False).numpy(), images)


def in_batches(classify: Callable, images: np.ndarray) -> np.ndarray:
    """float32 [N, K] of a function of uint8 [n, H, W, 3], n at most BATCH_SIZE."""
    starts = range(0, len(images), BATCH_SIZE)
    return np.concatenate([classify(images[s : s + BATCH_SIZE]) for s in starts]).astype(np.float32)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Computes in float32 where GPUs would round products to TensorFloat-32's 10 bits."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def compare(expected: np.ndarray, given: np.ndarray) -> dict:
    """How far probabilities [N, K] are from those expected; what is no number is off by 1.

    Returns:
        {"largest_difference", "mean_difference", "label_agreement"}: the largest of all and the mean
        over images of the largest of each, and the share of images with the same label.
    """
    difference = np.nan_to_num(np.abs(expected - given), nan=1.0).max(axis=1)
    return {
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "label_agreement": float((expected.argmax(1) == given.argmax(1)).mean()),
    }


def check(
    directory: pathlib.Path,
    samples: Samples,
    figures: dict[str, dict],
    limits: dict[str, dict],
    **more: object,
) -> None:
    """Writes `directory/FILE`, unless the export differs too much.

    Args:
        figures: of each form of the model, what `compare` gives.
        limits: of each form, how large its differences may be, by the same names.
        more: what else is to be stored.

    Raises:
        UserError: it does.
    """
    for name, row in figures.items():
        for which, limit in limits[name].items():
            if row[which] > limit:
                raise UserError(
                    f"the export was dropped: on {len(samples.images)} {samples.origin} the "
                    f"{which.replace('_', ' ')} between probabilities of {name} and the model's is "
                    f"{row[which]:.2g}, more than {limit:.2g}; {row['label_agreement']:.1%} of the "
                    "labels agree"
                )
    stored = {"images": len(samples.images), "origin": samples.origin, "limits": limits}
    (directory / FILE).parent.mkdir(exist_ok=True)
    (directory / FILE).write_text(to_json(stored | {"figures": figures} | more) + "\n", "utf-8")


def summary(directory: pathlib.Path) -> str:
    """What the check of an export found, a line for each form."""
    stored = json.loads((directory / FILE).read_text("utf-8"))
    return "\n".join(
        f"verified  {name}: on {stored['images']} {stored['origin']} probabilities within "
        f"{row['largest_difference']:.2g} of the model's, {row['label_agreement']:.1%} of labels agree"
        for name, row in stored["figures"].items()
    )
