"""TensorFlow Datasets: a tiny real data set on disk, and what is said where there is none."""

import json
import pathlib
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


class _Tiny(tfds.core.GeneratorBasedBuilder):
    """20 training and 8 test images of 6 x 9 in 3 classes; its subclasses are other data sets."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (6, 9, 3)
    SIDES = (6, 9)
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
        shape = (cls.SPLITS[split], *cls.SIDES, 3)
        images = np.random.default_rng(len(split)).integers(0, 256, shape, np.uint8)
        return [cls.change(split, i, pixels, i % len(NAMES)) for i, pixels in enumerate(images)]

    @staticmethod
    def change(split, index, pixels, label):
        return pixels, label


def subclass(name: str, **attributes) -> type:
    return type(name, (_Tiny,), attributes | {"__doc__": "x", "__module__": __name__})


VALIDATION = {"train": 20, "test": 8, "validation": 7}
TinyPlain = subclass("TinyPlain")
TinyGrey = subclass(
    "TinyGrey", SHAPE=(6, 9, 1), change=staticmethod(lambda s, i, pixels, y: (pixels[..., :1], y))
)
TinySizes = subclass(
    "TinySizes",
    SHAPE=(None, None, 3),
    change=staticmethod(lambda s, i, pixels, y: (pixels[: 3 + i % 2], y)),
)
TinyValidation = subclass("TinyValidation", SPLITS=VALIDATION)
TinyOnlyValidation = subclass("TinyOnlyValidation", SPLITS={"train": 20, "validation": 7})
TinyOnlyTrain = subclass("TinyOnlyTrain", SPLITS={"train": 60})
TinyOnlyTest = subclass("TinyOnlyTest", SPLITS={"test": 8})
TinyWithheld = subclass(  # as ImageNet: the labels of test are withheld
    "TinyWithheld",
    SPLITS=VALIDATION,
    change=staticmethod(lambda split, i, pixels, y: (pixels, -1 if split == "test" else y)),
)
TinyPartlyWithheld = subclass(
    "TinyPartlyWithheld",
    SPLITS=VALIDATION | {"test": 20},
    change=staticmethod(
        lambda split, i, pixels, y: (pixels, -1 if (split, i) == ("test", 19) else y)
    ),
)
TinyMany = subclass(  # more than a block of them
    "TinyMany", SPLITS={"train": 600, "test": 8}, SHAPE=(2, 3, 3), SIDES=(2, 3)
)
TinyUnsupervised = subclass("TinyUnsupervised", KEYS=None)
TinyOtherKeys = subclass("TinyOtherKeys", KEYS=("image", "image"))
TinyRegression = subclass("TinyRegression", LABEL=tfds.features.Scalar(np.int64))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Where all of them are, prepared."""
    path = tmp_path_factory.mktemp("tfds")
    for builder in set(_Tiny.__subclasses__()) - {TinyMany}:
        builder(data_dir=str(path)).download_and_prepare()
    return path


def load(data_dir, name: str, **options):
    return data.load(name, data_dir=str(data_dir), **options)


def expected(builder: type, split: str) -> tuple:
    return tuple(zip(*builder.examples(split), strict=True))


def assert_is(split, builder: type, name: str) -> None:
    pixels, labels = expected(builder, name)
    np.testing.assert_array_equal(split.images, pixels)
    np.testing.assert_array_equal(split.labels, labels)
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int64


def test_pixels_labels_and_names_come_back_exact_and_are_prepared_once(
    data_dir, monkeypatch, capsys
):
    train, test = expected(TinyPlain, "train"), expected(TinyPlain, "test")
    monkeypatch.setattr(TinyPlain, "examples", None)  # Preparing it again would fail.
    dataset = load(data_dir, "tiny_plain", val_fraction=0)
    for split, (pixels, labels) in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_array_equal(split.images, pixels)
        np.testing.assert_array_equal(split.labels, labels)
    assert dataset.val is None
    assert dataset.class_names == NAMES
    assert dataset.image_shape == (6, 9, 3)
    assert capsys.readouterr().out == ""


