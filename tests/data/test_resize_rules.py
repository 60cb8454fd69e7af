"""The two rules of resizing, against a plain one in Pillow, by every way that images take."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_cifar import data
from keras_cifar.data.images import (
    covered,
    decode_images,
    load_image,
    resize_each,
    resize_images,
    with_margin,
)
from keras_cifar.inference import image_files
from tests.data.test_images import noise, photo, saved

SHAPES = ((60, 300), (300, 60), (120, 80), (90, 135), (3, 5), (1, 1), (40, 56), (46, 64), (64, 64))
SIZES = ((40, 56), (56, 40), (48, 48))


def plain(pixels: np.ndarray, size: tuple[int, int], rule: str) -> np.ndarray:
    """The rules as a person would write them down: uint8 [*size, 3]."""
    image = Image.fromarray(pixels)
    if rule == "stretch":
        return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    height, width = round(size[0] / 0.875), round(size[1] / 0.875)
    if height / image.height >= width / image.width:
        width = int(image.width * height / image.height)
    else:
        height = int(image.height * width / image.width)
    scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return scaled[top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize("rule", ["stretch", "crop"])
@pytest.mark.parametrize("size", SIZES)
def test_every_way_follows_the_rule(tmp_path, size, rule):
    paths = [saved(tmp_path, photo(*shape), f"{shape}.png") for shape in SHAPES]
    expected = np.stack([plain(photo(*shape), size, rule) for shape in SHAPES]).astype(int)
    loaded = np.stack([load_image(path, size, rule) for path in paths])
    assert np.abs(loaded - expected).max() <= 2
    assert np.abs(loaded - expected).mean() < 0.5
    files = tf.constant([path.read_bytes() for path in paths])
    in_graph, good = tf.function(lambda files: decode_images(files, size, rule))(files)
    assert good.numpy().all()
    np.testing.assert_array_equal(in_graph, loaded)
    (batch,) = image_files.decode(((str(path), None) for path in paths), size, rule)
    np.testing.assert_array_equal([pixels for _, pixels, _ in batch], loaded)
    together = resize_each([photo(*shape) for shape in SHAPES], size, rule)
    np.testing.assert_array_equal(together, loaded)


@pytest.mark.parametrize("size", [*SIZES, (224, 224)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_crop_is_the_middle_of_a_resized_image(shape, size):
    """Scaling and cropping in one kernel rounds a few levels otherwise, by one."""
    pixels = noise(*shape)
    height, width = shape
    cover = [round(side / 0.875) for side in size]
    by_height = cover[0] * width >= cover[1] * height
    whole = (cover[0], width * cover[0] // height) if by_height else (
        height * cover[1] // width, cover[1]
    )  # fmt: skip
    top, left = (round((a - b) / 2) for a, b in zip(whole, size, strict=True))
    resized = resize_images(pixels, whole).numpy().astype(int)
    expected = resized[top : top + size[0], left : left + size[1]]
    difference = np.abs(resize_images(pixels, size, "crop").numpy() - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.005


def test_a_crop_keeps_proportions_and_cuts_the_border():
    """A disc stays a disc; its image has a red border, of which an eighth of the side goes."""
    y, x = np.mgrid[:256, :512]
    pixels = np.where((y - 128) ** 2 + (x - 256) ** 2 < 80**2, 255, 0)[..., None].repeat(3, 2)
    pixels[:14], pixels[-14:], pixels[:, :142], pixels[:, -142:] = 4 * [[255, 0, 0]]
    cropped = resize_images(pixels.astype(np.uint8), (224, 224), "crop").numpy()
    assert (cropped[..., 0] == cropped[..., 1]).all()
    np.testing.assert_array_equal(cropped, pixels[16:240, 144:368])
    stretched = resize_images(pixels.astype(np.uint8), (224, 224)).numpy()
    assert (stretched[..., 0] != stretched[..., 1]).mean() > 0.3


def test_an_image_of_the_size_is_zoomed_by_crop_alone():
    pixels = photo(48, 48)
    np.testing.assert_array_equal(resize_images(pixels, (48, 48)), pixels)
    (cropped,) = resize_each([pixels], (48, 48), "crop")
    assert covered((48, 48)) == (55, 55)
    assert np.abs(cropped - plain(pixels, (48, 48), "crop").astype(int)).max() <= 2
    assert (cropped != pixels).any()


def test_a_batch_is_cropped_as_its_images_are():
    batch = np.stack([noise(90, 50, seed=seed) for seed in range(3)])
    expected = [resize_images(pixels, (40, 56), "crop") for pixels in batch]
    np.testing.assert_array_equal(resize_images(batch, (40, 56), "crop"), expected)


@pytest.mark.parametrize("size", [*SIZES, (224, 224), (8, 8), (1, 1), (33, 7)])
def test_a_crop_takes_off_the_margin_that_was_added(size):
    images = np.stack([noise(*size, seed=seed) for seed in range(2)])
    bordered = with_margin(images)
    assert bordered.shape[1:3] == covered(size)
    np.testing.assert_array_equal(resize_images(bordered, size, "crop"), images)


def test_huge_images_are_close_to_the_rule(tmp_path):
    """They are averaged in blocks first, by how much the crop reduces them."""
    for shape in ((1000, 1400), (40, 3000)):
        path = saved(tmp_path, photo(*shape), "a.bmp")
        expected = plain(photo(*shape), (16, 24), "crop").astype(int)
        assert np.abs(load_image(path, (16, 24), "crop") - expected).mean() < 1.5


def test_a_strip_of_extreme_proportions_is_cropped(tmp_path):
    strip = np.zeros((1, 200_000, 3), np.uint8)
    strip[:, 100_000:] = 200
    cropped = load_image(saved(tmp_path, strip), (16, 16), "crop")
    assert (cropped[:, :8] < 101).all()
    assert (cropped[:, 8:] > 99).all()


@pytest.mark.parametrize("orientation", [3, 6])
def test_the_upright_image_is_cropped(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, photo(60, 90), "a.jpg", exif=exif, quality=95)
    expected = plain(load_image(path), (40, 56), "crop").astype(int)
    assert np.abs(load_image(path, (40, 56), "crop") - expected).max() <= 2


def test_a_folder_follows_the_rule(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index, shape in enumerate(SHAPES):
            Image.fromarray(photo(*shape)).save(tmp_path / split / "a" / f"{index}.png")
    prints = set()
    for image_size, resize, rule in (
        ("40x56", "auto", "stretch"),
        ("40x56", "crop", "crop"),
        ("66x80", "auto", "crop"),
        ("66x80", "stretch", "stretch"),
    ):
        split = data.load(
            f"folder:{tmp_path}", image_size=image_size, resize=resize, val_fraction=0
        ).train
        size = tuple(map(int, image_size.split("x")))
        expected = [load_image(tmp_path / "train" / "a" / f"{i}.png", size, rule) for i in range(9)]
        np.testing.assert_array_equal(split.images, expected)
        prints.add(split.fingerprint)
    assert len(prints) == 4
