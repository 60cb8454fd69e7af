"""ONNX with preprocessing inside, for ONNX Runtime and other runtimes."""

import pathlib

import keras

from keras_cifar.core.files import new_version
from keras_cifar.core.image_size import STRETCH
from keras_cifar.exporters import LABELS, folding, import_extra, labels_text, verification
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
    rule: str = STRETCH,
    **record: object,
) -> pathlib.Path:
    """Writes `base/<version>/` with model.onnx and labels.txt.

    Arguments and errors are those of `saved_model.export`. The model has the inputs and outputs of
    `folding.function`; its metadata `class_names` holds the class names, one a line, and `resize` the
    rule by which images got their size.
    """
    tf2onnx, runtime, onnx = map(import_extra, ("tf2onnx", "onnxruntime", "onnx"))
    classify = folding.function(model).classify
    names = labels_text(class_names)
    with new_version(base, version) as (written, target):
        written.mkdir()
        graph, _ = tf2onnx.convert.from_function(
            classify, input_signature=classify.input_signature, opset=OPSET
        )
        onnx.helper.set_model_props(graph, {"class_names": names, "resize": rule})
        (written / MODEL).write_bytes(graph.SerializeToString())
        (written / LABELS).write_text(names, "utf-8")
        session = runtime.InferenceSession(written / MODEL, providers=["CPUExecutionProvider"])

        def onnxruntime(images):
            return session.run(["probabilities"], {"images": images})[0]

        verification.verify(
            written, model, samples, {"onnxruntime": onnxruntime}, resize=rule, **record
        )
    return target
