"""Uneven classes: the weights against scikit-learn, and what a pass of equally frequent classes has."""

import numpy as np
import pytest
import tensorflow as tf
from sklearn.utils.class_weight import compute_class_weight

from keras_cifar.data.balance import class_weights, even_order


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


# ---- The order


UNEVEN = [(10, 1000), (3, 40, 7, 0, 25), (1, 1, 1), (5, 5), (9,), (50, 1, 1)]


def passes(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    order = tf.function(even_order(labels))
    return np.stack([order(tf.constant([seed, number])) for number in range(count)])


@pytest.mark.parametrize("counts", UNEVEN)
def test_pass_has_each_class_equally_often_and_all_its_examples_before_one_again(counts):
    labels = uneven(*counts)
    for order in passes(labels, 5):
        assert order.shape == labels.shape
        times = np.bincount(labels[order])[np.bincount(labels) > 0]
        assert times.max() - times.min() <= 1
        for label in np.unique(labels):
            drawn, members = order[labels[order] == label], np.flatnonzero(labels == label)
            assert len(set(drawn)) == min(len(drawn), len(members))
            for start in range(0, len(drawn), len(members)):
                cycle = drawn[start : start + len(members)]
                assert len(set(cycle)) == len(cycle)
                assert set(cycle) <= set(members)


def test_order_is_random_within_and_between_the_classes_and_a_function_of_the_seed():
    labels = uneven(20, 200, 31)
    found = passes(labels, 300)
    np.testing.assert_array_equal(found[:3], passes(labels, 3))
    assert len(np.unique(found, axis=0)) == 300
    assert not np.array_equal(found[0], passes(labels, 1, seed=1)[0])
    # Every image of the large class comes in 84 or 83 of 200 passes, each place has each class.
    shares = np.bincount(found.ravel(), minlength=251) / 300
    large = shares[labels == 1]
    assert large.mean() == pytest.approx(251 / 3 / 200, abs=0.01)
    assert large.min() > 0.25
    assert large.max() < 0.6
    at_places = np.stack([(labels[found] == label).mean(axis=0) for label in range(3)])
    assert at_places.min() > 0.2
    assert at_places.max() < 0.48
    # The remainder, of two, is of each class at times.
    extra = [np.bincount(labels[order]) - 251 // 3 for order in found]
    np.testing.assert_allclose(np.mean(extra, axis=0), 2 / 3, atol=0.12)
    # The images of a small class come in another order each time.
    small = np.stack([order[labels[order] == 0][:20] for order in found])
    assert len(np.unique(small, axis=0)) == 300
