"""What `Classifier.compile` refuses because several replicas would compute it wrongly."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.models import classifier
from tests.distributed.strategies import tiny

SGD = keras.optimizers.SGD


def compiled(strategy, model=tiny, optimizer=SGD, **arguments):
    """A compiled model; `model` and `optimizer` are called in the strategy's scope."""
    with strategy.scope():
        model = model()
        model.compile(optimizer(), **arguments)
    return model


def with_layer(make):
    """A model with a layer of Keras."""
    images, x = classifier.image_input((8, 8, 3))
    logits = keras.layers.Dense(3)(make()(keras.layers.Flatten()(x)))
    return classifier.Classifier.build_from(images, logits, "other")


def nested():
    return keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization()])


def outside(strategy, name, make):
    """Compiles what was made outside of the scope."""
    made = make()
    compiled(strategy, **{name: lambda: made})


def built_optimizer():
    optimizer = SGD()
    optimizer.build([keras.Variable(np.zeros(3))])
    return optimizer


LAYERS = {
    "BatchNormalization": keras.layers.BatchNormalization,
    "nested BatchNormalization": nested,
    "Dropout": lambda: keras.layers.Dropout(0.5),
    "GaussianNoise": lambda: keras.layers.GaussianNoise(0.5),
}
REFUSED = {
    "model outside": lambda s: outside(s, "model", tiny),
    "optimizer outside": lambda s: outside(s, "optimizer", SGD),
    "built optimizer outside": lambda s: outside(s, "optimizer", built_optimizer),
    "jit_compile": lambda s: compiled(s, jit_compile=True),
    "run_eagerly": lambda s: compiled(s, run_eagerly=True),
}
for name, make in LAYERS.items():
    REFUSED[name] = lambda s, make=make: compiled(s, lambda: with_layer(make))


@pytest.mark.parametrize("name", REFUSED)
def test_what_replicas_would_compute_wrongly_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^(the |layer |jit_compile)") as error:
        REFUSED[name](tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
    assert "\n" not in str(error.value)
    REFUSED[name](tf.distribute.get_strategy())  # One device accepts it.


@pytest.mark.parametrize("argument", [{"gradient_accumulation_steps": 2}, {"use_ema": True}])
def test_what_compile_does_itself_is_refused_in_optimizers(argument):
    with pytest.raises(ValueError, match="to compile, not"):
        compiled(tf.distribute.get_strategy(), optimizer=lambda: SGD(**argument))
