"""Layers and optimizers on two replicas against one device.

In a process of their own: after a strategy with float64, a second one in the process aborts.
"""

import subprocess
import sys

import numpy as np
import pytest

CODE = """
import sys
from keras_cifar.core import environment
environment.import_tensorflow()
import keras
import numpy as np
import tensorflow as tf
from keras_cifar.models import layers
from keras_cifar.training import optimizers

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
strategies = {"one": tf.distribute.get_strategy(), "two": mirrored}
found = {}


def parts(strategy, value):
    split = np.split(value, strategy.num_replicas_in_sync)
    return strategy.experimental_distribute_values_from_function(
        lambda c: tf.constant(split[c.replica_id_in_sync_group])
    )


def local(strategy, value):
    return [np.asarray(v) for v in strategy.experimental_local_results(value)]


def run(strategy, function, *values):
    call = tf.function(lambda *v: strategy.run(function, v), autograph=False)
    return call(*(parts(strategy, v) for v in values))


def norm(strategy, dtype, offset, shape, training):
    random = np.random.default_rng(0)
    with strategy.scope():
        layer = layers.BatchNormalization(dtype=dtype)
        layer.build(shape)
    for weight in layer.weights:
        weight.assign(random.uniform(0.5, 2, weight.shape))
    moves = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))  # halves that are not alike
    x = (random.normal(offset, 1, shape) + moves / 4).astype(dtype)
    factors = random.normal(0, 1, shape).astype(dtype)

    def step(x, factors):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
            target = tf.reduce_sum(y * factors)
        return y, *tape.gradient(target, [x, layer.gamma.value, layer.beta.value])

    y, inputs, gamma, beta = run(strategy, step, x, factors)
    result = {"y": np.concatenate(local(strategy, y))}
    result["input gradient"] = np.concatenate(local(strategy, inputs))
    result["gamma gradient"] = sum(local(strategy, gamma))
    result["beta gradient"] = sum(local(strategy, beta))
    for variable in (layer.moving_mean, layer.moving_variance):
        copies = local(strategy, variable.value)
        np.testing.assert_array_equal(copies[0], copies[-1])
        result[variable.name] = copies[0]
    return result


def adam(strategy, dtype, kind):
    random = np.random.default_rng(0)
    with strategy.scope():
        variables = [keras.Variable(random.normal(0, 1, s), dtype=dtype) for s in ((3, 4), (4,))]
        optimizer = kind(0.1, weight_decay=0.1)
        optimizer.build(variables)
    for _ in range(5):
        gradients = [random.normal(0, 1, (2, *v.shape)).astype(dtype) for v in variables]
        run(
            strategy,
            lambda *g: optimizer.apply([tf.reduce_sum(x, 0) for x in g], variables),
            *gradients,
        )
    result = {}
    for index, variable in enumerate((*variables, *optimizer.variables)):
        copies = local(strategy, variable.value)
        np.testing.assert_array_equal(copies[0], copies[-1])
        result[str(index)] = copies[0]
    return result


for name, strategy in strategies.items():
    for dtype in ("float32", "float64"):
        for training in (True, False):
            for offset in (0, 1000):
                for shape in ((8, 3, 3, 4), (8, 4)):
                    case = f"{dtype} {offset} {len(shape)} {training}"
                    for key, value in norm(strategy, dtype, offset, shape, training).items():
                        found[f"{name}|norm {case}|{key}"] = value
        for kind in (optimizers.Adam, optimizers.AdamW):
            for key, value in adam(strategy, dtype, kind).items():
                found[f"{name}|{kind.__name__} {dtype}|{key}"] = value

for channels in (16, 6):
    x = np.ones((64, 4, 4, channels), np.float32)
    with mirrored.scope():
        layer = layers.Dropout(0.5, seed=1)
    for call in ("first", "second"):
        masks = local(mirrored, run(mirrored, lambda x: layer(x, training=True), x))
        for index, mask in enumerate(masks):
            found[f"mask|{channels}|{call} {index}"] = mask == 0

# Outside of the replicas there is one batch, and one mask.
x = np.random.default_rng(0).normal(1, 2, (8, 3, 3, 4)).astype(np.float32)
with mirrored.scope():
    layer = layers.BatchNormalization()
    found["outside|norm"] = layer(x, training=True)
    found["outside|moving_mean"] = local(mirrored, layer.moving_mean.value)[1]
    found["outside|drop"] = layers.Dropout(0.5, seed=1)(x, training=True)
found["outside|x"] = x
np.savez(sys.argv[1], **found)
"""

