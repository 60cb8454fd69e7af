"""Preprocessing: every kind of image, every damage, and the same pixels in both decoders."""

import concurrent.futures
import itertools
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_cifar.core.errors import UserError
from keras_cifar.data.images import (
    MAX_PASSES,
    MAX_PIXELS,
    ImageError,
    _Budget,
    _work,
    decode_image,
    decode_images,
    load_image,
    resize_images,
)
from tests.commands import hostile


def noise(height: int = 12, width: int = 9, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def photo(height: int, width: int) -> np.ndarray:
    """A smooth image with edges, as photographs are and noise is not."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(7 * x + c) * np.cos(5 * y - c) + (x + y > 0.9) for c in range(3)]
    return np.clip(np.stack(waves, -1) * 70 + 100, 0, 255).astype(np.uint8)


def saved(tmp_path, image: Image.Image | np.ndarray, name: str = "a.png", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    path = tmp_path / name
    image.save(path, **options)
    return path


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


# ---- Kinds of image


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.webp"])
def test_rgb_comes_back_exact_whatever_the_suffix(tmp_path, name):
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, noise(), name, **options)
    pixels = load_image(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, noise())
    np.testing.assert_array_equal(load_image(str(path.rename(tmp_path / "image.txt"))), noise())


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.pgm", "a.gif"])
def test_grey_and_one_bit_become_rgb(tmp_path, name):
    grey = noise(channels=1)
    np.testing.assert_array_equal(load_image(saved(tmp_path, grey, name)), grey_to_rgb(grey))
    if name != "a.gif":
        path = saved(tmp_path, grey > 127, name.replace("pgm", "pbm"))
        np.testing.assert_array_equal(load_image(path), grey_to_rgb((grey > 127) * np.uint8(255)))


def palette_image() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


@pytest.mark.parametrize(
    ("name", "transparency", "expected"),
    [
        ("a.png", 1, [RED, WHITE, BLUE]),
        ("a.gif", 1, [RED, WHITE, BLUE]),
        ("a.png", b"\x00\xff\x80", [WHITE, GREEN, [127, 127, 255]]),
        ("a.tif", None, [RED, GREEN, BLUE]),
        ("a.bmp", None, [RED, GREEN, BLUE]),
    ],
)
def test_palette_becomes_its_colours_on_white(tmp_path, name, transparency, expected):
    path = saved(tmp_path, palette_image(), name)
    assert load_image(path).tolist() == [[RED, GREEN, BLUE]]
    if transparency is not None:
        path = saved(tmp_path, palette_image(), name, transparency=transparency)
    assert load_image(path).tolist() == [expected]


def test_transparent_colour_and_grey_with_alpha_are_on_white(tmp_path):
    pixels = np.array([[RED, GREEN]], np.uint8)
    path = saved(tmp_path, pixels, transparency=(255, 0, 0))
    assert load_image(path).tolist() == [[WHITE, GREEN]]
    path = saved(tmp_path, np.array([[7, 9]], np.uint8), transparency=7)
    assert load_image(path).tolist() == [[WHITE, [9, 9, 9]]]
    la = np.array([[[10, 0], [10, 255], [0, 128]]], np.uint8)
    pixels = load_image(saved(tmp_path, Image.fromarray(la, "LA")))
    assert pixels[0, :, 0].tolist() == [255, 10, 127]


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_rgba_is_composited_on_white(tmp_path, name):
    rgba = noise(channels=4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    pixels = load_image(saved(tmp_path, rgba, name, **options))
    assert (pixels[0] == 255).all()
    np.testing.assert_array_equal(pixels[1], rgba[1, :, :3])
    np.testing.assert_array_equal(pixels, on_white(rgba))


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 128, 0), (255, 255, 255), (20, 20, 20)])
def test_cmyk_jpeg_has_its_colours(tmp_path, colour):
    image = Image.new("RGB", (16, 16), colour).convert("CMYK")
    pixels = load_image(saved(tmp_path, image, "a.jpg", quality=95))
    assert np.abs(pixels.astype(int) - colour).max() <= 4


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_keep_the_high_byte(tmp_path, name):
    values = np.array([[0, 200, 255, 256, 1000], [32768, 65000, 65279, 65534, 65535]], np.uint16)
    pixels = load_image(saved(tmp_path, values, name))
    np.testing.assert_array_equal(pixels, grey_to_rgb((values >> 8).astype(np.uint8)))


def test_floats_of_unit_range_are_scaled_and_nan_is_black(tmp_path):
    values = np.array([[0.0, 0.5, 1.0, np.nan]], np.float32)
    pixels = load_image(saved(tmp_path, values, "a.tif"))
    assert pixels[0, :, 0].tolist() == [0, 128, 255, 0]


# EXIF orientation -> what a viewer does with the stored image.
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photo(16, 24)
    plain = load_image(saved(tmp_path, stored, f"plain{name}", quality=95))
    turned = load_image(saved(tmp_path, stored, name, quality=95, exif=exif))
    np.testing.assert_array_equal(turned, UPRIGHT[orientation](plain))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_first_frame_of_an_animation_is_taken(tmp_path, name):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    pixels = load_image(path)
    assert pixels.shape == (4, 5, 3)
    assert (pixels == RED).all()


@pytest.mark.parametrize("size", [None, (1, 1), (4, 7)])
def test_one_pixel_is_an_image(tmp_path, size):
    path = saved(tmp_path, np.array([[[1, 2, 3]]], np.uint8))
    pixels = load_image(path, size)
    assert pixels.shape == (*(size or (1, 1)), 3)
    assert (pixels == [1, 2, 3]).all()


def test_load_resizes_with_resize_images_after_compositing(tmp_path):
    pixels = load_image(saved(tmp_path, noise(50, 70)), (8, 6))
    np.testing.assert_array_equal(pixels, resize_images(noise(50, 70), (8, 6)))
    # Black that nobody sees must not darken its neighbours.
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, ::2] = 255
    assert (load_image(saved(tmp_path, rgba), (4, 4)) == 255).all()


# ---- Large images


def test_huge_image_and_long_strip_are_close_to_a_direct_resize(tmp_path):
    image = Image.fromarray(photo(250, 300)).resize((3000, 2500), Image.Resampling.NEAREST)
    path = saved(tmp_path, image, "a.bmp")
    direct = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    tracemalloc.start()
    loaded = load_image(path, (32, 32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(loaded.astype(int) - direct).mean() < 1.5
    assert peak < 3000 * 2500  # The whole of it would take 3 times that, and 12 as float32.
    strip = photo(40, 4000)
    direct = resize_images(strip, (32, 32)).numpy().astype(int)
    assert np.abs(load_image(saved(tmp_path, strip), (32, 32)) - direct).mean() < 1.5


def test_threads_share_a_budget_of_pixels():
    budget, running, peaks = _Budget(100), [], []

    def work(pixels):
        with budget.take(pixels):
            running.append(pixels)
            peaks.append(sum(running))
            time.sleep(0.001)
            running.remove(pixels)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 100, 10, 40, 60, 100, 5, 50] * 5))
    assert 60 <= max(peaks) <= 100
    with pytest.raises(ZeroDivisionError), budget.take(100):
        1 / 0  # noqa: B018
    with budget.take(100):
        pass


def test_bomb_inside_of_another_image_is_refused():
    bomb = hostile.png(40_000, 40_000, rows=10)
    header = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(bomb), 22)
    assert "bomb" in refusal(header + bomb)


def test_jpeg_of_very_many_scans_is_refused(tmp_path, monkeypatch):
    """Each takes a pass over all pixels and has some 30 bytes."""
    path = saved(tmp_path, Image.new("RGB", (2000, 1000)), "a.jpg", progressive=True)
    whole = path.read_bytes()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    assert len(scan) < 100
    most = MAX_PASSES * MAX_PIXELS // (2000 * 1000) - whole.count(b"\xff\xda")
    assert refusal(whole[:-2] + scan * (most + 1) + whole[-2:]).startswith("it has 1,790 scans")
    monkeypatch.setattr("keras_cifar.data.images.MAX_PASSES", 1)
    assert load_image(whole[:-2] + scan * 60 + whole[-2:], (8, 8)).shape == (8, 8, 3)


@pytest.mark.parametrize("form", ["EPS", "TGA", "PCX", "PDF"])
def test_other_formats_are_not_read(tmp_path, form):
    Image.fromarray(noise(6, 5)).save(tmp_path / "a.png", form)
    assert refusal(tmp_path / "a.png") == NO_IMAGE


# ---- Damaged files


def refusal(path, size=None) -> str:
    """The message of the ImageError that loading `path` raises: always one line."""
    with pytest.raises(ImageError) as caught:
        load_image(path, size)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert isinstance(caught.value, UserError)
    return message


NO_IMAGE = "not an image in a format that can be read"


@pytest.mark.parametrize(
    "contents", [b"", b"hello", b"\x00" * 5000, b"<svg/>", b"%PDF-1.7\n", b"GIF"]
)
def test_what_is_no_image_is_said(tmp_path, contents):
    path = tmp_path / "a.jpg"
    path.write_bytes(contents)
    assert refusal(path) == (NO_IMAGE if contents else "the file is empty")


def test_missing_file_a_directory_and_a_file_that_is_too_large_are_said(tmp_path):
    assert refusal(tmp_path / "none.png") == "No such file or directory"
    assert refusal(tmp_path) == "Is a directory"
    (tmp_path / "a.png").touch()
    os.truncate(tmp_path / "a.png", 2**40)
    assert "it has more than 536,870,910 bytes" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif", "a.gif"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.97])
def test_truncated_image_is_refused(tmp_path, name, keep):
    path = saved(tmp_path, noise(60, 50), name)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(keep * len(contents))])
    message = refusal(path)
    if path.suffix in (".jpg", ".png") and keep > 0.5:
        assert "truncated" in message
    assert refusal(path, (8, 8)) == message


# ---- Both decoders


def decoded(path) -> np.ndarray:
    return decode_image(tf.constant(path.read_bytes())).numpy()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 47), (120, 81)])
def test_jpeg_has_the_same_pixels_in_both_decoders(tmp_path, subsampling, shape):
    for make, quality in itertools.product((noise, photo), (40, 95)):
        path = saved(tmp_path, make(*shape), "a.jpg", quality=quality, subsampling=subsampling)
        np.testing.assert_array_equal(decoded(path), load_image(path))


KINDS = {
    "progressive.jpg": photo(50, 60),
    "restarts.jpg": photo(50, 60),
    "grey.jpg": photo(50, 60)[..., 0],
    "grey.png": noise(channels=1),
    "rgb.png": noise(),
    "rgba.png": noise(channels=4),
    "la.png": Image.fromarray(noise(channels=2), "LA"),
    "bits.png": Image.fromarray(noise(channels=1) > 127),
    "palette.png": palette_image(),
    "sixteen.png": (noise(channels=1).astype(np.uint16) << 8) + 200,
    "rgb.bmp": noise(),
    "grey.bmp": noise(channels=1),
    "rgba.bmp": noise(channels=4),
    "grey.gif": noise(channels=1),
    "palette.gif": palette_image(),
    "animated.gif": noise(channels=1),
    "rgb.webp": noise(),
    "rgba.webp": noise(channels=4),
    "one.png": noise(1, 1),
    "wide.png": noise(3, 100),
}


OPTIONS = {
    "progressive.jpg": {"progressive": True},
    "restarts.jpg": {"restart_marker_blocks": 1},
    "animated.gif": {"save_all": True, "append_images": [Image.new("L", (9, 12), 7)]},
    "rgb.webp": {"lossless": True},
    "rgba.webp": {"lossless": True, "exact": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_all_formats_have_the_same_pixels_in_both_decoders(tmp_path, name):
    path = saved(tmp_path, KINDS[name], name, **OPTIONS.get(name, {}))
    np.testing.assert_array_equal(decoded(path), load_image(path))


def test_decode_works_in_a_graph_for_all_formats_at_once(tmp_path):
    files = [saved(tmp_path, KINDS[name], name) for name in ("rgba.png", "rgb.bmp", "grey.gif")]
    files.append(saved(tmp_path, photo(12, 9), "a.jpg"))
    encoded = tf.data.Dataset.from_tensor_slices([f.read_bytes() for f in files])
    dataset = encoded.map(lambda e: resize_images(decode_image(e), (4, 4)))
    assert dataset.element_spec == tf.TensorSpec((4, 4, 3), tf.uint8)
    for file, pixels in zip(files, dataset, strict=True):
        np.testing.assert_array_equal(pixels, load_image(file, (4, 4)))


@pytest.mark.parametrize("contents", [b"", b"text", b"\xff\xd8\xff", b"BM", b"\x89PNG\r\n\x1a\n"])
def test_decode_refuses_what_is_no_image(contents):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_image(tf.constant(contents))


def claim(path, width: int, height: int) -> bytes:
    """A small file's bytes whose header says that it is that large."""
    contents = bytearray(path.read_bytes())
    if path.suffix == ".jpg":
        start = contents.index(b"\xff\xc0") + 5
        contents[start : start + 4] = struct.pack(">HH", height, width)
    elif path.suffix == ".png":
        header = b"IHDR" + struct.pack(">II", width, height) + contents[24:29]
        contents[12:33] = header + struct.pack(">I", zlib.crc32(header))
    elif path.suffix == ".gif":
        contents[6:10] = struct.pack("<HH", width, height)
    elif path.suffix == ".bmp":
        contents[18:26] = struct.pack("<ii", width, -height)
    elif contents[12:16] == b"VP8 ":
        contents[26:30] = struct.pack("<HH", width, height)
    elif contents[12:16] == b"VP8L":
        contents[21:25] = struct.pack("<I", width - 1 | height - 1 << 14)
    else:
        assert contents[12:16] == b"VP8X"
        contents[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(contents)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("a.jpg", "a.png", "a.gif", "a.bmp", "a.webp")),
        ("a.webp", {"lossless": True}),
        ("a.webp", {"exif": b"Exif\0\0"}),
    ],
)
def test_decoder_in_the_graph_refuses_bombs_by_their_header(tmp_path, name, options):
    path = saved(tmp_path, photo(20, 30), name, **options)
    assert decode_image(tf.constant(claim(path, 30, 20))).shape == (20, 30, 3)
    for sides in [(13_500, 13_500), (16_383, 10_924)]:
        with pytest.raises(tf.errors.InvalidArgumentError, match="bomb"):
            decode_image(tf.constant(claim(path, *sides)))
    # The largest that is decoded, which here it is not: that takes memory.
    largest = tf.constant(claim(path, 16_383, 10_923))
    assert _work(largest, tf.constant(name == "a.jpg")) == 16_383 * 10_923
    assert 16_383 * 10_923 <= MAX_PIXELS < 16_383 * 10_924
    if name == "a.png":  # Sides whose product is no number.
        for side in (2**31 - 1, 2**31, 2**32 - 1):
            with pytest.raises(tf.errors.InvalidArgumentError):
                decode_image(tf.constant(claim(path, side, side)))


