"""Each augmentation against what it promises, PIL where it has a counterpart, and the flag's errors."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from keras_cifar.core.errors import UsageError
from keras_cifar.data import augmentation

EACH = (
    "altflip", "color(0.4)", "crop(4)", "cutmix(1.0)", "cutout(6)", "erasing(0.8)", "flip",
    "mixup(0.2)", "randaugment(2,9)", "reflect_crop(2)", "resized_crop", "rotate(20)", "vflip",
)  # fmt: skip
CHAINS = (
    "mixup(0.2)|crop(4)",
    "crop(4)|flip|mixup(0.2)|cutmix(1.0)",
    "mixup(1.0)|randaugment(2,9)|cutmix(1.0)|color(0.4)|mixup(0.2)|cutout(6)",
    "rotate(20)|mixup(0.2)|vflip|erasing(0.5)|flip|rotate(5)|erasing(0.5)",
)


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here leaves anything in Keras."""


def augment(text: str, images, labels=None, seed: int = 0) -> tuple:
    if labels is None:
        labels = np.eye(len(images), dtype=np.float32)
    batch = tf.constant(images), tf.constant(labels)
    images, labels = augmentation.parse(text)(lambda _: batch, len(images), tf.constant([seed, 7]))
    return images.numpy(), labels.numpy()


def noise(count: int, height: int = 16, width: int = 12, seed: int = 0) -> np.ndarray:
    """uint8 [count, height, width, 3] with no black pixel."""
    random = np.random.default_rng(seed)
    return random.integers(1, 256, (count, height, width, 3), dtype=np.uint8)


