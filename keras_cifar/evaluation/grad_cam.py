"""Grad-CAM: the regions of an image that speak for a class (Selvaraju et al. 2017).

Section 3 of arXiv:1610.02391: the feature maps of the last convolutions are weighted with the mean
gradient of the class's logit and added up; negative values become 0. Small maps, such as the 2 x 2 of a
VGG at 32 x 32 pixels, show little more than a corner.
"""

import pathlib
import re

import keras
import numpy as np
import tensorflow as tf
from matplotlib import colormaps

from keras_cifar.core.config import BATCH_SIZE

# Layers that keep the meaning of the maps of a convolution.
_PASSES_ON = (
    keras.layers.MaxPooling2D,
    keras.layers.AveragePooling2D,
    keras.layers.Dropout,
    keras.layers.Identity,
    keras.layers.ZeroPadding2D,
)

HEAT = colormaps["inferno"]  # perceptually uniform, also for colour-blind readers
OPACITY = 0.7  # of the colour at heat 1


def last_maps(model: keras.Model) -> keras.KerasTensor:
    """The last feature maps [M, h, w, C] before the layer `logits`.

    Raises:
        ValueError: the model has none.
    """
    names = [layer.name for layer in model.layers]
    for layer in reversed(model.layers[: names.index("logits")]):
        if not isinstance(layer, (*_PASSES_ON, keras.layers.InputLayer)):
            output = layer.output
            if len(output.shape) == 4 and keras.backend.is_float_dtype(output.dtype):
                return output
    raise ValueError(f"{model.name} has no feature maps")


class GradCam:
    """Grad-CAM of a functional model that has a layer `logits`, as `models.load` returns it."""

    def __init__(self, model: keras.Model):
        maps = last_maps(model)
        self._maps = keras.Model(model.inputs[0], maps)
        self._logits = keras.Model(maps, model.get_layer("logits").output)

    def heat(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """The heat of a class in each image.

        Args:
            images: uint8 [N, H, W, 3], N of any size.
            classes: int [N].

        Returns:
            float32 [N, H, W] in [0, 1]. The maximum of each image is 1, or 0 where nothing speaks for
            the class.
        """
        heats = [np.empty((0, *images.shape[1:3]), np.float32)]
        for start in range(0, len(images), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            heats.append(self._heat(tf.constant(images[batch]), tf.constant(classes[batch])))
        return np.concatenate(heats)

    def _heat(self, images: tf.Tensor, classes: tf.Tensor) -> np.ndarray:
        # Eager: tracing takes longer than the few images that most calls explain.
        maps = self._maps(images, training=False)
        with tf.GradientTape() as tape:
            tape.watch(maps)
            logits = self._logits(maps, training=False)
            chosen = tf.gather(logits, classes, axis=1, batch_dims=1)
        gradient = tf.cast(tape.gradient(chosen, maps), tf.float32)
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        heat = tf.nn.relu(tf.reduce_sum(weights * tf.cast(maps, tf.float32), axis=3, keepdims=True))
        if len(heat) == 2 * len(images):  # The network adds mirror images to its batch.
            given, mirrored = tf.split(heat, 2)
            heat = (given + mirrored[:, :, ::-1]) / 2
        heat = tf.image.resize(heat, images.shape[1:3])[..., 0]
        return tf.math.divide_no_nan(heat, tf.reduce_max(heat, (1, 2), keepdims=True)).numpy()


def overlay(images: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Draws heat over images: grey where there is none, then purple, orange and yellow.

    Args:
        images: uint8 [N, H, W, 3].
        heat: float [N, H, W] in [0, 1].

    Returns:
        uint8 [N, H, W, 3].
    """
    grey = images.mean(axis=3, keepdims=True)
    colour = 255 * HEAT(heat)[..., :3]
    share = OPACITY * heat[..., np.newaxis]
    return np.round(grey * (1 - share) + colour * share).astype(np.uint8)


def enlarge(images: np.ndarray, side: int) -> np.ndarray:
    """Enlarges images uint8 [N, H, W, 3] by a whole factor to at least `side` pixels a side."""
    times = -(-side // min(images.shape[1:3]))
    return images.repeat(times, axis=1).repeat(times, axis=2)


def file_name(number: int, source: str) -> str:
    """The name of the overlay of a file: plain letters, unique by its number."""
    stem = re.sub(r"[^A-Za-z0-9]+", "_", pathlib.PurePath(source).stem)
    return f"{number:05}_{stem[:60]}.png"
