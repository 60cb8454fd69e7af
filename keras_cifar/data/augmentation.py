"""Stateless augmentation of batches, chosen by a string such as `crop(4)|flip|mixup(0.2)`.

Each public function below with `random` as its third parameter is the augmentation of that name:
(images, labels, random, *numbers) -> (images, labels), with images uint8 or float32 [n, H, W, 3] in
[0, 255], labels float32 [n, K] and `random` a `Random`. One that mixes examples has `partners` as its
fourth parameter: (images, labels) of another example of the batch for each.

The n examples are all or some of a batch. All random numbers must come from `random`, so that the
result for an example depends only on the seed and its position in the batch.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable

import tensorflow as tf

from keras_cifar.core.errors import UsageError, unknown
from keras_cifar.data import crops
from keras_cifar.data.transformations import (
    GREY,
    affine,
    autocontrast,
    blend,
    box_mask,
    clip,
    equalize,
    grey,
    mean_grey,
    mirror,
    sizes,
    smooth,
    to_uint8,
)

MAX_PADDING = 1024  # pixels, of `crop`; more is a typing error
MAX_OPERATIONS = 14  # of `randaugment`: as many as there are
# Of `erasing`: shares of the image's area, and ratios of height to width, as in PyTorch and timm.
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)

Batch = tuple[tf.Tensor, tf.Tensor]
# Positions int32 [n] in the batch, or None for all -> images uint8 [n, H, W, 3], labels [n, K].
Read = Callable[[tf.Tensor | None], Batch]


class Random:
    """Random numbers for the examples at `positions` int32 [n] of a batch; each call draws new ones.

    The numbers of an example do not depend on `positions`: they are drawn for the whole batch. So is
    all inexact arithmetic, because the last bit of a logarithm depends on how TensorFlow vectorizes.
    `alternating` bool [batch] is inverted from one pass over the data to the next; None draws it.
    """

    def __init__(self, seed, batch, positions=None, alternating=None):
        self._seed, self._batch, self._positions = seed, batch, positions
        self._alternating = alternating
        self._draws = 0

    def alternating(self):
        """bool [n]: for each example, the opposite of the pass before."""
        return self.uniform() < 0.5 if self._alternating is None else self._own(self._alternating)

    def uniform(self, shape=(), low=0.0, high=1.0, dtype=tf.float32):
        """[n, *shape] of [low, high)."""
        shape = (self._batch, *shape)
        return self._own(tf.random.stateless_uniform(shape, self._next(), low, high, dtype))

    def mapped(self, function, low=0.0, high=1.0, shape=()):
        """[n, ...]: `function`, which may be inexact, of float32 [batch, *shape] of [low, high)."""
        drawn = tf.random.stateless_uniform((self._batch, *shape), self._next(), low, high)
        return self._own(function(drawn))

    def beta(self, alpha: float):
        """float32 [n] of the distribution Beta(alpha, alpha)."""
        _require(0 < alpha <= 1e6, "alpha must be above 0 and at most 1e6")
        # A ratio of two gamma variates. With a small alpha both underflow, so they are drawn as
        # logarithms: Gamma(a) is Gamma(a + 1) U^(1/a).
        shape = (2, self._batch)
        log_gamma = tf.math.log(tf.random.stateless_gamma(shape, self._next(), alpha + 1.0))
        uniform = tf.random.stateless_uniform(shape, self._next(), 1e-38, 1.0)
        log_gamma += tf.math.log(uniform) / alpha
        return self._own(tf.sigmoid(log_gamma[0] - log_gamma[1]))

    def permutation(self):
        """int32 [n]: these positions of a random permutation of the batch."""
        order = tf.range(self._batch)
        return self._own(tf.random.experimental.stateless_shuffle(order, self._next()))

    def _next(self):
        self._draws += 1
        return tf.random.experimental.stateless_fold_in(self._seed, self._draws)

    def _own(self, drawn):
        return drawn if self._positions is None else tf.gather(drawn, self._positions)


def parse(text: str) -> Callable[..., Batch]:
    """The augmentation that a string such as `crop(4)|flip` describes; "" changes nothing.

    Returns:
        (read: Read, batch: int, seed: int32 [2], positions: int32 [n] = None, alternating: bool
        [batch] = None) -> (images uint8 [n, H, W, 3], labels float32 [n, K]): the augmented examples
        at these positions of a batch, by default all. It reads these, and their partners.

    Raises:
        UsageError: an unknown name, or numbers out of range.
    """
    steps = [_parse_step(part.strip(), text) for part in text.split("|")] if text.strip() else []

    def augment(read, batch, seed, positions=None, alternating=None):
        for index, step in enumerate(steps):
            drawn = tf.random.experimental.stateless_fold_in(seed, index)
            read = functools.partial(step, read, batch, drawn, alternating=alternating)
        images, labels = read(positions)
        return to_uint8(images), labels

    return augment


def crops_files(text: str) -> bool:
    """Whether the augmentation `text` begins with the one that takes files: see `crops.Encoded`."""
    return text.partition("|")[0].partition("(")[0].strip() == resized_crop.__name__


def _parse_step(part: str, text: str) -> Callable[..., Batch]:
    match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", part)
    if not match:
        form = "is not of the form name or name(number, ...)"
        raise UsageError(f"--augment={text!r}: {part!r} {form}")
    name, numbers = match.groups()
    choices = _functions()
    if name not in choices:
        raise unknown("augmentation", name, choices)
    function, signature = choices[name], inspect.signature(choices[name])
    mixes = "partners" in signature.parameters

    def step(read, batch, seed, positions, alternating=None):
        random = Random(seed, batch, positions, alternating)
        if not mixes:
            return function(*read(positions), random, *arguments)
        own, partners = _with_partners(read, batch, random.permutation(), positions)
        return function(*own, random, partners, *arguments)

    try:
        arguments = [float(n) for n in numbers.split(",")] if numbers and numbers.strip() else []
        _require(all(map(math.isfinite, arguments)), "numbers must be finite")
        signature.bind(*[None] * (4 if mixes else 3), *arguments)
        # Try it on a small batch, so that a wrong number is refused before training.
        step(lambda _: (tf.zeros((2, 4, 4, 3), tf.uint8), tf.eye(2)), 2, tf.constant([0, 0]), None)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--augment={text!r}: {part}: {error}") from None
    return step


def _with_partners(read: Read, batch, partners, positions) -> tuple[Batch, Batch]:
    """The examples at `positions` and those at `partners`; no more than the whole batch is read."""
    if positions is not None and 2 * positions.shape[0] < batch:
        both = read(tf.concat([positions, partners], axis=0))
        images, labels = (tf.split(part, 2) for part in both)
        return (images[0], labels[0]), (images[1], labels[1])
    everything = read(None)
    own = everything if positions is None else _rows(everything, positions)
    return own, _rows(everything, partners)


def _rows(examples: Batch, positions) -> Batch:
    return tuple(tf.gather(part, positions) for part in examples)


def _functions() -> dict[str, Callable]:
    return {
        name: value
        for name, value in globals().items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and list(inspect.signature(value).parameters)[:3] == ["images", "labels", "random"]
    }


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def crop(images, labels, random, padding: float):
    """Pads by `padding` black pixels on each side and crops at random to the size before.

    He et al. 2015, arXiv:1512.03385, section 4.2, with 4 pixels on CIFAR-10.
    """
    rows, columns = _shifts(images, random, padding)
    around = [int(padding)] * 2
    padded = tf.pad(images, [[0, 0], around, around, [0, 0]])
    return _gather(padded, rows + around[0], columns + around[0]), labels


def reflect_crop(images, labels, random, padding: float):
    """`crop` with the image mirrored at its edges in place of black.

    Jordan 2024, arXiv:2404.00498, with 2 pixels on CIFAR-10.
    """
    _, height, width = sizes(images)
    rows, columns = _shifts(images, random, padding)
    return _gather(images, _reflect(rows, height), _reflect(columns, width)), labels


def _shifts(images, random, padding: float) -> tuple:
    """(rows, columns), int32 [n, H] and [n, W]: an image's own, all moved by up to `padding`."""
    _require(
        1 <= padding <= MAX_PADDING and padding == int(padding),
        f"the padding must be a whole number of pixels, at most {MAX_PADDING}",
    )
    _, height, width = sizes(images)
    drawn = random.uniform((2, 1), 0, 2 * int(padding) + 1, tf.int32) - int(padding)
    top, left = tf.unstack(drawn, axis=1)
    return top + tf.range(height), left + tf.range(width)


