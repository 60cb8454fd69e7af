"""The training step against NumPy: loss, smoothing, decay, clipping, accumulation, precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.models import training_step
from keras_cifar.models.training_step import TrainingStep
from keras_cifar.models.weight_averaging import WeightAverages
from tests.models.small import CLASSES, cross_entropies, examples, functional, log_softmax, values


def step_of(network=None, rate: float = 0.1, clip=(), optimizer=None, **options) -> TrainingStep:
    network = network or functional()
    optimizer = optimizer or keras.optimizers.SGD(rate, **dict(clip))
    optimizer.build(network.trainable_variables)
    averages = WeightAverages(network.weights, 0.0)
    return TrainingStep(network, network.trainable_variables, optimizer, averages, **options)


def gradients_of(network, images, labels) -> list[np.ndarray]:
    """Of the mean cross-entropy of each head, as TensorFlow's own loss computes them."""
    with tf.GradientTape() as tape:
        logits = network(images, training=True)
        loss = tf.reduce_mean(keras.losses.categorical_crossentropy(labels, logits, True))
    return [g.numpy() for g in tape.gradient(loss, [v.value for v in network.trainable_variables])]


def test_metrics_are_sums_over_the_batch_before_the_step():
    step, (images, labels) = step_of(), examples()
    logits = step.network(images, training=True).numpy()
    gradients = gradients_of(functional(), images, labels)
    loss, correct, weight, norm, stop = step(images, labels).numpy()
    assert loss == pytest.approx(cross_entropies(labels, logits).sum(), rel=1e-5)
    assert correct == (logits.argmax(axis=1) == labels.argmax(axis=1)).sum()
    assert weight == len(labels)
    assert norm == pytest.approx(sum((g**2).sum() for g in gradients) ** 0.5, rel=1e-4)
    assert stop == 0
    step.request_stop()
    assert step(images, labels).numpy()[4] == 1


def test_examples_of_padding_count_nothing():
    images, labels = examples(6)
    plain, padded = step_of(functional(norm=False)), step_of(functional(norm=False))
    zeros = np.zeros_like(labels[:3])
    expected = plain(images, labels)
    got = padded(np.concatenate([images, images[:3]]), np.concatenate([labels, zeros]))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for path, value in values(padded.network).items():
        np.testing.assert_allclose(value, values(plain.network)[path], atol=1e-6, err_msg=path)


def test_extreme_logits_keep_a_finite_loss_and_a_gradient():
    step, (images, _) = step_of(functional(norm=False), rate=1e-3), examples()
    last = step.network.get_layer("logits")
    last.kernel.assign(last.kernel * 1e5)
    logits = step.network(images, training=True).numpy()
    assert np.ptp(logits, axis=1).min() > 200  # a probability of float32 is 0 there
    worst = np.eye(CLASSES, dtype=np.float32)[logits.argmin(axis=1)]
    before = values(step.network)
    loss = step(images, worst).numpy()[0]
    assert loss == pytest.approx(cross_entropies(worst, logits).sum(), rel=1e-5)
    for path, value in values(step.network).items():
        assert np.isfinite(value).all()
        assert not np.array_equal(value, before[path]), path


def test_label_smoothing_changes_the_targets_and_not_the_reported_loss():
    step, (images, labels) = step_of(rate=1.0, label_smoothing=0.3), examples()
    logits = step.network(images, training=True)
    loss = step(images, labels).numpy()[0]
    assert loss == pytest.approx(cross_entropies(labels, logits).sum(), rel=1e-5)
    smooth = labels * 0.7 + 0.3 / CLASSES
    expected = (smooth - np.exp(log_softmax(logits))).mean(axis=0)
    np.testing.assert_allclose(step.network.get_layer("logits").bias.numpy(), expected, atol=1e-6)


