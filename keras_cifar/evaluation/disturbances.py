"""Disturbances of images, each at five strengths; the literature calls them corruptions.

The tutorial begins with a figure of what makes a class hard to recognise. These are its causes, except
the variation within a class: viewpoint (rotation, perspective), scale, deformation (elastic),
occlusion, illumination (brightness, contrast, saturation), background clutter; and what cameras and
files add (noise, blur, jpeg).

The five strengths and the mean accuracy over all of them follow CIFAR-10-C (Hendrycks and Dietterich
2019, arXiv:1903.12261), but no result compares with a published one: `noise`, `contrast`, `jpeg` and,
at 32 x 32 pixels, `blur` have its definitions and parameters; `brightness` also darkens every second
image; the others are our own; pixels are rounded, not truncated; accuracy is not divided by AlexNet's.

The seed, the name and the row of an image determine what is random (the direction, the place, the
noise). The strength does not, so it only makes the same disturbance larger. Lengths are relative to the
image. Beyond its edges, the image is mirrored.
"""

import dataclasses
import io
import zlib
from collections.abc import Callable

import numpy as np
import scipy.ndimage
from PIL import Image

LEVELS = 5

DISTANCE = 2.0  # of the camera from a tilted image, in its sides: a field of view of 28 degrees
SMOOTHNESS = 0.1  # sigma of a deformation, in sides; smaller values fray edges
GREY = 128  # of the occluding box, as in Zeiler and Fergus 2013, arXiv:1311.2901
BOXES = 4  # of clutter in an image
NEIGHBOURS = 16  # images of a gallery: the first is shown, the others give clutter


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """function(images uint8 [n, H, W, 3], random, strength) -> disturbed images of the same shape."""

    function: Callable
    unit: str
    strengths: tuple[float, ...]


DISTURBANCES: dict[str, Disturbance] = {}


def _register(unit: str, *strengths: float):
    def add(function):
        DISTURBANCES[function.__name__] = Disturbance(function, unit, strengths)
        return function

    return add


def apply(
    name: str, images: np.ndarray, strength: int, seed: int = 0, first_row: int = 0
) -> np.ndarray:
    """Applies a disturbance to a copy of images.

    Args:
        name: one of `DISTURBANCES`.
        images: uint8 [n, H, W, 3] of any size. Clutter is taken from these.
        strength: from 0, which changes nothing, to 5.
        seed: of everything random.
        first_row: of a batch, so that the random numbers of each batch differ.
    """
    if strength == 0 or not images.size:
        return images.copy()
    disturbance = DISTURBANCES[name]
    random = np.random.default_rng([seed, zlib.crc32(name.encode()), first_row])
    return disturbance.function(images, random, disturbance.strengths[strength - 1])


