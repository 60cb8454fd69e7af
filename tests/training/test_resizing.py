"""--progressive_resizing: the images that the network sees, in which epochs, and how a run resumes."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar import models
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import StoppedError, UsageError
from keras_cifar.core.image_size import resizing_stages
from keras_cifar.models import batch_norm, resizing
from keras_cifar.training.plan import estimate, prepare
from keras_cifar.training.recorder import Recorder
from tests.models import small
from tests.training import test_resume
from tests.training.kills import trained
from tests.training.test_resume import begun, config, fit_to, signalled

quick_plots = test_resume.quick_plots  # the fixture

# Of three epochs, one at 4 and one at 6 pixels.
STAGES = {"model": "small", "progressive_resizing": "4:0.4,6:0.7", "val_fraction": 0.2}


def test_images_are_resized_as_by_tensorflow(random):
    images = random.integers(0, 256, (3, 32, 24, 3), np.uint8)
    found = resizing.resize(tf.constant(images), (20, 18))
    expected = tf.image.resize(images, (20, 18), antialias=True)
    assert found.dtype == tf.uint8
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.51)  # rounded to a level
    assert resizing.resize(images, None) is images


def compiled(side: int, **options) -> models.Classifier:
    model = models.build("small", (side, side, 3), small.CLASSES)
    model.compile(keras.optimizers.SGD(0.5), **options)
    return model


def losses(model) -> list[float]:
    return model.history.history["loss"]


@pytest.mark.parametrize("options", [{}, {"accumulate_steps": 2}, {"norm_batch": 5}])
def test_a_step_is_that_of_a_network_for_small_images(small_network, options):
    images, labels = small.examples(10)
    model, smaller = compiled(8, **options), compiled(6, **options)
    smaller.set_weights(model.get_weights())
    model.set_training_size((6, 6))
    assert resizing.takes(model.logits_model, (4, 4))  # which changes nothing
    for each, x in (
        (model, images),
        (smaller, resizing.resize(tf.constant(images), (6, 6)).numpy()),
    ):
        each.fit(x, labels, batch_size=10, shuffle=False, verbose=0)
    assert losses(model) == pytest.approx(losses(smaller), rel=1e-6)
    for value, expected in zip(model.get_weights(), smaller.get_weights(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
    # Whole images are tested, and are trained on again.
    model.set_weights(smaller.get_weights())
    other = compiled(8, **options)
    other.set_weights(model.get_weights())
    found, expected = (each.evaluate(images, labels, verbose=0) for each in (model, other))
    assert found == pytest.approx(expected, rel=1e-6)
    model.set_training_size(None)
    for each in (model, other):
        each.fit(images, labels, batch_size=10, shuffle=False, verbose=0)
    assert losses(model) == pytest.approx(losses(other), rel=1e-6)


def test_a_network_with_a_size_refuses_others(small_network):
    images, labels = small.examples()
    model = compiled(16)
    assert resizing.takes(model.logits_model, (8, 12))
    model.set_training_size((8, 8))
    model.set_training_size(None)
    with pytest.raises(ValueError, match="expected shape=\\(None, 16, 16, 3\\)"):
        model.fit(images, labels, verbose=0)


def test_epochs_have_their_sizes(tmp_path, image_folder, small_network, monkeypatch):
    traced, call = [], batch_norm.call

    def seen(network, images, training):
        traced.append((images.shape[1:3], training))
        return call(network, images, training)

    monkeypatch.setattr(batch_norm, "call", seen)
    _, plan = begun(image_folder, **STAGES)
    assert "\nresizing  4 x 4 up to epoch 1, 6 x 6 up to epoch 2, 16 x 16 to the end\n" in (
        plan.summary()
    )
    fit_to(tmp_path / "run", image_folder, **STAGES)
    assert [shape for shape, training in traced if training] == [(4, 4), (6, 6), (16, 16)]
    assert {shape for shape, training in traced if not training} == {(16, 16)}


def test_the_short_side_is_given_and_the_other_is_in_proportion(
    tmp_path, image_folder, small_network
):
    flags = STAGES | {"image_size": "12x18", "progressive_resizing": "8:0.5"}
    _, plan = begun(image_folder, **flags)
    assert plan.stages == [((8, 12), 1)]


def test_a_run_resumes_before_at_and_after_a_switch_to_the_same_bits(
    tmp_path, image_folder, small_network, monkeypatch
):
    flags = STAGES | {"optimizer": "sgd"}
    whole = trained(fit_to(tmp_path / "whole", image_folder, **flags))
    for method, count in (("on_train_batch_end", 3), ("on_test_batch_end", 1)) * 2:
        with signalled(monkeypatch, method, count), pytest.raises(StoppedError):
            fit_to(tmp_path / "run", image_folder, **flags)
    assert trained(fit_to(tmp_path / "run", image_folder, **flags)) == whole


# ---- Flags


@pytest.mark.parametrize(
    "text",
    ["24", "24:1", "24:0", "24:0.0", "24:-0.5", "24:0.5,", "24:0.5,20:0.7", "24:0.5,28:0.5"],
)
def test_stages_in_another_form_are_refused_in_one_line(text):
    with pytest.raises(UsageError, match="must be PIXELS:SHARE,") as caught:
        TrainConfig.from_flags(progressive_resizing=text)
    assert f"--progressive_resizing={text} " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stages_are_read():
    assert resizing_stages("160:.5,192:0.75") == ((160, 0.5), (192, 0.75))
    assert resizing_stages("") == ()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"model": "small", "progressive_resizing": "16:0.5"},
            "must be below the images' own 16 ",
        ),
        (
            {"model": "lenet5", "progressive_resizing": "12:0.5"},
            "lenet5 for 16 pixels cannot take",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(image_folder, small_network, flags, words):
    with pytest.raises(UsageError, match=words) as caught:
        prepare(config(image_folder, **flags))
    assert "\n" not in str(caught.value)


def test_a_stage_without_an_epoch_is_left_out(image_folder, small_network):
    _, plan = begun(image_folder, **STAGES | {"epochs": 2})
    assert plan.stages == [((6, 6), 1)]
    _, plan = begun(image_folder, **STAGES | {"epochs": 1})
    assert plan.stages == []
    assert "\nresizing  16 x 16 to the end\n" in plan.summary()


def test_dry_run_measures_the_slower_epochs(image_folder, small_network):
    assert " an epoch, at most " in estimate(config(image_folder, **STAGES))


def test_early_stopping_waits_for_whole_images(image_folder):
    plan = types.SimpleNamespace(config=config(image_folder, early_stopping=2, epochs=9))
    plan.stages = [((4, 4), 2), ((6, 6), 4)]

    def is_finished(epochs_done: int) -> bool:
        state = types.SimpleNamespace(plan=plan, epochs_done=epochs_done, best_epoch=lambda: 1)
        return Recorder.is_finished(state)

    assert not is_finished(5)
    assert is_finished(6)


def test_the_time_left_grows_with_the_pixels(image_folder):
    """Epochs of 16, 36 and 36 pixels took 88 seconds; two of 36 and three of 64 are left."""
    plan = types.SimpleNamespace(
        config=config(image_folder, epochs=9), stages=[((4, 4), 2), ((6, 6), 6)]
    )
    plan.dataset = types.SimpleNamespace(image_shape=(8, 8, 3))
    history = [{"seconds": seconds} for seconds in (999, 14, 39, 35)]  # the first: another process
    state = types.SimpleNamespace(
        plan=plan, history=history, epochs_done=4, _first=1, is_finished=lambda: False
    )
    assert Recorder._time_left(state) == ", 4.4 min left"
