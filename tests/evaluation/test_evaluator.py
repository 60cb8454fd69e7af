"""The files of an evaluation, and a model under disturbances."""

import json
import shutil

import numpy as np
import pytest

from keras_cifar import evaluate
from keras_cifar.core import cli
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import (
    disturbances,
    evaluator,
    metrics,
    plots,
    robustness,
    selective,
    text,
)


def command(*argv) -> int:
    return cli._execute("evaluate", evaluate.main, evaluate.EvaluateOptions, "", list(argv))


@pytest.fixture(scope="module")
def loaded(trained_run):
    """(model, dataset, spec) of the trained run."""
    return evaluator.load_run(trained_run, "test")


@pytest.fixture
def disturb(loaded, trained_run, tmp_path, monkeypatch):
    """The record of the test split under disturbances; nothing is drawn."""
    shutil.copy(trained_run.config, tmp_path)
    monkeypatch.setattr(plots, "save", lambda *_: None)
    monkeypatch.setattr(evaluator, "load_run", lambda *_: loaded)

    def disturb(seed=0, max_images=None) -> dict:
        return robustness.disturb(Run(tmp_path), "test", evaluator.RUNS_OWN, seed, max_images)

    return disturb


@pytest.fixture
def two(monkeypatch):
    """Only two disturbances, one of them random."""
    few = {name: disturbances.DISTURBANCES[name] for name in ("clutter", "contrast")}
    monkeypatch.setattr(disturbances, "DISTURBANCES", few)


def test_metrics_are_those_of_the_stored_predictions(trained_run):
    written = json.loads(trained_run.evaluation("test").read_text())
    names = tuple(trained_run.read_config()["class_names"])
    with np.load(trained_run.predictions("test")) as stored:
        labels, probabilities = stored["labels"], stored["probabilities"]
    assert (labels.dtype, probabilities.dtype) == (np.int64, np.float32)
    assert probabilities.shape == (30, 3)
    again = metrics.summarize(probabilities, labels, names)
    assert again == {key: written[key] for key in again}
    assert set(written) - set(again) == {"split", "data", "fingerprint"}


def test_evaluate_prints_intervals_calibration_error_and_paths(trained_run, capsys):
    assert command(f"--run={trained_run.path}", "--split=val") == 0
    found = json.loads(trained_run.evaluation("val").read_text())
    output = capsys.readouterr().out
    low, high = found["intervals"]["accuracy"]
    assert f"val accuracy {found['accuracy']:.4f} ({low:.4f} to {high:.4f})" in output
    error = found["calibration"]["expected_calibration_error"]
    assert f"calibration error {error:.4f}" in output
    assert output.splitlines()[-3:] == [
        f"metrics     {trained_run.evaluation('val')}",
        f"predictions {trained_run.predictions('val')}",
        f"confusion   {trained_run.confusion('val')}",
    ]


def test_evaluate_proposes_a_threshold_from_validation_alone(trained_run, capsys, tmp_path):
    assert command(f"--run={trained_run.path}", "--split=val") == 0
    found = json.loads(trained_run.evaluation("val").read_text())["min_probability"]
    with np.load(trained_run.predictions("val")) as stored:
        expected = selective.propose(stored["probabilities"], stored["labels"])
    assert found == expected | {"temperature": 1}
    assert f"\nunknown     {text.threshold_summary(found)}\n" in capsys.readouterr().out
    shutil.copy(trained_run.config, tmp_path)
    shutil.copy(trained_run.model, tmp_path)
    for split in ("train", "test"):
        assert command(f"--run={tmp_path}", f"--split={split}") == 0
        assert "min_probability" not in Run(tmp_path).evaluation(split).read_text()
        assert "unknown" not in capsys.readouterr().out


