"""LiteRT (TensorFlow Lite), for phones and small machines: in float32, and in 8-bit integers."""

import pathlib

import keras
import tensorflow as tf

from keras_cifar.core.errors import UserError
from keras_cifar.core.files import new_version
from keras_cifar.exporters import LABELS, folding, labels_text, needed, verification
from keras_cifar.exporters.verification import Samples

NEEDS_IMAGES = True
FLOAT = "model.tflite"
INT8 = "model_int8.tflite"

# How far 8-bit integers may be from float32, in the mean over images; see BUILD_NOTES.md. Labels are
# no measure: near a tie, any rounding changes them.
INT8_BOUND = 0.05


def export(
    model: keras.Model,
    base: pathlib.Path,
    class_names: tuple[str, ...],
    version: int | None = None,
    samples: Samples | None = None,
    **record: object,
) -> pathlib.Path:
    """Writes `base/<version>/` with model.tflite, model_int8.tflite and labels.txt.

    Arguments are as in `saved_model.export`. Both models take `images` uint8 [N, H, W, 3] and give
    `probabilities` float32 [N, K] and `label_index` int64 [N], by these names. The ranges of the
    integers are those that the network has on `samples.training`.

    Raises:
        UserError: there are no training images, the extra `formats` is not installed, or LiteRT says
            other than the model.
    """
    interpreter = needed("ai_edge_litert.interpreter")
    if samples is None or samples.training is None:
        raise UserError("LiteRT's 8-bit integers need training images, to measure their ranges on")
    module = folding.function(model)

    def converter():
        concrete = module.classify.get_concrete_function()
        return tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)

    def measured():
        return ([image[None]] for image in samples.training)

    def answers(path):
        runner = interpreter.Interpreter(str(path)).get_signature_runner()
        return verification.in_batches(
            lambda images: runner(images=images)["probabilities"], samples.images
        )

    with new_version(base, version) as (written, target):
        written.mkdir()
        (written / LABELS).write_text(labels_text(class_names), "utf-8")
        (written / FLOAT).write_bytes(converter().convert())
        integers = converter()
        integers.optimizations = [tf.lite.Optimize.DEFAULT]
        integers.representative_dataset = measured
        (written / INT8).write_bytes(integers.convert())

        with verification.full_precision():
            expected = verification.reference(model, samples.images)
        figures = {
            name: verification.compare(expected, answers(written / name)) for name in (FLOAT, INT8)
        }
        limits = {
            FLOAT: {"largest_difference": verification.bound(model)},
            INT8: {"mean_difference": INT8_BOUND},
        }
        verification.check(written, samples, figures, limits, **record)
    return target
