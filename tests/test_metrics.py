"""Figures against computations by hand."""

import numpy as np
import pytest
import sklearn.metrics

from keras_cifar import metrics

NAMES = ("a", "b", "c")


def test_figures_by_hand():
    probabilities = np.array(
        [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], np.float32
    )
    labels = np.array([0, 1, 1, 1])
    figures = metrics.summarize(probabilities, labels, NAMES)
    assert figures["count"] == 4
    assert figures["accuracy"] == 0.75
    assert figures["top5_accuracy"] == 1.0
    expected = -np.log([0.5, 0.5, np.float32(0.2), np.float32(0.8)]).mean()
    assert figures["loss"] == pytest.approx(expected, abs=1e-12)
    assert figures["confusion"] == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert figures["per_class"]["a"] == {
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "count": 1,
    }
    assert figures["per_class"]["b"]["recall"] == pytest.approx(2 / 3)
    assert figures["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 0}


def test_figures_equal_scikit_learns(random):
    probabilities = random.dirichlet(np.ones(12), 300)
    labels = random.integers(0, 12, 300)
    names = tuple("abcdefghijkl")
    figures = metrics.summarize(probabilities, labels, names)
    assert figures["loss"] == pytest.approx(
        sklearn.metrics.log_loss(labels, probabilities, labels=range(12)), abs=1e-12
    )
    assert figures["top5_accuracy"] == pytest.approx(
        sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(12))
    )


def test_a_probability_of_zero_keeps_the_loss_finite():
    figures = metrics.summarize(np.array([[0.0, 1.0]], np.float32), np.array([0]), ("a", "b"))
    assert np.isfinite(figures["loss"])
    assert figures["loss"] > 80


def test_the_table_has_a_line_a_class():
    figures = metrics.summarize(np.eye(3)[[0, 1, 2]], np.arange(3), NAMES)
    lines = metrics.table(figures).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["a", "1.0000", "1.0000", "1.0000", "1"]
