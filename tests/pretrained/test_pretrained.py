"""Pretrained networks: made from a run, loaded, used for prediction and to initialize a run."""

import json
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from keras_cifar import models, pretrained
from keras_cifar.core import cli, tensors
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import evaluator, metrics
from keras_cifar.evaluation.temperature import fit_to_split
from keras_cifar.inference.predictor import Predictor
from keras_cifar.pretrained import weights
from keras_cifar.pretrained.predictor import load_predictor
from keras_cifar.training import plan as planning
from scripts import make_pretrained
from tests.conftest import colour_images
from tests.inference.test_predict import command as classify


def make(*argv) -> int:
    """The exit status of the script in this process."""
    argv = [str(argument) for argument in argv]
    options = make_pretrained.PretrainedOptions
    return cli._execute("make_pretrained", make_pretrained.main, options, "RUN NAME", argv)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, trained_run):
    """A directory with the trained run as `tiny`."""
    directory = tmp_path_factory.mktemp("pretrained")
    run = Run(shutil.copytree(trained_run.path, directory / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "DIRECTORY", directory)
        assert make(run.path, "tiny", "--data=grey images", "--limits=colours") == 0
    return directory


@pytest.fixture
def installed(saved, monkeypatch):
    """The same as the directory of the package."""
    monkeypatch.setattr(pretrained, "DIRECTORY", saved)
    return saved


@pytest.fixture
def copied(saved, tmp_path, monkeypatch):
    """A copy of it that may be changed."""
    directory = shutil.copytree(saved, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    monkeypatch.setattr(pretrained, "DIRECTORY", directory)
    return directory


# ---- The package


def test_the_networks_of_the_package_can_be_loaded():
    for name in pretrained.names():
        model, card = pretrained.load(name)
        assert model.input_shape[1:] == card.image_shape
        assert (pretrained.DIRECTORY / f"{name}.safetensors").stat().st_size <= pretrained.MAX_BYTES
        assert 0 < card.accuracy < 1


# ---- Saving


def test_weights_are_rounded_kernels_and_whole_vectors(installed, trained_run):
    model, _ = pretrained.load("tiny")
    trained = models.load(trained_run.model)
    for mine, theirs in zip(model.get_weights(), trained.get_weights(), strict=True):
        assert mine.dtype == np.float32
        half = theirs.ndim > 1
        assert np.array_equal(mine, theirs.astype(np.float16) if half else theirs)
    size = (installed / "tiny.safetensors").stat().st_size
    assert 2 * trained.count_params() < size < 2.5 * trained.count_params()


def test_the_card_describes_the_network(installed, trained_run):
    config = trained_run.read_config()
    model, card = pretrained.load("tiny")
    test = evaluator.load_data(trained_run.read_config(), "test").test
    probabilities = evaluator.predict(model, test)
    right = probabilities.argmax(axis=1) == test.labels
    assert (card.accuracy, card.count) == (pytest.approx(right.mean()), 30)
    assert (card.model, card.image_shape) == ("lenet5", (16, 16, 3))
    assert card.class_names == ("class_0", "class_1", "class_2")
    assert (card.data, card.limits, card.recipe) == ("grey images", "colours", None)
    error = metrics.calibration_error(probabilities, test.labels)["expected_calibration_error"]
    assert (card.temperature, card.calibration_error) == (None, pytest.approx(error))
    assert card.licence == "Apache-2.0"
    assert (config["git_revision"] or "unknown") in card.source
    # The card has no paths of the machine that trained it.
    assert str(config["flags"]["data"]) not in (installed / "tiny.json").read_text()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["RUN", "x"], 2, "--data=TEXT is needed"),
        (["RUN", "--data=x"], 2, "give a run directory and a name"),
        (["RUN", "../x", "--data=x"], 2, "must consist of lower-case letters"),
        (["RUN", "x", "--data=x", "--temperature=0"], 2, "must be auto, a number above 0"),
        (["/nowhere", "x", "--data=x"], 1, "/nowhere does not exist"),
    ],
)
def test_wrong_usage_is_one_line(installed, argv, status, message, capsys):
    argv = [installed / "run" if argument == "RUN" else argument for argument in argv]
    assert make(*argv) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_the_script_shows_its_flags():
    command = [sys.executable, make_pretrained.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.startswith("usage: python scripts/make_pretrained.py [flags] RUN NAME\n")


def test_weights_that_are_too_large_or_change_the_accuracy_are_refused(installed):
    run, options = Run(installed / "run"), make_pretrained.PretrainedOptions(data="x")
    accuracy = mock.Mock(side_effect=[0.9, 0.901])
    for module, name, value, message in (
        (pretrained, "MAX_BYTES", 1000, "bytes, more than 1,000, which everybody"),
        (make_pretrained, "accuracy", accuracy, r"in float16 the test .* is 0.9010, and it"),
    ):
        with mock.patch.object(module, name, value), pytest.raises(UserError, match=message):
            make_pretrained.save(run, "x", options)
    config = run.config.read_text()
    run.config.write_text(config.replace('"lenet5"', '"resnet20"'))
    with pytest.raises(UserError, match="differs from what --model=resnet20 builds now"):
        make_pretrained.save(run, "x", options)
    run.config.write_text(config)
    assert pretrained.names() == ["tiny"]


def test_the_loaded_network_has_the_temperature(copied, trained_run, capsys):
    assert make(trained_run.path, "cool", "--data=x", "--temperature=auto") == 0
    out = capsys.readouterr().out
    assert f"{(copied / 'cool.safetensors').stat().st_size:,} bytes" in out
    assert str(copied / "cool.json") in out
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
    # The predictor returns the same.
    np.testing.assert_allclose(
        load_predictor("pretrained:cool", 1).classify(test.images), after, atol=1e-6
    )
    assert f"temperature {card.temperature:.3f}" in pretrained.describe()
    network = models.build("lenet5", (16, 16, 3), 3)
    text = weights.take(network, "pretrained:cool", card.class_names)
    assert text == "the weights of pretrained:cool"


# ---- Loading


def test_an_unknown_name_lists_the_choices(installed, tmp_path, monkeypatch):
    for name in ("big", "../tiny", ""):
        with pytest.raises(UsageError, match=r"unknown model 'pretrained:.*'; choose one of: tiny"):
            pretrained.load(name)
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path)
    with pytest.raises(UsageError, match="this installation has none"):
        pretrained.load("tiny")


