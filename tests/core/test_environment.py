"""The switches are what the table in environment.py says."""

import os

import pytest
import tensorflow as tf

from keras_cifar.core import config, environment
from keras_cifar.training import plan as planning


def set_quota(monkeypatch, tmp_path, text: str, cores: int = 4) -> None:
    for name in environment.THREADS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(environment, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))


@pytest.mark.parametrize(
    ("text", "threads"),
    [
        ("200000 100000\n", "2"),
        ("150000 100000\n", "2"),
        ("10000 100000\n", "1"),
        ("400000 100000\n", None),
        ("max 100000\n", None),
        ("nonsense", None),
    ],
)
def test_threads_follow_the_containers_quota(monkeypatch, tmp_path, text, threads):
    set_quota(monkeypatch, tmp_path, text)
    environment.configure()
    assert [os.environ.get(name) for name in environment.THREADS] == [threads, threads]


def test_variables_that_the_user_has_set_stay(monkeypatch, tmp_path):
    set_quota(monkeypatch, tmp_path, "200000 100000\n")
    monkeypatch.setattr(environment, "changed", set())
    mine = {"TF_NUM_INTRAOP_THREADS": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KERAS_BACKEND")
    environment.configure()
    assert mine.items() <= os.environ.items()
    assert os.environ["TF_NUM_INTEROP_THREADS"] == "2"
    assert os.environ["KERAS_BACKEND"] == "tensorflow"
    assert environment.changed == {"TF_NUM_INTEROP_THREADS", "KERAS_BACKEND"}


def fake_gpus(monkeypatch, *capabilities: tuple) -> None:
    """Makes TensorFlow say that there are GPUs of these compute capabilities."""
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(capabilities))
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda c: {"compute_capability": c}
    )


@pytest.mark.parametrize(
    ("gpus", "policy"),
    [
        ([], "float32"),
        ([(8, 0)], "mixed_bfloat16"),
        ([(9, 0), (9, 0)], "mixed_bfloat16"),
        ([(7, 5)], "float32"),
        ([(9, 0), (7, 0)], "float32"),
    ],
)
def test_precision_by_device(monkeypatch, gpus, policy):
    fake_gpus(monkeypatch, *gpus)
    assert environment.dtype_policy("auto")[0] == policy
    assert environment.dtype_policy("float64")[0] == "float64"


def test_xla_is_for_one_gpu_alone(monkeypatch):
    fake_gpus(monkeypatch)
    assert environment.use_xla("none") == (False, "it slows convolutions on a CPU")
    fake_gpus(monkeypatch, (8, 0))
    assert environment.use_xla("none") == (True, "one GPU")
    assert environment.use_xla("mirrored") == (False, "several replicas")


@pytest.mark.parametrize("xla", [False, True])
def test_training_asks_for_precision_and_xla(monkeypatch, image_folder, xla):
    monkeypatch.setattr(environment, "use_xla", lambda strategy: (xla, f"as {strategy}"))
    monkeypatch.setattr(environment, "dtype_policy", {"auto": ("mixed_bfloat16", "so")}.get)
    flags = config.TrainConfig.from_flags(
        model="lenet5", data=f"folder:{image_folder}", batch_size=16
    )
    plan = planning.prepare(flags)
    assert plan.model.jit_compile is xla
    assert plan.model.get_layer("logits").compute_dtype == "bfloat16"
    described = planning.describe_run(plan)
    assert (described["dtype_policy"], described["xla"]) == ("mixed_bfloat16", xla)
    assert f"mixed_bfloat16 (so), XLA {'on' if xla else 'off'} (as none)" in plan.summary()


@pytest.mark.parametrize(
    ("wanted", "gpus", "is_on"),
    [(False, [], True), (True, [], True), (False, ["GPU:0"], False), (True, ["GPU:0"], True)],
)
def test_deterministic_is_always_so_on_cpus(monkeypatch, wanted, gpus, is_on):
    calls = []
    fake_gpus(monkeypatch, *gpus)
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: calls.append(0))
    assert environment.make_deterministic(wanted) == is_on
    assert bool(calls) == (wanted and bool(gpus))
