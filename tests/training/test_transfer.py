"""--unfreeze_epoch: what stays, what is computed, how a run resumes around the switch."""

import itertools
import types

import keras
import numpy as np
import pytest

from keras_cifar import models
from keras_cifar.core.errors import StoppedError, UsageError
from keras_cifar.core.run_directory import Run
from keras_cifar.models.precise_batch_norm import PreciseBatchNorm
from keras_cifar.models.training_step import TrainingStep
from keras_cifar.training import checkpoint, recorder, trainer, transfer
from keras_cifar.training.plan import check_names, estimate
from keras_cifar.training.recorder import Recorder
from tests.training import test_resume
from tests.training.kills import digest, saved_state, trained
from tests.training.test_resume import begun, config, fit_to, layer_weights, signalled

quick_plots = test_resume.quick_plots  # the fixture

# Of `small_network`, with all that depends on which variables are trained. 5 steps an epoch.
FLAGS = {
    "model": "small",
    "freeze": "conv_relu",
    "unfreeze_epoch": 1,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "global_clipnorm": 0.1,
    "layer_decay": 0.9,
    "head_rate": 5.0,
    "accumulate_steps": 2,
    "class_weight": "balanced",
    "val_fraction": 0.2,
}
LAYERS = ("conv_conv", "conv_bn", "logits")


@pytest.fixture(autouse=True)
def _small(small_network):
    """All runs here are of the small network."""


def backward_convolutions(tensors) -> int:
    """How many gradients of convolutions some tensors of a graph are computed from."""
    found, seen = list(tensors), set()
    count = 0
    while found:
        operation = found.pop().op
        if operation.name not in seen:
            seen.add(operation.name)
            count += operation.type.startswith("Conv2DBackprop")
            found += operation.inputs
    return count


