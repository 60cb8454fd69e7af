"""Verifies that an export predicts what the model predicts, before it appears."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import sha256, to_json, versions
from keras_cifar.data import Dataset

FILE = pathlib.Path("assets.extra", "verification.json")  # below an export's directory

IMAGES = 256  # images that are compared: a second or two of ResNet-32 on two cores

# The largest difference between probabilities. In float32, folding and other kernels cause up to 1e-5
# (tests/exporters/test_folding.py); errors, such as a wrong scale, cause 1e-2 and more.
BOUND = 1e-4
# Half precision rounds by 2**-9 (bfloat16) in each layer, and the export computes in float32.
HALF_BOUND = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Images to verify an export with, uint8 [N, H, W, 3]."""

    images: np.ndarray
    origin: str  # where they are from, for messages
    training: np.ndarray | None = None  # from which integer formats measure their ranges


def of_dataset(dataset: Dataset, spec: str) -> Samples:
    """Validation images, or test images where nothing was held out; their labels are not used."""
    name = "test" if dataset.val is None else "val"
    images, training = (s.spread(IMAGES).images for s in (dataset.split(name), dataset.train))
    return Samples(images, f"{name} images of {spec}", training)


def bound(model: keras.Model) -> float:
    """The largest difference that a float32 export may have from the model."""
    half = any(layer.compute_dtype in ("float16", "bfloat16") for layer in model.layers)
    return HALF_BOUND if half else BOUND


def in_batches(classify: Callable, images: np.ndarray) -> np.ndarray:
    """float32 [N, K] from a function of uint8 [n, H, W, 3] with n at most BATCH_SIZE."""
    starts = range(0, len(images), BATCH_SIZE)
    batches = [np.asarray(classify(images[s : s + BATCH_SIZE])) for s in starts]
    return np.concatenate(batches).astype(np.float32)


def compare(expected: np.ndarray, found: np.ndarray) -> dict:
    """Measures the difference between probabilities [N, K]; NaN counts as a difference of 1.

    `mean_difference` is the mean over images of the largest of each image, `label_agreement` the
    fraction of images with the same label.
    """
    difference = np.nan_to_num(np.abs(expected - found), nan=1.0).max(axis=1)
    return {
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "label_agreement": float((expected.argmax(1) == found.argmax(1)).mean()),
    }


def verify(
    directory: pathlib.Path,
    model: keras.Model,
    samples: Samples | None,
    classifiers: dict[str, Callable],
    limits: dict[str, dict] | None = None,
    **record: object,
) -> None:
    """Compares an export with the model, and writes the differences to `directory/FILE`.

    Args:
        samples: None is random pixels.
        classifiers: the functions of the export by name, uint8 [n, H, W, 3] -> probabilities [n, K].
        limits: the largest values of `compare` by function; `bound` where there is none.
        record: further values to store.
    """
    if samples is None:
        shape = (IMAGES // 8, *model.input_shape[1:])
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        samples = Samples(pixels, "images of random pixels")
    # GPUs would round products to the 10 bits of TensorFloat-32.
    tensor_float = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        expected = in_batches(lambda images: model(images, training=False), samples.images)
        differences = {
            name: compare(expected, in_batches(classify, samples.images))
            for name, classify in classifiers.items()
        }
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(tensor_float)
    default = {"largest_difference": bound(model)}
    limits = {name: (limits or {}).get(name, default) for name in classifiers}
    for name, row in differences.items():
        for measure, limit in limits[name].items():
            if row[measure] > limit:
                raise UserError(
                    f"the export was discarded: on {len(samples.images)} {samples.origin} the "
                    f"{measure.replace('_', ' ')} between probabilities of {name} and the model's is "
                    f"{row[measure]:.2g}, more than {limit:.2g}; {row['label_agreement']:.1%} of the "
                    "labels agree"
                )
    stored = {"images": len(samples.images), "origin": samples.origin, "limits": limits}
    (directory / FILE).parent.mkdir(exist_ok=True)
    text = to_json(stored | {"figures": differences} | record) + "\n"
    (directory / FILE).write_text(text, "utf-8")


def origin(model: pathlib.Path) -> dict[str, object]:
    """What an export of a model's file stores beside the results, for `is_exported`."""
    return {"model_sha256": sha256(model)}


def is_exported(model: pathlib.Path, base: pathlib.Path) -> bool:
    """Whether the newest version below `base` is of this file; True if it does not say of which."""
    if not (found := versions(base)):
        return False
    try:
        stored = json.loads((base / str(found[-1]) / FILE).read_text("utf-8")).get("model_sha256")
        return stored in (None, sha256(model))
    except (OSError, ValueError, AttributeError):  # somebody else's, damaged, or without a model
        return True


def summary(directory: pathlib.Path) -> str:
    """The results of verifying an export, a line per function."""
    stored = json.loads((directory / FILE).read_text("utf-8"))
    return "\n".join(
        f"verified  {name}: on {stored['images']} {stored['origin']} probabilities within "
        f"{row['largest_difference']:.2g} of the model's, {row['label_agreement']:.1%} of labels agree"
        for name, row in stored["figures"].items()
    )
