"""The averages of weights against their formula."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.models.weight_averaging import WeightAverages


@pytest.fixture
def weights(random) -> list[keras.Variable]:
    return [keras.Variable(random.normal(size=shape)) for shape in ((2, 3), (4,))]


def arrays(variables) -> list[np.ndarray]:
    return [v.numpy() for v in variables]


def assert_equal(variables, expected, tolerance: float = 0.0) -> None:
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=0, atol=tolerance)


def test_averages_follow_the_weights_with_a_decay_that_grows_to_its_value(weights, random):
    averages = WeightAverages(weights, 0.3)
    expected = arrays(weights)
    assert_equal(averages.variables, expected)
    for count in range(1, 7):
        for weight in weights:
            weight.assign(random.normal(size=weight.shape))
        averages.update(tf.constant(count))
        decay = min(0.3, (1 + count) / (10 + count))
        pairs = zip(expected, arrays(weights), strict=True)
        expected = [decay * e + (1 - decay) * w for e, w in pairs]
    assert_equal(averages.variables, expected, 1e-6)


def test_averages_replace_the_weights_while_the_body_runs(weights):
    averages = WeightAverages(weights, 0.9)
    averaged = arrays(weights)
    for weight in weights:
        weight.assign(weight + 1)
    trained = arrays(weights)
    with pytest.raises(ZeroDivisionError), averages.in_place():
        assert_equal(weights, averaged)
        raise ZeroDivisionError
    assert_equal(weights, trained)


def test_decay_0_keeps_no_averages(weights):
    averages = WeightAverages(weights, 0.0)
    averages.update(tf.constant(1))
    assert averages.variables == []
    before = arrays(weights)
    with averages.in_place():
        assert_equal(weights, before)