WEIGHTS = (0.5, 2.0, 4.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_class_weights_make_the_loss_a_weighted_mean_and_not_the_reported_one(smoothing):
    images, labels = examples()
    options = {"rate": 1.0, "label_smoothing": smoothing}
    plain, step = step_of(**options), step_of(class_weight=WEIGHTS, **options)
    logits = step.network(images, training=True)
    np.testing.assert_array_equal(*(s(images, labels)[:3] for s in (plain, step)))
    weights = labels @ np.array(WEIGHTS)  # of mixed labels, those of the classes by their shares
    assert len(np.unique(weights)) > len(WEIGHTS)
    gaps = labels * (1 - smoothing) + smoothing / CLASSES - np.exp(log_softmax(logits))
    expected = (weights[:, None] * gaps).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(step.network.get_layer("logits").bias.numpy(), expected, atol=1e-6)


def test_class_weights_are_those_of_keras_and_sum_over_microbatches_padding_and_heads():
    images, labels = examples()
    labels = np.eye(CLASSES, dtype=np.float32)[labels.argmax(axis=1)]
    networks = [functional(norm=False, heads=2) for _ in range(3)]
    whole = step_of(networks[0], class_weight=WEIGHTS)
    parts = step_of(networks[1], class_weight=WEIGHTS, accumulate_steps=3)
    # Keras weighs examples, and divides by their number.
    weights = labels @ np.array(WEIGHTS, np.float32)
    networks[2].compile(
        keras.optimizers.SGD(0.1),
        [keras.losses.CategoricalCrossentropy(from_logits=True)] * 2,
        loss_weights=[1.0, 0.3],
    )
    networks[2].train_on_batch(images, [labels] * 2, sample_weight=[weights / weights.mean()] * 2)
    padded = np.concatenate([images, images[:2]]), np.concatenate([labels, 0 * labels[:2]])
    whole(*padded)
    for shard in (slice(0, 3), slice(3, 4), slice(4, 12)):  # each weighs something else
        parts.accumulate((padded[0][shard], padded[1][shard]))
    parts.update_from_sums()
    expected = networks[2].get_weights()
    for network in networks[:2]:
        for got, value in zip(network.get_weights(), expected, strict=True):
            np.testing.assert_allclose(got, value, atol=1e-6)


def test_equal_class_weights_change_nothing():
    images, labels = examples()
    plain, equal = step_of(), step_of(class_weight=(3.0,) * CLASSES)
    np.testing.assert_allclose(equal(images, labels), plain(images, labels), rtol=1e-5)
    for path, value in values(equal.network).items():
        np.testing.assert_allclose(value, values(plain.network)[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 2.0, 0.0), (1.0, -1.0, 2.0), (1, 2, np.nan)])
def test_class_weights_that_are_not_one_positive_number_a_class_are_refused(weights):
    with pytest.raises(ValueError, match="class_weight must be 3 finite numbers above 0") as error:
        step_of(class_weight=weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("of_kernels", "of_others"), [(0.2, 0.0), (0.0, 0.3), (0.2, 0.3)])
def test_decay_pulls_kernels_and_others_and_is_not_in_the_reported_loss(of_kernels, of_others):
    images, labels = examples()
    plain, decayed = step_of(), step_of(weight_decay=of_kernels, bias_decay=of_others)
    for step in (plain, decayed):
        step.network.get_layer("logits").bias.assign([1.0, -2.0, 3.0])
    before, averages = values(plain.network), ("moving_mean", "moving_variance")
    np.testing.assert_array_equal(*(step(images, labels)[:3] for step in (plain, decayed)))
    without = values(plain.network)
    for path, value in values(decayed.network).items():
        decay = of_kernels if path.endswith("kernel") else of_others
        pull = 0.0 if path.endswith(averages) else 0.1 * decay * before[path]
        np.testing.assert_allclose(value, without[path] - pull, atol=1e-6, err_msg=path)
    assert sum(path.endswith("kernel") for path in before) == 2


