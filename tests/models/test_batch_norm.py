"""Batch normalization against Keras's: the same numbers by fewer kernels; groups; replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.models import batch_norm, layers
from tests.models.small import functional, kernels

OURS = {"momentum": batch_norm.BATCH_NORM_MOMENTUM, "epsilon": batch_norm.BATCH_NORM_EPSILON}


def norms(**arguments) -> tuple:
    """Ours, by its defaults, and Keras's with the same numbers."""
    ours = layers.BatchNormalization(**arguments)
    return ours, keras.layers.BatchNormalization(**(OURS | arguments))


def results(layer, shape: tuple, offset: float, training: bool, call=None) -> dict:
    """Of three calls: outputs and gradients of the last, and the weights after them."""
    random = np.random.default_rng(0)
    layer.build(shape)
    for weight in layer.weights:  # all of them above 0, as variances are
        weight.assign(random.uniform(0.5, 2, weight.shape))
    factors = tf.constant(random.normal(0, 1, shape), layer.compute_dtype)
    variables = [v.value for v in layer.trainable_variables]
    for _ in range(3):
        x = tf.constant(random.normal(offset, 1, shape), layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = (call or layer)(x, training=training)
            target = tf.reduce_sum(tf.cast(outputs * factors, layer.variable_dtype))
        gradients = tape.gradient(target, [x, *variables])
    assert outputs.dtype == layer.compute_dtype
    names = ["input", *(v.name for v in layer.trainable_variables)]
    named = {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}
    weights = {v.name: v.numpy() for v in layer.weights}
    return {k: np.array(v, np.float64) for k, v in ({"y": outputs} | named | weights).items()}


def assert_same(one: dict, other: dict, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.isfinite(value).all(), name
        size = max(1.0, np.abs(other[name]).max())
        np.testing.assert_allclose(value, other[name], 0, tolerance * size, err_msg=name)


MAPS = (4, 5, 6, 8)
CASES = {
    "maps": ("float32", MAPS, {}, 0, 1e-5, True),
    "one pixel": ("float32", (1, 1, 1, 8), {}, 0, 1e-4, True),
    "two pixels": ("float32", (1, 2, 1, 8), {}, 0, 1e-4, True),
    "one image": ("float32", (1, 5, 6, 8), {}, 0, 1e-5, True),
    "large mean": ("float32", MAPS, {}, 1e3, 3e-4, True),
    "mixed_float16": ("mixed_float16", MAPS, {}, 0, 1e-3, True),
    "mixed_bfloat16": ("mixed_bfloat16", MAPS, {}, 0, 8e-3, True),
    "frozen": ("float32", MAPS, {"trainable": False}, 0, 1e-5, True),
    "other numbers": ("float32", MAPS, {"momentum": 0.7, "epsilon": 0.1}, 0, 1e-5, True),
    "axis 3": ("float32", MAPS, {"axis": 3}, 0, 1e-5, True),
    "float64": ("float64", MAPS, {}, 0, 1e-12, False),
    "float64, large mean": ("float64", MAPS, {}, 1e3, 1e-9, False),
    "vectors": ("float32", (16, 8), {}, 0, 1e-5, False),
    "volumes": ("float32", (2, 3, 4, 5, 8), {}, 0, 1e-5, False),
    "axis 1": ("float32", MAPS, {"axis": 1}, 0, 1e-5, False),
    "no scale": ("float32", MAPS, {"scale": False}, 0, 1e-5, True),
    "no center": ("float32", MAPS, {"center": False}, 0, 1e-5, True),
    "renorm": ("float32", MAPS, {"renorm": True}, 0, 1e-5, False),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("case", CASES)
def test_batch_norm_equals_keras_in_outputs_gradients_and_statistics(case, training):
    policy, shape, arguments, offset, tolerance, fused = CASES[case]
    keras.config.set_dtype_policy(policy)
    ours, theirs = norms(**arguments)
    got, expected = (results(layer, shape, offset, training) for layer in (ours, theirs))
    assert_same(got, expected, tolerance)
    described = [[(v.name, v.dtype, v.trainable) for v in x.weights] for x in (ours, theirs)]
    assert described[0] == described[1]
    found = kernels(ours, (None, *shape[1:]), ours.compute_dtype, training)
    assert ("FusedBatchNormV3" in found) == fused
    assert not (fused and "SquaredDifference" in found)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_batch_norm_compiled_by_xla_equals_keras(training):
    ours, theirs = norms()
    call = tf.function(ours, jit_compile=True, autograph=False)
    got = results(ours, MAPS, 2, training, call=call)
    assert_same(got, results(theirs, MAPS, 2, training), 3e-5)


# ---- Groups


GROUPED = {
    "maps": ("float32", (12, 5, 6, 8), 1e-5),
    "large mean": ("float32", (12, 5, 6, 8), 1e-3),
    "mixed_float16": ("mixed_float16", (12, 5, 6, 8), 1e-3),
    "float64": ("float64", (12, 5, 6, 8), 1e-12),
    "vectors": ("float32", (12, 8), 1e-5),
    "volumes": ("float32", (12, 2, 3, 2, 8), 1e-5),
}


def one_by_one(layer, groups: int):
    """A call of `layer` on each group; the moving averages take the mean over groups."""

    def call(x, training):
        averages = [layer.moving_mean, layer.moving_variance]
        before, after, outputs = [v.numpy() for v in averages], [], []
        for part in tf.split(x, groups):
            for variable, value in zip(averages, before, strict=True):
                variable.assign(value)
            outputs.append(layer(part, training=training))
            after.append([v.numpy() for v in averages])
        for variable, value in zip(averages, np.mean(after, axis=0), strict=True):
            variable.assign(value)
        return tf.concat(outputs, 0)

    return call


@pytest.mark.parametrize("known", [True, False], ids=["known size", "unknown size"])
@pytest.mark.parametrize("case", GROUPED)
def test_groups_are_normalized_each_by_itself(case, known):
    policy, shape, tolerance = GROUPED[case]
    keras.config.set_dtype_policy(policy)
    ours, theirs = norms()
    ours.norm_batch = 4
    spec = tf.TensorSpec((shape[0] if known else None, *shape[1:]), ours.compute_dtype)
    call = tf.function(lambda x: ours(x, training=True), autograph=False, input_signature=[spec])
    offset = 1e3 if "mean" in case else 2
    got = results(ours, shape, offset, True, lambda x, training: call(x))
    expected = results(theirs, shape, offset, True, one_by_one(theirs, 3))
    assert_same(got, expected, tolerance)
    fused = known and len(shape) == 4 and policy != "float64"
    assert ("FusedBatchNormV3" in kernels(ours, spec.shape, spec.dtype)) == fused


@pytest.mark.parametrize(("size", "calls"), [(8, 2), (6, 1)], ids=["four groups", "three"])
def test_halves_of_whole_groups_are_computed_by_themselves(size, calls):
    images = tf.constant(np.random.default_rng(0).normal(2, 3, (size, 8, 8, 3)), tf.float32)
    found = []
    for call in (keras.Model.__call__, batch_norm.call):
        keras.utils.set_random_seed(0)
        model = functional()
        batch_norm.configure(model, 2)
        with tf.GradientTape() as tape:
            outputs = [call(model, images, training=True) for _ in range(2)][-1]
            loss = tf.reduce_sum(outputs**3)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        found.append([outputs, *gradients, *(v.numpy() for v in model.weights)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-5)
    spec = tf.TensorSpec(images.shape)
    traced = tf.function(lambda x: batch_norm.call(model, x, True), input_signature=[spec])
    kinds = [op.type for op in traced.get_concrete_function().graph.get_operations()]
    assert kinds.count("Conv2D") == calls
    batch_norm.configure(model, "whole")
    for training in (False, True):
        got = batch_norm.call(model, images, training)
        np.testing.assert_array_equal(got, model(images, training=training))


def test_evaluation_does_not_depend_on_groups():
    ours, theirs = norms()
    ours.norm_batch = 4
    assert_same(results(ours, MAPS, 0, False), results(theirs, MAPS, 0, False), 1e-5)


def test_fixed_averages_normalize_and_stay_and_scale_and_offset_are_trained():
    layer, (x, other) = (
        layers.BatchNormalization(),
        np.random.default_rng(0).normal(2, 3, (2, *MAPS)),
    )
    layer(tf.constant(other, tf.float32), training=True)
    x, before = tf.constant(x, tf.float32), layer.get_weights()
    by_batch = layer(x, training=True).numpy()
    layer.set_weights(before)
    assert batch_norm.configure(keras.Sequential([layer]), "fixed") == []
    with tf.GradientTape() as tape:
        outputs = layer(x, training=True)
        loss = tf.reduce_sum(outputs**2)
    np.testing.assert_array_equal(outputs, layer(x, training=False))
    assert np.abs(outputs - by_batch).max() > 0.1
    for value, old in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, old)
    gradients = tape.gradient(loss, [v.value for v in layer.trainable_variables])
    assert len(gradients) == 2
    assert all(np.abs(gradient).min() > 0 for gradient in gradients)


def test_a_batch_that_is_not_of_whole_groups_is_refused():
    layer = layers.BatchNormalization(name="norm")
    layer.norm_batch = 4
    message = "norm: norm_batch=4 does not divide a batch of 6"
    with pytest.raises(ValueError, match=message):
        layer(tf.zeros((6, 2, 2, 3)), training=True)
    spec = tf.TensorSpec((None, 2, 2, 3))
    call = tf.function(lambda x: layer(x, training=True), input_signature=[spec], autograph=False)
    call(tf.zeros((8, 2, 2, 3)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="norm_batch=4 does not divide"):
        call(tf.zeros((6, 2, 2, 3)))


@pytest.mark.parametrize("arguments", [{"axis": 1}, {"renorm": True}])
def test_groups_are_refused_where_they_would_not_be_used(arguments):
    layer = layers.BatchNormalization(**arguments)
    layer.norm_batch = 2
    with pytest.raises(ValueError, match="groups need channels last"):
        layer(tf.zeros((4, 3, 3, 3)), training=True)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "half", "8"])
def test_a_wrong_norm_batch_is_refused(value):
    with pytest.raises(ValueError, match="norm_batch="):
        batch_norm.configure(functional(), value)


def test_the_layers_of_keras_have_no_groups():
    images = keras.Input((4, 4, 3))
    inner = keras.Model(images, keras.layers.BatchNormalization(name="theirs")(images))
    model = keras.Model(images, inner(images))
    batch_norm.configure(model, "whole")
    for value in (2, "fixed"):
        with pytest.raises(ValueError, match=f"'theirs' of Keras knows no norm_batch={value!r}"):
            batch_norm.configure(model, value)


# ---- The statistics of replicas


def test_averages_that_replicas_compute_alone_are_those_of_trained_layers(monkeypatch):
    monkeypatch.setattr(batch_norm, "replicas", lambda: 2)
    model = functional()
    norm = model.get_layer("conv_bn")
    averages = [norm.moving_mean, norm.moving_variance]
    assert batch_norm.configure(model, "whole") == []
    assert batch_norm.configure(model, "replica") == averages == batch_norm.configure(model, 2)
    norm.trainable = False
    assert batch_norm.configure(model, 2) == []


@pytest.mark.parametrize("case", ["maps", "large mean", "mixed_float16", "mixed_bfloat16"])
def test_synchronized_equals_the_fused_kernel_where_there_is_one_replica(case, monkeypatch):
    monkeypatch.setattr(batch_norm, "all_reduce_small", tf.identity)
    policy, shape, _, offset, tolerance, _ = CASES[case]
    keras.config.set_dtype_policy(policy)
    ours, theirs = norms()

    def call(x, training):
        values = [tf.cast(v, tf.float32) for v in (ours.gamma, ours.beta)]
        outputs, *statistics = batch_norm.normalize_synchronized(x, *values, ours.epsilon)
        ours._update_averages(*statistics)
        return outputs

    got = results(ours, shape, offset, True, call)
    assert_same(got, results(theirs, shape, offset, True), tolerance)


def test_moments_are_combined_by_their_counts(monkeypatch):
    random = np.random.default_rng(0)
    parts = [random.normal(1e4, 1, (count, 3)) for count in (2, 7)]
    moments = [(len(x), x.mean(0), x.var(0)) for x in parts]
    sums = []
    monkeypatch.setattr(batch_norm, "all_reduce_small", lambda x: sums.append(x) or x)
    for arguments in moments:
        batch_norm.combine_moments(*map(tf.constant, arguments))
    monkeypatch.setattr(batch_norm, "all_reduce_small", lambda _: sums[0] + sums[1])
    count, mean, variance = batch_norm.combine_moments(*map(tf.constant, moments[0]))
    everything = np.concatenate(parts)
    assert count == 9
    np.testing.assert_allclose(mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, everything.var(0), rtol=1e-6)
