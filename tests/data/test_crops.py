"""`resized_crop`: which parts, the pixels of files of every kind, bad files, and who reads what."""

import collections
import itertools
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_cifar import data
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.data import augmentation, crops, folder
from keras_cifar.data.images import load_image
from keras_cifar.distributed.sharding import ReplicaRange
from tests.data.test_exif import TAG
from tests.data.test_images import photo

SIZE = (24, 32)


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here leaves anything in Keras."""


def draws(count: int, smallest: float = 0.08, largest: float = 1.0, seed: int = 0) -> tuple:
    random = np.random.default_rng(seed)
    uniform = random.random((count, 2, crops.TRIES), np.float32)
    return crops.sides_of(tf.constant(uniform), smallest, largest), random.random(
        (count, 2), np.float32
    )


# ---- Which part


@pytest.mark.parametrize(("smallest", "largest"), [(0.08, 1.0), (0.5, 0.6)])
def test_parts_have_the_shares_and_ratios_asked_for(smallest, largest):
    found = crops.box(*draws(2000, smallest, largest), tf.constant([300, 400])).numpy()
    top, left, height, width = found.T
    assert (found >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    share, ratio = height * width / 120_000, width / height
    assert smallest - 0.01 <= share.min() < smallest + 0.05
    assert largest - 0.1 < share.max() <= largest + 0.01
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.05
    # They are everywhere.
    assert 0.4 < (left / np.maximum(1, 400 - width)).mean() < 0.6
    assert {0} < set(top)
    assert (top + height == 300).any()


def test_part_of_a_narrow_image_is_the_middle():
    for sides, expected in (((30, 3000), (0, 1480, 30, 40)), ((3000, 30), (1480, 0, 40, 30))):
        found = crops.box(*draws(50, 0.9, 1.0), tf.constant(sides)).numpy()
        np.testing.assert_array_equal(found, [expected] * 50)


def test_images_in_memory_are_cropped_as_pillow_crops_and_enlarges():
    images = np.stack([photo(40, 30), photo(30, 40).transpose(1, 0, 2)] * 4)
    sides, place = draws(8, 0.2, 1.0)
    got = crops.of_pixels(tf.constant(images), sides, place).numpy()
    for mine, image, part in zip(
        got, images, crops.box(sides, place, tf.constant([40, 30])).numpy(), strict=True
    ):
        top, left, height, width = part
        limits = left, top, left + width, top + height
        expected = Image.fromarray(image).resize((30, 40), Image.Resampling.BILINEAR, limits)
        np.testing.assert_allclose(mine, np.asarray(expected), atol=1.01)


# ---- The pixels of files


def encoded(paths: list, size: tuple[int, int] = SIZE, read=None) -> crops.Encoded:
    names = tf.constant([os.fsencode(path) for path in paths])
    return crops.Encoded(names, tf.range(len(paths), dtype=tf.int64), size, read)


def no_python(row):
    raise AssertionError("Python is not needed for it")


def expected_part(pixels: np.ndarray, sides, place, size=SIZE) -> np.ndarray:
    top, left, height, width = crops.box(sides, place, tf.constant(pixels.shape[:2])).numpy()
    part = pixels[top : top + height, left : left + width]
    return crops.resized(tf.constant(part), size).numpy()


def cut(paths: list, sides, place, size=SIZE, read=no_python) -> tuple:
    @tf.function
    def run():
        return crops.of_files(encoded(paths, size, read), sides, tf.constant(place))

    return tuple(part.numpy() for part in run())


def test_jpeg_files_of_any_orientation_give_the_part_of_the_upright_image(tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "DIVISORS", (1,))
    paths = []
    for number, grey in itertools.product(range(9), (False, True)):
        exif = Image.Exif()
        exif[TAG] = number
        image = Image.fromarray(photo(60, 83)).convert("L" if grey else "RGB")
        paths.append(tmp_path / f"{number} {grey}.jpg")
        image.save(paths[-1], quality=90, exif=exif, progressive=number == 5)
    sides, place = draws(len(paths), 0.3, 0.9)
    pixels, good = cut(paths, sides, place)
    assert good.all()
    for number, path in enumerate(paths):
        expected = expected_part(load_image(path), sides[number], place[number])
        # libjpeg interpolates colours without the pixels beyond the edge of a part.
        np.testing.assert_allclose(pixels[number], expected, rtol=0, atol=4, err_msg=str(path))
        assert (pixels[number] == expected).mean() > 0.9


def test_large_jpeg_files_are_decoded_smaller_and_look_the_same(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    Image.fromarray(photo(600, 800)).save(path, quality=95)
    sides, place = draws(12, 0.1, 1.0)
    small, _ = cut([path] * 12, sides, place)
    monkeypatch.setattr(crops, "DIVISORS", (1,))
    whole, _ = cut([path] * 12, sides, place)
    assert not np.array_equal(small, whole)
    # Parts of other places differ by 50 and more; the borders are moved by up to 7 pixels.
    assert np.abs(small.astype(int) - whole).mean() < 5


@pytest.mark.parametrize(
    ("side", "shape", "kernel"),
    [
        (16, (30, 25), "antialiased"),
        (64, (100, 70), "antialiased"),
        (64, (50, 100), "antialiased"),
        (72, (100, 80), "areas"),
        (72, (60, 80), "bilinear"),
    ],
)
def test_small_images_are_resized_as_validation_is(side, shape, kernel):
    pixels, size = tf.constant(photo(*shape)), (side, side)
    kernels = {
        "antialiased": tf.image.resize(pixels, size, antialias=True),
        "areas": tf.raw_ops.ResizeArea(images=pixels[None], size=size)[0],
        "bilinear": tf.image.resize(pixels, size),
    }
    found = crops.resized(pixels, size).numpy()
    gaps = {name: np.abs(found - value.numpy()).max() for name, value in kernels.items()}
    assert min(gaps, key=gaps.get) == kernel
    assert gaps[kernel] <= 0.51


def test_other_formats_and_colours_are_read_by_python(tmp_path):
    image = Image.fromarray(photo(40, 50))
    names = {
        "a.png": image, "b.tiff": image, "c.webp": image, "d.jpg": image.convert("CMYK"),
        "e.gif": image.convert("P"), "f.jpg": image,
    }  # fmt: skip
    paths = [tmp_path / name for name in names]
    for path, pixels in zip(paths, names.values(), strict=True):
        pixels.save(path)
    asked = []

    def read(row):
        asked.append(int(row))
        return load_image(paths[row]), True

    sides, place = draws(len(paths), 0.3, 0.9)
    pixels, good = cut(paths, sides, place, read=read)
    assert good.all()
    assert sorted(asked) == [0, 1, 2, 3, 4]
    for number, path in enumerate(paths):
        expected = expected_part(load_image(path), sides[number], place[number])
        np.testing.assert_array_equal(pixels[number], expected, err_msg=path.name)


# ---- A folder


AUGMENT = "resized_crop(0.2,1)|flip|mixup(0.2)"


def write_photos(root, count: int = 40, kind: str = "jpg"):
    """root/train/<a|b>/N.jpg and root/test, of sides that differ."""
    for number in range(count):
        folder = root / ("test" if number % 5 == 0 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = photo(30 + number % 7, 40 - number % 9)
        pixels[:, :, number % 3] = 255 - pixels[:, :, number % 3]
        Image.fromarray(pixels).save(folder / f"{number:02}.{kind}")
    return root


def loaded(root, **options) -> data.Dataset:
    options = {"image_size": "24x32", "augment": AUGMENT} | options
    return data.load(f"folder:{root}", **options)


def take(dataset: data.Dataset, count: int, *arguments, augment: str = AUGMENT) -> list:
    batches = data.training_batches(dataset.train, 2, 8, augment, 3, *arguments)
    return [(x.numpy(), y.numpy()) for x, y in itertools.islice(batches, count)]


def assert_same(got: list, expected: list) -> None:
    for mine, other in zip(got, expected, strict=True):
        for array, wanted in zip(mine, other, strict=True):
            np.testing.assert_array_equal(array, wanted)


def test_each_pass_has_other_parts_and_any_start_and_replicas_the_same_images(tmp_path):
    dataset = loaded(write_photos(tmp_path))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (28, 4, 8)
    batches = take(dataset, 7)  # three of a pass
    assert batches[0][0].shape == (8, 24, 32, 3)
    assert not np.array_equal(batches[0][0], batches[3][0])
    assert_same(take(dataset, 3, 4), batches[4:])
    shards = [take(dataset, 7, 0, ReplicaRange(number, 1, 2)) for number in range(2)]
    joined = [
        [np.concatenate(part) for part in zip(*step, strict=True)]
        for step in zip(*shards, strict=True)
    ]
    assert_same(joined, batches)


def test_training_images_are_not_decoded_beforehand(tmp_path, monkeypatch):
    root, opened = write_photos(tmp_path, kind="png"), collections.Counter()
    monkeypatch.setattr(
        "keras_cifar.data.folder.load_image",
        lambda source, *a, **k: opened.update([source]) or load_image(source, *a, **k),
    )
    dataset = loaded(root)
    assert len(opened) == len(dataset.val) + len(dataset.test)


def test_a_process_reads_its_own_share_alone(tmp_path, monkeypatch):
    root = write_photos(tmp_path, 160, "png")
    read, rows = folder._Encoded.read, collections.defaultdict(set)

    def noted(self, row):
        rows[self].add(int(row))
        return read(self, row)

    monkeypatch.setattr(folder._Encoded, "read", noted)
    for number in range(2):
        # Without partners, half of each batch is all that one of two replicas needs.
        take(loaded(root), 3, 0, ReplicaRange(number, 1, 2), augment="resized_crop")
    # With what is read ahead, all of the first pass, in which no image comes twice.
    one, other = rows.values()
    assert min(len(one), len(other)) >= 12
    assert not one & other


def test_the_decoded_training_images_are_those_of_a_folder_without_crops(tmp_path):
    dataset, other = loaded(write_photos(tmp_path)), loaded(tmp_path, augment="flip")
    np.testing.assert_array_equal(dataset.train.decoded().images, other.train.images)
    np.testing.assert_array_equal(dataset.train.spread(5).images, other.train.spread(5).images)
    np.testing.assert_array_equal(dataset.val.images, other.val.images)
    got, expected = (list(data.evaluation_batches(d.train, 2, 8)) for d in (dataset, other))
    assert_same(got, expected)
    assert dataset.train.fingerprint == loaded(tmp_path).train.fingerprint
    (tmp_path / "train" / "a" / "02.jpg").write_bytes(b"other")
    assert dataset.train.fingerprint != loaded(tmp_path).train.fingerprint


def test_crops_need_a_size(tmp_path):
    with pytest.raises(
        UsageError, match="resized_crop crops files of any size: it needs --image_size"
    ):
        loaded(write_photos(tmp_path), image_size=None)


def test_bad_file_stops_with_its_name(tmp_path):
    dataset = loaded(write_photos(tmp_path))
    bad = dataset.train.files.paths[dataset.train.rows[5]]
    os.truncate(bad, 300)
    with pytest.raises(tf.errors.OpError):
        take(dataset, 9)
    failure = dataset.train.files.failure
    assert isinstance(failure, UserError)
    assert str(failure).startswith(f"{bad} cannot be read: ")
    assert "--on_bad_image=skip" in str(failure)


def test_skipped_file_does_not_count_and_is_listed_once(tmp_path, capsys):
    dataset = loaded(write_photos(tmp_path), bad_images=data.BadImages(True, 0.1))
    bad = dataset.train.files.paths[dataset.train.rows[5]]
    os.truncate(bad, 300)
    batches = take(dataset, 9, augment="resized_crop")
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            assert (label.sum() == 0) == (image.max() == 0)
    assert 1 <= sum((labels.sum(1) == 0).sum() for _, labels in batches) <= 3
    assert [(x.split, x.file) for x in dataset.left_out()] == [("train", bad)]
    assert capsys.readouterr().err.count(bad) == 1


def test_more_bad_files_than_the_share_stop(tmp_path):
    dataset = loaded(write_photos(tmp_path), bad_images=data.BadImages(True, 0.05))
    for row in dataset.train.rows[:4]:
        os.truncate(dataset.train.files.paths[row], 300)
    with pytest.raises(tf.errors.OpError):
        take(dataset, 9)
    assert "--max_bad_share" in str(dataset.train.files.failure)


# ---- The flag


@pytest.mark.parametrize(
    ("text", "crops_files"),
    [
        ("resized_crop|flip", True),
        (" resized_crop( 0.2, 1)", True),
        ("flip|resized_crop", False),
        ("", False),
    ],
)
def test_files_are_cropped_where_it_is_the_first(text, crops_files):
    augmentation.parse(text)
    assert augmentation.crops_files(text) == crops_files


@pytest.mark.parametrize("numbers", ["0,1", "0.5,0.4", "0.5,1.1", "0.1,0.2,0.3"])
def test_wrong_shares_are_refused(numbers):
    with pytest.raises(UsageError, match="resized_crop"):
        augmentation.parse(f"resized_crop({numbers})")
