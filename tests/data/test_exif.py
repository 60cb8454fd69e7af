"""EXIF orientation inside a graph: as Pillow applies it, and whatever the segment holds."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_cifar.data.exif import orientation, upright
from keras_cifar.data.images import decode_image, decode_images, load_image
from tests.data.test_images import photo

TAG = 0x0112


def jpeg(exif: bytes | Image.Exif, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo(16, 24)).save(file, "JPEG", exif=exif, quality=95, **options)
    return file.getvalue()


def turned(number: int, endian: str = "<") -> bytes:
    """An EXIF segment with this orientation between other entries."""
    exif = Image.Exif()
    exif.endian = endian
    exif.update({0x010F: "a camera", TAG: number, 0x011A: 72.0, 0x0132: "2026:01:01 00:00:00"})
    return exif.tobytes()


def test_images_are_turned_as_pillow_turns_them():
    files = [jpeg(turned(number, endian)) for number in range(1, 9) for endian in "<>"]
    find = tf.function(orientation, [tf.TensorSpec([], tf.string)])
    assert [int(find(contents)) for contents in files] == [n for n in range(1, 9) for _ in "<>"]
    turn = tf.function(
        lambda encoded: upright(decode_image(encoded), encoded), [tf.TensorSpec([], tf.string)]
    )
    for contents in files:
        np.testing.assert_array_equal(turn(contents), load_image(contents))
    assert {load_image(contents).shape[:2] for contents in files} == {(16, 24), (24, 16)}
    pixels, good = decode_images(tf.constant(files), (9, 7), "crop")
    assert good.numpy().all()
    expected = [load_image(contents, (9, 7), "crop") for contents in files]
    np.testing.assert_array_equal(pixels, expected)


def test_other_segments_before_it_are_skipped():
    contents = jpeg(turned(6), comment=b"x" * 5000, icc_profile=b"y" * 9000)
    comment = b"\xff\xfe\x00\x09Exif\0\0\0"  # not the marker of EXIF
    assert int(orientation(tf.constant(contents))) == 6
    assert int(orientation(tf.constant(contents[:2] + comment + contents[2:]))) == 1


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_other_numbers_leave_an_image_as_it_is(number):
    assert int(orientation(tf.constant(jpeg(turned(number))))) == 1


def test_files_without_orientation_have_none():
    png = io.BytesIO()
    Image.fromarray(photo(4, 5)).save(png, "PNG", exif=turned(6))
    for contents in (
        b"",
        b"\xff\xd8\xff",
        jpeg(b""),
        png.getvalue(),
        b"\xff\xd8\xff\xe1\0\0Exif\0\0",
    ):
        assert int(orientation(tf.constant(contents))) == 1


def test_damaged_segments_are_no_errors(random):
    whole = jpeg(turned(6))
    start = whole.index(b"Exif")
    find = tf.function(orientation)
    for length in range(start, start + 120, 7):
        assert int(find(tf.constant(whole[:length]))) in (1, 6)
    for _ in range(100):
        damaged = bytearray(whole)
        for place in random.integers(start + 6, start + 60, 4):
            damaged[place] = random.integers(256)
        assert 1 <= int(find(tf.constant(bytes(damaged)))) <= 8
