"""Metrics against computations by hand and scikit-learn's, and their text."""

import numpy as np
import pytest
import sklearn.metrics

from keras_cifar.evaluation import metrics, text

NAMES = ("a", "b", "c")


def test_a_class_without_images_has_metrics_of_zero():
    found = metrics.summarize(np.eye(3)[[0, 1, 0, 1]], np.array([0, 1, 1, 1]), NAMES)
    assert found["confusion"] == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert found["per_class"]["a"] == {
        "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "count": 1
    }  # fmt: skip
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 0}


def test_metrics_equal_scikit_learns(random):
    probabilities, labels = random.dirichlet(np.ones(12), 300), random.integers(0, 12, 300)
    names, classes = tuple("abcdefghijkl"), range(12)
    found = metrics.summarize(probabilities, labels, names)
    loss = sklearn.metrics.log_loss(labels, probabilities, labels=classes)
    assert found["loss"] == pytest.approx(loss, abs=1e-12)
    top5 = sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=classes)
    assert found["top5_accuracy"] == top5
    predicted = probabilities.argmax(axis=1)
    assert found["accuracy"] == sklearn.metrics.accuracy_score(labels, predicted)
    report = sklearn.metrics.classification_report(
        labels, predicted, labels=classes, target_names=names, output_dict=True, zero_division=0
    )
    theirs = ("precision", "recall", "f1-score", "support")
    for name, row in found["per_class"].items():
        assert list(row) == ["precision", "recall", "f1", "count"]
        assert list(row.values()) == pytest.approx([report[name][key] for key in theirs])


def test_a_probability_of_zero_keeps_the_loss_finite():
    found = metrics.summarize(np.array([[0.0, 1.0]], np.float32), np.array([0]), ("a", "b"))
    assert 80 < found["loss"] < np.inf


def test_an_interval_is_that_of_a_normal_distribution_where_there_are_many_images(random):
    for values in (random.random(10_000) < 0.9, random.exponential(size=10_000)):
        low, high = metrics.bootstrap(values)
        assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 100, rel=0.1)
        assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * (high - low))


@pytest.mark.parametrize("count", [1, 20])
def test_intervals_of_few_images(count):
    assert metrics.bootstrap(np.ones(count, bool)) == [1, 1]
    low, high = metrics.bootstrap(np.arange(count) / 10)
    assert 0 <= low <= high <= count / 10
    found = metrics.summarize(np.eye(3)[[0] * count], np.zeros(count, int), NAMES)
    right = {"accuracy": [1, 1], "top5_accuracy": [1, 1]}
    assert found["intervals"] == {"level": 0.95, **right, "loss": [0, 0]}


def test_the_calibration_error_is_that_of_the_definition():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    labels = np.array([0, 1, 0, 1])
    found = metrics.calibration_error(probabilities, labels)
    # Bins of 0.9 (two images, half right), of 0.6 and of 0.7 (both right).
    error = (abs(1.8 - 1) + abs(0.6 - 1) + abs(0.7 - 1)) / 4
    assert found["expected_calibration_error"] == pytest.approx(error, abs=1e-12)
    assert [b["count"] for b in found["bins"]] == [0] * 8 + [1, 0, 1, 0, 0, 2, 0]
    assert list(found["bins"][13].values()) == pytest.approx([13 / 15, 14 / 15, 2, 0.9, 0.5])
    assert found["bins"][0]["confidence"] is found["bins"][0]["accuracy"] is None


@pytest.mark.parametrize("confidence", [1 / 15, 0.6, 1.0])
def test_a_bin_has_its_upper_edge(confidence):
    bins = metrics.calibration_error(np.array([[confidence, 0.0]]), np.array([0]))["bins"]
    (one,) = (b for b in bins if b["count"])
    assert one["high"] == pytest.approx(confidence)


def test_the_most_confused_pairs_come_first():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([0, 2, 1, 0, 0, 1, 1, 2])
    found = metrics.summarize(np.eye(3)[predicted], labels, NAMES)
    assert found["confused"][0] == {"true": "b", "predicted": "a", "count": 2}
    pairs = [(*pair.values(),) for pair in found["confused"]]
    assert pairs == [("b", "a", 2), ("c", "b", 2), ("a", "b", 1), ("a", "c", 1)]
    assert "most confused: b as a 2, c as b 2, a as b 1" in text.metrics_summary(found)


def test_the_most_confident_mistakes_come_first():
    probabilities = np.array(
        [[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.5, 0.25, 0.25], [0, 0, 1]], np.float32
    )
    found = metrics.summarize(probabilities, np.array([1, 0, 2, 2]), NAMES)
    assert [mistake["row"] for mistake in found["mistakes"]] == [1, 0, 2]
    classes = {"row": 1, "true": "a", "predicted": "b"}
    assert found["mistakes"][0] == {**classes, "probability": 0.75, "true_probability": 0.125}


def test_lists_of_mistakes_are_short(random):
    probabilities, labels = random.dirichlet(np.ones(12), 600), random.integers(0, 12, 600)
    found = metrics.summarize(probabilities, labels, tuple("abcdefghijkl"))
    assert len(found["confused"]) == 20
    assert len(found["mistakes"]) == 48
    wrong = probabilities.argmax(axis=1) != labels
    assert found["mistakes"][47]["probability"] == np.sort(probabilities.max(axis=1)[wrong])[-48]


def test_the_text_has_the_metrics_their_intervals_and_a_line_a_class():
    found = metrics.summarize(np.eye(3)[[0, 1, 2]], np.arange(3), NAMES)
    assert text.metrics_summary(found).splitlines() == [
        "accuracy 1.0000 (1.0000 to 1.0000), top-5 1.0000 (1.0000 to 1.0000), loss 0.0000 "
        "(0.0000 to 0.0000) on 3 images, in brackets 95% intervals",
        "calibration error 0.0000; most confused: none",
    ]
    lines = [line.split() for line in text.metrics_table(found).splitlines()]
    assert lines[0] == ["class", "precision", "recall", "f1", "count"]
    assert lines[1:] == [[name, "1.0000", "1.0000", "1.0000", "1"] for name in NAMES]