def test_frames_and_scans_count_as_the_pixels_they_are(tmp_path):
    frames = [Image.fromarray(photo(8, 8)).convert("P") for _ in range(30)]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert decode_image(tf.constant(path.read_bytes())).shape == (8, 8, 3)
    contents = claim(path, 3000, 3000)
    assert contents.count(b"\0,") < 20
    with pytest.raises(tf.errors.InvalidArgumentError, match="bomb"):
        decode_image(tf.constant(contents + b"\0," * 20))
    path = saved(tmp_path, photo(20, 30), "a.jpg")
    contents = claim(path, 3000, 3000)
    for more, said in ((397, "bomb"), (396, "^(?!.*bomb)")):
        with pytest.raises(tf.errors.InvalidArgumentError, match=said):
            decode_image(tf.constant(contents[:-2] + b"\xff\xda" * more))


@pytest.mark.parametrize("lossless", [True, False])
def test_animated_webp_is_refused_before_the_decoder_sees_it(tmp_path, lossless):
    # What TensorFlow 2.21 does with one is to write beyond its memory.
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime", "blue")]
    path = saved(
        tmp_path, frames[0], "a.webp", save_all=True, append_images=frames[1:], lossless=lossless
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="animated WebP"):
        decode_image(tf.constant(path.read_bytes()))
    _, good = decode_images(tf.constant([path.read_bytes()]), (5, 5))
    assert good.numpy().tolist() == [False]


