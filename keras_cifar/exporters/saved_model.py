"""SavedModel with preprocessing inside, under a TensorFlow Serving model base path."""

import functools
import pathlib

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.core.errors import unwritten
from keras_cifar.core.files import new_version
from keras_cifar.core.image_size import CROP, STRETCH
from keras_cifar.data.images import decode_images, with_margin
from keras_cifar.exporters import LABELS, bundle, folding, labels_text, verification
from keras_cifar.exporters.verification import Samples
from keras_cifar.inference.predictor import CROPPED

NEEDS_IMAGES = False


def export(
    model: keras.Model,
    base: pathlib.Path,
    class_names: tuple[str, ...],
    version: int | None = None,
    samples: Samples | None = None,
    rule: str = STRETCH,
    **record: object,
) -> pathlib.Path:
    """Writes `base/<version>/`, which appears when it is complete and agrees with the model.

    Args:
        model: uint8 [N, H, W, 3] -> probabilities [N, K], with a layer named `features`.
        version: an integer; None is the next one.
        samples: images to verify with; None is random ones.
        rule: of `data.images.resize_images`, by which the model's images got their size.
        record: further values to store with the results of verification.

    Raises:
        UserError: the disk is full, or the export differs from the model.
    """
    with new_version(base, version) as (saved, target):
        # `save` copies the asset's file, so it must exist until then.
        labels = saved.parent / LABELS
        labels.write_text(labels_text(class_names), "utf-8")
        module, signatures = functions(model, class_names, rule)
        module.labels = tf.saved_model.Asset(str(labels))
        try:
            tf.saved_model.save(module, str(saved), signatures=signatures)
            name = bundle.model_name(base)
            bundle.write_warmup(saved / bundle.WARMUP, name, signatures)
        except tf.errors.OpError as error:
            raise unwritten(target, error) from None
        loaded = tf.saved_model.load(str(saved))  # It owns the variables of its signatures.

        def serving_default(images):
            return loaded.signatures["serving_default"](images=tf.constant(images))["probabilities"]

        def of_files(name, images):
            files = tf.map_fn(tf.io.encode_png, images, fn_output_signature=tf.string)
            return loaded.signatures[name](image_bytes=files)["probabilities"]

        def serving_bytes(images):
            return of_files("serving_bytes", with_margin(images) if rule == CROP else images)

        classifiers = {"serving_default": serving_default, "serving_bytes": serving_bytes}
        if rule == CROP:
            classifiers[CROPPED] = functools.partial(of_files, CROPPED)
        verification.verify(saved, model, samples, classifiers, resize=rule, **record)
        bundle.write_notes(base, rule)
    return target


def functions(
    model: keras.Model, class_names: tuple[str, ...], rule: str = STRETCH
) -> tuple[tf.Module, dict]:
    """(the owner of the weights, the functions to serve by the names of their signatures).

    They are plain TensorFlow: they load without Keras and this package.
    """
    size = model.input_shape[1:3]
    model = folding.fold(model, kept="features")
    features = keras.Model(model.inputs[0], model.get_layer("features").output)
    names = tf.constant(class_names)
    module = tf.Module()
    # tf.Module does not find Keras's variables; these are the TensorFlow variables inside them.
    module.weights = [v.value for v in model.weights]

    pixels = tf.TensorSpec((None, *size, 3), tf.uint8, name="images")
    encoded = tf.TensorSpec((None,), tf.string, name="image_bytes")

    @tf.function(input_signature=[pixels], autograph=False)
    def serving_default(images):
        probabilities = tf.cast(model(images, training=False), tf.float32)
        index = tf.argmax(probabilities, axis=1)
        label = tf.gather(names, index)
        return {"probabilities": probabilities, "label": label, "label_index": index}

    def of_files(image_bytes, rule):
        images, valid = decode_images(image_bytes, size, rule)
        # A call, so that the network is stored and loaded once for all.
        outputs = serving_default(images)
        # Files that are not images are marked; the others get their predictions.
        return {
            "probabilities": tf.where(valid[:, None], outputs["probabilities"], np.nan),
            "label": tf.where(valid, outputs["label"], ""),
            "label_index": tf.where(valid, outputs["label_index"], -1),
        }

    @tf.function(input_signature=[encoded], autograph=False)
    def serving_bytes(image_bytes):
        return of_files(image_bytes, rule)

    @tf.function(input_signature=[encoded], autograph=False)
    def serving_cropped(image_bytes):
        return of_files(image_bytes, STRETCH)

    @tf.function(input_signature=[pixels], autograph=False)
    def features_of(images):
        values = tf.cast(features(images, training=False), tf.float32)
        # Where the classifier averages feature maps, the features are averages of maps too.
        return {"features": tf.reduce_mean(values, [1, 2]) if values.shape.rank == 4 else values}

    module.serving_default = serving_default
    module.serving_bytes = serving_bytes
    module.features_of = features_of
    signatures = {"serving_default": serving_default, "serving_bytes": serving_bytes}
    if rule == CROP:
        module.serving_cropped = signatures[CROPPED] = serving_cropped
    return module, signatures | {"features": features_of}