def _reflect(index, size):
    """Indices mirrored at 0 and at size - 1."""
    return tf.clip_by_value(size - 1 - tf.abs(size - 1 - tf.abs(index)), 0, size - 1)


def _gather(images, rows, columns):
    # Rows first: they are contiguous, and then only the columns that stay are moved.
    return tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)


def resized_crop(images, labels, random, smallest: float = 0.08, largest: float = 1.0):
    """Crops each image to a random share of its area, `smallest` to `largest`, and resizes that.

    Szegedy et al. 2014, arXiv:1409.4842, section 6, with its shares. As the first augmentation of a
    folder it crops the files themselves. A file that cannot be read has a label of zeros, so that it
    does not count.
    """
    _require(0 < smallest <= largest <= 1, "the shares must be above 0, rising and at most 1")
    sides = random.mapped(
        lambda drawn: crops.sides_of(drawn, smallest, largest), shape=(2, crops.TRIES)
    )
    place = random.uniform((2,))
    if not isinstance(images, crops.Encoded):
        return crops.of_pixels(images, sides, place), labels
    pixels, good = crops.of_files(images, sides, place)
    return pixels, tf.where(good[:, None], labels, 0.0)


def flip(images, labels, random):
    """Mirrors each image left to right with probability one half."""
    return mirror(images, random.uniform() < 0.5), labels


