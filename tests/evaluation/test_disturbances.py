"""Disturbances: the common properties and the effect of each."""

import io

import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from sklearn.datasets import load_digits

from keras_cifar.evaluation import disturbances
from keras_cifar.evaluation.disturbances import DISTURBANCES, LEVELS, apply


@pytest.fixture(scope="module")
def images():
    """uint8 [40, 32, 32, 3]: digits, each in a colour of its own."""
    large = load_digits().images[:40].repeat(4, axis=1).repeat(4, axis=2)
    colours = np.random.default_rng(0).uniform(0.3, 1, (40, 1, 1, 3))
    return np.round(large[..., None] * (240 / 16) * colours + 10).astype(np.uint8)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_strength_0_changes_nothing_and_each_other_more_than_the_one_before(name, images):
    before = images.copy()
    assert len(DISTURBANCES[name].strengths) == LEVELS
    found = [apply(name, images, level) for level in range(LEVELS + 1)]
    changes = [np.abs(disturbed.astype(int) - images).mean() for disturbed in found]
    assert (np.diff(changes) > 0).all(), changes
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(found[0], images)
    assert not np.shares_memory(found[0], images)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_a_disturbance_depends_on_the_seed_and_the_row(name, images):
    first = apply(name, images, 3, seed=1)
    np.testing.assert_array_equal(first, apply(name, images, 3, seed=1))
    others = [apply(name, images, 3, seed=2), apply(name, images, 3, seed=1, first_row=40)]
    drawn = name not in ("contrast", "saturation", "blur", "jpeg")
    assert [(first != other).any() for other in others] == [drawn, drawn]


@pytest.mark.parametrize("name", DISTURBANCES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 3), (1, 32, 32), (3, 9, 40), (0, 8, 8)])
def test_any_size_and_number(name, shape, random):
    images = random.integers(0, 256, (*shape, 3), np.uint8)
    for level in (1, LEVELS):
        disturbed = apply(name, images, level)
        assert disturbed.dtype == np.uint8
        assert disturbed.shape == images.shape


@pytest.mark.parametrize("name", sorted(set(DISTURBANCES) - {"noise"}))
def test_grey_stays_grey(name, images):
    grey = images[..., :1].repeat(3, axis=-1)
    disturbed = apply(name, grey, LEVELS)
    assert (np.ptp(disturbed, axis=-1) == 0).all()
    assert (disturbed != grey).any() == (name != "saturation")


def test_a_gallery_has_the_first_image_under_everything(images):
    found = disturbances.gallery(images, seed=3)
    assert list(found) == list(DISTURBANCES)
    for name, row in found.items():
        assert row.shape == (LEVELS + 1, 32, 32, 3)
        expected = apply(name, images[: disturbances.NEIGHBOURS], 4, seed=3)[0]
        np.testing.assert_array_equal(row[[0, 4]], [images[0], expected])


@pytest.mark.parametrize("size", [(9, 9), (8, 8)])
def test_a_rotation_by_90_degrees_moves_pixels_whole(size, random):
    images = random.integers(0, 256, (20, *size, 3), np.uint8)
    turned = disturbances.rotation(images, random, 90)
    left, right = (
        (turned == np.rot90(images, k, axes=(1, 2))).all(axis=(1, 2, 3)) for k in (1, -1)
    )
    np.testing.assert_array_equal(left, ~right)
    assert 0 < left.sum() < 20


def test_a_scale_of_2_doubles_or_halves_lengths_and_mirrors_the_image_at_its_edges(random):
    images = random.integers(0, 256, (20, 9, 9, 3), np.uint8)
    halved = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), "symmetric")[:, ::2, ::2]
    scaled, inner = disturbances.scale(images, random, 2), images[:, 2:7, 2:7].astype(float)
    smaller = (scaled == halved).all(axis=(1, 2, 3))
    larger = (scaled[:, ::2, ::2] == inner).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(smaller, ~larger)
    assert 0 < larger.sum() < 20
    between = (inner[:, :, 1:] + inner[:, :, :-1]) / 2  # by bilinear interpolation
    np.testing.assert_allclose(scaled[larger, ::2, 1::2], between[larger], atol=0.51)


def test_a_tilted_image_is_shorter_one_way_and_larger_where_it_is_nearer(random):
    images = np.zeros((200, 65, 65, 3), np.uint8)
    images[:, 24:41, 24:41] = 255  # a square of 17 pixels
    seen = disturbances.perspective(images, random, 60)[:, 19:46, 19:46, 0] > 127
    assert seen[:, 13, 13].all()  # the centre stays
    # To half the length, and otherwise as it is: the area is a bit more than half, for the distance.
    assert seen.sum(axis=(1, 2)) == pytest.approx(17 * 17 / 2, rel=0.15)
    ahead = seen[:, :13].sum(axis=(1, 2)) - seen[:, 14:].sum(axis=(1, 2)).astype(float)
    assert ahead.min() < -10
    assert ahead.max() > 10