def test_transparency_in_bands_is_that_of_the_whole(tmp_path, monkeypatch):
    sides = ((40, 23), (1, 1), (7, 60), (10, 5))
    paths = [saved(tmp_path, noise(*side, channels=4), f"{side}.png") for side in sides]
    whole = [load_image(path) for path in paths]
    monkeypatch.setattr("keras_cifar.data.images.BAND", 50)
    for path, expected in zip(paths, whole, strict=True):
        np.testing.assert_array_equal(load_image(path), expected)
        np.testing.assert_array_equal(decoded(path), expected)


def test_bad_image_stops_no_others(tmp_path):
    images = [saved(tmp_path, photo(9 + i, 12), f"{i}.jpg").read_bytes() for i in range(40)]
    expected = [load_image(contents, (5, 6)) for contents in images]
    signature = [tf.TensorSpec([None], tf.string)]
    decode = tf.function(lambda files: decode_images(files, (5, 6)), signature)
    for bad in ([], [0], [39], [0, 1, 2, 20, 38, 39], list(range(40))):
        files = [b"no image" if i in bad else contents for i, contents in enumerate(images)]
        pixels, good = decode(tf.constant(files))
        assert np.flatnonzero(~good.numpy()).tolist() == bad
        for i in set(range(40)) - set(bad):
            np.testing.assert_array_equal(pixels[i], expected[i])
    pixels, good = decode(tf.constant([], tf.string))
    assert pixels.shape == (0, 5, 6, 3)
    assert good.shape == (0,)


# ---- Resizing


@pytest.mark.parametrize("shape", [(50, 70), (64, 64), (33, 31), (480, 640), (20, 400)])
@pytest.mark.parametrize("make", [noise, photo])
def test_resizing_is_pillows_bilinear(shape, make):
    pixels = make(*shape)
    expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    resized = resize_images(pixels, (32, 32)).numpy().astype(int)
    assert np.abs(resized - np.asarray(expected)).mean() < 1


def test_batch_is_resized_as_its_images_are():
    batch = np.stack([noise(seed=seed) for seed in range(3)])
    expected = [resize_images(pixels, (5, 6)) for pixels in batch]
    np.testing.assert_array_equal(resize_images(batch, (5, 6)), expected)


def test_resizing_keeps_its_own_size_and_flat_colours():
    for shape in ((1, 1), (32, 32), (7, 50)):
        np.testing.assert_array_equal(resize_images(noise(*shape), shape), noise(*shape))
    for level, size in itertools.product((0, 1, 127, 254, 255), ((8, 8), (32, 32), (100, 90))):
        pixels = np.full((37, 23, 3), level, np.uint8)
        assert (resize_images(pixels, size).numpy() == level).all()