def test_accuracies_under_disturbances_are_those_of_the_disturbed_images(loaded, disturb, tmp_path):
    model, dataset, _ = loaded
    record = disturb(seed=5)
    assert record == json.loads(Run(tmp_path).disturbances("test").read_text())
    chosen = robustness.choose(dataset.test, seed=5, max_images=None)
    images, labels = chosen.images, chosen.labels

    def accuracy(images):
        return (model(images).numpy().argmax(axis=1) == labels).mean()

    assert record["clean_accuracy"] == accuracy(images)
    assert (record["count"], record["seed"]) == (30, 5)
    assert record["fingerprint"] == dataset.test.fingerprint
    assert list(record["disturbances"]) == list(disturbances.DISTURBANCES)
    for name in ("brightness", "noise", "clutter"):
        expected = [
            accuracy(disturbances.apply(name, images, level, seed=5)) for level in range(1, 6)
        ]
        assert record["disturbances"][name]["accuracy"] == pytest.approx(expected)
    every = [row["accuracy"] for row in record["disturbances"].values()]
    assert record["mean_accuracy"] == pytest.approx(np.mean(every), abs=1e-12)


def test_the_seed_changes_what_is_random(disturb, two):
    first, again, other = (disturb(seed) for seed in (0, 0, 1))
    assert first == again
    assert first["disturbances"]["clutter"] != other["disturbances"]["clutter"]
    assert first["disturbances"]["contrast"] == other["disturbances"]["contrast"]


def test_images_are_spread_over_the_split_and_mixed(loaded, disturb, two):
    split = loaded[1].test
    for most, count in ((10, 10), (None, 30), (1000, 30)):
        rows = robustness.choose(split, 0, most).rows
        assert (rows != np.sort(rows)).any()
        np.testing.assert_array_equal(np.sort(rows), split.spread(count).rows)
        assert disturb(max_images=most)["count"] == len(rows)


def test_images_are_disturbed_in_batches_and_each_differently(disturb, monkeypatch, two):
    batches, apply = [], disturbances.apply

    def spy(name, images, strength, seed, first_row=0):
        batches.append((len(images), first_row))
        return apply(name, images, strength, seed, first_row)

    monkeypatch.setattr(disturbances, "apply", spy)
    monkeypatch.setattr(robustness, "DISTURBED_BYTES", 8 * 16 * 16 * 3)
    in_batches = disturb()
    assert list(dict.fromkeys(batches))[:4] == [(8, 0), (8, 8), (8, 16), (6, 24)]
    monkeypatch.setattr(robustness, "DISTURBED_BYTES", 2**22)
    at_once = disturb()
    # The contrast is not random, so batches do not change it.
    assert in_batches["disturbances"]["contrast"] == at_once["disturbances"]["contrast"]


def test_evaluate_disturb_prints_a_table_and_keeps_the_metrics(trained_run, capsys):
    before = trained_run.evaluation("test").read_bytes()
    argv = f"--run={trained_run.path}", "--disturb", "--max_images=6", "--disturb_seed=3"
    assert command(*argv) == 0
    assert trained_run.evaluation("test").read_bytes() == before
    record = json.loads(trained_run.disturbances("test").read_text())
    assert (record["count"], record["seed"], record["split"]) == (6, 3, "test")
    output = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line}
    for name, row in record["disturbances"].items():
        assert lines[name][1:6] == [f"{value:.4f}" for value in row["accuracy"]]
        assert lines[name][7].rstrip(",") == f"{row['strengths'][0]:g}"
    assert f"{record['mean_accuracy']:.4f} averaged" in output
    assert f"metrics     {trained_run.disturbances('test')}\n" in output
    assert f"images      {trained_run.gallery('test')}\n" in output
    assert trained_run.gallery("test").exists()


@pytest.mark.parametrize(
    "flags",
    [["--max_images=5"], ["--disturb", "--max_images=0"], ["--disturb", "--disturb_seed=-1"]],
)
def test_invalid_flags_are_refused(trained_run, flags, capsys):
    assert command(f"--run={trained_run.path}", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flags[-1].partition("=")[0] in line