def test_damaged_files_are_one_line(copied):
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
    facts = (f"{card.accuracy:.4f} on 30", f"expected error {card.calibration_error:.4f}\n")
    for text in ("pretrained:tiny", *facts, "colours", card.source):
        assert text in out
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path)
    assert pretrained.describe() == "no models come with this installation"


def test_arrays_are_restored_as_they_were_saved():
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array(7, np.int64)}
    data = tensors.save(arrays, {"who": "me"})
    found = tensors.load(data, arrays)
    assert tensors.load_metadata(data) == {"who": "me"}
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    for other in ({"a": arrays["a"]}, arrays | {"b": found["a"]}):
        with pytest.raises(ValueError, match="not the expected ones"):
            tensors.load(data, other)


# ---- Uses


def test_it_predicts_what_the_export_of_the_run_predicts(installed, trained_run):
    mine, theirs = load_predictor("pretrained:tiny", 1), Predictor(str(trained_run.path))
    images, _ = colour_images(200, 16, 3, seed=5)
    assert (mine.size, mine.class_names) == (theirs.size, theirs.class_names)
    for method in ("classify", "features"):
        a, b = (getattr(predictor, method)(images) for predictor in (mine, theirs))
        np.testing.assert_allclose(a, b, atol=0.01)
        assert a.dtype == np.float32
    assert mine.classify(images[:0]).shape == (0, 3)


def test_predict_takes_a_pretrained_name_and_explains_it(installed, tmp_path, capsys):
    Image.new("RGB", (20, 20), "white").save(tmp_path / "white.png")
    out = tmp_path / "overlays"
    flags = ("--model=pretrained:tiny", "--format=json", f"--explain={out}")
    assert classify(*flags, "--min_probability=0.9999", tmp_path) == 0
    assert [path.name for path in out.iterdir()] == ["00001_white.png"]
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["top"][0]["label"], row["top"][0]["guess"]) == ("unknown", "class_2")
    assert classify("--model=pretrained:big", tmp_path) == 2
    assert "choose one of: tiny" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("class_0", "class_1", "class_2"), ("x", "y", "z")])
def test_a_run_is_initialized_with_its_weights(installed, names):
    model = models.build("lenet5", (16, 16, 3), 3)
    text = weights.take(model, "pretrained:tiny", names)
    new = names[0] == "x"
    assert text == "the weights of pretrained:tiny" + "; new layers: logits" * new
    theirs = pretrained.load("tiny")[0]
    pairs = zip(model.get_weights(), theirs.get_weights(), strict=True)
    same = [np.array_equal(mine, other) for mine, other in pairs]
    assert all(same[:-2])
    assert all(same) != new


def test_init_from_of_train_takes_a_pretrained_name(installed, image_folder):
    flags = {"model": "lenet5", "data": f"folder:{image_folder}", "batch_size": 16}
    plan = planning.prepare(TrainConfig.from_flags(init_from="pretrained:tiny", **flags))
    assert plan.origin == "the weights of pretrained:tiny"
    with pytest.raises(UsageError, match="choose one of: tiny"):
        planning.prepare(TrainConfig.from_flags(init_from="pretrained:big", **flags))