def flat(count: int, height: int = 8, width: int = 6) -> np.ndarray:
    """Each image of one grey of its own, some levels from the next."""
    greys = (np.arange(count) * (250 // count) + 3).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def is_box(mask: np.ndarray) -> bool:
    return bool(np.array_equal(mask, mask.any(axis=1)[:, None] & mask.any(axis=0)[None, :]))


# ---- All of them


@pytest.mark.parametrize("text", [*EACH, "crop(4)|flip|cutout(8)|mixup(0.2)"])
def test_result_depends_on_the_seed_alone_and_keeps_shape_and_types(text):
    images = noise(16)
    first, again, other = (augment(text, images, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    got, labels = first
    assert (got.dtype, got.shape) == (np.uint8, images.shape)
    assert (labels.dtype, labels.shape) == (np.float32, (16, 16))
    assert not np.array_equal(got, images)
    assert ("mix" in text) != np.array_equal(labels, np.eye(16))


@pytest.mark.parametrize("text", EACH)
def test_images_of_a_batch_are_drawn_independently(text):
    images = np.broadcast_to(noise(1), (32, 16, 12, 3)).copy()
    if "mix" in text:  # equal images cannot show how they are mixed, their labels can
        results = augment(text, images)[1].max(axis=1)
    else:
        results = augment(text, images)[0].reshape(32, -1)
    assert len(np.unique(results, axis=0)) > 1


@pytest.mark.parametrize("text", EACH)
def test_runs_in_a_map_whose_batches_have_no_known_size(text):
    images, labels = noise(10), np.eye(10, dtype=np.float32)
    step = augmentation.parse(text)
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(4)
    assert batches.element_spec[0].shape[0] is None
    got = list(batches.map(lambda *xy: step(lambda _: xy, tf.shape(xy[0])[0], tf.constant([0, 7]))))
    assert [len(x) for x, _ in got] == [4, 4, 2]
    assert all(x.shape[1:] == (16, 12, 3) and x.dtype == tf.uint8 for x, _ in got)
    # Floats may be rounded another way in a graph: by one level, in the image and in its neighbours.
    eager = augment(text, images[:4], labels[:4])[0]
    far = np.abs(got[0][0].numpy().astype(int) - eager) > 1
    assert far.mean() < 0.01


# ---- Some of a batch


def augment_some(text: str, positions: list[int] | None, count: int = 19) -> tuple:
    """(images, labels, positions that were read) of some examples of a batch of noise."""
    # Sides that are no multiple of what a processor computes at once.
    images, labels = noise(count, 15, 11), np.eye(count, dtype=np.float32)
    asked = []

    def read(positions):
        rows = np.arange(count) if positions is None else positions.numpy()
        asked.append(rows.tolist())
        return tf.constant(images[rows]), tf.constant(labels[rows])

    some = None if positions is None else tf.constant(positions, tf.int32)
    images, labels = augmentation.parse(text)(read, count, tf.constant([5, 7]), some)
    assert len(asked) == 1
    return images.numpy(), labels.numpy(), asked[0]


@pytest.mark.parametrize("text", [*EACH, *CHAINS])
def test_example_does_not_depend_on_those_computed_with_it(text):
    images, labels, _ = augment_some(text, None)
    # The last of these, whose partners would be as many as the batch, has it read as a whole.
    for positions in ([18], [2, 3], [4, 0, 17], [5, 6, 7, 8, 9], list(range(7, 19))):
        some = augment_some(text, positions)
        np.testing.assert_array_equal(some[0], images[positions])
        np.testing.assert_array_equal(some[1], labels[positions])


@pytest.mark.parametrize(
    ("text", "most"),
    [("crop(4)|flip|color(0.4)", 2), ("crop(4)|mixup(0.2)|flip", 4), (CHAINS[1], 8)],
)
def test_no_example_is_read_that_is_not_seen_and_no_more_than_the_batch(text, most):
    _, labels, read = augment_some(text, [3, 16])
    assert len(read) == most
    assert read[:2] == [3, 16]
    assert set(np.flatnonzero(labels.any(axis=0))) <= set(read)
    if "mix" in text:
        assert augment_some(text, list(range(10)))[2] == list(range(19))


def test_each_draw_of_an_augmentation_is_another():
    random = augmentation.Random(tf.constant([0, 1]), 50)
    draws = [random.uniform(), random.uniform(), random.beta(1.0), random.beta(1.0)]
    draws += [random.permutation(), random.permutation()]
    assert len(np.unique(draws, axis=0)) == len(draws)
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.5
    assert sorted(draws[4].numpy()) == list(range(50))


# ---- Crop and flip


def offsets(images: np.ndarray, original: np.ndarray, padding: int, mode: str) -> list:
    """The corner, in the padded original, of the window that each image is."""
    height, width, _ = original.shape
    padded = np.pad(original, ((padding, padding), (padding, padding), (0, 0)), mode)
    corners = [(y, x) for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    windows = {padded[y : y + height, x : x + width].tobytes(): (y, x) for y, x in corners}
    assert len(windows) == len(corners)
    return [windows[image.tobytes()] for image in images]


@pytest.mark.parametrize("padding", [1, 2, 4])
@pytest.mark.parametrize(("name", "mode"), [("crop", "constant"), ("reflect_crop", "reflect")])
def test_crop_takes_each_window_of_the_padded_image_about_as_often(padding, name, mode):
    original = noise(1, 10, 7)[0]
    count = 40 * (2 * padding + 1) ** 2
    images = np.broadcast_to(original, (count, *original.shape)).copy()
    got = offsets(augment(f"{name}({padding})", images)[0], original, padding, mode)
    _, times = np.unique(got, axis=0, return_counts=True)
    assert len(times) == (2 * padding + 1) ** 2
    assert times.min() >= 15
    assert times.max() <= 75


def test_flip_mirrors_about_half_and_twice_draws_twice():
    images = noise(400)
    got = augment("flip", images)[0]
    mirrored = (got == images[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (got == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert 160 <= mirrored.sum() <= 240
    assert 160 <= (augment("flip|flip", images)[0] == images).all(axis=(1, 2, 3)).sum() <= 240


def test_vflip_turns_about_half_upside_down_independently_of_flip():
    images = noise(400)
    got = augment("vflip", images)[0]
    turned = (got == images[:, ::-1]).all(axis=(1, 2, 3))
    assert (turned ^ (got == images).all(axis=(1, 2, 3))).all()
    assert 160 <= turned.sum() <= 240
    forms = [images[:, ::y, ::x] for y in (1, -1) for x in (1, -1)]
    both = augment("flip|vflip", images)[0]
    counts = [(both == form).all(axis=(1, 2, 3)).sum() for form in forms]
    assert sum(counts) == 400
    assert min(counts) >= 70


# ---- Rotation


@pytest.mark.parametrize("degrees", [10, 45, 180])
def test_rotate_turns_by_angles_spread_evenly_over_the_range(degrees):
    # A spot off the centre, which turns with the image.
    yy, xx = np.mgrid[-20:21, -20:21]
    spot = 250 * np.exp(-((xx - 12) ** 2 + yy**2) / 8)
    images = np.repeat(spot.astype(np.uint8)[None, :, :, None], 3, axis=3)
    got = augment(f"rotate({degrees})", np.broadcast_to(images, (300, 41, 41, 3)).copy())[0]
    weight = np.where(xx**2 + yy**2 < 18**2, got[..., 0], 0).astype(float)
    turned = np.degrees(np.arctan2((weight * yy).sum((1, 2)), (weight * xx).sum((1, 2))))
    assert np.abs(turned).max() <= degrees + 1
    expected = np.linspace(-degrees, degrees, 300)
    assert np.abs(np.sort(turned) - expected).max() <= degrees * 0.2


def test_rotate_is_that_of_pil_and_comes_in_grey():
    class Chosen(augmentation.Random):
        def mapped(self, function, low, high):
            return function(tf.fill((len(images),), high))

    images = photos()
    got, _ = augmentation.rotate(tf.constant(images), None, Chosen(None, len(images)), 25)
    got = augmentation.to_uint8(got).numpy().astype(int)
    expected = pil(images, lambda image: image.rotate(25, Image.Resampling.BILINEAR))
    assert np.abs(got - expected)[:, 6:-6, 6:-6].max() <= 1
    assert (got[:, 0, 0] == 128).all()


# ---- Erasing and cutout


def test_erasing_greys_a_rectangle_inside_with_its_probability():
    images = np.full((4000, 32, 24, 3), 200, np.uint8)
    for probability in (0.25, 1.0):
        got = augment(f"erasing({probability})", images)[0]
        erased = (got == 128).all(axis=3)
        assert set(np.unique(got)) == {128, 200}
        assert all(map(is_box, erased))
        assert erased.any(axis=(1, 2)).mean() == pytest.approx(probability, abs=0.03)
    share = erased.mean(axis=(1, 2))
    # Uniform but for whole pixels.
    np.testing.assert_allclose(
        np.quantile(share, [0, 0.25, 0.5, 0.75, 1]), [0.02, 0.0975, 0.175, 0.2525, 0.33], atol=0.02
    )
    ratio = erased.any(axis=2).sum(axis=1) / erased.any(axis=1).sum(axis=1)
    large = share > 0.1  # where a pixel more or less changes little
    assert 0.25 < ratio[large].min() < 0.45
    assert 2.2 < ratio[large].max() < 3.8
    assert np.median(ratio[large]) == pytest.approx(1, abs=0.15)
    # Each pixel, also of the border, is erased at times; those in the middle more often.
    times = erased.mean(axis=0)
    assert times.min() > 0.002
    assert times[0, 0] < times[0, 12] < times[16, 12]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 40), (40, 2)])
def test_erasing_leaves_its_rectangle_inside_of_any_image(shape):
    images = np.full((300, *shape, 3), 200, np.uint8)
    erased = (augment("erasing(1)", images)[0] == 128).all(axis=3)
    assert erased.any(axis=(1, 2)).all()
    assert all(map(is_box, erased))
    assert erased.any(axis=0).all()
    assert erased.sum(axis=(1, 2)).max() <= max(1, 0.5 * shape[0] * shape[1])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_cutout_blackens_one_box_of_the_size_or_less_at_the_edge(size):
    images = noise(2000)
    got = augment(f"cutout({size})", images)[0]
    black = (got == 0).all(axis=3)
    assert all(map(is_box, black))
    np.testing.assert_array_equal(got[~black], images[~black])
    assert black.any(axis=2).sum(axis=1).max() == size
    assert black.any(axis=1).sum(axis=1).max() == size
    areas = black.sum(axis=(1, 2))
    assert areas.max() == size**2
    assert areas.min() >= (size - size // 2) ** 2
    assert (areas < size**2).any() == (size > 1)
    assert black.any(axis=0).all()


# ---- Colour


def test_color_of_a_grey_image_is_brightness_within_the_strength():
    images = np.full((500, 4, 4, 3), 100, np.uint8)
    for strength in (0.1, 0.5, 1.0):
        got = augment(f"color({strength})", images)[0]
        assert (got == got[:, :1, :1, :1]).all()
        assert abs(got.min() - 100 * (1 - strength)) <= 4 * strength
        assert abs(got.max() - 100 * (1 + strength)) <= 4 * strength


def test_color_changes_contrast_and_saturation_within_the_strength():
    left, right = (60, 90, 120), (150, 110, 170)
    images = np.repeat([[[left, right]]], 500, axis=0).repeat(2, axis=1).astype(np.uint8)
    got = augment("color(0.2)", images)[0].astype(float)

    def measures(x):
        luma = x @ [0.299, 0.587, 0.114]
        contrast = (luma[:, 0, 1] - luma[:, 0, 0]) / luma.mean(axis=(1, 2))
        chroma = (x[:, 0, 0, 2] - x[:, 0, 0, 0]) / (luma[:, 0, 1] - luma[:, 0, 0])
        return np.array([contrast, chroma])

    factors = measures(got) / measures(images.astype(float))
    np.testing.assert_allclose(factors.min(axis=1), 0.8, atol=0.03)
    np.testing.assert_allclose(factors.max(axis=1), 1.2, atol=0.03)
    assert abs(np.corrcoef(factors)[0, 1]) < 0.2


# ---- Mixing


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_mixup_mixes_pixels_by_the_shares_of_the_labels(alpha):
    images = flat(50)
    got, labels = augment(f"mixup({alpha})", images)
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    assert ((labels > 0).sum(axis=1) <= 2).all()
    expected = labels @ images[:, 0, 0, 0]
    np.testing.assert_allclose(
        got, np.broadcast_to(expected[:, None, None, None], got.shape), atol=0.51
    )


def test_mixup_labels_that_are_mixed_already_still_sum_to_one():
    _, labels = augment("mixup(1.0)|cutmix(1.0)|mixup(0.2)", flat(50))
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    assert labels.min() >= 0
    assert ((labels > 0).sum(axis=1) > 2).any()


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 10.0])
def test_shares_are_of_a_beta_distribution(alpha):
    share = augmentation.Random(tf.constant([0, 1]), 20_000).beta(alpha)
    assert np.mean(share) == pytest.approx(0.5, abs=0.02)
    assert np.var(share) == pytest.approx(0.25 / (2 * alpha + 1), rel=0.05)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_larger_alpha_leaves_fewer_images_almost_as_they_were(name):
    whole = [(augment(f"{name}({a})", flat(50))[1] > 0.95).any(axis=1).mean() for a in (0.2, 100)]
    assert whole[0] > 0.2
    assert whole[1] < 0.1


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmix_labels_are_the_shares_of_the_pixels(alpha):
    images = flat(50)
    got, labels = augment(f"cutmix({alpha})", images)
    shares = (got[..., :1] == images[None, :, 0, 0, 0].reshape(1, 1, 1, 50)).mean(axis=(1, 2))
    np.testing.assert_allclose(labels, shares, rtol=0, atol=1e-6)
    mixed = ((shares > 0) & (shares < 1)).any(axis=1)
    assert mixed.sum() > 5


def test_cutmix_pastes_one_box_of_the_partner():
    images = flat(50)
    got, labels = augment("cutmix(1.0)", images)
    foreign = (got != images).all(axis=3)
    assert all(map(is_box, foreign))
    assert foreign.any(axis=0).all()
    np.testing.assert_allclose(1 - foreign.mean(axis=(1, 2)), np.diag(labels), atol=1e-6)


# ---- RandAugment


@pytest.fixture
def one_operation():
    """(images, operation, level, sign) -> images uint8, with nothing left to chance."""

    def apply(images, operation, level, sign=1):
        class Chosen(augmentation.Random):
            def uniform(self, shape=(), low=0.0, high=1.0, dtype=tf.float32):
                return tf.fill((len(images), *shape), operation if high == 14 else 0.5 * (sign > 0))

        random = Chosen(tf.constant([0, 0]), len(images))
        result = augmentation._one_randaugment(tf.cast(images, tf.float32), random, level)
        return augmentation.to_uint8(result).numpy()

    return apply


def pil(images: np.ndarray, function) -> np.ndarray:
    return np.stack([np.asarray(function(Image.fromarray(image))) for image in images])


def photos(height: int = 24, width: int = 20) -> np.ndarray:
    """Noise, a dark and a bright image of little contrast, a gradient, few levels, one level."""
    wide = noise(1, height, width)[0].astype(int)
    ramp = np.broadcast_to(np.arange(width)[None, :, None] * 9 + 20, wide.shape)
    few = wide // 100 * 90 + 10
    one = np.full_like(wide, 77)
    return np.stack([wide, wide // 4 + 5, wide // 3 + 150, ramp, few, one]).astype(np.uint8)


def affine(matrix):
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("operation", [0, 1, 2], ids=["rotate", "shear_x", "shear_y"])
def test_rotation_and_shear_move_pixels_as_pil(one_operation, operation, level, sign):
    images = photos()
    height, width = images.shape[1:3]
    shear = sign * level * 0.3
    reference = (
        lambda image: image.rotate(sign * level * 30, Image.Resampling.BILINEAR),
        affine((1, shear, -shear * height / 2, 0, 1, 0)),
        affine((1, 0, 0, shear, 1, -shear * width / 2)),
    )[operation]
    got = one_operation(images, operation, level, sign).astype(int)
    inside = np.s_[:, 6:-6, 6:-6]
    assert np.abs(got - pil(images, reference))[inside].max() <= 1


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("operation", "axis"), [(3, 2), (4, 1)], ids=["x", "y"])
def test_translation_moves_by_a_share_of_a_third_of_the_side_and_fills_grey(
    one_operation, operation, axis, sign
):
    images = noise(3, 15, 30)
    pixels = round(0.2 * images.shape[axis] / 3)
    expected = np.roll(images, -sign * pixels, axis)
    edge = [slice(None)] * 4
    edge[axis] = slice(-pixels, None) if sign > 0 else slice(0, pixels)
    expected[tuple(edge)] = 128
    np.testing.assert_array_equal(one_operation(images, operation, 0.2, sign), expected)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("operation", "enhance", "tolerance"),
    [
        (5, ImageEnhance.Brightness, 1),
        (6, ImageEnhance.Contrast, 2),
        (7, ImageEnhance.Color, 2),
        (8, ImageEnhance.Sharpness, 2),
    ],
)
def test_enhancements_are_those_of_pil(one_operation, operation, enhance, tolerance, level, sign):
    images = photos()
    expected = pil(images, lambda image: enhance(image).enhance(1 + sign * 0.9 * level))
    got = one_operation(images, operation, level, sign).astype(int)
    assert np.abs(got - expected).max() <= tolerance


@pytest.mark.parametrize("magnitude", range(11))
def test_posterize_and_solarize_are_those_of_pil(one_operation, magnitude):
    images, bits, threshold = photos(), 8 - round(magnitude * 0.4), 256 - 25.6 * magnitude
    expected = pil(images, lambda image: ImageOps.posterize(image, bits))
    np.testing.assert_array_equal(one_operation(images, 9, magnitude / 10), expected)
    expected = pil(images, lambda image: ImageOps.solarize(image, threshold))
    np.testing.assert_array_equal(one_operation(images, 10, magnitude / 10), expected)


def test_autocontrast_is_that_of_pil(one_operation):
    images = photos()
    got = one_operation(images, 11, 0.9).astype(int)
    assert np.abs(got - pil(images, ImageOps.autocontrast)).max() <= 1
    assert not np.array_equal(got[1], images[1])


@pytest.mark.parametrize(("height", "width"), [(24, 20), (32, 32), (15, 17), (16, 16)])
def test_equalize_is_that_of_pil_and_the_last_is_the_identity(one_operation, height, width):
    images = photos(height, width)
    np.testing.assert_array_equal(one_operation(images, 12, 0.9), pil(images, ImageOps.equalize))
    np.testing.assert_array_equal(one_operation(images, 13, 1.0), images)


@pytest.mark.parametrize("operation", range(11))
def test_magnitude_is_how_far_an_operation_goes(one_operation, operation):
    images = photos()
    changes = [
        np.abs(one_operation(images, operation, level).astype(int) - images).mean()
        for level in (0.0, 0.5, 1.0)
    ]
    assert changes[0] == 0
    assert changes[0] < changes[1] < changes[2]


def test_randaugment_draws_all_operations_and_adds_up_by_number_and_magnitude():
    images = np.broadcast_to(photos()[1], (700, 24, 20, 3)).copy()
    once, twice, weak = (augment(f"randaugment({n})", images)[0] for n in ("1,9", "2,9", "2,1"))
    kinds, times = np.unique(once.reshape(700, -1), axis=0, return_counts=True)
    # Nine operations have a sign, which makes two kinds of each.
    assert len(kinds) == 14 + 9
    assert times.min() >= 10
    assert times.max() <= 80
    assert len(np.unique(twice.reshape(700, -1), axis=0)) > 3 * len(kinds)
    changes = [np.abs(got.astype(int) - images).mean() for got in (weak, twice)]
    assert changes[1] > 1.5 * changes[0]


# ---- The flag


def test_whitespace_and_no_augmentation_change_nothing():
    images = noise(8)
    for text in ("", "   "):
        got, labels = augment(text, images)
        np.testing.assert_array_equal(got, images)
        np.testing.assert_array_equal(labels, np.eye(8))
    expected = augment("crop(4)|randaugment(2,9)", images)[0]
    got = augment("  crop( 4 )  |randaugment(2 , 9) ", images)[0]
    np.testing.assert_array_equal(got, expected)


def test_steps_run_from_left_to_right():
    white = np.full((32, 16, 16, 3), 255, np.uint8)
    cut_last = augment("mixup(1.0)|cutout(8)", white)[0]
    cut_first = augment("cutout(8)|mixup(1.0)", white)[0]
    assert set(np.unique(cut_last)) == {0, 255}
    assert len(np.unique(cut_first)) > 2


def refused(text: str) -> str:
    with pytest.raises(UsageError) as error:
        augmentation.parse(text)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["crap(4)", "flip|Crop(4)", "parse", "Random", "_equalize", "tf", "flip2"]
)
def test_unknown_name_lists_the_choices(name):
    message = refused(name)
    assert name.split("|")[-1].split("(")[0] in message
    choices = ", ".join(sorted(text.split("(")[0] for text in EACH))
    assert message.endswith(f"choose one of: {choices}")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("crop", ["0", "-4", "1.5", "nan", "inf", "four", "4,", "1e10", "", "1,2"]),
        ("flip", ["1"]),
        ("cutout", ["0", "-8", "2.5"]),
        ("vflip", ["1"]),
        ("erasing", ["0", "-0.5", "1.1", ""]),
        ("rotate", ["0", "-15", "181", "nan", ""]),
        ("color", ["0", "-0.4", "1.1"]),
        ("mixup", ["0", "-1", "nan", "inf", ""]),
        ("cutmix", ["0", "-0.1"]),
        ("randaugment", ["0,9", "-1,9", "1.5,9", "2,-1", "2,10.5", "2,nan", "2", "2,9,1"]),
    ],
)
def test_wrong_number_of_arguments_and_number_out_of_range_name_the_step(name, arguments):
    for numbers in arguments:
        step = f"{name}({numbers})"
        assert f"--augment='flip|{step}': {step}: " in refused(f"flip|{step}")
    if name not in ("flip", "vflip"):
        assert "argument" in refused(name)


@pytest.mark.parametrize(
    "text",
    ["crop(4", "crop 4", "crop 4)", "|", "crop(4)|", "crop(4)||flip", "crop((4))", "flip;", "(4)"],
)
def test_bad_syntax_shows_the_form(text):
    message = refused(text)
    assert f"--augment={text!r}" in message
    assert "name(number, ...)" in message