NORMS = [
    f"norm {dtype} {offset} {rank} {training}"
    for dtype in ("float32", "float64")
    for offset in (0, 1000)
    for rank in (4, 2)
    for training in (True, False)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("replicas") / "found.npz"
    command = [sys.executable, "-c", CODE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(np.load(path))


def compare(found: dict, case: str, tolerance: float) -> None:
    keys = [key.partition("|")[2] for key in found if key.startswith(f"one|{case}|")]
    assert len(keys) > 5
    for key in keys:
        one, two = found[f"one|{key}"], found[f"two|{key}"]
        assert one.dtype == two.dtype
        size = max(1.0, np.abs(one).max())
        np.testing.assert_allclose(two, one, rtol=0, atol=tolerance * size, err_msg=key)


@pytest.mark.parametrize("case", NORMS)
def test_two_replicas_normalize_by_the_statistics_of_the_whole_batch(found, case):
    _, dtype, offset, *_ = case.split()
    tolerances = {"float32": (1e-5, 5e-4), "float64": (1e-12, 1e-9)}
    compare(found, case, tolerances[dtype][offset != "0"])


def test_statistics_of_the_two_halves_differ(found):
    y = found["one|norm float64 0 4 True|y"]
    assert np.abs(y[:4].mean((0, 1, 2)) - y[4:].mean((0, 1, 2))).max() > 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_two_replicas_take_the_steps_of_one_device(found, kind, dtype, tolerance):
    compare(found, f"{kind} {dtype}", tolerance)


@pytest.mark.parametrize("channels", [16, 6])
def test_each_replica_drops_others(found, channels):
    calls = ("first 0", "first 1", "second 0", "second 1")
    masks = [found[f"mask|{channels}|{call}"] for call in calls]
    for index, mask in enumerate(masks):
        assert mask.mean() == pytest.approx(0.5, abs=0.05)
        for other in masks[:index]:
            assert (mask != other).mean() == pytest.approx(0.5, abs=0.05)


def test_layers_can_be_called_outside_of_the_replicas(found):
    x, y = found["outside|x"], found["outside|drop"]
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(found["outside|norm"], (x - mean) / variance**0.5, atol=1e-4)
    np.testing.assert_allclose(found["outside|moving_mean"], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(y, np.where(y == 0, 0, x * 2), atol=1e-6)
    assert (y == 0).mean() == pytest.approx(0.5, abs=0.2)


LEFT = """
import time
from keras_cifar.core import environment
environment.import_tensorflow()
import tensorflow as tf
from keras_cifar.data.batches import _prefetched
from keras_cifar.distributed import sharding

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
computed = []


def slow(index):
    time.sleep(0.01)
    computed.append(index)
    return index


def numbers(share):
    dataset = tf.data.Dataset.range(1_000_000)
    dataset = dataset.map(lambda index: tf.numpy_function(slow, [index], tf.int64))
    return _prefetched(dataset)


batches = sharding.shard_batches(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), numbers, None)
for _ in range(30):
    iterator = iter(batches)
    next(iterator)
    del iterator
    number = len(computed)
    time.sleep(0.03)
    assert len(computed) == number, "the thread reads on"
# Left to Python's end.
iterator = iter(batches)
next(iterator)
print("left in peace")
"""


def test_iterator_may_be_left_while_a_batch_is_computed():
    """A thread that reads freed memory would end the process with SIGSEGV."""
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "left in peace\n"), done.stderr
