"""The training step against NumPy: loss, smoothing, decay, averages, replicas and precision."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.data import Split, evaluation_batches, training_batches
from keras_cifar.models import classifier, layers
from tests.conftest import colour_images

CLASSES = 3


def tiny(norm: bool = True) -> classifier.Classifier:
    keras.utils.set_random_seed(1)
    images, x = classifier.image_input((8, 8, 3))
    x = layers.conv_norm(x, 4, 3, name="conv") if norm else layers.conv(x, 4, 3, name="conv")
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    logits = keras.layers.Dense(CLASSES, name="logits")(x)
    return classifier.Classifier.build_from(images, logits, "tiny")


def compiled(model=None, rate: float = 0.1, **kwargs) -> classifier.Classifier:
    model = model or tiny()
    model.compile(keras.optimizers.SGD(rate), jit_compile=False, **kwargs)
    return model


def examples(count: int = 10) -> tuple:
    images, labels = colour_images(count, 8, CLASSES)
    return images, np.eye(CLASSES, dtype=np.float32)[labels]


def step(model, images, labels) -> dict:
    """One step on all of the images; what it reported."""
    history = model.fit(images, labels, batch_size=len(images), shuffle=False, verbose=0)
    return {name: values[0] for name, values in history.history.items()}


def evaluate(model, *data, **kwargs) -> dict:
    return model.evaluate(*data, verbose=0, return_dict=True, **kwargs)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def cross_entropy(labels, logits) -> float:
    return float(-(labels * log_softmax(logits)).sum(axis=1).mean())


def values(model) -> dict[str, np.ndarray]:
    return {v.path: v.numpy() for v in model.weights}


# ---- Loss and accuracy


@pytest.mark.parametrize("batch_size", [4, 10, 3])
def test_evaluation_is_the_mean_over_examples_also_with_a_partial_batch(batch_size):
    model, (images, labels) = compiled(), examples(10)
    logits = model.logits_model(images, training=False)
    # Right on seven of the ten.
    labels = np.eye(CLASSES, dtype=np.float32)[logits.numpy().argmax(axis=1)]
    labels[[1, 4, 9]] = np.roll(labels[[1, 4, 9]], 1, axis=1)
    got = evaluate(model, images, labels, batch_size=batch_size)
    assert got["accuracy"] == pytest.approx(0.7, abs=1e-7)
    assert got["loss"] == pytest.approx(cross_entropy(labels, logits), rel=1e-5)


@pytest.mark.parametrize("count", [1, 8, 9, 11])
def test_filling_of_the_last_batch_counts_nothing(count):
    images, labels = colour_images(count, 8, CLASSES)
    model = compiled()
    expected = evaluate(model, images, np.eye(CLASSES, dtype=np.float32)[labels], batch_size=count)
    got = evaluate(model, evaluation_batches(Split(images, labels), CLASSES, 4))
    assert got == pytest.approx(expected, rel=1e-6)


def test_training_reports_the_cross_entropy_of_the_batch_before_the_step():
    model, (images, labels) = compiled(), examples()
    labels = labels * 0.7 + labels[::-1] * 0.3
    logits = model.logits_model(images, training=True)
    accuracy = (logits.numpy().argmax(axis=1) == labels.argmax(axis=1)).mean()
    model = compiled()
    got = step(model, images, labels)
    assert got["loss"] == pytest.approx(cross_entropy(labels, logits), rel=1e-5)
    assert got["accuracy"] == pytest.approx(accuracy, abs=1e-7)


def test_step_is_gradient_descent_on_the_cross_entropy():
    model, (images, labels) = compiled(rate=0.5), examples()
    features = keras.Model(model.inputs[0], model.get_layer("features").output)
    last = model.get_layer("logits")
    inputs = features(images, training=True).numpy()
    kernel, bias = last.kernel.numpy(), last.bias.numpy()
    error = (np.exp(log_softmax(inputs @ kernel + bias)) - labels) / len(labels)
    step(model, images, labels)
    np.testing.assert_allclose(last.bias.numpy(), bias - 0.5 * error.sum(axis=0), atol=1e-6)
    np.testing.assert_allclose(last.kernel.numpy(), kernel - 0.5 * inputs.T @ error, atol=1e-6)


def test_extreme_logits_keep_a_finite_loss_and_a_gradient():
    model, (images, _) = compiled(tiny(norm=False), rate=1e-3), examples()
    last = model.get_layer("logits")
    last.kernel.assign(last.kernel * 1e5)
    logits = model.logits_model(images, training=True)
    assert np.ptp(logits, axis=1).min() > 200  # a probability of float32 is 0 there
    worst = np.eye(CLASSES, dtype=np.float32)[logits.numpy().argmin(axis=1)]
    before = values(model)
    assert step(model, images, worst)["loss"] == pytest.approx(
        cross_entropy(worst, logits), rel=1e-5
    )
    for path, value in values(model).items():
        assert np.isfinite(value).all()
        assert not np.array_equal(value, before[path]), path


def test_label_smoothing_spreads_the_targets_in_training_only():
    model, (images, labels) = compiled(rate=1.0, label_smoothing=0.3), examples()
    plain = evaluate(compiled(), images, labels)
    assert evaluate(model, images, labels) == pytest.approx(plain, rel=1e-6)
    logits = model.logits_model(images, training=True)
    step(model, images, labels)
    smooth = labels * 0.7 + 0.3 / CLASSES
    expected = (smooth - np.exp(log_softmax(logits))).mean(axis=0)
    np.testing.assert_allclose(model.get_layer("logits").bias.numpy(), expected, atol=1e-6)


def test_weight_decay_pulls_kernels_alone_and_is_not_in_the_reported_loss():
    images, labels = examples()
    before = values(tiny())
    plain, decayed = compiled(), compiled(weight_decay=0.2)
    reported = [step(model, images, labels) for model in (plain, decayed)]
    assert reported[0] == reported[1]
    without = values(plain)
    for path, value in values(decayed).items():
        pull = 0.1 * 0.2 * before[path] if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(value, without[path] - pull, atol=1e-6, err_msg=path)
    assert sum(path.endswith("kernel") for path in before) == 2


# ---- Averaged weights


class Recording(keras.callbacks.Callback):
    """The weights after each step."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append([w.numpy() for w in self.model.weights])