def test_a_deformation_moves_points_by_its_strength_and_smoothly(random):
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 2, (60, 64, 64, 3)).copy()
    moved = (disturbances.elastic(ramp, random, 0.04).astype(float) - ramp)[:, 10:-10] / 2
    # Of the two directions one is seen: 0.04 * 64 pixels over the square root of 2.
    assert np.sqrt((moved**2).mean()) == pytest.approx(0.04 * 64 / np.sqrt(2), rel=0.1)
    rows = moved[:, 0, :, 0]
    assert np.abs(np.diff(rows, axis=1)).mean() < 0.3 * np.abs(rows).mean()  # and smoothly


def test_occlusion_covers_its_share_with_a_grey_box(random):
    images = np.zeros((30, 40, 20, 3), np.uint8)
    covered = disturbances.occlusion(images, random, 0.25) == disturbances.GREY
    assert (covered.sum(axis=(1, 2)) == 40 * 20 / 4).all()
    assert covered.any(axis=2).sum(axis=1).tolist() == [[20] * 3] * 30  # of the image's proportions
    assert len(np.unique(covered, axis=0)) > 10


def test_clutter_comes_from_other_images_in_its_share(random):
    colours = np.array([0, 30, 60], np.uint8)
    images = np.zeros((30, 32, 32, 3), np.uint8) + colours
    images += np.arange(30, dtype=np.uint8)[:, None, None, None]
    disturbed = disturbances.clutter(images, random, 0.4)
    foreign = (disturbed != images).mean(axis=(1, 2, 3))
    assert (foreign >= 0.09).all()  # all four boxes at one place
    assert (foreign <= 0.4).all()
    assert foreign.mean() > 0.25
    assert max(len(np.unique(image[..., 0])) for image in disturbed) == 1 + disturbances.BOXES
    assert (np.ptp(disturbed - colours, axis=-1) == 0).all()  # pixels stay whole


def test_brightness_is_the_value_of_hsv(random):
    colours = random.integers(0, 256, (300, 1, 1, 3), np.uint8)
    colours[:5] = 0
    disturbed = disturbances.brightness(colours, random, 0.2) / 255
    hue, saturation, value = np.moveaxis(rgb_to_hsv(colours / 255), -1, 0)
    close = []
    for wanted in (np.minimum(1, value + 0.2), value * 0.6):
        expected = hsv_to_rgb(np.stack([hue, saturation, wanted], axis=-1))
        close.append(np.abs(disturbed - expected).max(axis=(1, 2, 3)) < 0.6 / 255)
    brighter, darker = close
    assert (brighter | darker).all()
    assert 0 < brighter.sum() < 300


def test_contrast_and_saturation_leave_their_share(images):
    def spread(pixels):
        return pixels.astype(float).std(axis=(1, 2)).mean(), np.ptp(pixels, axis=-1).mean()

    contrast, saturation = spread(images)
    left = spread(disturbances.contrast(images, None, 0.3))[0] / contrast
    assert left == pytest.approx(0.3, rel=0.02)
    left = spread(disturbances.saturation(images, None, 0.4))[1] / saturation
    assert left == pytest.approx(0.4, rel=0.02)


def test_noise_has_its_deviation_in_each_colour(random):
    images = np.full((10, 32, 32, 3), 128, np.uint8)
    noise = disturbances.noise(images, random, 0.1).astype(float) - 128
    assert noise.std(axis=(0, 1, 2)) == pytest.approx(25.5, rel=0.03)
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.05


@pytest.mark.parametrize("side", [32, 64])
def test_a_blurs_width_is_relative_to_the_image(side):
    images = np.zeros((1, side, side, 3), np.uint8)
    images[:, side // 2 :] = 255
    edge = disturbances.blur(images, None, 2)[0, :, 0, 0]
    # A Gaussian's integral goes from 16 to 84 % within one deviation to each side.
    width = np.interp([0.1587 * 255, 0.8413 * 255], edge, np.arange(side))
    assert np.diff(width) == pytest.approx(2 * 2 * side / 32, rel=0.05)


def test_jpeg_is_pillows(images):
    file = io.BytesIO()
    Image.fromarray(images[3]).save(file, "JPEG", quality=50)
    with Image.open(file) as image:
        np.testing.assert_array_equal(disturbances.jpeg(images, None, 50)[3], np.asarray(image))
