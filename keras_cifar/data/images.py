"""The one definition of preprocessing: encoded image -> uint8 RGB pixels at the model's size.

`load_image` reads files with Pillow; `decode_image` does the same inside a TensorFlow graph for the
formats TensorFlow knows. They give equal pixels for JPEG, PNG, BMP and GIF. Pillow alone knows CMYK
colours and palette transparency. `resize_images` resizes the pixels of both, by one of two rules.
"""

import contextlib
import functools
import io
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import open_file, size_of
from keras_cifar.core.image_size import CROP, STRETCH
from keras_cifar.data.exif import JPEG, upright

# Of everything below. A new number makes the cache decode all images again.
VERSION = 1

# The formats that are read, by Pillow's names, and their file name suffixes in lower case. Pillow
# knows more; one of them, EPS, starts a PostScript interpreter.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "ICO": (".ico",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
}
GRAPH_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")  # that TensorFlow knows
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# Pillow refuses more before it decodes any, also in images inside of others (ICO). The largest camera
# sensor in use has 151 megapixels (Phase One IQ4).
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
MAX_FILE = 3 * MAX_PIXELS  # bytes

# Passes over the pixels of the largest image; a smaller one may have more. A JPEG has one for each
# scan: usual progressive ones have 10, and a scan can have as few as 31 bytes.
MAX_PASSES = 20

_BOMB = f"{MAX_PIXELS:,} pixels (a decompression bomb?)"

BAND = 2**20  # pixels that are composited at a time, in float32

# An image of more than twice as many times the target's sides is first averaged in blocks, down to this
# many times: 100 megapixels in float32 would take 1.2 GB.
BLOCK_REDUCTION = 16

# The share of the scaled image's sides that a crop keeps: the middle 224 of 256 pixels (Krizhevsky et
# al. 2012, section 4.1, and torchvision's references/classification).
CROP_SHARE = 0.875

# Pillow warns of large images and damaged metadata. What cannot be read raises an error anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(UserError):
    """A file is not an image that can be read. The message is the reason alone."""


class _Budget:
    """Limits the pixels that all threads together decode at a time: an image may take a gigabyte."""

    def __init__(self, pixels: int):
        self._free = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: pixels <= self._free)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_BUDGET = _Budget(MAX_PIXELS)