def train(model, steps: int, batch_size: int = 8):
    images, labels = colour_images(40, 8, CLASSES)
    batches = training_batches(Split(images, labels), CLASSES, batch_size, "flip", seed=0)
    recording = Recording()
    model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[recording])
    return recording.steps


def test_averages_follow_the_weights_with_a_decay_that_grows_to_its_value():
    model = compiled(ema=0.3)
    expected = [w.numpy() for w in model.weights]
    for count, weights in enumerate(train(model, 6), start=1):
        decay = min(0.3, (1 + count) / (10 + count))
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    for average, value in zip(model.averages, expected, strict=True):
        np.testing.assert_allclose(average.numpy(), value, atol=1e-6)


def test_averaged_puts_the_averages_in_place_for_its_body():
    model = compiled(ema=0.9)
    trained = train(model, 3)[-1]
    images, _ = examples()
    outside = model(images, training=False).numpy()
    with model.averaged():
        for weight, average, old in zip(model.weights, model.averages, trained, strict=True):
            np.testing.assert_array_equal(weight.numpy(), average.numpy())
            assert not np.array_equal(weight.numpy(), old), weight.path
        assert not np.array_equal(model(images, training=False), outside)
    np.testing.assert_array_equal(model(images, training=False), outside)


def test_averaged_gives_the_trained_weights_back_after_an_error():
    model = compiled(ema=0.9)
    trained = train(model, 2)[-1]
    with pytest.raises(ZeroDivisionError), model.averaged():
        raise ZeroDivisionError
    for weight, old in zip(model.weights, trained, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)


def test_averaged_changes_nothing_where_no_averages_are_kept():
    model = compiled()
    trained = train(model, 2)[-1]
    assert model.averages == []
    with model.averaged():
        for weight, old in zip(model.weights, trained, strict=True):
            np.testing.assert_array_equal(weight.numpy(), old)


def test_averages_are_no_weights_of_the_model():
    assert len(compiled(ema=0.9).weights) == len(compiled().weights)


# ---- Statistics of batch normalization


def conv_batches(model, batches) -> tuple:
    conv = keras.Model(model.inputs[0], model.get_layer("conv_conv").output)
    outputs = [conv(images).numpy() for images in batches]
    return [o.mean(axis=(0, 1, 2)) for o in outputs], [o.var(axis=(0, 1, 2)) for o in outputs]


@pytest.mark.parametrize("count", [1, 3])
def test_recalibrated_statistics_are_those_of_the_batches_alone(count):
    model = compiled()
    train(model, 2)
    batches = [colour_images(6, 8, CLASSES, seed=seed)[0] for seed in range(count)]
    weights = np.array([0.1 * 0.9 ** (count - 1 - i) for i in range(count)])
    weights /= weights.sum()
    means, variances = conv_batches(model, batches)
    model.recompute_statistics(iter([(tf.constant(b), None) for b in batches]), count)
    norm = model.get_layer("conv_bn")
    np.testing.assert_allclose(norm.moving_mean.numpy(), weights @ means, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance.numpy(), weights @ variances, rtol=1e-4)


