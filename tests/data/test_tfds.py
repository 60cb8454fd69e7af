"""TensorFlow Datasets: a tiny real data set on disk, and what is said where there is none."""

import json
import shutil
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

from keras_cifar import data
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.data import tfds as source
from keras_cifar.data.images import resize_images
from tests.data.test_cache import left, needs_proc, peaks

NAMES = ("cat", "dog", "frog")


def photos(count: int, seed: int, sides=(6, 9)) -> tuple:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, *sides, 3), np.uint8)
    return pixels, np.arange(count) % len(NAMES)


class _Tiny(tfds.core.GeneratorBasedBuilder):
    """20 training and 8 test images of 6 x 9 in 3 classes."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (6, 9, 3)
    KEYS = ("image", "label")
    LABEL = tfds.features.ClassLabel(names=NAMES)
    SPLITS = {"train": 20, "test": 8}  # noqa: RUF012

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=self.SHAPE, encoding_format="png"),
            "label": self.LABEL,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="x",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=self.KEYS,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in self.SPLITS}

    def _generate_examples(self, split):
        for index, (pixels, label) in enumerate(self.examples(split)):
            yield index, {"image": pixels, "label": int(label)}

    @classmethod
    def examples(cls, split):
        return zip(*photos(cls.SPLITS[split], seed=len(split)), strict=True)


class TinyPlain(_Tiny):
    """Train and test."""


class TinyGrey(_Tiny):
    """Of one channel."""

    SHAPE = (6, 9, 1)

    @classmethod
    def examples(cls, split):
        return ((pixels[..., :1], label) for pixels, label in super().examples(split))


class TinySizes(_Tiny):
    """Of different sizes."""

    SHAPE = (None, None, 3)

    @classmethod
    def examples(cls, split):
        return (
            (pixels[: 3 + index % 2], label)
            for index, (pixels, label) in enumerate(super().examples(split))
        )


class TinyValidation(_Tiny):
    """With a validation split."""

    SPLITS = {"train": 20, "test": 8, "validation": 7}  # noqa: RUF012


class TinyOnlyValidation(_Tiny):
    """With a validation split and no test split."""

    SPLITS = {"train": 20, "validation": 7}  # noqa: RUF012


class TinyOnlyTrain(_Tiny):
    """With nothing to test on."""

    SPLITS = {"train": 60}  # noqa: RUF012


class TinyOnlyTest(_Tiny):
    """With nothing to train on."""

    SPLITS = {"test": 8}  # noqa: RUF012


class TinyWithheld(TinyValidation):
    """As ImageNet: the labels of test are withheld."""

    @classmethod
    def examples(cls, split):
        return (
            (pixels, -1 if split == "test" else label) for pixels, label in super().examples(split)
        )


class TinyMany(_Tiny):
    """More than a block of them."""

    SPLITS = {"train": 1000, "test": 8}  # noqa: RUF012
    SHAPE = (2, 3, 3)

    @classmethod
    def examples(cls, split):
        return zip(*photos(cls.SPLITS[split], seed=1, sides=(2, 3)), strict=True)


class TinyUnsupervised(_Tiny):
    """Without supervised keys."""

    KEYS = None


class TinyOtherKeys(_Tiny):
    """With other supervised keys."""

    KEYS = ("image", "image")


class TinyRegression(_Tiny):
    """Whose label is a number instead of a class."""

    LABEL = tfds.features.Scalar(np.int64)


BUILDERS = (
    TinyPlain,
    TinyGrey,
    TinySizes,
    TinyValidation,
    TinyOnlyValidation,
    TinyOnlyTrain,
    TinyOnlyTest,
    TinyWithheld,
    TinyMany,
    TinyUnsupervised,
    TinyOtherKeys,
    TinyRegression,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where all of them are, prepared."""
    path = tmp_path_factory.mktemp("tfds")
    for builder in BUILDERS:
        builder(data_dir=str(path)).download_and_prepare()
    return path


def load(data_dir, name: str, **options):
    return data.load(name, data_dir=str(data_dir), **options)


