"""Images resized inside the training step, for progressive resizing."""

import keras
import numpy as np
import tensorflow as tf

Size = tuple[int, int]  # height, width in pixels


def resize(images: tf.Tensor, size: Size | None) -> tf.Tensor:
    """uint8 [B, H, W, 3] -> uint8 of `size`, by TensorFlow's antialiased linear filter; None keeps it.

    A matrix product for each side runs on every device and has static shapes.
    """
    if size is None:
        return images
    rows, columns = (_filter(*sides) for sides in zip(images.shape[1:3], size, strict=True))
    x = tf.einsum("hH,bHWc->bhWc", rows, tf.cast(images, tf.float32))
    x = tf.einsum("wW,bhWc->bhwc", columns, x)
    return tf.cast(tf.round(x), images.dtype)


def _filter(before: int, after: int) -> np.ndarray:
    """float32 [after, before]: the weights of the pixels of a row in those of the resized row."""
    with tf.init_scope():  # TensorFlow's own resizing of each single pixel
        pixels = tf.eye(before)[:, :, None]
        return tf.image.resize(pixels, (after, before), antialias=True)[:, :, 0].numpy()


def allow(network: keras.Model, size: Size | None) -> None:
    """Lets a network be called on images of `size` only, or with None of any that its layers take."""
    network.input_spec = keras.InputSpec(shape=(None, *(size or (None, None)), 3))


def takes(network: keras.Model, size: Size) -> bool:
    """Whether the layers of a network can compute images of a size other than that it is built for."""
    images = tf.TensorSpec((None, *size, 3), network.inputs[0].dtype)
    before = network.input_spec
    allow(network, None)
    try:
        tf.function(network, autograph=False).get_concrete_function(images)
    except ValueError:
        return False
    finally:
        network.input_spec = before
    return True