class Weights(keras.callbacks.Callback):
    """Records the weights of each layer after each epoch."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append({name: layer_weights(self.model, name) for name in LAYERS})


def changed(before: dict, after: dict) -> list[str]:
    return [name for name in LAYERS if before[name] != after[name]]


def test_frozen_layers_stay_until_they_are_unfrozen_and_are_not_computed(
    tmp_path, image_folder, monkeypatch
):
    gradients, recompute = TrainingStep.gradients, PreciseBatchNorm.recompute
    traced, precise = [], []

    def counted(self, *arguments, **kwargs):
        found, metrics = gradients(self, *arguments, **kwargs)
        traced.append((len(found), backward_convolutions(found)))
        return found, metrics

    def compared(self, *arguments):
        mean = self.network.get_layer("conv_bn").moving_mean
        before = mean.numpy()
        recompute(self, *arguments)
        precise.append(not np.array_equal(before, mean.numpy()))

    monkeypatch.setattr(TrainingStep, "gradients", counted)
    monkeypatch.setattr(PreciseBatchNorm, "recompute", compared)
    model, plan = begun(image_folder, **FLAGS, ema=0.9)
    before = {name: layer_weights(model, name) for name in LAYERS}
    averages, recorded = digest(x.numpy() for x in model.averages[:-2]), Weights()
    run = Run(tmp_path / "run")
    assert "\nfrozen    up to conv_relu, for the first 1 of 3 epochs\n" in plan.summary()
    trainer.fit(plan, run, callbacks=(recorded,))
    after = [before, *recorded.epochs]
    assert [changed(*pair) for pair in itertools.pairwise(after)] == [
        ["logits"],
        list(LAYERS),
        list(LAYERS),
    ]
    assert precise == [False, True, True]
    # A function is traced once: the head's kernel and bias, then also a kernel, gamma and beta.
    assert traced == [(2, 0), (5, 1)]
    assert digest(x.numpy() for x in model.averages[:-2]) != averages


def test_without_the_flag_frozen_layers_are_in_no_optimizer(image_folder):
    """As in checkpoints of earlier versions."""
    model, plan = begun(image_folder, **FLAGS | {"unfreeze_epoch": None})
    assert len(model.optimizer._trainable_variables) == 2
    assert not model.optimizer.starts
    assert not plan.begin_epoch(1)
    assert "\nfrozen    up to conv_relu\n" in plan.summary()


def test_filters_that_are_never_trained_are_not_after_unfreezing():
    model = models.build("airbench94", (32, 32, 3), 3)
    before = [v.path for v in model.trainable_variables]
    frozen = transfer.freeze(model, "whitening")
    assert len(model.trainable_variables) < len(before)
    assert frozen.set_trainable(True)
    assert not frozen.set_trainable(True)
    assert [v.path for v in model.trainable_variables] == before


# ---- Resuming


@pytest.fixture
def whole(tmp_path, image_folder) -> dict:
    """The results of a run that nothing happened to."""
    return trained(fit_to(tmp_path / "whole", image_folder, **FLAGS))


def test_a_run_resumes_before_at_and_after_the_switch_to_the_same_bits(
    tmp_path, image_folder, monkeypatch, capsys, whole
):
    """The run is stopped four times, and once killed between the epochs."""
    begin = Recorder.on_epoch_begin

    def killed(self, epoch, logs=None):
        assert epoch == 0, "killed"
        begin(self, epoch)

    path = tmp_path / "run"
    for method, count in (
        ("on_train_batch_end", 3),
        ("on_test_batch_end", 1),
        ("on_epoch_begin", None),
        ("on_train_batch_end", 1),
        ("on_train_batch_end", 2),
    ):
        if count:
            with signalled(monkeypatch, method, count), pytest.raises(StoppedError):
                fit_to(path, image_folder, **FLAGS)
        else:
            with monkeypatch.context() as patch, pytest.raises(AssertionError, match="killed"):
                patch.setattr(Recorder, method, killed)
                fit_to(path, image_folder, **FLAGS)
    run = fit_to(path, image_folder, **FLAGS)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("resuming")]
    assert said == [
        f"resuming from {place} of 3"
        for place in (
            "step 3 of 4 in epoch 1",
            "step 4 of 4 in epoch 1",
            "epoch 1",
            "step 1 of 4 in epoch 2",
            "step 3 of 4 in epoch 2",
        )
    ]
    assert trained(run) == whole


def test_a_rollback_to_before_the_switch_freezes_again(
    tmp_path, image_folder, monkeypatch, capsys, whole
):
    """With the whole learning rate, so that the results compare."""
    read, poison = checkpoint.read, test_resume.poisoned
    path = tmp_path / "run"
    monkeypatch.setattr(recorder, "ROLLBACK_FACTOR", 1.0)
    poison(monkeypatch, 1)

    def damaged(directory):
        newest = checkpoint._files(directory)[0]
        if "epoch-00001" in newest.name:
            newest.write_bytes(b"")
        return read(directory)

    monkeypatch.setattr(checkpoint, "read", damaged)
    run = fit_to(path, image_folder, **FLAGS, on_nan="rollback")
    assert "rolled back to epoch 0 of 3" in capsys.readouterr().out
    assert saved_state(run.checkpoint)[0] == whole["variables of the checkpoint"]


# ---- Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"unfreeze_epoch": 2}, "^--unfreeze_epoch=2 needs --freeze=LAYER"),
        ({"freeze": "conv_relu", "unfreeze_epoch": 3}, "=3 must be below --epochs=3; without it"),
        ({"freeze": "conv_relu", "unfreeze_epoch": 0}, "=0 must be greater than 0"),
        ({"freeze": "conv_relu", "unfreeze_epoch": -1}, "=-1 must be greater than 0"),
    ],
)
def test_epochs_that_make_no_sense_are_refused_in_one_line(image_folder, flags, words):
    with pytest.raises(UsageError, match=words) as caught:
        check_names(config(image_folder, **flags))
    assert "\n" not in str(caught.value)


def test_dry_run_measures_the_slower_epochs(image_folder):
    assert " an epoch, at most " in estimate(config(image_folder, **FLAGS))


def test_early_stopping_waits_for_unfrozen_epochs(image_folder):
    def is_finished(epochs_done: int, best: int, **flags) -> bool:
        plan = types.SimpleNamespace(
            config=config(image_folder, early_stopping=2, epochs=9, **flags), stages=[]
        )
        state = types.SimpleNamespace(plan=plan, epochs_done=epochs_done, best_epoch=lambda: best)
        return Recorder.is_finished(state)

    late = {"freeze": "conv_relu", "unfreeze_epoch": 4}
    assert is_finished(3, 1)
    assert not is_finished(3, 1, **late)
    assert not is_finished(5, 1, **late)
    assert is_finished(6, 1, **late)
    assert not is_finished(6, 5, **late)
