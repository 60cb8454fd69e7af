"""ONNX with the preprocessing of pixels inside, for ONNX Runtime and what else reads it."""

import pathlib

import keras

from keras_cifar.core.files import new_version
from keras_cifar.exporters import LABELS, folding, labels_text, needed, verification
from keras_cifar.exporters.verification import Samples

NEEDS_IMAGES = False
MODEL = "model.onnx"

# Of 2022, the newest that tf2onnx 1.17 writes; ONNX Runtime reads it since 1.14.
OPSET = 18


def export(
    model: keras.Model,
    base: pathlib.Path,
    class_names: tuple[str, ...],
    version: int | None = None,
    samples: Samples | None = None,
    **record: object,
) -> pathlib.Path:
    """Writes `base/<version>/` with model.onnx and labels.txt; arguments as `saved_model.export`.

    The model takes `images` uint8 [N, H, W, 3] and gives `probabilities` float32 [N, K] and
    `label_index` int64 [N]. Its metadata has the class names, one a line, as `class_names`.

    Raises:
        UserError: the extra `formats` is not installed, or ONNX Runtime says other than the model.
    """
    tf2onnx, runtime, onnx = needed("tf2onnx"), needed("onnxruntime"), needed("onnx")
    samples = samples or verification.noise(model.input_shape[1:3])
    classify = folding.function(model).classify
    names = labels_text(class_names)
    with new_version(base, version) as (written, target):
        written.mkdir()
        graph, _ = tf2onnx.convert.from_function(
            classify, input_signature=classify.input_signature, opset=OPSET
        )
        onnx.helper.set_model_props(graph, {"class_names": names})
        (written / MODEL).write_bytes(graph.SerializeToString())
        (written / LABELS).write_text(names, "utf-8")

        session = runtime.InferenceSession(written / MODEL, providers=["CPUExecutionProvider"])
        with verification.full_precision():
            expected = verification.reference(model, samples.images)
        given = verification.in_batches(
            lambda images: session.run(["probabilities"], {"images": images})[0], samples.images
        )
        figures = {"onnxruntime": verification.compare(expected, given)}
        limits = {"onnxruntime": {"largest_difference": verification.bound(model)}}
        verification.check(written, samples, figures, limits, **record)
    return target
