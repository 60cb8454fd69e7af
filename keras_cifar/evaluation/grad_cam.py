"""Grad-CAM: where in a picture a class is seen (Selvaraju et al. 2017, arXiv:1610.02391, section 3).

The maps are those of the last convolutions. Each is weighted with the mean of its gradient of the
class's logit, they are added up, and what speaks against the class is cut off. Networks whose maps are
small, as 2 x 2 of the VGGs at 32 x 32, show little more than a corner.
"""

import pathlib
import re

import keras
import numpy as np
import tensorflow as tf
from matplotlib import colormaps

from keras_cifar.core.config import BATCH_SIZE

# What only thins out, masks or passes on the maps of a convolution.
_PASSES_ON = (
    keras.layers.MaxPooling2D,
    keras.layers.AveragePooling2D,
    keras.layers.Dropout,
    keras.layers.Identity,
    keras.layers.ZeroPadding2D,
)

HEAT = colormaps["inferno"]  # dark to bright, evenly, also for those who see fewer colours
OPAQUE = 0.7  # of the colour where the heat is greatest


def last_maps(model: keras.Model) -> keras.KerasTensor:
    """The last feature maps [M, h, w, C] before the layer `logits`.

    Raises:
        ValueError: there are none.
    """
    names = [layer.name for layer in model.layers]
    for layer in reversed(model.layers[: names.index("logits")]):
        if not isinstance(layer, (*_PASSES_ON, keras.layers.InputLayer)):
            output = layer.output
            if len(output.shape) == 4 and keras.backend.is_float_dtype(output.dtype):
                return output
    raise ValueError(f"{model.name} has no feature maps")


class GradCam:
    """Heat of a functional model that has a layer `logits`, as `models.load` gives it."""

    def __init__(self, model: keras.Model):
        maps = last_maps(model)
        self._maps = keras.Model(model.inputs[0], maps)
        self._logits = keras.Model(maps, model.get_layer("logits").output)

    def heat(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Where the class of each image is seen.

        Args:
            images: uint8 [N, H, W, 3], N of any size.
            classes: int [N].

        Returns:
            float32 [N, H, W] in [0, 1]; the greatest of each image is 1, or 0 where nothing speaks
            for the class.
        """
        heats = [np.empty((0, *images.shape[1:3]), np.float32)]
        for start in range(0, len(images), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            heats.append(self._heat(tf.constant(images[part]), tf.constant(classes[part])))
        return np.concatenate(heats)

    def _heat(self, images: tf.Tensor, classes: tf.Tensor) -> np.ndarray:
        # Not compiled: it would have to be traced for each model, and most have few images to explain.
        maps = self._maps(images, training=False)
        with tf.GradientTape() as tape:
            tape.watch(maps)
            logits = self._logits(maps, training=False)
            chosen = tf.gather(logits, classes, axis=1, batch_dims=1)
        gradient = tf.cast(tape.gradient(chosen, maps), tf.float32)
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        heat = tf.nn.relu(tf.reduce_sum(weights * tf.cast(maps, tf.float32), axis=3, keepdims=True))
        if len(heat) == 2 * len(images):  # of the images, then of their mirror images
            given, mirrored = tf.split(heat, 2)
            heat = (given + mirrored[:, :, ::-1]) / 2
        heat = tf.image.resize(heat, images.shape[1:3])[..., 0]
        return tf.math.divide_no_nan(heat, tf.reduce_max(heat, (1, 2), keepdims=True)).numpy()


def overlay(images: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Images under their heat: grey where there is none, then purple, orange and yellow.

    Args:
        images: uint8 [N, H, W, 3].
        heat: float [N, H, W] in [0, 1].

    Returns:
        uint8 [N, H, W, 3].
    """
    grey = images.mean(axis=3, keepdims=True)
    colour = 255 * HEAT(heat)[..., :3]
    share = OPAQUE * heat[..., np.newaxis]
    return np.round(grey * (1 - share) + colour * share).astype(np.uint8)


def enlarge(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [N, H, W, 3] in whole multiples of their size, so that no side is below `side` pixels."""
    times = -(-side // min(images.shape[1:3]))
    return images.repeat(times, axis=1).repeat(times, axis=2)


def file_name(number: int, source: str) -> str:
    """The name of the overlay of a file: of plain letters, and unique by its number."""
    stem = re.sub(r"[^A-Za-z0-9]+", "_", pathlib.PurePath(source).stem)
    return f"{number:05}_{stem[:60]}.png"
