"""LiteRT (TensorFlow Lite) for phones and small machines: in float32 and in 8-bit integers."""

import pathlib
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_cifar.core.errors import UserError
from keras_cifar.core.files import new_version
from keras_cifar.core.image_size import STRETCH
from keras_cifar.exporters import LABELS, folding, import_extra, labels_text, verification
from keras_cifar.exporters.verification import Samples

NEEDS_IMAGES = True
FLOAT = "model.tflite"
INT8 = "model_int8.tflite"

# The largest mean difference of 8-bit integers from float32; see BUILD_NOTES.md. Labels are not
# compared: near a tie, any rounding changes them.
INT8_BOUND = 0.05


def export(
    model: keras.Model,
    base: pathlib.Path,
    class_names: tuple[str, ...],
    version: int | None = None,
    samples: Samples | None = None,
    rule: str = STRETCH,
    **record: object,
) -> pathlib.Path:
    """Writes `base/<version>/` with model.tflite, model_int8.tflite and labels.txt.

    Arguments and errors are those of `saved_model.export`. Both models have the inputs and outputs of
    `folding.function`; the integers have the ranges of the network's values on `samples.training`.
    """
    interpreter = import_extra("ai_edge_litert.interpreter")
    if samples is None or samples.training is None:
        raise UserError("LiteRT's 8-bit integers need training images to measure their ranges on")
    module = folding.function(model)
    concrete = module.classify.get_concrete_function()

    def converter():
        return tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)

    def classifier(path: pathlib.Path) -> Callable:
        runner = interpreter.Interpreter(str(path)).get_signature_runner()
        return lambda images: runner(images=images)["probabilities"]

    with new_version(base, version) as (written, target):
        written.mkdir()
        (written / LABELS).write_text(labels_text(class_names), "utf-8")
        (written / FLOAT).write_bytes(converter().convert())
        integers = converter()
        integers.optimizations = [tf.lite.Optimize.DEFAULT]
        integers.representative_dataset = lambda: ([image[None]] for image in samples.training)
        (written / INT8).write_bytes(integers.convert())

        classifiers = {name: classifier(written / name) for name in (FLOAT, INT8)}
        limits = {INT8: {"mean_difference": INT8_BOUND}}
        verification.verify(written, model, samples, classifiers, limits, resize=rule, **record)
    return target