def test_network_recalibrated_on_a_batch_sees_it_as_in_training():
    model, (images, labels) = compiled(), examples()
    train(model, 2)
    expected = model.logits_model(images, training=True)
    trained = {path: v for path, v in values(model).items() if "moving" not in path}
    model.recompute_statistics(iter([(tf.constant(images), tf.constant(labels))]), 1)
    np.testing.assert_allclose(model.logits_model(images, training=False), expected, atol=1e-5)
    for path, value in trained.items():
        np.testing.assert_array_equal(values(model)[path], value)


@pytest.mark.parametrize(("norm", "count"), [(True, 0), (False, 5)])
def test_recalibration_of_nothing_takes_no_batch_and_changes_nothing(norm, count):
    model = compiled(tiny(norm))
    before = values(model)
    model.recompute_statistics(iter(()), count)
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, before[path])


def test_recalibration_sees_the_network_without_dropout():
    keras.utils.set_random_seed(0)
    images, x = classifier.image_input((8, 8, 3))
    x = keras.layers.Dropout(0.5, name="drop")(x)
    x = layers.conv_norm(x, 4, 3, name="block")
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    logits = keras.layers.Dense(3, name="logits")(x)
    model = classifier.Classifier.build_from(images, logits, "dropped")
    model.compile("sgd")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    seeds = model.get_layer("drop").seed_generator.state.numpy()
    model.recompute_statistics(iter([(pixels, None)]), 1)
    inner = keras.Model(model.inputs[0], model.get_layer("block_conv").output)
    plain = inner(pixels, training=False).numpy()
    layer = model.get_layer("block_bn")
    np.testing.assert_allclose(layer.moving_mean.numpy(), plain.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), plain.var((0, 1, 2)), rtol=1e-4)
    # Training still drops, and goes on where it would have without.
    assert model.get_layer("drop").rate == 0.5
    np.testing.assert_array_equal(model.get_layer("drop").seed_generator.state.numpy(), seeds)
    dropped = inner(pixels, training=True).numpy()
    assert np.abs(dropped - plain).max() > 0.1


# ---- Precision


@pytest.mark.parametrize(
    ("policy", "computed", "output"),
    [
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("mixed_float16", "float16", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
    ],
)
def test_each_policy_trains_and_gives_probabilities_of_its_variables_type(policy, computed, output):
    keras.config.set_dtype_policy(policy)
    model, (images, labels) = compiled(ema=0.5, weight_decay=1e-3), examples()
    assert model.get_layer("logits").compute_dtype == computed
    before = values(model)
    loss = step(model, images, labels)["loss"]
    assert loss == pytest.approx(np.log(CLASSES), rel=0.5)
    for path, value in values(model).items():
        assert value.dtype == output
        assert np.isfinite(value).all()
        assert not np.array_equal(value, before[path]), path
    with model.averaged():
        probabilities = model(images, training=False)
    assert probabilities.dtype == output
    np.testing.assert_allclose(np.sum(probabilities, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_computes_the_loss_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    model, (images, labels) = compiled(), examples()
    logits = model.logits_model(images, training=False).numpy().astype(np.float64)
    got = evaluate(model, images, labels, batch_size=10)["loss"]
    assert got == pytest.approx(cross_entropy(labels, logits), rel=1e-5)


def test_float16_step_with_a_gradient_that_overflows_changes_no_weight():
    keras.config.set_dtype_policy("mixed_float16")
    model, (images, labels) = compiled(), examples()
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(2.0**120)
    before = values(model)
    step(model, images, labels)
    for path, value in values(model).items():
        if "moving" not in path:
            np.testing.assert_array_equal(value, before[path])
    assert float(model.optimizer.dynamic_scale.numpy()) < 2.0**120


def test_deployable_shares_the_weights_and_has_no_training_step():
    model, (images, labels) = compiled(), examples()
    network = model.deployable
    assert type(network) is not classifier.Classifier
    assert network.name == "tiny"
    step(model, images, labels)
    np.testing.assert_array_equal(network(images), model(images))
    for mine, other in itertools.zip_longest(network.weights, model.weights):
        assert mine is other


@pytest.mark.parametrize("call", ["fit", "evaluate"])
def test_model_that_was_compiled_outside_of_the_scope_is_refused(call):
    model = compiled()
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        with pytest.raises(ValueError, match="compiled outside of the strategy's scope") as error:
            getattr(model, call)(*examples(), verbose=0)
        assert "\n" not in str(error.value)
    getattr(model, call)(*examples(), verbose=0)