def test_auxiliary_logits_are_trained_with_weight_three_tenths_and_not_reported():
    step, (images, labels) = step_of(functional(heads=3), rate=1.0), examples()
    variables = step.variables
    network, before = functional(heads=3), [v.numpy() for v in variables]
    heads = [
        gradients_of(keras.Model(network.inputs[0], logits), images, labels)
        for logits in network.outputs
    ]
    shared = len(heads[0]) - 2  # all but the kernel and the bias of the head itself
    expected = [one + 0.3 * (two + three) for one, two, three in zip(*heads, strict=True)][:shared]
    expected += [*heads[0][shared:], *(0.3 * g for g in heads[1][shared:] + heads[2][shared:])]
    loss = step(images, labels).numpy()[0]
    main = network(images, training=True)[0]
    assert loss == pytest.approx(cross_entropies(labels, main).sum(), rel=1e-5)
    for variable, old, gradient in zip(variables, before, expected, strict=True):
        np.testing.assert_allclose(old - variable.numpy(), gradient, atol=1e-5)


def test_microbatches_add_up_to_their_batch():
    images, labels = examples()
    whole = step_of(functional(norm=False), weight_decay=0.1)
    parts = step_of(functional(norm=False), weight_decay=0.1, accumulate_steps=3)
    for _ in range(2):  # the sums start again
        expected = whole(images, labels)
        for shard in (slice(0, 3), slice(3, 4), slice(4, 10)):
            parts.accumulate((images[shard], labels[shard]))
        np.testing.assert_allclose(parts.update_from_sums(), expected, rtol=1e-5)
    for path, value in values(parts.network).items():
        np.testing.assert_allclose(value, values(whole.network)[path], atol=1e-6, err_msg=path)


LIMITS = ({"clipnorm": 0.02}, {"clipvalue": 0.005}, {"global_clipnorm": 0.02}, {})


@pytest.mark.parametrize("clip", LIMITS, ids=str)
def test_gradients_of_replicas_are_clipped_as_keras_clips_them(clip):
    images, labels = examples()
    step = step_of(clip=clip)
    gradients, _ = step.gradients(images, labels, divide=True)
    expected = step.optimizer._clip_gradients(gradients)
    for got, value in zip(step._clip(gradients), expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-5)
    norm = step(images, labels).numpy()[3]  # of the gradient before it is clipped
    assert norm == pytest.approx(float(tf.linalg.global_norm(gradients)), rel=1e-4)


def test_optimizer_does_not_clip_while_the_steps_of_replicas_are_traced():
    step = step_of(clip={"clipnorm": 0.02})
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for strategy, limit in ((tf.distribute.get_strategy(), 0.02), (two, None)):
        with pytest.raises(ZeroDivisionError), step.clipping_all_reduced(strategy):
            assert step.optimizer.clipnorm == limit
            raise ZeroDivisionError
        assert step.optimizer.clipnorm == 0.02


# ---- Precision


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_computes_the_loss_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    network, (images, labels) = functional(), examples()
    (logits,) = training_step.compute_logits(network, images, training=False)
    assert logits.dtype == policy.removeprefix("mixed_")
    expected = cross_entropies(labels, logits.numpy().astype(np.float64)).sum()
    loss = training_step.evaluation_metrics(tf.constant(labels), logits).numpy()[0]
    assert loss == pytest.approx(expected, rel=1e-5)


def test_float16_step_with_a_gradient_that_overflows_changes_no_weight():
    keras.config.set_dtype_policy("mixed_float16")
    network, (images, labels) = functional(), examples()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    step = step_of(network, optimizer=optimizer)
    optimizer.dynamic_scale.assign(2.0**120)
    before = values(network)
    assert step(images, labels).numpy()[3] == 0  # instead of an infinite norm
    for path, value in values(network).items():
        if "moving" not in path:
            np.testing.assert_array_equal(value, before[path])
    assert float(optimizer.dynamic_scale.numpy()) < 2.0**120
