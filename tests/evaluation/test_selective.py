"""The threshold that `evaluate` proposes for `predict --min_probability`."""

import json

import numpy as np
import pytest
import scipy.special

from keras_cifar.core.errors import UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import selective, text
from keras_cifar.exporters import verification


def answers(*levels) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, labels) of (largest probability, images, wrong ones) for each level."""
    confidence = np.repeat([level for level, _, _ in levels], [count for _, count, _ in levels])
    labels = np.concatenate([np.arange(count) < wrong for _, count, wrong in levels])
    return np.stack([confidence, 1 - confidence], axis=1).astype(np.float32), labels.astype(int)


@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_the_threshold_is_the_smallest_that_reaches_the_target(random, noise):
    labels = random.integers(0, 4, 500)
    logits = 3 * np.eye(4)[labels] + noise * random.normal(size=(500, 4))
    probabilities = scipy.special.softmax(logits, axis=1).astype(np.float32)
    found = selective.propose(probabilities, labels)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    assert found["target"] == pytest.approx(max(0.95, (1 + right.mean()) / 2))
    kept = confidence >= found["value"]
    assert 20 <= kept.sum() < 500
    assert found["answered"] == kept.mean()
    assert found["accuracy"] == pytest.approx(right[kept].mean())
    assert found["accuracy"] >= found["target"]
    for threshold in confidence[~kept]:
        assert right[confidence >= threshold].mean() < found["target"]


def test_images_of_one_probability_are_answered_together():
    # 39 of the 40 at 0.9 are right; with those at 0.5, 49 of 60.
    found = selective.propose(*answers((0.9, 40, 1), (0.5, 20, 10)))
    assert found == {"value": 0.7, "accuracy": 0.975, "answered": 40 / 60, "target": 0.95}


def test_the_target_itself_is_enough():
    reached, missed = (answers((0.9, count, 1), (0.5, 20, 10)) for count in (20, 19))
    assert selective.propose(*reached)["accuracy"] == selective.propose(*reached)["target"] == 0.95
    assert selective.propose(*missed)["value"] is None


def test_above_an_accuracy_of_090_half_the_error_must_go():
    # The 4 errors of 100 images become 2 of 95 without 0.5, and 1 of 90 without 0.6.
    levels = (0.9, 90, 1), (0.6, 5, 1), (0.5, 5, 2)
    found = selective.propose(*answers(*levels))
    assert (found["target"], found["answered"], found["value"]) == (0.98, 0.9, 0.8)


def test_no_threshold_is_needed_if_all_answers_are_right():
    found = selective.propose(*answers((0.9, 10, 0), (0.6, 10, 0)))
    assert found == {"value": 0, "accuracy": 1, "answered": 1, "target": 1}
    assert text.threshold_summary(found) == "no --min_probability is needed: all answers are right"


@pytest.mark.parametrize(
    "levels",
    [((0.9, 30, 10), (0.6, 30, 10)), ((0.9, 19, 0), (0.6, 30, 20)), ((0.9, 19, 0),)],
    ids=["too many are wrong", "too few are right", "too few images"],
)
def test_no_threshold_is_proposed_if_none_reaches_the_target(levels):
    found = selective.propose(*answers(*levels))
    assert found["value"] is found["accuracy"] is found["answered"] is None
    line = "no --min_probability is proposed: none answers at least 20 of these images with "
    assert text.threshold_summary(found) == f"{line}{found['target']:.1%} of the answers right"


def test_the_line_has_the_threshold_the_share_and_the_accuracy():
    found = selective.propose(*answers((0.9, 40, 1), (0.5, 20, 10)))
    assert text.threshold_summary(found) == (
        "predict --min_probability 0.7 answers 66.7% of the images, and 97.5% of these answers "
        "are right"
    )


BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


@pytest.mark.parametrize(
    ("low", "high", "value"),
    [(0.5, 0.9, 0.7), (0.8, 0.84, 0.82), (0.9999, 1.0, 0.99995), (BELOW_ONE, 1.0, 0.99999997)],
)
def test_the_threshold_has_few_digits(low, high, value):
    assert selective._shortest(low, high) == value
    assert low < value <= high


# ---- The probabilities of the export


@pytest.fixture
def exported(tmp_path):
    """Writes what a version of a run's export holds beside its model: the run."""

    def write(version: int, record: str | None) -> Run:
        path = tmp_path / "export" / str(version) / verification.FILE
        path.parent.mkdir(parents=True)
        (path.parents[1] / "saved_model.pb").touch()
        if record is not None:
            path.write_text(record)
        return Run(tmp_path)

    return write


def test_the_threshold_is_for_the_temperature_of_the_newest_export(exported, random):
    labels = random.integers(0, 4, 200)
    logits = 2 * np.eye(4)[labels] + random.normal(size=(200, 4))
    cold, warm = (scipy.special.softmax(logits / t, axis=1).astype(np.float32) for t in (1, 2.5))
    exported(9, "{}")
    run = exported(10, json.dumps({"calibration": {"temperature": 2.5}}))
    found = selective.propose_for_export(run, cold, labels)
    assert found.pop("temperature") == 2.5
    value, expected = found.pop("value"), selective.propose(warm, labels)
    assert value == pytest.approx(expected.pop("value"), abs=1e-3)
    assert found == expected
    assert (warm.max(axis=1) >= value).mean() == found["answered"]
    assert abs(value - selective.propose(cold, labels)["value"]) > 0.1


@pytest.mark.parametrize("record", [None, '{"images": 3}'], ids=["no record", "no temperature"])
def test_an_export_without_a_temperature_has_that_of_1(exported, tmp_path, record):
    given = answers((0.9, 40, 1), (0.5, 20, 10))
    expected = selective.propose(*given) | {"temperature": 1}
    assert selective.propose_for_export(Run(tmp_path / "no export"), *given) == expected
    assert selective.propose_for_export(exported(1, record), *given) == expected


@pytest.mark.parametrize("record", ["", "[]", '{"calibration": {"temperature": "warm"}}'])
def test_a_damaged_record_is_an_error(exported, record):
    with pytest.raises(UserError, match=r"verification.json is damaged: "):
        selective.propose_for_export(exported(1, record), *answers((0.9, 40, 1)))
