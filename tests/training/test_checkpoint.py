"""Saving and restoring everything that decides the next step."""

import json
import os
import random as python_random

import numpy as np
import pytest

from keras_cifar import models
from keras_cifar.core.config import OptimizerConfig
from keras_cifar.core.errors import UserError
from keras_cifar.data import Split, training_batches
from keras_cifar.training import checkpoint
from keras_cifar.training.checkpoint import TrainingProgress
from keras_cifar.training.optimizers import compile_model, schedule
from tests.conftest import colour_images

POSITION = TrainingProgress([{"epoch": 1, "loss": 0.1}], 2, (0.1, 1 / 3, 4.0, 2.0, 0.0), 1.5, 1)


def build(name="vgg_bn_drop", classes=3, **flags):
    model = models.build(name, (32, 32, 3), classes)
    config = OptimizerConfig(learning_rate=0.01, **flags)
    compile_model(model, config, schedule(config, 4, 2), jit_compile=False)
    return model


def restore(directory, model) -> TrainingProgress:
    return checkpoint.assign(model, checkpoint.read(directory)[1], directory)


def step(model, start):
    split = Split(*colour_images(16, 32, 3))
    batches = training_batches(split, 3, 4, "flip", seed=1, start_step=start)
    model.fit(batches, epochs=1, steps_per_epoch=2, verbose=0, shuffle=False)


@pytest.mark.parametrize("flags", [{"ema": 0.9}, {"optimizer": "sgd"}], ids=["ema", "sgd"])
def test_going_on_equals_not_having_stopped(tmp_path, flags):
    model = build(**flags)
    step(model, 0)
    checkpoint.save(tmp_path, model, POSITION, 2)
    step(model, 2)

    other = build(**flags)
    assert restore(tmp_path, other) == POSITION
    step(other, 2)
    assert checkpoint.digest(other) == checkpoint.digest(model)
    # Dropout's random states were restored: with others, the weights would be far apart.
    third = build(**flags)
    restore(tmp_path, third)
    for layer in third._flatten_layers():
        if hasattr(layer, "seed_generator"):
            layer.seed_generator.state.assign(layer.seed_generator.state + 7)
    step(third, 2)
    kernels = [m.get_layer("logits").kernel.numpy() for m in (model, third)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


@pytest.fixture(scope="module")
def lenet():
    return build("lenet5")


def filled(model, value) -> None:
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, value))


def value_of(model) -> float:
    return float(model.get_layer("logits").bias.numpy()[0])


@pytest.fixture
def two(tmp_path, lenet):
    """A directory with the checkpoints of steps 1 and 2, whose weights are 1 and 2."""
    for number in (1, 2):
        filled(lenet, number)
        checkpoint.save(tmp_path, lenet, TrainingProgress(steps=number), number)
    filled(lenet, 0)
    return tmp_path


def damage(path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "empty":
        data = b""
    elif how == "truncated":
        data = data[:-1]
    elif how == "longer":
        data += b"\0"
    else:
        place = {"first": 0, "header": 300, "middle": len(data) // 2, "last": len(data) - 1}[how]
        data[place] ^= 1
    path.write_bytes(data)


DAMAGES = ["missing", "empty", "truncated", "longer", "first", "header", "middle", "last"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_noticed_and_the_one_before_used(two, lenet, capsys, how):
    newest = checkpoint._files(two)[0]
    damage(newest, how)
    assert restore(two, lenet).steps == 1
    assert value_of(lenet) == 1
    said = capsys.readouterr().out
    if how != "missing":
        assert f"checkpoint {newest.name} is damaged; going on from the one before" in said
        assert said.count("\n") == 1
    # What was damaged does not take the place of what is saved from here on.
    checkpoint.save(two, lenet, TrainingProgress(steps=1, seconds=2.0), 1)
    assert newest not in checkpoint._files(two)


@pytest.mark.parametrize("how", DAMAGES[1:])
def test_damage_to_both_is_one_clear_error(two, lenet, how):
    for path in checkpoint._files(two):
        damage(path, how)
    with pytest.raises(UserError) as caught:
        restore(two, lenet)
    message = str(caught.value)
    assert f"no checkpoint in {two} is whole" in message
    assert all(path.name in message for path in checkpoint._files(two))
    assert "--init_from" in message
    assert "\n" not in message


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.read(tmp_path / "none") == (None, b"")
    assert not checkpoint.exists(tmp_path)


def test_the_last_two_are_kept(two, lenet):
    checkpoint.save(two, lenet, TrainingProgress(steps=3), 3)
    assert [restored.name[:14] for restored in checkpoint._files(two)] == [
        "step-000000003",
        "step-000000002",
    ]
    # The end of an epoch is after its last step.
    checkpoint.save(two, lenet, TrainingProgress([{"epoch": 1}]), 3)
    assert restore(two, lenet).history
    assert len(list(two.iterdir())) == 2


def test_of_another_network_or_optimizer_is_refused(two):
    for other in (build("lenet5", classes=4), build("lenet5", optimizer="sgd")):
        with pytest.raises(UserError, match="another network or optimizer"):
            restore(two, other)


@pytest.mark.parametrize("seed", range(3))
def test_hostile_contents_with_a_right_checksum_are_one_line(two, lenet, seed):
    """Whoever writes a file can write its checksum too."""
    chance = python_random.Random(seed)
    _, whole = checkpoint.read(two)
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])

    def lying(change) -> bytes:
        other = json.loads(json.dumps(header))
        change(other)
        text = json.dumps(other).encode()
        return len(text).to_bytes(8, "little") + text + whole[end:]

    cases = [
        b"", b"x", b"\xff" * 8, b"\xff" * 100, whole[:end], whole + whole, b"\0" * 16,
        lying(lambda h: h["variable_0"].update(shape=[2**40])),
        lying(lambda h: h["variable_0"].update(shape="x")),
        lying(lambda h: h["variable_0"].update(dtype=[])),
        lying(lambda h: h.update(__metadata__=3)),
        lying(lambda h: h["__metadata__"].update(position="[]")),
        lying(lambda h: h["__metadata__"].update(position='{"steps": "x"}')),
        lying(lambda h: h["__metadata__"].update(position='{"totals": 1}')),
        lying(lambda h: h["__metadata__"].update(position='{"history": {"a": 1}}')),
        lying(lambda h: h["__metadata__"].update(position="[" * 100_000)),
        lying(lambda h: h.pop("variable_0")),
    ]  # fmt: skip
    for _ in range(150):
        data = bytearray(whole[: end + 100] if chance.random() < 0.5 else whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), end))] = chance.randrange(256)
        cases.append(bytes(data))
    for data in cases:
        try:
            checkpoint.assign(lenet, data, "x").step(3)  # what was changed does not matter
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017  Some are well.


def test_a_full_disk_leaves_what_was_there(two, lenet, full_disk):
    before = {path.name: path.read_bytes() for path in two.iterdir()}
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save(two, lenet, TrainingProgress(steps=3), 3)
    assert str(two) in str(caught.value.filename)
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before
    assert restore(two, lenet).steps == 2
    assert os.listdir(two)  # and nothing is left of the attempt