def expected(builder: type, split: str) -> tuple:
    examples = list(builder.examples(split))
    return [pixels for pixels, _ in examples], [label for _, label in examples]


def assert_is(split, builder: type, name: str) -> None:
    pixels, labels = expected(builder, name)
    np.testing.assert_array_equal(split.images, pixels)
    np.testing.assert_array_equal(split.labels, labels)
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int64


# ---- Splits


def test_pixels_labels_and_names_come_back_exact(data_dir):
    dataset = load(data_dir, "tiny_plain", val_fraction=0)
    assert_is(dataset.train, TinyPlain, "train")
    assert_is(dataset.test, TinyPlain, "test")
    assert dataset.val is None
    assert dataset.class_names == NAMES
    assert dataset.image_shape == (6, 9, 3)


def test_what_is_prepared_is_not_prepared_again(data_dir, monkeypatch, capsys):
    monkeypatch.setattr(TinyPlain, "examples", None)  # Preparing it would fail.
    assert len(load(data_dir, "tiny_plain").test) == 8
    assert capsys.readouterr().out == ""


def test_what_is_not_prepared_is_prepared_below_data_dir(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset = data.load("tiny_plain", data_dir="~/here", val_fraction=0)
    assert_is(dataset.test, TinyPlain, "test")
    path = tmp_path / "here" / "tiny_plain" / "1.0.0"
    assert (path / "dataset_info.json").exists()
    assert f"downloading tiny_plain to {path}" in capsys.readouterr().out


def test_grey_images_become_rgb(data_dir):
    images = load(data_dir, "tiny_grey", val_fraction=0).train.images
    grey = np.stack(expected(TinyGrey, "train")[0])
    np.testing.assert_array_equal(images, np.repeat(grey, 3, axis=-1))


def test_image_size_resizes(data_dir):
    dataset = load(data_dir, "tiny_plain", image_size=4, val_fraction=0)
    assert dataset.image_shape == (4, 4, 3)
    pixels = np.stack(expected(TinyPlain, "train")[0])
    np.testing.assert_array_equal(dataset.train.images, resize_images(pixels, (4, 4)))


def test_images_of_different_sizes_need_image_size(data_dir):
    with pytest.raises(UsageError, match="differ in size: give --image_size"):
        load(data_dir, "tiny_sizes")
    dataset = load(data_dir, "tiny_sizes", image_size=5, val_fraction=0)
    for got, pixels in zip(dataset.test.images, expected(TinySizes, "test")[0], strict=True):
        np.testing.assert_array_equal(got, resize_images(pixels, (5, 5)))


def test_validation_split_is_the_validation_split(data_dir):
    dataset = load(data_dir, "tiny_validation")
    assert_is(dataset.train, TinyValidation, "train")
    assert_is(dataset.val, TinyValidation, "validation")
    assert_is(dataset.test, TinyValidation, "test")


def test_without_test_validation_is_the_test_split(data_dir):
    dataset = load(data_dir, "tiny_only_validation", val_fraction=0.2)
    assert_is(dataset.test, TinyOnlyValidation, "validation")
    assert [len(dataset.train), len(dataset.val)] == [17, 3]


def test_withheld_test_labels_make_validation_the_test_split(data_dir):
    dataset = load(data_dir, "tiny_withheld", val_fraction=0)
    assert_is(dataset.test, TinyWithheld, "validation")
    assert dataset.val is None


def test_data_set_of_train_alone_gets_a_test_split_whatever_the_seed(data_dir):
    first = load(data_dir, "tiny_only_train", val_fraction=0)
    assert np.bincount(first.test.labels).tolist() == [2, 2, 2]
    together = np.concatenate([first.train.images, first.test.images]).reshape(60, -1)
    assert len(np.unique(together, axis=0)) == 60
    second = load(data_dir, "tiny_only_train", seed=1)
    assert second.test.fingerprint == first.test.fingerprint


def test_data_set_without_train_is_refused(data_dir):
    with pytest.raises(UserError, match="no split train; it has test"):
        load(data_dir, "tiny_only_test")


# ---- The cache


@pytest.fixture
def decoded(monkeypatch) -> list:
    """Which splits were decoded since the list was emptied."""
    splits, real = [], source._batches

    def count(builder, split, size):
        splits.append(split)
        return real(builder, split, size)

    monkeypatch.setattr(source, "_batches", count)
    return splits


def test_second_load_decodes_nothing(data_dir, tmp_path, decoded):
    first = load(data_dir, "tiny_plain", cache_dir=str(tmp_path))
    assert decoded == ["train", "test"]
    second = load(data_dir, "tiny_plain", cache_dir=str(tmp_path))
    assert decoded == ["train", "test"]
    assert second.describe() == first.describe()
    assert_is(second.test, TinyPlain, "test")
    assert len(left(tmp_path)) == 2
    load(data_dir, "tiny_plain", cache_dir=str(tmp_path), image_size=4)
    assert decoded == ["train", "test"] * 2


def test_what_is_prepared_again_with_other_images_is_decoded_again(data_dir, tmp_path, monkeypatch):
    before = load(data_dir, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    examples = TinyPlain.examples
    monkeypatch.setattr(
        TinyPlain, "examples", lambda self, split: ((255 - p, y) for p, y in examples(split))
    )
    TinyPlain(data_dir=str(tmp_path)).download_and_prepare()
    after = load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(after.test.images, 255 - before.test.images)


@pytest.mark.parametrize("place", ["beginning", "end"])
def test_changed_record_file_is_read_again(data_dir, tmp_path, place, decoded):
    shutil.copytree(data_dir / "tiny_plain", tmp_path / "tiny_plain")
    load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    file = record_file(tmp_path)
    contents = bytearray(file.read_bytes())
    contents[30 if place == "beginning" else -30] ^= 0xFF
    file.write_bytes(contents)
    with pytest.raises(UserError, match="tiny_plain train cannot be read"):
        load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    assert len(left(tmp_path / "cache")) == 2  # those of before


def test_only_the_ends_of_record_files_are_looked_at(data_dir, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(source, "ENDS", 16)
    shutil.copytree(data_dir / "tiny_plain", tmp_path / "tiny_plain")
    load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    file = record_file(tmp_path)
    contents = bytearray(file.read_bytes())
    contents[200] ^= 0xFF
    file.write_bytes(contents)
    decoded.clear()
    load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    assert decoded == []


def test_array_records_are_read_as_tfrecords_are(data_dir, tmp_path, decoded):
    TinyValidation(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    assert list((tmp_path / "tiny_validation" / "1.0.0").glob("*.array_record-*"))
    dataset = load(tmp_path, "tiny_validation", cache_dir=str(tmp_path / "cache"))
    for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert_is(dataset.split(split), TinyValidation, name)
    assert dataset.describe() == load(data_dir, "tiny_validation").describe()


@pytest.mark.parametrize(
    "damage", [lambda file: file.write_bytes(file.read_bytes()[:-100]), lambda file: file.unlink()]
)
def test_damaged_array_records_are_refused_in_one_line(tmp_path, damage):
    TinyPlain(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    for file in (tmp_path / "tiny_plain" / "1.0.0").glob("*-train.array_record-*"):
        damage(file)
    with pytest.raises(UserError, match="tiny_plain train cannot be read") as caught:
        load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_split_that_lost_records_is_refused(data_dir, tmp_path):
    shutil.copytree(data_dir / "tiny_plain", tmp_path / "tiny_plain")
    short = data_dir / "tiny_plain" / "1.0.0"
    shutil.copy(next(short.glob("*-test.tfrecord-*")), record_file(tmp_path))  # 8 records, not 20
    with pytest.raises(UserError, match=r"tiny_plain train cannot be read: .*only 8"):
        load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("change", [lambda b: b.unbatch().take(13).batch(5), lambda b: b.repeat(2)])
def test_another_number_of_images_than_is_said_is_refused(data_dir, tmp_path, monkeypatch, change):
    real = source._batches
    monkeypatch.setattr(source, "_batches", lambda *a: change(real(*a)))
    with pytest.raises(UserError, match=r"tiny_plain train has (13|40) images instead of 20"):
        load(data_dir, "tiny_plain", cache_dir=str(tmp_path))
    assert left(tmp_path) == []


@needs_proc
@pytest.mark.parametrize(
    "file_format", ["tfrecord", pytest.param("array_record", marks=pytest.mark.slow)]
)
def test_reading_takes_no_memory_for_all_of_it(tmp_path, file_format):
    TinyMany(data_dir=str(tmp_path)).download_and_prepare(file_format=file_format)
    result = peaks(f"""
        import json
        from keras_cifar import data

        arguments = dict(data_dir={str(tmp_path)!r}, cache_dir={str(tmp_path / "cache")!r})
        data.load("tiny_many", image_size=8, **arguments)  # what TensorFlow needs for anything
        result = {{}}
        for name in ("first", "second"):
            with Peak() as peak:
                dataset = data.load("tiny_many", image_size=384, **arguments)
                dataset.describe()
            result[name] = peak.most
        print(json.dumps(result))
    """)
    shutil.rmtree(tmp_path)  # 446 MB
    assert result["first"] < 200, result
    assert result["second"] < 30, result


# ---- What is invalid


@pytest.mark.parametrize("name", ["tiny_unsupervised", "tiny_other_keys", "tiny_regression"])
def test_data_set_that_is_not_for_classification_is_refused(data_dir, name):
    with pytest.raises(UserError, match=f"{name} is not for image classification"):
        load(data_dir, name)


@pytest.mark.parametrize("name", ["cifar11", "no_such_thing", "cifar", "Cifar 10", "../x", "a/b/c"])
def test_unknown_name_is_wrong_usage(tmp_path, name):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, name)
    message = str(caught.value)
    assert repr(name) in message
    assert "folder:PATH" in message
    assert "\n" not in message


def test_unknown_configuration_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, "cifar10/none")
    assert "cifar10/none" in str(caught.value)
    assert "\n" not in str(caught.value)


def record_file(data_dir):
    return next((data_dir / "tiny_plain" / "1.0.0").glob("*-train.tfrecord-*"))


def truncate(data_dir):
    file = record_file(data_dir)
    file.write_bytes(file.read_bytes()[:-100])


def remove_records(data_dir):
    record_file(data_dir).unlink()


def spoil_images(data_dir):
    file = record_file(data_dir)
    contents = bytearray(file.read_bytes())
    contents[200] ^= 0xFF
    file.write_bytes(contents)


def spoil_info(data_dir):
    (data_dir / "tiny_plain" / "1.0.0" / "dataset_info.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate, remove_records, spoil_images, spoil_info])
def test_damaged_data_set_is_refused_in_one_line(data_dir, tmp_path, damage):
    shutil.copytree(data_dir / "tiny_plain", tmp_path / "tiny_plain")
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        load(tmp_path, "tiny_plain")
    assert "tiny_plain" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_data_set_that_names_code_is_refused_and_nothing_is_imported(
    data_dir, tmp_path, monkeypatch, key
):
    shutil.copytree(data_dir / "tiny_plain", tmp_path / "stranger")
    file = tmp_path / "stranger" / "1.0.0" / "features.json"
    features = json.loads(file.read_text())
    name = features.pop("pythonClassName")
    assert name.startswith("tensorflow_datasets.")
    file.write_text(json.dumps({key: "hostile_module.Feature", "content": {}, **features}))
    code = f"open({str(tmp_path / 'made')!r}, 'w')"
    (tmp_path / "hostile_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"it names 'hostile_module\.Feature'") as caught:
        load(tmp_path, "stranger")
    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "made").exists()


# ---- No network


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(101, "Network is unreachable")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_network_the_other_ways_are_named_at_once(tmp_path, offline, name):
    """TFDS itself tries for more than 3 minutes."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{name} cannot be downloaded")
    assert "Network is unreachable" in message
    for way in ("archive:PATH", "folder:PATH", "digits"):
        assert f"--data={way}" in message
    assert not isinstance(caught.value, UsageError)
