"""Recomputed statistics against those of the batches by themselves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.models import batch_norm, classifier, layers
from keras_cifar.models.precise_batch_norm import PreciseBatchNorm
from tests.conftest import colour_images
from tests.models.small import CLASSES, examples, functional, values


def recompute(network, batches: list, count: int | None = None) -> None:
    pairs = iter([(tf.constant(batch), None) for batch in batches])
    precise = PreciseBatchNorm(network, tf.distribute.get_strategy(), run_eagerly=True)
    precise.recompute(pairs, len(batches) if count is None else count)


def used(network, seed: int = 5) -> keras.Model:
    """With statistics of other images than those of the test."""
    network(colour_images(9, 8, CLASSES, seed)[0], training=True)
    return network


@pytest.mark.parametrize("count", [1, 3])
def test_statistics_are_those_of_the_batches_alone(count):
    network = used(functional())
    batches = [colour_images(6, 8, CLASSES, seed)[0] for seed in range(count)]
    conv = keras.Model(network.inputs[0], network.get_layer("conv_conv").output)
    outputs = [conv(batch).numpy() for batch in batches]
    weights = np.array([0.1 * 0.9 ** (count - 1 - i) for i in range(count)])
    weights /= weights.sum()
    recompute(network, batches)
    norm = network.get_layer("conv_bn")
    means, variances = ([f(o, axis=(0, 1, 2)) for o in outputs] for f in (np.mean, np.var))
    np.testing.assert_allclose(norm.moving_mean.numpy(), weights @ means, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance.numpy(), weights @ variances, rtol=1e-4)


def test_network_sees_the_batch_as_in_training_and_keeps_its_weights():
    network, (images, _) = used(functional()), examples()
    expected = network(images, training=True)
    weights = {path: v for path, v in values(network).items() if "moving" not in path}
    recompute(network, [images])
    np.testing.assert_allclose(network(images, training=False), expected, atol=1e-5)
    for path, value in weights.items():
        np.testing.assert_array_equal(values(network)[path], value)


@pytest.mark.parametrize("case", ["no batches", "frozen", "fixed", "no normalization"])
def test_without_trainable_normalization_or_batches_nothing_changes(case):
    network = used(functional(norm=case != "no normalization"))
    if case == "frozen":
        network.get_layer("conv_bn").trainable = False
    if case == "fixed":
        batch_norm.configure(network, "fixed")
    before = values(network)
    recompute(network, [], 0 if case == "no batches" else 5)
    for path, value in values(network).items():
        np.testing.assert_array_equal(value, before[path])


def test_dropout_is_off_meanwhile_and_continues_as_before():
    images, x = classifier.image_input((8, 8, 3))
    x = keras.layers.Dropout(0.5, name="drop")(x)
    network = keras.Model(images, layers.conv_norm(x, 4, 3, name="block"))
    pixels = examples(16)[0]
    drop, norm = network.get_layer("drop"), network.get_layer("block_bn")
    state = drop.seed_generator.state.numpy()
    recompute(network, [pixels])
    conv = keras.Model(images, network.get_layer("block_conv").output)
    plain = conv(pixels, training=False).numpy()
    np.testing.assert_allclose(norm.moving_mean.numpy(), plain.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), plain.var((0, 1, 2)), rtol=1e-4)
    assert drop.rate == 0.5
    np.testing.assert_array_equal(drop.seed_generator.state.numpy(), state)
    assert np.abs(conv(pixels, training=True).numpy() - plain).max() > 0.1
