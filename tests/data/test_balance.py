"""Uneven classes: the weights against scikit-learn."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from keras_cifar.data.balance import class_weights


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here leaves anything in Keras."""


def uneven(*counts: int) -> np.ndarray:
    """Labels of so many examples of each class, in a random order."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(0).permutation(labels)


@pytest.mark.parametrize("counts", [(10, 1000), (1, 2, 3), (5, 5, 5, 5), (7,)])
def test_weights_are_those_of_scikit_learn(counts):
    labels, classes = uneven(*counts), np.arange(len(counts))
    expected = compute_class_weight("balanced", classes=classes, y=labels)
    np.testing.assert_allclose(class_weights(labels, len(counts)), expected)


def test_class_without_images_is_not_counted():
    got = class_weights(uneven(10, 0, 30), 4)
    np.testing.assert_allclose(got, [2, 1, 2 / 3, 1])
