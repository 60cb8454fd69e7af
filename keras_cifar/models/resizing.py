"""Images shrunk inside the training step, for progressive resizing."""

import numpy as np
import tensorflow as tf

Size = tuple[int, int]  # height, width in pixels


def shrink(images: tf.Tensor, size: Size | None) -> tf.Tensor:
    """uint8 [B, H, W, 3] -> uint8 of a smaller `size`, by an antialiased linear filter; None keeps it.

    A matrix product for each side runs on every device and has static shapes.
    """
    if size is None:
        return images
    rows, columns = (_filter(*sides) for sides in zip(images.shape[1:3], size, strict=True))
    x = tf.einsum("hH,bHWc->bhWc", rows, tf.cast(images, tf.float32))
    x = tf.einsum("wW,bhWc->bhwc", columns, x)
    return tf.cast(tf.round(x), images.dtype)


def _filter(before: int, after: int) -> np.ndarray:
    """float32 [after, before]: the weights of the pixels of a row in those of the shrunk row."""
    with tf.init_scope():  # TensorFlow's own resizing of each single pixel
        pixels = tf.eye(before)[:, :, None]
        return tf.image.resize(pixels, (after, before), antialias=True)[:, :, 0].numpy()
