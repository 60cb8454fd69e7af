"""Grad-CAM: the regions of an image that speak for a class (Selvaraju et al. 2017).

Section 3 of arXiv:1610.02391: the feature maps of the last convolutions are weighted with the mean
gradient of the class's logit and added up; negative values become 0. Small maps, such as the 2 x 2 of a
VGG at 32 x 32 pixels, show little more than a corner.
"""

import keras
import numpy as np
import tensorflow as tf
from matplotlib import colormaps

from keras_cifar.core.config import BATCH_SIZE

# Layers whose outputs are not the maps of a convolution; most only pass them on.
_SKIPPED = (
    keras.layers.InputLayer,
    keras.layers.MaxPooling2D,
    keras.layers.AveragePooling2D,
    keras.layers.Dropout,
    keras.layers.Identity,
    keras.layers.ZeroPadding2D,
)

HEAT = colormaps["inferno"]  # perceptually uniform, also for colour-blind readers
OPACITY = 0.7  # of the colour at heat 1


def last_maps(model: keras.Model) -> keras.KerasTensor:
    """The last feature maps [M, h, w, C] before the layer `logits`; ValueError if there are none."""
    names = [layer.name for layer in model.layers]
    layers = model.layers[: names.index("logits")]
    # Some networks have further layers after the average over the maps, of one pixel.
    pools = [x for x in layers if isinstance(x, keras.layers.GlobalAveragePooling2D)]
    if pools and not any(x.output is pools[-1].input for x in layers if isinstance(x, _SKIPPED)):
        return pools[-1].input
    for layer in reversed(layers):
        output = layer.output
        is_maps = len(output.shape) == 4 and keras.backend.is_float_dtype(output.dtype)
        if is_maps and not isinstance(layer, _SKIPPED):
            return output
    raise ValueError(f"{model.name} has no feature maps")


class GradCam:
    """Grad-CAM of a functional model that has a layer `logits`, as `models.load` returns it."""

    def __init__(self, model: keras.Model):
        maps = last_maps(model)
        self._maps = keras.Model(model.inputs[0], maps)
        self._logits = keras.Model(maps, model.get_layer("logits").output)

    def heat(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """The heat, float32 [N, H, W] in [0, 1], of `classes` int [N] in `images` uint8 [N, H, W, 3].

        The maximum of each image is 1, or 0 where nothing speaks for the class.
        """
        batches = (np.s_[at : at + BATCH_SIZE] for at in range(0, len(images), BATCH_SIZE))
        return np.concatenate([self._heat(tf.constant(images[b]), classes[b]) for b in batches])

    def _heat(self, images: tf.Tensor, classes: np.ndarray) -> np.ndarray:
        # Eager: tracing takes longer than the few images that most calls explain.
        maps = self._maps(images, training=False)
        with tf.GradientTape() as tape:
            tape.watch(maps)
            logits = self._logits(maps, training=False)
            chosen = tf.gather(logits, classes, axis=1, batch_dims=1)
        gradient = tf.cast(tape.gradient(chosen, maps), tf.float32)
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        heat = tf.nn.relu(tf.reduce_sum(weights * tf.cast(maps, tf.float32), axis=3, keepdims=True))
        if len(heat) > len(
            images
        ):  # The network adds mirror images, and shifted ones, to its batch.
            given, mirrored = (half[: len(images)] for half in tf.split(heat, 2))
            heat = (given + mirrored[:, :, ::-1]) / 2
        heat = tf.image.resize(heat, images.shape[1:3])[..., 0]
        return tf.math.divide_no_nan(heat, tf.reduce_max(heat, (1, 2), keepdims=True)).numpy()


def overlay(images: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Draws heat [N, H, W] in [0, 1] over images uint8 [N, H, W, 3]: grey, purple, orange, yellow."""
    grey = images.mean(axis=3, keepdims=True)
    colour = 255 * HEAT(heat)[..., :3]
    share = OPACITY * heat[..., np.newaxis]
    return np.round(grey * (1 - share) + colour * share).astype(np.uint8)
