"""Which strategy a request gets. The tests' TensorFlow has started with two virtual CPU devices."""

import pytest
import tensorflow as tf

from keras_cifar import distribution
from keras_cifar.errors import UsageError


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here leaves anything in Keras."""


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that the machine has so many GPUs."""
    real = tf.config.list_physical_devices

    def pretend(count):
        names = [f"GPU {i}" for i in range(count)]
        monkeypatch.setattr(
            tf.config,
            "list_physical_devices",
            lambda kind=None: names if kind == "GPU" else real(kind),
        )

    return pretend


@pytest.mark.parametrize(
    ("name", "replicas", "chosen", "count", "reason"),
    [
        ("auto", None, "none", 1, "the CPU"),
        ("auto", 1, "none", 1, "the CPU"),
        ("auto", 2, "mirrored", 2, "2 virtual CPU devices"),
        ("none", None, "none", 1, "the CPU"),
        ("none", 1, "none", 1, "the CPU"),
        ("mirrored", None, "mirrored", 1, "1 virtual CPU device"),
        ("mirrored", 1, "mirrored", 1, "1 virtual CPU device"),
        ("mirrored", 2, "mirrored", 2, "2 virtual CPU devices"),
    ],
)
def test_choice_without_gpu(gpus, name, replicas, chosen, count, reason):
    gpus(0)
    strategy, got_name, got_reason = distribution.choose(name, replicas)
    assert (got_name, got_reason) == (chosen, reason)
    assert strategy.num_replicas_in_sync == count
    assert isinstance(strategy, tf.distribute.MirroredStrategy) == (chosen == "mirrored")


def test_mirrored_uses_each_virtual_device_once(gpus):
    gpus(0)
    strategy, _, _ = distribution.choose("mirrored", 2)
    devices = {device.rsplit("/", 1)[-1] for device in strategy.extended.worker_devices}
    assert devices == {"device:CPU:0", "device:CPU:1"}


@pytest.mark.parametrize(
    ("count", "name", "replicas", "devices", "reason"),
    [
        (2, "auto", None, ["GPU:0", "GPU:1"], "2 GPUs"),
        (2, "mirrored", 1, ["GPU:0"], "1 GPU"),
        (4, "auto", 3, ["GPU:0", "GPU:1", "GPU:2"], "3 GPUs"),
    ],
)
def test_gpus_are_preferred(gpus, monkeypatch, count, name, replicas, devices, reason):
    gpus(count)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: devices)
    assert distribution.choose(name, replicas) == (devices, "mirrored", reason)


@pytest.mark.parametrize(("count", "name"), [(1, "auto"), (1, "none"), (2, "none")])
def test_one_gpu_needs_no_strategy(gpus, count, name):
    gpus(count)
    strategy, chosen, reason = distribution.choose(name, None)
    assert (strategy.num_replicas_in_sync, chosen, reason) == (1, "none", "one GPU")


@pytest.mark.parametrize(
    ("count", "name", "replicas", "message"),
    [
        (0, "multiworker", None, "--strategy=multiworker is not there yet"),
        (0, "none", 2, "--replicas=2 needs --strategy=mirrored or auto"),
        (0, "mirrored", 3, "--replicas=3 must be chosen before TensorFlow starts"),
        (0, "auto", 3, "--replicas=3 must be chosen before TensorFlow starts"),
        (2, "mirrored", 3, "--replicas=3 is more than this machine's 2 GPUs"),
        (1, "auto", 2, "--replicas=2 is more than this machine's 1 GPU"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(gpus, count, name, replicas, message):
    gpus(count)
    with pytest.raises(UsageError, match=f"^{message}") as error:
        distribution.choose(name, replicas)
    assert "\n" not in str(error.value)


def test_process_without_a_cpu_device_is_refused(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [])
    with pytest.raises(UsageError, match="no CPU device"):
        distribution.choose("mirrored", 2)