def gallery(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """The first image under each disturbance: uint8 [6, H, W, 3] by name, strength 0 first."""
    images = images[:NEIGHBOURS]
    return {
        name: np.stack([apply(name, images, level, seed)[0] for level in range(LEVELS + 1)])
        for name in DISTURBANCES
    }


# ---- Geometry


@_register("degrees", 10, 20, 30, 45, 60)
def rotation(images, random, angle: float):
    """Rotates about the centre, left or right."""
    turn = np.deg2rad(angle) * _signs(images, random)
    y, x = _grid(images)
    cos, sin = np.cos(turn), np.sin(turn)
    return _sample(images, cos * y - sin * x, sin * y + cos * x)


@_register("degrees", 15, 25, 35, 45, 55)
def perspective(images, random, angle: float):
    """Tilts about an axis of random direction in the image plane."""
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    direction = random.uniform(0, 2 * np.pi, (len(images), 1, 1))
    ahead, across = np.sin(direction), np.cos(direction)
    side = min(images.shape[1:3])
    y, x = (part / side for part in _grid(images))
    # p is along the direction of the tilt, q along the axis. The ray through each of these points
    # meets the tilted image at `along`, `beside`.
    p, q = x * across + y * ahead, y * across - x * ahead
    along = p * DISTANCE / (DISTANCE * cos - p * sin)
    beside = q * (1 + along * sin / DISTANCE)
    y, x = along * ahead + beside * across, along * across - beside * ahead
    return _sample(images, y * side, x * side)


@_register("times larger or smaller", 1.15, 1.3, 1.5, 1.75, 2)
def scale(images, random, factor: float):
    """Enlarges or shrinks about the centre."""
    y, x = _grid(images)
    change = factor ** _signs(images, random)
    return _sample(images, y * change, x * change)


@_register("of a side, root mean square", 0.015, 0.03, 0.045, 0.06, 0.08)
def elastic(images, random, amount: float):
    """Moves each point by a smooth random field (Simard et al. 2003, Best practices for CNNs)."""
    side = min(images.shape[1:3])
    noise = random.standard_normal((2, *images.shape[:3]), np.float32)
    field = scipy.ndimage.gaussian_filter(noise, SMOOTHNESS * side, axes=(2, 3))
    size = np.sqrt((field**2).sum(axis=0).mean(axis=(1, 2), keepdims=True))
    y, x = _grid(images)
    dy, dx = field * (amount * side / np.maximum(size, 1e-9))
    return _sample(images, y + dy, x + dx)


@_register("of the area", 0.05, 0.1, 0.2, 0.3, 0.4)
def occlusion(images, random, share: float):
    """Covers a random place with a grey box of the image's proportions."""
    disturbed = images.copy()
    disturbed[_boxes(images, random, share)] = GREY
    return disturbed


@_register("of the area, at most", 0.1, 0.2, 0.3, 0.4, 0.5)
def clutter(images, random, share: float):
    """Pastes boxes from other images at random places, which may overlap."""
    disturbed = images.copy()
    count = len(images)
    for _ in range(BOXES):
        # Any image but itself, where there is another.
        steps = random.integers(min(1, count - 1), max(count, 2), count)
        others = (np.arange(count) + steps) % count
        _, rows, columns = _boxes(images, random, share / BOXES)
        place = _boxes(images, random, share / BOXES)
        disturbed[place] = images[others[:, None, None], rows, columns]
    return disturbed


# ---- Light and colour


@_register("of 255, brighter or darker", 0.05, 0.1, 0.15, 0.2, 0.3)
def brightness(images, random, amount: float):
    """Changes the value of HSV, the largest of the three colours, up or down.

    Brighter images add the amount. Darker ones multiply, as a subtraction would turn dark images black.
    """
    brighter = _signs(images, random)[..., None] > 0
    pixels = images.astype(np.float32)
    value = pixels.max(axis=-1, keepdims=True)
    wanted = np.where(brighter, np.minimum(value + 255 * amount, 255), value * (1 - 2 * amount))
    # Hue and saturation stay the same; black has none.
    return _to_uint8(np.where(value > 0, pixels * wanted / np.maximum(value, 1), wanted))


@_register("of the contrast is left", 0.75, 0.5, 0.4, 0.3, 0.15)
def contrast(images, random, factor: float):
    """Moves pixels towards the mean of each colour."""
    pixels = images.astype(np.float32)
    means = pixels.mean(axis=(1, 2), keepdims=True)
    return _to_uint8((pixels - means) * factor + means)


@_register("of the saturation is left", 0.8, 0.6, 0.4, 0.2, 0)
def saturation(images, random, factor: float):
    """Moves pixels towards grey, which the last strength reaches."""
    pixels = images.astype(np.float32)
    grey = (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    return _to_uint8((pixels - grey) * factor + grey)


# ---- Cameras and files


@_register("of 255, standard deviation", 0.04, 0.06, 0.08, 0.09, 0.1)
def noise(images, random, deviation: float):
    """Adds Gaussian noise to every pixel and colour."""
    drawn = random.standard_normal(images.shape, np.float32)
    return _to_uint8(images + np.float32(255 * deviation) * drawn)


@_register("thirty-seconds of a side, standard deviation", 0.4, 0.6, 0.7, 0.8, 1)
def blur(images, random, deviation: float):
    """Smooths with a Gaussian."""
    sigma = deviation * min(images.shape[1:3]) / 32
    pixels = images.astype(np.float32)
    return _to_uint8(scipy.ndimage.gaussian_filter(pixels, sigma, axes=(1, 2), mode="nearest"))


@_register("quality", 80, 65, 58, 50, 40)
def jpeg(images, random, quality: int):
    """Compresses as JPEG."""
    disturbed = np.empty_like(images)
    for index, pixels in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        with Image.open(file, formats=["JPEG"]) as image:
            disturbed[index] = image
    return disturbed


# ---- Helpers


def _signs(images, random) -> np.ndarray:
    return random.choice(np.array([-1, 1], np.float32), (len(images), 1, 1))


def _grid(images) -> tuple[np.ndarray, np.ndarray]:
    """(y float32 [1, H, 1], x float32 [1, 1, W]) of the pixels from the centre."""
    height, width = images.shape[1:3]
    y = np.arange(height, dtype=np.float32) - (height - 1) / 2
    x = np.arange(width, dtype=np.float32) - (width - 1) / 2
    return y[None, :, None], x[None, None, :]


def _sample(images, y, x) -> np.ndarray:
    """Interpolates bilinearly at points y, x [n, H, W], in pixels from the centre of each image."""
    count, height, width, channels = images.shape
    y, x = np.broadcast_arrays(y + (height - 1) / 2, x + (width - 1) / 2)
    sampled = np.empty(images.shape, np.float32)
    for row, channel in np.ndindex(count, channels):
        plane, points = images[row, ..., channel], (y[row], x[row])
        scipy.ndimage.map_coordinates(
            plane, points, sampled[row, ..., channel], order=1, mode="reflect"
        )
    return _to_uint8(sampled)


def _boxes(images, random, share: float) -> tuple:
    """Indices (image [n, 1, 1], row [n, h, 1], column [n, 1, w]) of a random box inside each image."""
    count = len(images)
    indices = []
    for axis, size in enumerate(images.shape[1:3]):
        length = max(1, round(np.sqrt(share) * size))
        start = (random.random((count, 1)) * (size - length + 1)).astype(int)
        indices.append(np.expand_dims(start + np.arange(length), 2 - axis))
    return np.arange(count)[:, None, None], *indices


def _to_uint8(pixels) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
