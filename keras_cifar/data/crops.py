"""A random part of each image, resized, inside a graph. Of a JPEG file, no more than it is decoded.

Szegedy et al. 2014, arXiv:1409.4842, section 6: parts of a random share of the area and a random ratio
of the sides. How they are drawn, and what if they do not fit, is as in torchvision's RandomResizedCrop.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_cifar.core.image_size import SMALL_IMAGE
from keras_cifar.data import exif
from keras_cifar.data.exif import JPEG
from keras_cifar.data.images import MAX_PIXELS, map_each, resize_images

RATIO = (3 / 4, 4 / 3)  # of width to height
TRIES = 10  # until a part fits into the image

# What libjpeg can divide the sides by while it decodes, which is faster than decoding all pixels.
DIVISORS = (1, 2, 4, 8)


class Encoded(NamedTuple):
    """Image files that take the place of uint8 [n, H, W, 3].

    Attributes:
        paths: string [n].
        rows: int64 [n], by which `read` knows them.
        size: (H, W).
        read: Python's way to read one that is no JPEG file, or a damaged one: a row -> (uint8
            [height, width, 3], upright; whether it can be read).
    """

    paths: tf.Tensor
    rows: tf.Tensor
    size: tuple[int, int]
    read: Callable


def sides_of(uniform: tf.Tensor, smallest: float, largest: float) -> tf.Tensor:
    """Height and width of parts, float32 [..., 2, TRIES], in units of the root of the image's area.

    `uniform` has the same shape, of [0, 1): for shares of `smallest` to `largest`, and for ratios.
    """
    share = smallest + (largest - smallest) * uniform[..., 0, :]
    low, high = map(math.log, RATIO)
    ratio = tf.exp(low + (high - low) * uniform[..., 1, :])
    return tf.sqrt(tf.stack([share / ratio, share * ratio], axis=-2))


def box(sides: tf.Tensor, place: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """(top, left, height, width), int32 [..., 4], of the first part that fits into an image.

    If none does, it is the largest in the middle whose ratio is allowed.

    Args:
        sides: float32 [..., 2, TRIES] of `sides_of`.
        place: float32 [..., 2], uniform of [0, 1).
        image: int32 [2], its height and width.
    """
    whole = tf.cast(image, tf.float32)
    drawn = tf.round(sides * tf.sqrt(whole[0] * whole[1]))
    fits = tf.reduce_all((drawn >= 1) & (drawn <= whole[:, None]), axis=-2)
    middle = tf.minimum(whole, tf.round(whole[::-1] * (1 / RATIO[0], RATIO[1])))
    first = tf.gather(drawn, tf.argmax(fits, -1), axis=-1, batch_dims=fits.shape.rank - 1)
    fits = tf.reduce_any(fits, axis=-1, keepdims=True)
    part = tf.where(fits, first, middle)
    free = whole - part
    # A product may be rounded up.
    start = tf.where(fits, tf.minimum(tf.floor(place * (free + 1)), free), tf.floor(free / 2))
    return tf.cast(tf.concat([start, part], axis=-1), tf.int32)


def of_pixels(images: tf.Tensor, sides: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
    """Parts of images uint8 or float32 [n, H, W, 3], enlarged to [n, H, W, 3] bilinearly, float32."""
    shape = tf.shape(images)[1:3]
    parts = tf.cast(box(sides, place, shape), tf.float32)
    # The kernel's positions are centres of pixels, from the first to the last that it shall sample.
    # Those beyond the edge are of a margin that repeats it.
    step = parts[:, 2:] / tf.cast(shape, tf.float32)
    first = parts[:, :2] + step / 2 + 0.5
    limits = tf.concat([first, first + parts[:, 2:] - step], axis=1)
    limits /= tf.cast(tf.tile(shape + 1, [2]), tf.float32)
    margin = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]], "SYMMETRIC")
    return tf.image.crop_and_resize(margin, limits, tf.range(tf.shape(images)[0]), shape)


def of_files(files: Encoded, sides: tf.Tensor, place: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Parts of image files, resized, and which could be read: uint8 [n, H, W, 3], bool [n]."""

    def of_jpeg(path, sides, place):
        return resized(_part_of_jpeg(path, sides, place, files.size), files.size)

    def of_other(number):
        types = (tf.uint8, tf.bool)
        pixels, good = tf.numpy_function(files.read, [files.rows[number]], types, stateful=False)
        shape = tf.shape(pixels)
        top, left, height, width = tf.unstack(box(sides[number], place[number], shape[:2]))
        part = tf.ensure_shape(pixels, (None, None, 3))[top : top + height, left : left + width]
        return resized(part, files.size), tf.ensure_shape(good, ())

    def completed():
        others = tf.where(~good)
        signature = tf.TensorSpec((*files.size, 3), tf.uint8), tf.TensorSpec((), tf.bool)
        found, can_read = tf.map_fn(of_other, others[:, 0], fn_output_signature=signature)
        return (
            tf.tensor_scatter_nd_update(pixels, others, found),
            tf.tensor_scatter_nd_update(good, others, can_read),
        )

    pixels, good = map_each(of_jpeg, (files.paths, sides, place), files.size)
    return tf.cond(tf.reduce_all(good), lambda: (pixels, good), completed)


def _part_of_jpeg(path, sides, place, size: tuple[int, int]) -> tf.Tensor:
    """uint8 [height, width, 3]: the part of an image, upright, not much larger than `size` if it can.

    Any error is TensorFlow's: it is no JPEG file, a damaged one, too large, or of CMYK colours.
    """
    encoded = tf.io.read_file(path)
    # Before libjpeg, which prints that it is none.
    is_jpeg = tf.debugging.Assert(tf.strings.substr(encoded, 0, 3) == JPEG, [path])
    with tf.control_dependencies([is_jpeg]):
        shape = tf.image.extract_jpeg_shape(encoded)
    is_usual = (shape[2] < 4) & (tf.reduce_prod(tf.cast(shape[:2], tf.int64)) <= MAX_PIXELS)
    orientation = exif.orientation(encoded)
    with tf.control_dependencies([tf.debugging.Assert(is_usual, [path])]):
        image = exif.turned(shape[:2], orientation)
    part = box(sides, place, image)
    window = exif.stored_box(part, image, orientation)
    fit = tf.reduce_min(part[2:] // size)
    index = tf.reduce_sum(tf.cast(tf.constant(DIVISORS[1:], tf.int32) <= fit, tf.int32))

    def decoded(divisor):
        # The default DCT differs from that of `images.decode_image`.
        options = {"channels": 3, "ratio": divisor, "dct_method": "INTEGER_ACCURATE"}
        return lambda: tf.image.decode_and_crop_jpeg(encoded, window // divisor, **options)

    return exif.turn(tf.switch_case(index, [decoded(divisor) for divisor in DIVISORS]), orientation)


def resized(pixels: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """uint8 [*size, 3] of uint8 [height, width, 3], bilinear.

    Antialiased, as validation is, up to SMALL_IMAGE pixels: ResNet-20 has 0.752 so with 16 pixels, and
    0.734 with means of areas. Above, what becomes smaller is means of areas: three times as fast.
    """
    if min(size) <= SMALL_IMAGE:
        return resize_images(pixels, size)
    images = pixels[None]
    shrinks = tf.reduce_all(tf.shape(pixels)[:2] >= size)
    sized = tf.cond(
        shrinks,
        lambda: tf.raw_ops.ResizeArea(images=images, size=size),
        lambda: tf.image.resize(images, size),
    )
    return tf.cast(sized[0] + 0.5, tf.uint8)
