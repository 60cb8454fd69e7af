"""What augmentations do to images, without chance.

Images are float32 [B, H, W, 3] in [0, 255]; `sizes`, `mirror` and `to_uint8` take uint8 too.
"""

import tensorflow as tf

GREY = 128  # of what is not of the image; the network's scaling to [-1, 1] makes it 0


def affine(images, cos, sin, shear_x, shear_y, shift_x, shift_y):
    """Each image rotated, sheared and shifted about its centre; all parameters float32 [B]."""
    batch, height, width = sizes(images)
    x = (tf.cast(width, tf.float32) - 1) / 2
    y = (tf.cast(height, tf.float32) - 1) / 2
    a, b = cos, shear_x - sin
    c, d = shear_y + sin, cos
    zero = tf.zeros((batch,))
    # Output (i, j) takes the input at (a i + b j + e, c i + d j + f).
    transforms = tf.stack(
        [a, b, x - a * x - b * y + shift_x, c, d, y - c * x - d * y + shift_y, zero, zero], axis=1
    )
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=transforms,
        output_shape=tf.stack([height, width]),
        fill_value=float(GREY),
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )


def smooth(images):
    """PIL's SMOOTH filter; the border stays."""
    kernel = tf.constant([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13.0
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    inner = tf.nn.depthwise_conv2d(images, kernel, [1, 1, 1, 1], "VALID")
    ones = tf.pad(tf.ones_like(inner), [[0, 0], [1, 1], [1, 1], [0, 0]])
    return tf.where(ones > 0, tf.pad(inner, [[0, 0], [1, 1], [1, 1], [0, 0]]), images)


def autocontrast(images):
    low = tf.reduce_min(images, axis=[1, 2], keepdims=True)
    high = tf.reduce_max(images, axis=[1, 2], keepdims=True)
    stretched = (images - low) * 255.0 / tf.maximum(high - low, 1.0)
    return tf.where(high > low, stretched, images)


def equalize(images):
    """Each channel's histogram made flat, as PIL's ImageOps.equalize."""
    batch, height, width = sizes(images)
    values = tf.reshape(
        tf.transpose(tf.cast(images, tf.int32), [0, 3, 1, 2]), [batch * 3, height * width]
    )
    histogram = tf.math.bincount(values, minlength=256, maxlength=256, axis=-1)
    histogram = tf.reshape(histogram, [batch * 3, 256])
    last = tf.argmax(tf.where(histogram > 0, tf.range(256), -1), axis=1)
    step = (height * width - tf.gather(histogram, last, batch_dims=1)) // 255
    before = tf.cumsum(histogram, axis=1, exclusive=True) + step[:, None] // 2
    table = tf.minimum(before // tf.maximum(step[:, None], 1), 255)
    table = tf.where(step[:, None] > 0, table, tf.range(256))
    equal = tf.reshape(tf.gather(table, values, batch_dims=1), [batch, 3, height, width])
    return tf.cast(tf.transpose(equal, [0, 2, 3, 1]), tf.float32)


def sizes(images):
    """(batch, height, width): Python integers where they are known, else tensors."""
    static, dynamic = images.shape, tf.shape(images)
    return tuple(static[i] if static[i] is not None else dynamic[i] for i in range(3))


def mirror(images, mirrored, axis=2):
    """Mirrors the images where `mirrored` bool [n] is true: left to right, or upside down (axis 1)."""
    both = tf.concat([images, tf.reverse(images, [axis])], axis=0)
    # Whole rows are copied: four times as fast as `tf.where`.
    batch = sizes(images)[0]
    return tf.gather(both, tf.range(batch) + tf.where(mirrored, batch, 0))


def box_mask(y, x, box_height, box_width, height, width):
    """bool [B, H, W, 1]: the pixels inside each image's box around (y, x)."""
    top, left = y - box_height // 2, x - box_width // 2
    rows = tf.reshape(tf.range(height), (1, -1, 1, 1))
    columns = tf.reshape(tf.range(width), (1, 1, -1, 1))
    vertical = (rows >= top) & (rows < top + box_height)
    return vertical & (columns >= left) & (columns < left + box_width)


def grey(images):
    """Luma (ITU-R BT.601) as [B, H, W, 1]."""
    return tf.reduce_sum(images * [0.299, 0.587, 0.114], axis=-1, keepdims=True)


def mean_grey(images):
    return tf.reduce_mean(grey(images), axis=[1, 2], keepdims=True)


def blend(degenerate, images, factor):
    """`degenerate` at factor 0, the images at 1, beyond them above 1."""
    return clip(degenerate + factor * (images - degenerate))


def clip(images):
    return tf.clip_by_value(images, 0.0, 255.0)


def to_uint8(images):
    return images if images.dtype == tf.uint8 else tf.cast(tf.round(clip(images)), tf.uint8)