def test_what_is_not_prepared_is_prepared_below_data_dir(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset = data.load("tiny_plain", data_dir="~/here", val_fraction=0)
    assert_is(dataset.test, TinyPlain, "test")
    path = tmp_path / "here" / "tiny_plain" / "1.0.0"
    assert (path / "dataset_info.json").exists()
    assert f"downloading tiny_plain to {path}" in capsys.readouterr().out


def test_grey_images_become_rgb_and_image_size_resizes(data_dir):
    images = load(data_dir, "tiny_grey", val_fraction=0).train.images
    grey = np.repeat(expected(TinyGrey, "train")[0], 3, axis=-1)
    np.testing.assert_array_equal(images, grey)
    images = load(data_dir, "tiny_grey", image_size=4, val_fraction=0).train.images
    np.testing.assert_array_equal(images, resize_images(grey, (4, 4)))
    images = load(
        data_dir, "tiny_grey", image_size="4x5", resize="crop", val_fraction=0
    ).train.images
    np.testing.assert_array_equal(images, resize_images(grey, (4, 5), "crop"))
    again = load(data_dir, "tiny_grey", image_size="4x5", val_fraction=0).train.images
    np.testing.assert_array_equal(again, resize_images(grey, (4, 5)))


def test_images_of_different_sizes_need_image_size(data_dir):
    with pytest.raises(UsageError, match="differ in size: give --image_size"):
        load(data_dir, "tiny_sizes")
    dataset = load(data_dir, "tiny_sizes", image_size=5, val_fraction=0)
    for got, pixels in zip(dataset.test.images, expected(TinySizes, "test")[0], strict=True):
        np.testing.assert_array_equal(got, resize_images(pixels, (5, 5)))


NO_TEST = "it has no test split; validation is the test split"
WITHHELD = "its test labels are withheld; validation is the test split"


@pytest.mark.parametrize(
    ("builder", "splits", "line"),
    [
        (TinyValidation, ("train", "validation", "test"), None),
        (TinyOnlyValidation, ("train", None, "validation"), NO_TEST),
        (TinyWithheld, ("train", None, "validation"), WITHHELD),
        (TinyPartlyWithheld, ("train", None, "validation"), WITHHELD),
    ],
)
def test_validation_is_the_test_split_where_there_is_none(data_dir, capsys, builder, splits, line):
    dataset = load(data_dir, builder.name, val_fraction=0)
    assert capsys.readouterr().err == (f"splits    {builder.name}: {line}\n" if line else "")
    for split, name in zip((dataset.train, dataset.val, dataset.test), splits, strict=True):
        assert split is None if name is None else not assert_is(split, builder, name)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_images_whose_labels_are_withheld_are_not_decoded(tmp_path, decoded, file_format):
    TinyWithheld(data_dir=str(tmp_path)).download_and_prepare(file_format=file_format)
    load(tmp_path, "tiny_withheld", cache_dir=str(tmp_path / "cache"))
    assert decoded == ["train", "validation"]
    assert len(left(tmp_path / "cache")) == 2


def test_data_set_of_train_alone_gets_a_test_split_whatever_the_seed(data_dir, capsys):
    first = load(data_dir, "tiny_only_train", val_fraction=0)
    line = "it has no test split; 10% of each class of train are the test split"
    assert capsys.readouterr().err == f"splits    tiny_only_train: {line}\n"
    assert np.bincount(first.test.labels).tolist() == [2, 2, 2]
    together = np.concatenate([first.train.images, first.test.images]).reshape(60, -1)
    assert len(np.unique(together, axis=0)) == 60
    second = load(data_dir, "tiny_only_train", seed=1)
    assert second.test.fingerprint == first.test.fingerprint


@pytest.fixture
def decoded(monkeypatch) -> list:
    """Which splits were decoded since the list was emptied."""
    splits, real = [], source._batches

    def count(builder, split, *rest):
        splits.append(split)
        batches = real(builder, split, *rest)
        assert batches.options().autotune.enabled is False  # see `without_autotune`
        return batches

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


def test_what_is_prepared_again_with_other_images_is_decoded_again(data_dir, tmp_path, monkeypatch):
    before = load(data_dir, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    examples = TinyPlain.examples
    monkeypatch.setattr(
        TinyPlain, "examples", lambda self, split: [(255 - p, y) for p, y in examples(split)]
    )
    TinyPlain(data_dir=str(tmp_path)).download_and_prepare()
    after = load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(after.test.images, 255 - before.test.images)


@pytest.mark.parametrize("place", [30, -30])
def test_changed_record_file_is_read_again(data_dir, tmp_path, place):
    shutil.copytree(data_dir / "tiny_plain", tmp_path / "tiny_plain")
    load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    spoil(record_file(tmp_path), place)
    with pytest.raises(UserError, match="tiny_plain train cannot be read"):
        load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    assert len(left(tmp_path / "cache")) == 2  # those of before


def test_only_the_ends_of_record_files_are_looked_at(data_dir, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(source, "ENDS", 16)
    shutil.copytree(data_dir / "tiny_plain", tmp_path / "tiny_plain")
    load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    spoil(record_file(tmp_path), 200)
    decoded.clear()
    load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    assert decoded == []


def test_array_records_are_read_as_tfrecords_are(data_dir, tmp_path):
    TinyValidation(data_dir=str(tmp_path)).download_and_prepare(file_format="array_record")
    assert list((tmp_path / "tiny_validation" / "1.0.0").glob("*.array_record-*"))
    dataset = load(tmp_path, "tiny_validation", cache_dir=str(tmp_path / "cache"))
    for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert_is(dataset.split(split), TinyValidation, name)
    assert dataset.describe() == load(data_dir, "tiny_validation").describe()


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
    shutil.rmtree(tmp_path)  # 270 MB
    assert result["first"] < 200, result
    assert result["second"] < 30, result


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tiny_unsupervised", "is not for image classification"),
        ("tiny_other_keys", "is not for image classification"),
        ("tiny_regression", "is not for image classification"),
        ("tiny_only_test", "has no split train; it has test"),
    ],
)
def test_data_set_that_is_not_for_classification_or_has_no_train_is_refused(data_dir, name, why):
    with pytest.raises(UserError, match=f"{name} {why}"):
        load(data_dir, name)


@pytest.mark.parametrize("name", ["cifar11", "no_such_thing", "cifar", "Cifar 10", "../x", "a/b/c"])
def test_unknown_name_is_wrong_usage(tmp_path, name):
    with pytest.raises(UsageError, match="folder:PATH") as caught:
        load(tmp_path, name)
    assert repr(name) in str(caught.value)
    with pytest.raises(UserError, match="cifar10/none") as other:
        load(tmp_path, "cifar10/none")
    assert "\n" not in str(caught.value) + str(other.value)


def record_file(data_dir, kind="tfrecord"):
    return next((data_dir / "tiny_plain" / "1.0.0").glob(f"*-train.{kind}-*"))


def spoil(file, place):
    contents = bytearray(file.read_bytes())
    contents[place] ^= 0xFF
    file.write_bytes(contents)


DAMAGES = {
    "shorter": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "missing": pathlib.Path.unlink,
    "image": lambda file: spoil(file, 200),
    "info": lambda file: (file.parent / "dataset_info.json").write_text("{"),
    "lost records": lambda file: shutil.copy(next(file.parent.glob("*-test.*-*")), file),
}


@pytest.fixture(scope="module")
def array_records(tmp_path_factory):
    path = tmp_path_factory.mktemp("array")
    TinyPlain(data_dir=str(path)).download_and_prepare(file_format="array_record")
    return path


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *(("tfrecord", name) for name in DAMAGES),
        *(("array_record", name) for name in ("shorter", "missing")),
    ],
)
def test_damaged_data_set_is_refused_in_one_line(data_dir, array_records, tmp_path, kind, damage):
    whole = data_dir if kind == "tfrecord" else array_records
    shutil.copytree(whole / "tiny_plain", tmp_path / "tiny_plain")
    DAMAGES[damage](record_file(tmp_path, kind))
    with pytest.raises(UserError, match="tiny_plain") as caught:
        load(tmp_path, "tiny_plain", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert damage == "info" or "tiny_plain train cannot be read" in str(caught.value)
    assert damage == "info" or left(tmp_path / "cache") == []


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
