"""The Classifier: what its parts are given, and fit and evaluate as a whole."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.models import batch_norm, classifier
from keras_cifar.models.training_step import TrainingStep
from keras_cifar.models.weight_averaging import WeightAverages
from tests.models.small import CLASSES, cross_entropies, examples, tiny, values


def compiled(model=None, **options) -> classifier.Classifier:
    model = model or tiny()
    model.compile(keras.optimizers.SGD(0.1), **options)
    return model


def fit(model, images, labels) -> dict:
    """One step on all of the images; what it reported."""
    history = model.fit(images, labels, batch_size=len(images), shuffle=False, verbose=0)
    return {name: values[0] for name, values in history.history.items()}


def evaluate(model, *data, **options) -> dict:
    return model.evaluate(*data, verbose=0, return_dict=True, **options)


# ---- Training and evaluation


@pytest.mark.parametrize("batch_size", [4, 10, 3])
def test_evaluation_is_the_mean_over_examples_also_with_a_partial_batch(batch_size):
    model, (images, labels) = compiled(), examples(10)
    logits = model.logits_model(images, training=False)
    # Right on seven of the ten.
    labels = np.eye(CLASSES, dtype=np.float32)[logits.numpy().argmax(axis=1)]
    labels[[1, 4, 9]] = np.roll(labels[[1, 4, 9]], 1, axis=1)
    got = evaluate(model, images, labels, batch_size=batch_size)
    assert got["accuracy"] == pytest.approx(0.7, abs=1e-7)
    assert got["loss"] == pytest.approx(cross_entropies(labels, logits).mean(), rel=1e-5)


@functools.cache
def stepped(ema: float = 0.0, norm_batch: str | int = "whole", **options) -> list[np.ndarray]:
    """The weights after two steps of a TrainingStep by itself, and their averages."""
    network, optimizer = tiny(), keras.optimizers.SGD(0.1)
    optimizer.build(network.trainable_variables)
    averages = WeightAverages(network.weights, ema)
    batch_norm.configure(network, norm_batch)
    step = TrainingStep(
        network.logits_model, network.trainable_variables, optimizer, averages, **options
    )
    images, labels = examples(8)
    for half in (slice(0, 4), slice(4, 8)):
        step(images[half], labels[half])
    return [v.numpy() for v in (*network.weights, *averages.variables)]


@pytest.mark.parametrize(
    ("options", "of_step"),
    [
        ({"label_smoothing": 0.3}, {"label_smoothing": 0.3}),
        ({"class_weight": (0.5, 2.0, 4.0)}, {"class_weight": (0.5, 2.0, 4.0)}),
        ({"weight_decay": 0.2}, {"weight_decay": 0.2}),
        ({"bias_decay": 0.2}, {"bias_decay": 0.2}),
        ({"ema": 0.5}, {"ema": 0.5}),
        ({"norm_batch": 2}, {"norm_batch": 2}),
        ({"steps_per_execution": 2}, {}),
        ({"jit_compile": True}, {}),
        ({"run_eagerly": True}, {}),
    ],
    ids=str,
)
def test_fit_is_the_training_step_with_the_options_of_compile(options, of_step):
    model = compiled(**options)
    model.fit(*examples(8), batch_size=4, shuffle=False, verbose=0)
    found = [v.numpy() for v in (*model.weights, *model.averages)]
    for got, expected in zip(found, stepped(**of_step), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    if of_step:
        expected = stepped()
        same = [np.allclose(*pair, atol=1e-4) for pair in zip(found, expected, strict=False)]
        assert len(found) > len(expected) or not all(same)


def test_xla_computes_the_same_from_microbatches():
    models = [compiled(accumulate_steps=2, jit_compile=jit) for jit in (True, False)]
    before = [v.numpy() for v in models[0].weights]
    for model in models:
        model.fit(*examples(8), batch_size=8, shuffle=False, verbose=0)
    found, expected = ([v.numpy() for v in model.weights] for model in models)
    assert not all(np.array_equal(*pair) for pair in zip(found, before, strict=True))
    for pair in zip(found, expected, strict=True):
        np.testing.assert_allclose(*pair, atol=1e-5)


def test_a_data_set_for_validation_has_its_own_batches():
    model = compiled()
    data = tf.data.Dataset.from_tensor_slices(examples(6)).batch(3)
    history = model.fit(*examples(8), batch_size=4, validation_data=data, verbose=0).history
    expected = model.evaluate(data, verbose=0, return_dict=True)
    assert history["val_loss"] == [pytest.approx(expected["loss"])]


def test_statistics_are_recomputed_from_microbatches():
    model, (images, _) = compiled(accumulate_steps=2), examples()
    batches = [(tf.constant(part), None) for part in (images[:5], images[5:])]
    model.recompute_statistics(iter(batches), 1)
    conv = keras.Model(model.inputs[0], model.get_layer("conv_conv").output)
    means = [conv(part).numpy().mean((0, 1, 2)) for part, _ in batches]
    expected = (0.9 * means[0] + means[1]) / 1.9
    np.testing.assert_allclose(model.get_layer("conv_bn").moving_mean.numpy(), expected, atol=1e-6)


def test_train_step_of_a_subclass_is_what_fit_runs():
    class Doubling(classifier.Classifier):
        def train_step(self, data):
            return 2 * super().train_step(data)

    network = tiny()
    images, logits = network.inputs[0], network.get_layer("logits").output
    model = compiled(Doubling.build_from(images, logits, "doubling"))
    fit(model, *examples(10))
    assert model.totals[2] == 20


# ---- Precision


@pytest.mark.parametrize(
    ("policy", "computed", "output"),
    [
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
    loss = fit(model, images, labels)["loss"]
    assert loss == pytest.approx(np.log(CLASSES), rel=0.5)
    for path, value in values(model).items():
        assert value.dtype == output
        assert np.isfinite(value).all()
        assert not np.array_equal(value, before[path]), path
    with model.averaged():
        probabilities = model(images, training=False)
    assert probabilities.dtype == output
    np.testing.assert_allclose(np.sum(probabilities, axis=1), 1, atol=1e-5)


# ---- The network alone, and what is refused


def test_deployable_shares_the_weights_and_has_no_training_step():
    model, (images, labels) = compiled(), examples()
    network = model.deployable
    assert type(network) is not classifier.Classifier
    assert network.name == "tiny"
    fit(model, images, labels)
    np.testing.assert_array_equal(network(images), model(images))
    for mine, other in itertools.zip_longest(network.weights, model.weights):
        assert mine is other


def test_input_is_scaled_to_plus_minus_one():
    images, scaled = classifier.image_input((1, 3, 3))
    given = np.array([[[[0, 255, 51]] * 3]], np.uint8)
    np.testing.assert_allclose(
        keras.Model(images, scaled)(given)[0, 0, 0], (-1, 1, -0.6), atol=1e-6
    )


@pytest.mark.parametrize("call", ["fit", "evaluate"])
def test_model_that_was_compiled_outside_of_the_scope_is_refused(call):
    model = compiled()
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        with pytest.raises(ValueError, match="compiled outside of the strategy's scope") as error:
            getattr(model, call)(*examples(), verbose=0)
        assert "\n" not in str(error.value)
    getattr(model, call)(*examples(), verbose=0)


@pytest.mark.parametrize("call", ["train_on_batch", "test_on_batch"])
def test_calls_on_one_batch_say_what_to_call_instead(call):
    with pytest.raises(NotImplementedError, match=f"{call}: call (fit|evaluate) on the batch"):
        getattr(compiled(), call)(*examples())
