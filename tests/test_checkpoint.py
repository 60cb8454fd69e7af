"""Saving and restoring everything that decides the next step."""

import numpy as np
import pytest

from keras_cifar import checkpoint, distribution, models, pipeline
from keras_cifar.config import TrainConfig
from keras_cifar.data import Split
from keras_cifar.distribution import Devices
from keras_cifar.errors import UserError
from keras_cifar.optimizers import compile_model
from tests.conftest import colour_images

ALONE = Devices(distribution.choose(TrainConfig(strategy="none")), TrainConfig())


def build(**flags):
    model = models.build("vgg_bn_drop", (32, 32, 3), 3)
    compile_model(model, TrainConfig(epochs=4, learning_rate=0.01, **flags), 2, jit_compile=False)
    return model


def step(model, start):
    split = Split(*colour_images(16, 32, 3))
    batches = pipeline.training(split, 3, 4, "flip", seed=1, start_step=start)
    model.fit(batches, epochs=1, steps_per_epoch=2, verbose=0, shuffle=False)


@pytest.mark.parametrize("flags", [{"ema": 0.9}, {"optimizer": "sgd"}], ids=["ema", "sgd"])
def test_going_on_equals_not_having_stopped(tmp_path, flags):
    path = tmp_path / "c.npz"
    model = build(**flags)
    step(model, 0)
    checkpoint.save(path, model, {"history": [1]})
    step(model, 2)

    other = build(**flags)
    assert checkpoint.restore(path, other, ALONE) == {"history": [1]}
    step(other, 2)
    for mine, theirs in zip(
        checkpoint._variables(model), checkpoint._variables(other), strict=True
    ):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)
    # Dropout's random states were restored: with others, the weights would be far apart.
    third = build(**flags)
    checkpoint.restore(path, third, ALONE)
    for layer in third._flatten_layers():
        if hasattr(layer, "seed_generator"):
            layer.seed_generator.state.assign(layer.seed_generator.state + 7)
    step(third, 2)
    kernels = [m.get_layer("logits").kernel.numpy() for m in (model, third)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_no_checkpoint_is_a_new_start(tmp_path):
    assert checkpoint.restore(tmp_path / "none.npz", models.build("lenet5"), ALONE) == {}


def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / "c.npz"
    model = models.build("lenet5")
    compile_model(model, TrainConfig(), 2)
    checkpoint.save(path, model, {})
    other = models.build("lenet5", num_classes=3)
    compile_model(other, TrainConfig(), 2)
    with pytest.raises(UserError, match="another network"):
        checkpoint.restore(path, other, ALONE)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"c\.npz is damaged"):
        checkpoint.restore(path, model, ALONE)
