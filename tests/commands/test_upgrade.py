"""Runs, checkpoints, models and exports that an earlier revision wrote.

`tests/fixtures/revision_bf0a5a8.tar.xz` was written by that revision with --data=digits:

    finished    lenet5, Adam, averaged weights, --calibration_batches, exported
    unfinished  resnet20, SGD, stopped by SIGTERM at step 2 of 4 of its second epoch
    whole       the end of the same run without the stop: checkpoint, history, test metrics

The learning rate of the latter two is 1e-30 and their first weights are multiples of 1/32, so that the
files compress well: batch normalization's statistics are all that changes.
"""

import csv
import json
import pathlib
import re
import runpy
import sys
import tarfile
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from keras_cifar import models
from tests.conftest import write_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "revision_bf0a5a8.tar.xz"
UNFINISHED = (
    *("--data=digits", "--model=resnet20", "--image_size=8", "--epochs=2", "--steps_per_epoch=4"),
    *("--batch_size=32", "--augment=crop(1)|flip", "--optimizer=sgd", "--momentum=0"),
    *("--learning_rate=1e-30", "--init_from=start.keras", "--calibration_batches=2"),
)


@pytest.fixture
def old(tmp_path, monkeypatch) -> pathlib.Path:
    """The directory of the earlier runs, which is the working directory."""
    with tarfile.open(FIXTURE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not before 3.11.4
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, *argv: str) -> int | None:
    with mock.patch.object(sys, "argv", [command, *argv]), pytest.raises(SystemExit) as ended:
        runpy.run_module(f"keras_cifar.{command}", run_name="__main__")
    return ended.value.code


def test_finished_run_is_evaluated_with_the_same_metrics(old):
    before = json.loads((old / "finished/eval/test.json").read_text())
    assert run("evaluate", "--run=finished") == 0
    after = json.loads((old / "finished/eval/test.json").read_text())
    assert after["fingerprint"] == before["fingerprint"]
    assert after["accuracy"] == before["accuracy"]
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_finished_run_is_reported_and_exported_again(old):
    assert run("report", "finished", "--out=report.html") == 0
    assert re.search(r"0\.7214|72\.14", (old / "report.html").read_text())
    assert run("export", "--run=finished") == 0
    exports = [tf.saved_model.load(str(old / "finished/export" / version)) for version in "12"]
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8))
    for name, output in (("serving_default", "probabilities"), ("features", "features")):
        before, after = (e.signatures[name](images=images)[output] for e in exports)
        np.testing.assert_allclose(after, before, atol=1e-5)


def test_earlier_export_predicts(old, capsys):
    write_folder(old / "images", {"": 4}, side=16)
    assert run("predict", "--model=finished", "--format=json", "images") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [len(row["top"]) for row in rows] == [3] * 4


def test_finished_run_is_not_trained_again(old, capsys):
    flags = json.loads((old / "finished/config.json").read_text())["flags"]
    model = (old / "finished/model.keras").read_bytes()
    argv = [f"--{name}={value}" for name, value in flags.items() if value not in (None, False)]
    assert run("train", *argv) == 0
    assert (old / "finished/model.keras").read_bytes() == model
    assert "test accuracy 0.7214" in capsys.readouterr().out


def test_unfinished_run_resumes_and_ends_as_it_would_have(old, capsys):
    assert run("train", *UNFINISHED, "--run_dir=unfinished") == 0
    assert "resuming from step 2 of 4 in epoch 2 of 2" in capsys.readouterr().out
    ends = []
    for directory in ("whole", "unfinished/checkpoint"):
        path = max((old / directory).glob("step-000000008-epoch-00002-*.safetensors"))
        ends.append(safetensors.numpy.load_file(path))
    assert ends[0].keys() == ends[1].keys()
    for name, expected in ends[0].items():
        # Kernels of other CPUs round otherwise.
        np.testing.assert_allclose(ends[1][name], expected, rtol=1e-4, atol=1e-4)
    histories = []
    for name in ("whole", "unfinished"):
        with open(old / name / "history.csv", newline="") as file:
            histories.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert histories[1] == pytest.approx(histories[0], abs=1e-4)


def test_other_flags_than_those_of_the_earlier_run_are_named(old, capsys):
    assert run("train", *UNFINISHED[:-1], "--run_dir=unfinished", "--ema=0.5") == 2
    message = capsys.readouterr().err
    assert "--precise_bn_batches was 2, is 10; --ema was 0.0, is 0.5" in message


def test_models_load_with_keras_by_the_documented_import(old):
    import keras
    import keras_cifar.layers

    assert keras_cifar.layers is models.layers
    for name in ("finished", "unfinished"):
        assert keras.models.load_model(old / name / "model.keras").count_params() > 10_000