def vflip(images, labels, random):
    """Turns each image upside down, as a mirror does, with probability one half."""
    return mirror(images, random.uniform() < 0.5, axis=1), labels


def altflip(images, labels, random):
    """Mirrors each image left to right in every second pass over the data.

    So two passes show both forms of each image. Which images are mirrored first is random.
    Jordan 2024, arXiv:2404.00498, section 3.6.
    """
    return mirror(images, random.alternating()), labels


def cutout(images, labels, random, size: float):
    """Blackens a square of `size` pixels around a random point; it may reach over the edge.

    DeVries and Taylor 2017, arXiv:1708.04552 (16 pixels on CIFAR-10, 8 on CIFAR-100).
    """
    _require(size >= 1 and size == int(size), "the size must be a whole number of pixels")
    _, height, width = sizes(images)
    top, left = _random_boxes(random, height, width)
    inside = box_mask(top, left, int(size), int(size), height, width)
    return tf.where(inside, tf.zeros_like(images), images), labels


def erasing(images, labels, random, probability: float):
    """Greys out, with this probability, a rectangle of 2 % to 33 % of the area inside the image.

    Zhong et al. 2017, arXiv:1708.04896 (0.5 on CIFAR-10), with PyTorch's areas and ratios of the
    sides. PyTorch erases images that are normalized, with 0: their mean. The grey is the 0 of ours.
    """
    _require(0 < probability <= 1, "the probability must be above 0 and at most 1")
    _, height, width = sizes(images)
    high, wide = (tf.cast(side, tf.float32) for side in (height, width))
    share = random.uniform((1, 1, 1), *ERASED_AREA)
    ratio = random.mapped(tf.exp, *map(math.log, ERASED_RATIO))[:, None, None, None]
    # A rectangle of this area that does not fit is made as high or as wide as the image.
    rows = tf.clip_by_value(tf.sqrt(share * ratio * high * wide), share * high, high)
    columns = tf.clip_by_value(tf.round(share * high * wide / rows), 1.0, wide)
    rows = tf.clip_by_value(tf.round(rows), 1.0, high)
    place = random.uniform((2, 1, 1, 1))
    top, left = place[:, 0] * (high - rows + 1), place[:, 1] * (wide - columns + 1)
    top, left, rows, columns = (tf.cast(x, tf.int32) for x in (top, left, rows, columns))
    inside = box_mask(top + rows // 2, left + columns // 2, rows, columns, height, width)
    inside &= random.uniform((1, 1, 1)) < probability
    return tf.where(inside, tf.cast(GREY, images.dtype), images), labels


def rotate(images, labels, random, degrees: float):
    """Rotates each image about its centre by an angle of +- `degrees`; what comes in is grey."""
    _require(0 < degrees <= 180, "the degrees must be above 0 and at most 180")
    limit = math.radians(degrees)
    turns = random.mapped(lambda a: tf.stack([tf.cos(a), tf.sin(a)], 1), -limit, limit)
    cos, sin = tf.unstack(turns, axis=1)
    zero = tf.zeros_like(cos)
    return affine(tf.cast(images, tf.float32), cos, sin, zero, zero, zero, zero), labels


def color(images, labels, random, strength: float):
    """Changes brightness, contrast and saturation, each by a factor in 1 +- `strength`.

    In this order, as in Krizhevsky's successors' ImageNet training (0.4).
    """
    _require(0 < strength <= 1, "the strength must be above 0 and at most 1")
    factors = random.uniform((3, 1, 1, 1), 1 - strength, 1 + strength)
    images = tf.cast(images, tf.float32)
    images = clip(images * factors[:, 0])
    images = blend(mean_grey(images), images, factors[:, 1])
    return blend(grey(images), images, factors[:, 2]), labels


def mixup(images, labels, random, partners, alpha: float):
    """Mixes each image and its label with another's: shares from Beta(alpha, alpha).

    Zhang et al. 2017, arXiv:1710.09412 (alpha 1.0 on CIFAR-10, 0.2 on ImageNet).
    """
    share = random.beta(alpha)[:, None]
    pixels = share[:, None, None]
    images, others = (tf.cast(x, tf.float32) for x in (images, partners[0]))
    return images * pixels + others * (1 - pixels), labels * share + partners[1] * (1 - share)


def cutmix(images, labels, random, partners, alpha: float):
    """Pastes a random box of another image; labels are mixed by the areas that are seen.

    Yun et al. 2019, arXiv:1905.04899 (alpha 1.0 on CIFAR-10 and ImageNet).
    """
    _, height, width = sizes(images)
    side = tf.sqrt(1.0 - random.beta(alpha))[:, None, None, None]
    box_height = tf.cast(tf.round(side * tf.cast(height, tf.float32)), tf.int32)
    box_width = tf.cast(tf.round(side * tf.cast(width, tf.float32)), tf.int32)
    y, x = _random_boxes(random, height, width)
    inside = box_mask(y, x, box_height, box_width, height, width)
    seen = 1.0 - tf.reduce_mean(tf.cast(inside, tf.float32), axis=[1, 2])
    return tf.where(inside, partners[0], images), labels * seen + partners[1] * (1 - seen)


def randaugment(images, labels, random, operations: float, magnitude: float):
    """Applies `operations` of 14 transformations, chosen at random for each image, at one magnitude.

    Cubuk et al. 2019, arXiv:1909.13719: the operations and ranges of its reference
    implementation, magnitude 0 to 10 (N=2, M=9 on ImageNet; N=3, M=4 and more on CIFAR-10);
    translation is up to a third of the side. Areas that come in from outside are grey.
    """
    _require(
        1 <= operations <= MAX_OPERATIONS and operations == int(operations),
        f"the number of operations must be whole and at most {MAX_OPERATIONS}",
    )
    _require(0 <= magnitude <= 10, "the magnitude must be from 0 to 10")
    images = tf.cast(images, tf.float32)
    for _ in range(int(operations)):
        images = _one_randaugment(images, random, magnitude / 10.0)
    return images, labels


def _one_randaugment(images, random, level):
    """One operation of `level` in [0, 1]. All images go through all formulas and keep what they drew:
    on small images that is far faster than a branch for each.
    """
    _, height, width = sizes(images)
    choice = random.uniform((1, 1, 1), 0, 14, tf.int32)
    sign = tf.where(random.uniform() < 0.5, -1.0, 1.0)

    def chosen(operation):
        return tf.cast(tf.equal(choice[:, 0, 0, 0], operation), tf.float32) * sign

    moved = affine(
        images,
        # Exact values; those of a tensor are not: see `Random`.
        cos=tf.where(chosen(0) == 0.0, 1.0, math.cos(level * math.pi / 6)),
        sin=chosen(0) * math.sin(level * math.pi / 6),
        shear_x=chosen(1) * (level * 0.3),
        shear_y=chosen(2) * (level * 0.3),
        shift_x=chosen(3) * (level * tf.cast(width, tf.float32) / 3),
        shift_y=chosen(4) * (level * tf.cast(height, tf.float32) / 3),
    )
    factor = 1.0 + sign[:, None, None, None] * 0.9 * level
    result = tf.where(choice <= 4, moved, images)
    result = tf.where(choice == 5, clip(images * factor), result)  # brightness
    result = tf.where(choice == 6, blend(mean_grey(images), images, factor), result)  # contrast
    result = tf.where(choice == 7, blend(grey(images), images, factor), result)  # colour
    result = tf.where(choice == 8, blend(smooth(images), images, factor), result)  # sharpness
    bits = 8 - round(level * 4)
    result = tf.where(choice == 9, tf.floor(images / 2 ** (8 - bits)) * 2 ** (8 - bits), result)
    threshold = 256.0 * (1.0 - level)
    result = tf.where(choice == 10, tf.where(images < threshold, images, 255.0 - images), result)
    result = tf.where(choice == 11, autocontrast(images), result)
    return tf.where(choice == 12, equalize(images), result)  # 13 is the identity


def _random_boxes(random, height, width):
    """(row, column), each int32 [n, 1, 1, 1], of a random pixel of each image."""
    sides = tf.cast(tf.reshape(tf.stack([height, width]), (2, 1, 1, 1)), tf.float32)
    point = tf.cast(random.uniform((2, 1, 1, 1)) * sides, tf.int32)
    return tf.unstack(point, axis=1)
