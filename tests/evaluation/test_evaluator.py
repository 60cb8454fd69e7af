"""What evaluation writes beside the figures, and a model under disturbances."""

import json

import numpy as np
import pytest

from keras_cifar import evaluate
from keras_cifar.core import cli
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import disturbances, evaluator, metrics, robustness


def command(*argv) -> int:
    return cli._execute("evaluate", evaluate.main, evaluate.EvaluateOptions, "", list(argv))


@pytest.fixture(scope="module")
def source(trained_run):
    """(model, dataset, spec) of the trained run."""
    return evaluator.load_run(trained_run, "test")


def disturbed(source, tmp_path, seed=0, max_images=None) -> dict:
    model, dataset, spec = source
    return robustness.disturb(model, "test", dataset.test, spec, Run(tmp_path), seed, max_images)


# ---- Predictions


def test_all_figures_can_be_computed_again_from_the_predictions(trained_run):
    figures = json.loads(trained_run.evaluation("test").read_text())
    config = trained_run.read_config()
    with np.load(trained_run.predictions("test")) as stored:
        labels, probabilities = stored["labels"], stored["probabilities"]
    assert labels.dtype == np.int64
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (30, 3)
    again = metrics.summarize(probabilities, labels, tuple(config["class_names"]))
    assert again == {key: figures[key] for key in again}
    assert set(figures) - set(again) == {"split", "data", "fingerprint"}


def test_evaluate_prints_intervals_calibration_and_where_the_predictions_are(trained_run, capsys):
    assert command(f"--run={trained_run.path}", "--split=val") == 0
    figures = json.loads(trained_run.evaluation("val").read_text())
    output = capsys.readouterr().out
    low, high = figures["intervals"]["accuracy"]
    assert f"val accuracy {figures['accuracy']:.4f} ({low:.4f} to {high:.4f})" in output
    error = figures["calibration"]["expected_calibration_error"]
    assert f"calibration error {error:.4f}" in output
    assert str(trained_run.predictions("val")) in output


# ---- Disturbances


def test_accuracies_under_disturbances_are_those_of_the_disturbed_images(source, tmp_path):
    model, dataset, _ = source
    record = disturbed(source, tmp_path, seed=5)
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


def test_the_seed_changes_what_is_random(source, tmp_path):
    first, again, other = (disturbed(source, tmp_path, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["disturbances"]["clutter"] != other["disturbances"]["clutter"]
    assert first["disturbances"]["contrast"] == other["disturbances"]["contrast"]


def test_images_are_spread_over_the_split_and_mixed(source, tmp_path):
    split = source[1].test
    for most, count in ((10, 10), (None, 30), (1000, 30)):
        rows = robustness.choose(split, 0, most).rows
        assert (rows != np.sort(rows)).any()
        np.testing.assert_array_equal(np.sort(rows), split.spread(count).rows)
        assert disturbed(source, tmp_path, max_images=most)["count"] == len(rows)


def test_images_are_disturbed_in_parts_and_each_otherwise(source, tmp_path, monkeypatch):
    parts = []
    apply = disturbances.apply

    def spy(name, images, strength, seed, first_row=0):
        parts.append((len(images), first_row))
        return apply(name, images, strength, seed, first_row)

    monkeypatch.setattr(disturbances, "apply", spy)
    monkeypatch.setattr(robustness, "DISTURBED_BYTES", 8 * 16 * 16 * 3)
    whole = disturbed(source, tmp_path)
    assert list(dict.fromkeys(parts))[:4] == [(8, 0), (8, 8), (8, 16), (6, 24)]
    monkeypatch.undo()
    # What is not random is the same in parts.
    at_once = disturbed(source, tmp_path)["disturbances"]
    for name in ("contrast", "blur", "saturation"):
        assert whole["disturbances"][name] == at_once[name]


def test_evaluate_disturb_prints_the_table_and_leaves_the_figures(trained_run, capsys):
    before = trained_run.evaluation("test").read_bytes()
    argv = f"--run={trained_run.path}", "--disturb", "--max_images=6", "--disturb_seed=3"
    assert command(*argv) == 0
    assert trained_run.evaluation("test").read_bytes() == before
    record = json.loads(trained_run.disturbances("test").read_text())
    assert (record["count"], record["seed"], record["split"]) == (6, 3, "test")
    output = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line}
    for name, row in record["disturbances"].items():
        assert [float(value) for value in lines[name][1:6]] == pytest.approx(
            row["accuracy"], abs=1e-4
        )
        assert lines[name][7].rstrip(",") == f"{row['strengths'][0]:g}"
    assert f"{record['mean_accuracy']:.4f} in the mean" in output
    for path in (trained_run.disturbances("test"), trained_run.gallery("test")):
        assert str(path) in output
        assert path.exists()


@pytest.mark.parametrize(
    "flags",
    [["--max_images=5"], ["--disturb", "--max_images=0"], ["--disturb", "--disturb_seed=-1"]],
)
def test_flags_that_make_no_sense_are_refused(trained_run, flags, capsys):
    assert command(f"--run={trained_run.path}", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flags[-1].partition("=")[0] in line
