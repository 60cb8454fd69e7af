"""Checkpoints: saving and restoring the full training state."""

import json
import random

import keras
import numpy as np
import pytest

from keras_cifar import models
from keras_cifar.core.config import OptimizerConfig
from keras_cifar.core.errors import UserError
from keras_cifar.data import Split, training_batches
from keras_cifar.models import classifier, layers
from keras_cifar.training import checkpoint
from keras_cifar.training.checkpoint import TrainingProgress
from keras_cifar.training.optimizers import compile_model, schedule
from tests.conftest import colour_images

PROGRESS = TrainingProgress([{"epoch": 1, "loss": 0.1}], 2, (0.1, 1 / 3, 4.0, 2.0, 0.0), 1.5, 1)


def tiny():
    """A small network with everything that a checkpoint stores: moving statistics and dropout."""
    images, x = classifier.image_input((16, 16, 3))
    x = keras.layers.Conv2D(4, 3, strides=2)(x)
    x = layers.Dropout(0.5)(layers.BatchNormalization()(x))
    logits = keras.layers.Dense(3, name="logits")(keras.layers.Flatten()(x))
    return classifier.Classifier.build_from(images, logits, "tiny")


def build(name="lenet5", classes=3, **flags):
    model = tiny() if name == "tiny" else models.build(name, (16, 16, 3), classes)
    config = OptimizerConfig(learning_rate=0.01, **flags)
    compile_model(model, config, schedule(config, 4, 2), jit_compile=False)
    return model


def restore(directory, model) -> TrainingProgress:
    return checkpoint.assign(model, checkpoint.read(directory)[1], directory)


def step(model, start):
    split = Split(*colour_images(16, 16, 3))
    batches = training_batches(split, 3, 4, "flip", seed=1, start_step=start)
    model.fit(batches, epochs=1, steps_per_epoch=2, verbose=0, shuffle=False)


def test_resuming_equals_training_without_a_stop(tmp_path):
    model = build("tiny", ema=0.9)
    step(model, 0)
    checkpoint.save(tmp_path, model, PROGRESS, 2)
    step(model, 2)

    other = build("tiny", ema=0.9)
    assert restore(tmp_path, other) == PROGRESS
    step(other, 2)
    assert checkpoint.digest(other) == checkpoint.digest(model)
    # Dropout's random states were restored: with others, the weights differ much.
    restore(tmp_path, other)
    for layer in other._flatten_layers():
        if hasattr(layer, "seed_generator"):
            layer.seed_generator.state.assign(layer.seed_generator.state + 7)
    step(other, 2)
    kernels = [m.get_layer("logits").kernel.numpy() for m in (model, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


@pytest.fixture(scope="module")
def lenet():
    return build()


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


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "first": lambda data: flip(data, 0),
    "header": lambda data: flip(data, 300),
    "middle": lambda data: flip(data, len(data) // 2),
    "last": lambda data: flip(data, len(data) - 1),
}


def damage(path, how: str) -> None:
    path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(two, lenet, capsys, how):
    newest = checkpoint._files(two)[0]
    damage(newest, how)
    assert restore(two, lenet).steps == 1
    assert value_of(lenet) == 1
    out = capsys.readouterr().out
    assert f"checkpoint {newest.name} is damaged; resuming from the previous one" in out
    assert out.count("\n") == 1
    # With a second one it is an error.
    other = checkpoint._files(two)[1]
    whole = other.read_bytes()
    damage(other, how)
    with pytest.raises(UserError) as caught:
        restore(two, lenet)
    message = str(caught.value)
    assert f"all checkpoints in {two} are damaged: {newest.name}, {other.name}; " in message
    assert "--init_from" in message
    assert "\n" not in message
    # A damaged file is removed by the next save.
    other.write_bytes(whole)
    checkpoint.save(two, lenet, TrainingProgress(steps=1, seconds=2.0), 1)
    assert newest not in checkpoint._files(two)


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert checkpoint.read(tmp_path / "none") == (None, b"")
    assert not checkpoint.exists(tmp_path)


def test_the_last_two_are_kept(two, lenet):
    checkpoint.save(two, lenet, TrainingProgress(steps=3), 3)
    names = [path.name[:14] for path in checkpoint._files(two)]
    assert names == ["step-000000003", "step-000000002"]
    # The end of an epoch is after its last step.
    checkpoint.save(two, lenet, TrainingProgress([{"epoch": 1}]), 3)
    assert restore(two, lenet).history
    assert len(list(two.iterdir())) == 2


def test_a_checkpoint_of_another_network_or_optimizer_is_refused(two):
    for other in (build(classes=4), build(optimizer="sgd")):
        with pytest.raises(UserError, match="another network or optimizer"):
            restore(two, other)


def test_hostile_contents_with_a_right_checksum_are_one_line(two, lenet):
    """Whoever writes a file can write its checksum too."""
    chance = random.Random(0)
    _, whole = checkpoint.read(two)
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])

    def header_with(change) -> bytes:
        other = json.loads(json.dumps(header))
        change(other)
        text = json.dumps(other).encode()
        return len(text).to_bytes(8, "little") + text + whole[end:]

    cases = [
        b"", b"x", b"\xff" * 8, b"\xff" * 100, whole[:end], whole + whole, b"\0" * 16,
        header_with(lambda h: h["variable_0"].update(shape=[2**40])),
        header_with(lambda h: h["variable_0"].update(shape="x")),
        header_with(lambda h: h["variable_0"].update(dtype=[])),
        header_with(lambda h: h.update(__metadata__=3)),
        header_with(lambda h: h["__metadata__"].update(position="[]")),
        header_with(lambda h: h["__metadata__"].update(position='{"steps": "x"}')),
        header_with(lambda h: h["__metadata__"].update(position='{"totals": 1}')),
        header_with(lambda h: h["__metadata__"].update(position="[" * 100_000)),
        header_with(lambda h: h.pop("variable_0")),
    ]  # fmt: skip
    for _ in range(300):
        data = bytearray(whole[: end + 100] if chance.random() < 0.5 else whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), end))] = chance.randrange(256)
        cases.append(bytes(data))
    for data in cases:
        try:
            checkpoint.assign(lenet, data, "x")
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017  Some are valid.


def test_a_full_disk_leaves_what_was_there(two, lenet, full_disk):
    before = {path.name: path.read_bytes() for path in two.iterdir()}
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save(two, lenet, TrainingProgress(steps=3), 3)
    assert str(two) in str(caught.value.filename)
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before
    assert restore(two, lenet).steps == 2
