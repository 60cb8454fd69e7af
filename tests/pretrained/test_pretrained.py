"""Networks that come with the package: saved from a run, loaded, classified with, begun with."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_cifar import models, predict, pretrained
from keras_cifar.core import cli, tensors
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import evaluator, metrics
from keras_cifar.evaluation.temperature import fit_to_split
from keras_cifar.inference.predictor import Predictor
from keras_cifar.pretrained import __main__ as command
from keras_cifar.pretrained import saving
from keras_cifar.pretrained.predictor import PretrainedPredictor
from keras_cifar.training import plan as planning
from keras_cifar.training import transfer
from tests.conftest import colour_images


def execute(*argv) -> int:
    argv = [str(argument) for argument in argv]
    options = command.PretrainedOptions
    return cli._execute("pretrained", command.main, options, "RUN NAME", argv)


def classify(*argv) -> int:
    argv = [str(argument) for argument in argv]
    return cli._execute("predict", predict.main, predict.PredictOptions, "IMAGE ...", argv)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, trained_run):
    """A directory with the trained run as `tiny`."""
    directory = tmp_path_factory.mktemp("pretrained")
    run = Run(shutil.copytree(trained_run.path, directory / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "DIRECTORY", directory)
        assert execute(run.path, "tiny", "--data=grey pictures", "--limits=colours") == 0
    return directory


@pytest.fixture
def installed(saved, monkeypatch):
    """The same as what the package comes with."""
    monkeypatch.setattr(pretrained, "DIRECTORY", saved)
    return saved


@pytest.fixture
def copied(saved, tmp_path, monkeypatch):
    """A copy of it that may be spoilt."""
    directory = shutil.copytree(saved, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    monkeypatch.setattr(pretrained, "DIRECTORY", directory)
    return directory


# ---- The package


def test_what_comes_with_the_package_can_be_loaded():
    for name in pretrained.names():
        model, card = pretrained.load(name)
        assert model.input_shape[1:] == card.image_shape
        assert (pretrained.DIRECTORY / f"{name}.safetensors").stat().st_size <= pretrained.LARGEST
        assert 0 < card.accuracy < 1


# ---- Saving


def test_weights_are_rounded_kernels_and_whole_vectors(installed, trained_run):
    model, _ = pretrained.load("tiny")
    trained = models.load(trained_run.model)
    for mine, theirs in zip(model.get_weights(), trained.get_weights(), strict=True):
        assert mine.dtype == np.float32
        half = theirs.ndim > 1
        assert np.array_equal(mine, theirs.astype(np.float16) if half else theirs)
    assert any(
        (a != b).any() for a, b in zip(model.get_weights(), trained.get_weights(), strict=True)
    )
    size = (installed / "tiny.safetensors").stat().st_size
    assert 2 * trained.count_params() < size < 2.5 * trained.count_params()


def test_card_says_what_is_to_be_known(installed, trained_run):
    config = trained_run.read_config()
    model, card = pretrained.load("tiny")
    test = evaluator.load_data(trained_run.read_config(), "test").test
    probabilities = evaluator.predict(model, test)
    right = probabilities.argmax(axis=1) == test.labels
    assert (card.accuracy, card.count) == (pytest.approx(right.mean()), 30)
    assert (card.model, card.image_shape) == ("lenet5", (16, 16, 3))
    assert card.class_names == ("class_0", "class_1", "class_2")
    assert (card.data, card.limits, card.recipe) == ("grey pictures", "colours", None)
    error = metrics.calibration_error(probabilities, test.labels)["expected_calibration_error"]
    assert (card.temperature, card.calibration_error) == (None, pytest.approx(error))
    assert card.licence == "Apache-2.0"
    assert (config["git_revision"] or "unknown") in card.source
    # No directory of whoever trained it.
    assert str(config["flags"]["data"]) not in (installed / "tiny.json").read_text()


def test_command_says_size_accuracy_and_where(installed, capsys):
    assert execute(installed / "run", "again", "--data=x") == 0
    out = capsys.readouterr().out
    size = (installed / "again.safetensors").stat().st_size
    assert f"{size:,} bytes" in out
    assert str(installed / "again.json") in out
    assert pretrained.names() == ["again", "tiny"]
    for suffix in (".json", ".safetensors"):
        (installed / f"again{suffix}").unlink()


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["RUN", "x"], 2, "--data=WORDS is needed"),
        (["RUN", "--data=x"], 2, "give a run directory and a name"),
        (["RUN", "../x", "--data=x"], 2, "must consist of lower-case letters"),
        (
            ["RUN", "x", "--data=x", "--temperature=0"],
            2,
            "must be auto, a number above 0, or a run",
        ),
        (["/nowhere", "x", "--data=x"], 1, "/nowhere does not exist"),
    ],
)
def test_wrong_usage_is_one_line(installed, argv, status, words, capsys):
    argv = [installed / "run" if word == "RUN" else word for word in argv]
    assert execute(*argv) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_what_is_too_large_or_changes_too_much_is_refused(installed, monkeypatch):
    run, words = Run(installed / "run"), ("x", "data", "limits", "licence")
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "LARGEST", 1000)
        with pytest.raises(UserError, match="bytes, more than 1,000, which everybody"):
            saving.save(run, *words)
    with monkeypatch.context() as patch:
        figures = iter([0.9, 0.901])
        patch.setattr(saving, "_accuracy", lambda *_: next(figures))
        with pytest.raises(
            UserError, match=r"in float16 the test accuracy of .* is 0.9010, and it"
        ):
            saving.save(run, *words)
    config = run.config.read_text()
    run.config.write_text(config.replace('"lenet5"', '"resnet20"'))
    with pytest.raises(UserError, match="is not what --model=resnet20 makes now"):
        saving.save(run, *words)
    run.config.write_text(config)
    assert pretrained.names() == ["tiny"]


def test_temperature_is_in_what_is_loaded(copied, trained_run):
    assert execute(trained_run.path, "cool", "--data=x", "--temperature=auto") == 0
    validation = evaluator.load_data(trained_run.read_config(), "val").split("val")
    fitted = fit_to_split(models.load(trained_run.model), validation)
    (plain, _), (model, card) = pretrained.load("tiny"), pretrained.load("cool")
    assert card.temperature == pytest.approx(fitted["temperature"])
    assert abs(card.temperature - 1) > 0.01
    test = evaluator.load_data(trained_run.read_config(), "test").test
    before, after = (evaluator.predict(network, test) for network in (plain, model))
    expected = before.astype(np.float64) ** (1 / card.temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(after, expected, atol=1e-5)
    error = metrics.calibration_error(after, test.labels)["expected_calibration_error"]
    assert card.calibration_error == pytest.approx(error)
    # What classifies answers the same.
    np.testing.assert_allclose(PretrainedPredictor("cool").classify(test.images), after, atol=1e-6)
    assert f"temperature {card.temperature:.3f}" in pretrained.describe()
    assert transfer.take_weights(
        models.build("lenet5", (16, 16, 3), 3), "pretrained:cool", card.class_names
    ) == ("the weights of pretrained:cool")


# ---- Loading


def test_it_is_explained(installed, tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    out = tmp_path / "overlays"
    assert classify("--model=pretrained:tiny", f"--explain={out}", tmp_path / "red.png") == 0
    assert [path.name for path in out.iterdir()] == ["00001_red.png"]


def test_unknown_name_lists_those_there_are(installed, tmp_path, monkeypatch):
    for name in ("big", "../tiny", ""):
        with pytest.raises(UsageError, match=r"unknown model 'pretrained:.*'; choose one of: tiny"):
            pretrained.load(name)
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path)
    with pytest.raises(UsageError, match="this installation has none"):
        pretrained.load("tiny")


def test_damaged_files_are_said(copied):
    weights, card = copied / "tiny.safetensors", copied / "tiny.json"
    whole = weights.read_bytes()
    for damage in (whole[:-1], b"", whole.replace(b'"F16"', b'"F32"', 1), b"\xff" * 8 + whole[8:]):
        weights.write_bytes(damage)
        with pytest.raises(UserError, match=r"tiny\.safetensors is damaged"):
            pretrained.load("tiny")
    values = json.loads(card.read_text())
    for damage in ("", "[]", json.dumps(values | {"more": 1}), json.dumps({"model": "lenet5"})):
        card.write_text(damage)
        with pytest.raises(UserError, match=r"tiny\.json is damaged"):
            pretrained.load("tiny")


def test_cards_are_printed(installed, tmp_path, monkeypatch, capsys):
    assert classify("--list_pretrained") == 0
    out = capsys.readouterr().out
    card = pretrained.card("tiny")
    for words in (
        "pretrained:tiny",
        f"{card.accuracy:.4f} on 30",
        f"expected error {card.calibration_error:.4f}\n",
        "colours",
        card.source,
    ):
        assert words in out
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path)
    assert pretrained.describe() == "no models come with this installation"


def test_arrays_come_back_as_they_were():
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array(7, np.int64)}
    data = b"".join(tensors.pack(arrays, {"who": "me"}))
    found = tensors.unpack(data, arrays)
    assert tensors.metadata(data) == {"who": "me"}
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    for other in (
        {"a": arrays["a"]},
        {"b": arrays["b"], "a": arrays["a"]},
        arrays | {"b": found["a"]},
    ):
        with pytest.raises(ValueError, match="other arrays"):
            tensors.unpack(data, other)


# ---- Uses


def test_predicts_what_the_export_of_the_run_does(installed, trained_run):
    mine, theirs = PretrainedPredictor("tiny"), Predictor(str(trained_run.path))
    images, _ = colour_images(200, 16, 3, seed=5)
    assert (mine.size, mine.class_names) == (theirs.size, theirs.class_names)
    for method in ("classify", "features"):
        a, b = (getattr(predictor, method)(images) for predictor in (mine, theirs))
        np.testing.assert_allclose(a, b, atol=0.01)
        assert a.dtype == np.float32
    assert mine.classify(images[:0]).shape == (0, 3)


def test_predict_takes_its_name(installed, trained_run, tmp_path, capsys):
    images, _ = colour_images(3, 20, 3, seed=9)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    answers = []
    for model in ("pretrained:tiny", trained_run.path):
        assert classify(f"--model={model}", "--format=json", tmp_path) == 0
        answers.append(json.loads(capsys.readouterr().out))
    for mine, theirs in zip(*answers, strict=True):
        assert mine["file"] == theirs["file"]
        for a, b in zip(mine["top"], theirs["top"], strict=True):
            assert a["label"] == b["label"]
            assert a["probability"] == pytest.approx(b["probability"], abs=0.01)
    assert classify("--model=pretrained:big", tmp_path) == 2
    assert "choose one of: tiny" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("class_0", "class_1", "class_2"), ("x", "y", "z")])
def test_a_run_begins_with_its_weights(installed, names):
    model = models.build("lenet5", (16, 16, 3), 3)
    words = transfer.take_weights(model, "pretrained:tiny", names)
    new = names[0] == "x"
    assert words == "the weights of pretrained:tiny" + "; new are logits" * new
    theirs = pretrained.load("tiny")[0]
    pairs = zip(model.get_weights(), theirs.get_weights(), strict=True)
    same = [np.array_equal(mine, other) for mine, other in pairs]
    assert all(same[:-2])
    assert all(same) != new


def test_init_from_of_train_takes_its_name(installed, image_folder):
    flags = {"model": "lenet5", "data": f"folder:{image_folder}", "batch_size": 16}
    plan = planning.prepare(TrainConfig.from_flags(init_from="pretrained:tiny", **flags))
    assert plan.origin == "the weights of pretrained:tiny"
    with pytest.raises(UsageError, match="choose one of: tiny"):
        planning.prepare(TrainConfig.from_flags(init_from="pretrained:big", **flags))