def load_image(
    source: str | pathlib.Path | bytes,
    size: tuple[int, int] | None = None,
    rule: str = STRETCH,
    *,
    exact: bool = True,
) -> np.ndarray:
    """Reads an image file as a person would see it.

    It takes the first frame of an animation, applies the EXIF orientation, composites transparency on
    white and converts grey, palette, CMYK and 16-bit images.

    Args:
        source: the file, or its contents.
        size: (height, width) in pixels, or None for the image's own.
        rule: of `resize_images`.
        exact: False leaves the last step to `resize_each`, which is cheaper for many images.

    Returns:
        uint8 [height, width, 3], RGB; an ImageError says why there is none.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
            length = len(source) if isinstance(source, bytes) else size_of(file)
            if length == 0:
                raise ImageError("the file is empty")
            if length > MAX_FILE:
                raise ImageError(f"it has more than {MAX_FILE:,} bytes")
            with (
                Image.open(file, formats=tuple(FORMATS)) as image,
                _BUDGET.take(image.width * image.height),
            ):
                passes = _scans(file) if image.format in ("JPEG", "MPO") else 1
                if passes * image.width * image.height > MAX_PASSES * MAX_PIXELS:
                    raise ImageError(f"it has {passes:,} scans, too many for an image of its size")
                pixels = _pixels(image, size and covered(size, rule))
                return resize_each([pixels], size, rule)[0] if exact and size else pixels
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("not an image in a format that can be read") from None
    except Image.DecompressionBombError:
        raise ImageError(f"the image has more than {_BOMB}") from None
    except MemoryError:
        raise ImageError("the image is too large for the memory") from None
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError and more.
        raise ImageError(reason(error)) from None


def stored_size(path: str | pathlib.Path) -> tuple[int, int]:
    """(height, width) of an image file by its header alone, before its EXIF orientation.

    An ImageError says why there is none.
    """
    try:
        with open_file(path) as file, Image.open(file, formats=tuple(FORMATS)) as image:
            return image.height, image.width
    except Exception as error:  # as in `load_image`
        raise ImageError(reason(error)) from None


def decoding_work(encoded: bytes) -> int:
    """The pixels that `decode_image` computes for a file, by its header, as `_work` counts them.

    More than MAX_PIXELS for a file that it must not get: one that Pillow does not know either.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=GRAPH_FORMATS) as image:
            area, kind = image.width * image.height, image.format
    except Exception:  # as in `load_image`
        return MAX_PIXELS + 1
    if kind == "WEBP" and encoded[15] == ord("X") and encoded[20] & 2:  # animated
        return MAX_PIXELS + 1
    if kind == "GIF":
        return area * max(encoded.count(b"\0,"), 1)
    return max(area, area * encoded.count(b"\xff\xda") // MAX_PASSES) if kind == "JPEG" else area


def resize_each(images: list[np.ndarray], size: tuple[int, int], rule: str = STRETCH) -> np.ndarray:
    """`resize_images` of images of any sizes, those of one size together.

    uint8 [height, width, 3] each -> uint8 [N, *size, 3].
    """
    resized = np.empty((len(images), *size, 3), np.uint8)
    shapes = np.array([image.shape[:2] for image in images])
    for shape in np.unique(shapes, axis=0):
        rows = np.flatnonzero((shapes == shape).all(1))
        stack = np.stack([images[row] for row in rows])
        done = rule == STRETCH and tuple(shape) == tuple(size)
        resized[rows] = stack if done else resize_images(stack, size, rule).numpy()
    return resized


def _scans(file: BinaryIO) -> int:
    position = file.tell()
    file.seek(0)
    found = file.read().count(b"\xff\xda")
    file.seek(position)
    return found


def _pixels(image: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [height, width, 3] of the first frame, upright and on white, not quite of `size` yet."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_eight_bit(np.asarray(image)))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    mode = "RGBA" if transparent else "RGB"
    if image.mode != mode or "transparency" in image.info:
        image = image.convert(mode)
    if size is not None:
        factor = min(image.height // size[0], image.width // size[1])
        if factor >= 2 * BLOCK_REDUCTION:
            image = image.reduce(factor // BLOCK_REDUCTION)
    pixels = np.asarray(image)
    if not transparent:
        return pixels
    opaque = np.empty((*pixels.shape[:2], 3), np.uint8)
    rows = max(1, BAND // pixels.shape[1])
    for start in range(0, len(pixels), rows):
        opaque[start : start + rows] = on_white(pixels[start : start + rows]).numpy()
    return opaque


def _eight_bit(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        scale = 255.0 if values.max(initial=0) <= 1.0 else 1.0
        return np.clip(values * scale + 0.5, 0, 255).astype(np.uint8)
    if values.dtype == np.uint16 or values.max(initial=0) > 255:
        values = values >> 8  # as TensorFlow's PNG decoder does
    return np.clip(values, 0, 255).astype(np.uint8)


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a JPEG, PNG, BMP, GIF (first frame) or WebP file, string [], inside a graph.

    EXIF orientation is left to `exif.upright`.

    Returns:
        uint8 [height, width, 3], RGB, transparency composited on white.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are not an image, have more than MAX_PIXELS pixels
            (in all frames of a GIF) or are an animated WebP.
    """

    def jpeg():
        # The default DCT differs from libjpeg's (and Pillow's) by up to 9 levels.
        return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")

    def other():
        pixels = tf.io.decode_image(encoded, channels=0, expand_animations=False)
        pixels = tf.cond(
            tf.shape(pixels)[2] < 3,
            lambda: tf.concat([pixels[..., :1]] * 3 + [pixels[..., 1:]], axis=2),
            lambda: pixels,
        )
        # The fourth channel of a BMP is padding.
        opaque = tf.logical_or(tf.shape(pixels)[2] == 3, tf.strings.substr(encoded, 0, 2) == b"BM")
        return tf.cond(opaque, lambda: pixels[..., :3], lambda: _opaque_in_graph(pixels))

    is_jpeg = tf.strings.substr(encoded, 0, 3) == JPEG
    small, message = (
        _work(encoded, is_jpeg) <= MAX_PIXELS,
        f"an animated WebP, or more than {_BOMB}",
    )
    with tf.control_dependencies([tf.debugging.Assert(small, [message])]):
        pixels = tf.cond(is_jpeg, jpeg, other)
    return tf.ensure_shape(pixels, (None, None, 3))


def _work(encoded: tf.Tensor, is_jpeg: tf.Tensor) -> tf.Tensor:
    """int64 []: the pixels that a decoder will compute, by the file's header; 0 if it is no image.

    TensorFlow's own limits are higher, and it reads every frame of a GIF and every scan of a JPEG.
    """
    start = tf.strings.substr(encoded, 0, 30)
    header = tf.cast(tf.io.decode_raw(start, tf.uint8, fixed_length=30), tf.int64)

    def number(*places):  # the lowest byte first
        return sum(header[place] * 2 ** (8 * i) for i, place in enumerate(places))

    def count(marker):
        return tf.size(tf.strings.split(encoded, marker), tf.int64) - 1

    def jpeg():  # The marker begins a scan.
        area = tf.reduce_prod(tf.image.extract_jpeg_shape(encoded, tf.int64)[:2])
        return tf.maximum(area, area * count(b"\xff\xda") // MAX_PASSES)

    def png():  # IHDR is the first chunk. Sides of 2**31 and more are invalid.
        return number(19, 18, 17, 16) * tf.minimum(number(23, 22, 21, 20), 2**31)

    def gif():  # The logical screen. Before most frames is a block that ends in 0.
        return number(6, 7) * number(8, 9) * tf.maximum(count(b"\0,"), 1)

    def bmp():  # A negative height means that the first row is the top.
        rows = number(22, 23, 24, 25)
        return number(18, 19, 20, 21) * tf.where(header[25] > 127, 2**32 - rows, rows)

    def webp():  # RFC 9649: lossy, lossless or extended.
        packed = number(21, 22, 23, 24)
        lossless = (packed % 2**14 + 1) * (packed // 2**14 % 2**14 + 1)
        lossy = number(26, 27) % 2**14 * (number(28, 29) % 2**14)
        extended = (number(24, 25, 26) + 1) * (number(27, 28, 29) + 1)
        # TensorFlow 2.21 writes animations beyond the end of its memory, and the process dies.
        extended = tf.where(header[20] & 2 == 0, extended, MAX_PIXELS + 1)
        kind = header[15]
        return tf.where(kind == ord("L"), lossless, tf.where(kind == ord("X"), extended, lossy))

    first = ((0x89, png), (ord("G"), gif), (ord("R"), webp), (ord("B"), bmp))
    kinds = [(is_jpeg, jpeg), *((header[0] == byte, kind) for byte, kind in first)]
    return tf.case(kinds, lambda: tf.constant(0, tf.int64))


def _opaque_in_graph(pixels: tf.Tensor) -> tf.Tensor:
    """`on_white` in bands of rows, one at a time, to save memory."""
    height, width = tf.unstack(tf.shape(pixels)[:2])
    rows = tf.maximum(1, BAND // width)
    count = (height + rows - 1) // rows
    bands = tf.TensorArray(tf.uint8, count, infer_shape=False, element_shape=(None, None, 3))

    def composite(i, bands):
        return i + 1, bands.write(i, on_white(pixels[i * rows : (i + 1) * rows]))

    _, bands = tf.while_loop(lambda i, _: i < count, composite, (0, bands), parallel_iterations=1)
    return bands.concat()


def decode_images(
    encoded: tf.Tensor, size: tuple[int, int], rule: str = STRETCH
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes, turns upright and resizes images string [N] inside a graph, in parallel.

    A bad one stops no others.

    Returns:
        (uint8 [N, *size, 3], bool [N]): the pixels, and whether the image could be decoded. Where
        it could not, the pixels are those of another image.
    """

    def finished(contents):
        return resize_images(upright(decode_image(contents), contents), size, rule)

    return map_each(finished, (encoded,), size)


def map_each(
    function: Callable, inputs: tuple[tf.Tensor, ...], size: tuple[int, int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Calls `function` for each of N rows of the inputs inside a graph, in parallel.

    Returns:
        (uint8 [N, *size, 3], bool [N]): what it returned, and whether it did so without an error.
        Where it did not, the pixels are those of another row.
    """
    count = tf.shape(inputs[0], tf.int64)[0]
    numbers = tf.range(count)
    rows = tf.data.Dataset.from_tensor_slices((numbers, *inputs))
    # A graph cannot catch an error, but a tf.data pipeline can skip the element that has one.
    images = rows.map(
        lambda number, *row: (number, function(*row)), num_parallel_calls=tf.data.AUTOTUNE
    ).ignore_errors()
    # A sentinel at the end: there is always an element, and one after each.
    last = tf.data.Dataset.from_tensors((count, tf.zeros((*size, 3), tf.uint8)))
    options = tf.data.Options()
    options.autotune.enabled = False  # a thread a core from the start, and none that measures
    options.experimental_optimization.apply_default_optimizations = False
    batch = images.concatenate(last).batch(count + 1).with_options(options)
    done, pixels = batch.get_single_element()
    places = tf.searchsorted(done, numbers)
    return tf.gather(pixels, places), tf.gather(done, places) == numbers


def on_white(pixels: tf.Tensor) -> tf.Tensor:
    """Composites uint8 [height, width, 4] RGBA on white: uint8 [height, width, 3]."""
    pixels = tf.cast(pixels, tf.float32)
    colour, alpha = pixels[..., :3], pixels[..., 3:] / 255.0
    return tf.cast(tf.round(colour * alpha + 255.0 * (1.0 - alpha)), tf.uint8)


def resize_images(pixels: tf.Tensor, size: tuple[int, int], rule: str = STRETCH) -> tf.Tensor:
    """Resizes uint8 [..., height, width, 3] to `size` (height, width): bilinear, antialiased.

    STRETCH keeps the whole image, so its aspect ratio becomes that of `size`. CROP scales it, with its
    aspect ratio, until it covers `covered(size)`, and keeps the middle of `size`; the roundings are
    those of torchvision's Resize and CenterCrop.
    """
    if rule == STRETCH:
        resized = tf.image.resize(pixels, size, method="bilinear", antialias=True)
    else:
        pixels = tf.convert_to_tensor(pixels)
        single = pixels.shape.rank == 3
        resized = _cropper(tuple(size))(pixels[None] if single else pixels)
        resized = resized[0] if single else resized
    return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)


def covered(size: tuple[int, int], rule: str = CROP) -> tuple[int, int]:
    """The (height, width) that an image covers when it is scaled, before it is cropped to `size`."""
    share = CROP_SHARE if rule == CROP else 1
    return round(size[0] / share), round(size[1] / share)


@functools.cache
def _cropper(size: tuple[int, int]) -> Callable:
    """CROP to a size as a function, uint8 [N, height, width, 3] -> float32 [N, *size, 3].

    One kernel scales and crops, so what is cut off is not computed. It is a TensorFlow function, as
    two dozen operations one by one take as long as to resize an image.
    """

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)], autograph=False)
    def scaled_middle(pixels):
        sides, cover = tf.shape(pixels, tf.int64)[1:3], tf.constant(covered(size), tf.int64)
        axis = tf.cast(cover[0] * sides[1] < cover[1] * sides[0], tf.int64)  # that just covers
        others = sides * cover[axis] // sides[axis]
        scaled = tf.where(tf.range(2, dtype=tf.int64) == axis, cover, others)
        cut = tf.round((scaled - size) / 2)  # above and on the left
        step = sides / scaled  # pixels of the image, float64
        # The pixels that the kernel reads, so that positions are small numbers: they become float32.
        reach = tf.maximum(step, 1.0) + 1.0
        first = tf.cast(tf.maximum(tf.floor(cut * step - reach), 0.0), tf.int64)
        last = tf.cast(tf.math.ceil((cut + size) * step + reach), tf.int64)  # or beyond the image
        return tf.raw_ops.ScaleAndTranslate(
            images=pixels[:, first[0] : last[0], first[1] : last[1]],
            size=size,
            scale=tf.cast(1 / step, tf.float32),
            translation=tf.cast(tf.cast(first, tf.float64) / step - cut, tf.float32),
            kernel_type="triangle",
            antialias=True,
        )

    return scaled_middle


def with_margin(images: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W, 3] with what CROP to (H, W) cuts off: it gives these very images."""
    size = images.shape[1:3]
    more = [whole - side for whole, side in zip(covered(size), size, strict=True)]
    margins = [(round(both / 2), both - round(both / 2)) for both in more]
    return np.pad(images, [(0, 0), *margins, (0, 0)], "edge")
