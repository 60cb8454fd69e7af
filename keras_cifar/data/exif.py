"""EXIF orientation inside a graph: tag 0x0112 of a JPEG file's EXIF segment (CIPA DC-008)."""

import tensorflow as tf

JPEG = b"\xff\xd8\xff"  # the first bytes of a file
HEAD = 2**16  # bytes of a file in which the segment begins, and of the segment: it has no more


def upright(pixels: tf.Tensor, encoded: tf.Tensor) -> tf.Tensor:
    """Turns the pixels [H, W, 3] of the JPEG file `encoded`, string [], as its camera was held.

    Other files, and those without a valid orientation, keep their pixels.
    """
    return turn(pixels, orientation(encoded))


def turn(pixels: tf.Tensor, found: tf.Tensor) -> tf.Tensor:
    """Turns the pixels [H, W, 3] of a file of the orientation `found`, int32 []."""
    pixels = tf.cond(found >= 5, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)
    for axis, is_flipped in enumerate(_flips(found)):
        axes = [axis]
        pixels = tf.cond(is_flipped, lambda p=pixels, a=axes: tf.reverse(p, a), lambda p=pixels: p)
    return pixels


def turned(pair: tf.Tensor, found: tf.Tensor) -> tf.Tensor:
    """A pair for height and width [2], in the order of the other frame: of the file, or upright."""
    return tf.where(found >= 5, pair[::-1], pair)


def stored_box(box: tf.Tensor, sides: tf.Tensor, found: tf.Tensor) -> tf.Tensor:
    """Where in the file a box of the upright image is; each (top, left, height, width), int32 [4].

    `sides` int32 [2] are height and width of the upright image.
    """
    start, size = box[:2], box[2:]
    start = tf.where(tf.stack(_flips(found)), sides - start - size, start)
    return tf.concat([turned(start, found), turned(size, found)], 0)


def _flips(found: tf.Tensor) -> list[tf.Tensor]:
    """Whether rows and whether columns are in reverse order, after the axes were swapped."""
    return [tf.reduce_any(found == flipped) for flipped in ((3, 4, 7, 8), (2, 3, 6, 7))]


def orientation(encoded: tf.Tensor) -> tf.Tensor:
    """int32 []: 1 to 8, as EXIF numbers them; 1 where a file, string [], tells none."""
    parts = tf.strings.split(tf.strings.substr(encoded, 0, HEAD), b"Exif\0\0", maxsplit=1)
    place = tf.strings.length(parts[0])
    is_jpeg = tf.strings.substr(encoded, 0, 3) == JPEG
    # The marker of the segment and the two bytes of its length are before the name.
    marker = tf.strings.substr(parts[0], tf.maximum(place - 4, 0), 2)
    is_exif = is_jpeg & (tf.size(parts) == 2) & (marker == b"\xff\xe1")
    tiff = tf.strings.substr(encoded, tf.minimum(place + 6, tf.strings.length(encoded)), HEAD)
    fields = tf.io.decode_raw(tiff, tf.uint8, fixed_length=HEAD)
    little = fields[0] == ord("I")

    def numbers(places):  # of two bytes
        places = tf.clip_by_value(places, 0, HEAD - 2)
        one, two = (tf.cast(tf.gather(fields, places + i), tf.int32) for i in (0, 1))
        return tf.where(little, one + 256 * two, 256 * one + two)

    # Of the four bytes of the directory's place, the higher two are 0. An entry has 12 bytes: tag, type
    # (3 is a number of two bytes), count, value.
    directory = numbers(tf.where(little, 4, 6))
    entries = directory + 2 + 12 * tf.range(tf.minimum(numbers(directory), HEAD // 12))
    is_found = (numbers(entries) == 0x0112) & (numbers(entries + 2) == 3)
    value = tf.concat([tf.boolean_mask(numbers(entries + 8), is_found), [1]], 0)[0]
    return tf.where(is_exif & (value >= 1) & (value <= 8), value, 1)
