"""Files for TensorFlow Serving beside a SavedModel: warm-up records, configuration, instructions."""

import io
import pathlib
import re
import shlex

import numpy as np
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import prediction_log_pb2

from keras_cifar.core.files import replacing
from keras_cifar.core.image_size import CROP, STRETCH

# Where TensorFlow Serving looks for records, and how many it reads:
# https://www.tensorflow.org/tfx/serving/saved_model_warmup
WARMUP = pathlib.Path("assets.extra", "tf_serving_warmup_requests")
MAX_RECORDS = 1000

# TensorFlow prepares some kernels for each shape at the first request with it.
BATCHES = (1, 2, 4, 8, 16, 32)

CONFIG = "models.config"
NOTES = "SERVING.md"

# What `serving_bytes` does by each rule of `data.images.resize_images`.
_RESIZES = {
    STRETCH: "resizes the whole image, whatever its\nproportions",
    CROP: "scales the image until it covers\n1/0.875 of the model's size, and takes the middle",
}


def write_warmup(path: pathlib.Path, name: str, signatures: dict) -> None:
    """Writes a TFRecord of PredictionLog: a request for each signature and each of BATCHES.

    `name` is the model's; `signatures` are those of `saved_model.functions`.
    """
    _, *shape = signatures["serving_default"].input_signature[0].shape
    grey = np.full(shape, 128, np.uint8)
    files = tf.constant([_encoded(grey, "JPEG"), _encoded(grey, "PNG")])
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for batch in BATCHES:
            # A constant tensor is stored as one value and a shape, so the file is small.
            images = tf.make_tensor_proto(grey[0, 0, 0], shape=(batch, *shape))
            encoded = tf.make_tensor_proto(tf.gather(files, np.arange(batch) % 2))
            for signature, function in signatures.items():
                spec = function.input_signature[0]
                log = prediction_log_pb2.PredictionLog()
                request = log.predict_log.request
                request.model_spec.name = name
                request.model_spec.signature_name = signature
                value = encoded if spec.dtype == tf.string else images
                request.inputs[spec.name].CopyFrom(value)
                writer.write(log.SerializeToString())


def _encoded(pixels: np.ndarray, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def model_name(base: pathlib.Path) -> str:
    """The model name for a base path: the name of the run, or of the directory."""
    base = base.absolute()
    name = base.parent.name if base.name == "export" else base.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"


def write_notes(base: pathlib.Path, rule: str) -> None:
    """Writes models.config and SERVING.md into a base path, where TensorFlow Serving ignores them.

    `rule` is that of `data.images.resize_images`.
    """
    name = model_name(base)
    config = (
        f"model_config_list {{\n  config {{\n    name: '{name}'\n"
        f"    base_path: '/models/{name}'\n    model_platform: 'tensorflow'\n  }}\n}}\n"
    )
    url = f"http://localhost:8501/v1/models/{name}"
    lines = "\n".join(f"{purpose}:\n\n    {line}\n" for purpose, line in commands(base).items())
    notes = f"""# {name}

A TensorFlow Serving model base path. {CONFIG} is for several models in one server
(`--model_config_file=/models/{name}/{CONFIG}`).

{lines}
Image files of any size go to the signature `serving_bytes`, which {_RESIZES[rule]}.
A file that is not an image gets the label "", the index -1 and probabilities NaN, which TensorFlow
Serving writes as the bare word NaN. The model's status is at {url}, its metadata at {url}/metadata.
"""
    for file, text in ((CONFIG, config), (NOTES, notes)):
        with replacing(base / file) as path:
            path.write_text(text, "utf-8")


def commands(base: pathlib.Path) -> dict[str, str]:
    """The command lines that start a server of a base path and send requests to it, by purpose."""
    name = model_name(base)
    url = f"http://localhost:8501/v1/models/{name}"
    mount = shlex.quote(f"{base.absolute()}:/models/{name}")
    # The shell's own printf and a pipe: a program's arguments have at most 128 KB.
    request = '{"signature_name": "serving_bytes", "instances": [{"b64": "%s"}]}'
    return {
        "serve": f"docker run --rm -p 8500:8500 -p 8501:8501 -v {mount} -e MODEL_NAME={name} "
        "tensorflow/serving",
        "serve without Docker": "python -m keras_cifar.serve "
        f"--model {shlex.quote(str(base.absolute()))} --name {name}",
        "request": f"printf '{request}' \"$(base64 -w0 dog.jpg)\" | curl -d @- {url}:predict",
        "request with this package": f"python -m keras_cifar.predict --model {url} dog.jpg",
    }
