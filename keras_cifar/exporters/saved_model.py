"""SavedModel with the preprocessing inside, under a TensorFlow Serving model base path."""

import pathlib

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.core.errors import unwritten
from keras_cifar.core.files import new_version
from keras_cifar.data.images import decode_images
from keras_cifar.exporters import LABELS, bundle, folding, labels_text, verification
from keras_cifar.exporters.verification import Samples

NEEDS_IMAGES = False


def export(
    model: keras.Model,
    base: pathlib.Path,
    class_names: tuple[str, ...],
    version: int | None = None,
    samples: Samples | None = None,
    **record: object,
) -> pathlib.Path:
    """Writes `base/<version>/`, which appears when it is complete and says what the model says.

    Args:
        model: uint8 [N, H, W, 3] -> probabilities [N, K], with a layer called `features`.
        version: an integer; None is the next one.
        samples: images to compare with; None is random ones.
        record: what is stored with the figures of that.

    Returns:
        The new directory.

    Raises:
        UserError: the disk is full, or what was written differs from the model.
    """
    size = model.input_shape[1:3]
    with new_version(base, version) as (saved, target):
        # The asset's file is copied, so it must stay until the model is saved.
        labels = saved.parent / LABELS
        labels.write_text(labels_text(class_names), "utf-8")
        module = functions(model, class_names)
        module.labels = tf.saved_model.Asset(str(labels))
        try:
            tf.saved_model.save(module, str(saved), signatures=signatures(module))
            bundle.write_warmup(saved / bundle.WARMUP, bundle.model_name(base), size)
        except tf.errors.OpError as error:
            raise unwritten(target, error) from None
        _verify(model, saved, samples or verification.noise(size), record)
        bundle.write_notes(base)
    return target


def _verify(model: keras.Model, saved: pathlib.Path, samples: Samples, record: dict) -> None:
    """Compares the model with what a server would load, from pixels and from files."""
    loaded = tf.saved_model.load(str(saved))

    def default(images):
        return loaded.signatures["serving_default"](images=tf.constant(images))

    def encoded(images):
        files = tf.map_fn(tf.io.encode_png, images, fn_output_signature=tf.string)
        return loaded.signatures["serving_bytes"](image_bytes=files)

    with verification.full_precision():
        expected = verification.reference(model, samples.images)
        figures = {
            name: verification.compare(
                expected,
                verification.in_batches(
                    lambda x, f=f: f(x)["probabilities"].numpy(), samples.images
                ),
            )
            for name, f in (("serving_default", default), ("serving_bytes", encoded))
        }
    limits = {name: {"largest_difference": verification.bound(model)} for name in figures}
    verification.check(saved, samples, figures, limits, **record)


def functions(model: keras.Model, class_names: tuple[str, ...]) -> tf.Module:
    """What is served. Plain TensorFlow: whoever loads it, when saved, needs neither Keras nor us."""
    size = model.input_shape[1:3]
    model = folding.fold(model, kept="features")
    features = keras.Model(model.inputs[0], model.get_layer("features").output)
    names = tf.constant(class_names)
    module = tf.Module()
    # Keras's own variables are not found by tf.Module; these are what they wrap.
    module.weights = [v.value for v in model.weights]

    pixels = tf.TensorSpec((None, *size, 3), tf.uint8, name="images")
    encoded = tf.TensorSpec((None,), tf.string, name="image_bytes")

    @tf.function(input_signature=[pixels], autograph=False)
    def serving_default(images):
        probabilities = tf.cast(model(images, training=False), tf.float32)
        index = tf.argmax(probabilities, axis=1)
        return {
            "probabilities": probabilities,
            "label": tf.gather(names, index),
            "label_index": index,
        }

    @tf.function(input_signature=[encoded], autograph=False)
    def serving_bytes(image_bytes):
        images, good = decode_images(image_bytes, size)
        # A call, so that the network is stored, and loaded, once for both.
        answer = serving_default(images)
        # What is no image has an answer that no image has, and the others have theirs.
        return {
            "probabilities": tf.where(good[:, None], answer["probabilities"], np.nan),
            "label": tf.where(good, answer["label"], ""),
            "label_index": tf.where(good, answer["label_index"], -1),
        }

    @tf.function(input_signature=[pixels], autograph=False)
    def features_of(images):
        values = tf.cast(features(images, training=False), tf.float32)
        # Where the classifier averages maps, so are the features averages of maps.
        return {"features": tf.reduce_mean(values, [1, 2]) if values.shape.rank == 4 else values}

    module.serving_default = serving_default
    module.serving_bytes = serving_bytes
    module.features_of = features_of
    return module


def signatures(module: tf.Module) -> dict:
    """The functions by the names under which they are served."""
    return {
        "serving_default": module.serving_default,
        "serving_bytes": module.serving_bytes,
        "features": module.features_of,
    }
