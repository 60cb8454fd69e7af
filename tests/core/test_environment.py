"""The switches are what the table in environment.py says."""

import ctypes
import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.core import config, environment
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.distributed.strategy import DistributedContext
from keras_cifar.training import plan as planning
from keras_cifar.training import trainer


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
    assert environment.usable_cpus() == int(threads or 4)


@pytest.mark.parametrize(("threads", "count", "apart"), [(2, 2, 1), (2, 3, 1), (4, 2, 0)])
def test_devices_without_a_spare_thread_compute_apart(monkeypatch, threads, count, apart):
    calls = []
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", str(threads))
    monkeypatch.setattr(tf.config.threading, "set_intra_op_parallelism_threads", calls.append)
    library = types.SimpleNamespace(mallopt=lambda *pair: calls.append(pair))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    environment.separate_devices(count)
    assert calls == [1, *environment.MALLOC.items()] * apart
    del library.mallopt
    environment.separate_devices(count)
    assert calls[-apart:] == [1] * apart


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


def set_gain(monkeypatch, gain: float) -> None:
    """Makes the CPU so many times as fast in bfloat16."""
    monkeypatch.setattr(environment, "bfloat16_gain", lambda: gain)


@pytest.mark.parametrize(
    ("gpus", "gain", "policy"),
    [
        ([], 0.0, "float32"),
        ([], 1.1, "float32"),
        ([], 1.6, "mixed_bfloat16"),
        ([(8, 0)], 0.3, "mixed_bfloat16"),
        ([(9, 0), (9, 0)], 0.3, "mixed_bfloat16"),
        ([(7, 5)], 1.6, "float32"),
        ([(9, 0), (7, 0)], 1.6, "float32"),
    ],
)
def test_precision_by_device(monkeypatch, gpus, gain, policy):
    fake_gpus(monkeypatch, *gpus)
    set_gain(monkeypatch, gain)
    assert environment.dtype_policy("auto")[0] == policy
    for name in ("float32", "float64"):
        assert environment.dtype_policy(name) == (name, "by --dtype_policy")
        assert environment.dtype_policy("auto", name) == (name, "as the run began")


@pytest.mark.parametrize(
    ("name", "began_with"), [("mixed_bfloat16", None), ("auto", "mixed_bfloat16")]
)
def test_bfloat16_where_it_is_slow_or_impossible(monkeypatch, name, began_with):
    set_gain(monkeypatch, 0.3)
    policy, why = environment.dtype_policy(name, began_with)
    assert policy == "mixed_bfloat16"
    assert why.endswith(", 0.3 of float32's speed on this CPU")
    set_gain(monkeypatch, 0.0)
    with pytest.raises(UsageError, match="this CPU has no kernels for mixed_bfloat16"):
        environment.dtype_policy(name, began_with)


@pytest.mark.parametrize(
    ("flags", "has"),
    [("flags : sse2 amx_bf16 avx", True), ("flags : amx_bf16x", False), (None, False)],
)
def test_instructions_are_read_from_the_flags_of_the_cpu(flags, has, monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    if flags:
        info.write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    assert environment.cpu_has.__wrapped__("amx_bf16") == has


def test_bfloat16_is_measured_and_not_looked_up():
    """The tests' processes may not use the instructions; a process of its own may."""
    assert environment.bfloat16_gain() < environment.MIN_BFLOAT16_GAIN
    code = """if True:
        from keras_cifar.core import environment
        environment.configure()
        environment.import_tensorflow()
        print(environment.bfloat16_gain())
    """
    variables = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    has_instructions = environment.cpu_has("avx512_bf16") or environment.cpu_has("amx_bf16")
    assert (float(done.stdout) >= environment.MIN_BFLOAT16_GAIN) == has_instructions


def test_workers_agree_on_the_slowest_cpus_precision(monkeypatch, image_folder, small_network):
    flags = {"model": small_network, "data": f"folder:{image_folder}", "batch_size": 16}
    settings = config.TrainConfig.from_flags(**flags)
    set_gain(monkeypatch, 1.6)
    assert planning.prepare(settings).dtype_policy[0] == "mixed_bfloat16"
    one_is_slow = lambda self, own: [own, ["float32", "slow"]] if own else [own, own]  # noqa: E731
    monkeypatch.setattr(DistributedContext, "all_gather", one_is_slow)
    assert planning.prepare(settings).dtype_policy == ("float32", "slow")
    the_run_began = lambda self, own: ["float64", None] if own is None else [own]  # noqa: E731
    monkeypatch.setattr(DistributedContext, "all_gather", the_run_began)
    assert planning.prepare(settings).dtype_policy == ("float64", "as the run began")


def test_a_resumed_run_keeps_its_precision(monkeypatch, image_folder, tmp_path, capsys):
    flags = {"model": "lenet5", "data": f"folder:{image_folder}", "batch_size": 16}
    flags |= {"run_dir": str(tmp_path / "run"), "epochs": 2, "export": False}
    run = Run(flags["run_dir"])
    for gain, why in (
        (1.6, "1.6 times as fast"),
        (0.3, "as the run began, 0.3 of float32's speed"),
    ):
        set_gain(monkeypatch, gain)
        trainer.train(config.TrainConfig.from_flags(**flags), run)
        assert re.search(f"mixed_bfloat16 .*{why}", capsys.readouterr().out)
    assert run.read_config()["dtype_policy"] == "mixed_bfloat16"
    damaged = run.read_config() | {"dtype_policy": "bfloat17"}
    run.config.write_text(json.dumps(damaged))
    with pytest.raises(
        UserError, match=r"config\.json is damaged: dtype_policy is none of Keras's"
    ):
        run.read_config()


def test_depthwise_networks_stay_in_float32_on_cpus(monkeypatch, image_folder):
    set_gain(monkeypatch, 1.6)
    flags = {"model": "efficientnet_lite0", "data": f"folder:{image_folder}", "image_size": 32}
    flags["batch_size"] = 16
    plans = [
        planning.prepare(config.TrainConfig.from_flags(**flags, dtype_policy=policy))
        for policy in ("auto", "float32", "mixed_bfloat16")
    ]
    reasons = ["its depthwise convolutions are slower in bfloat16"] + 2 * ["by --dtype_policy"]
    policies = "float32", "float32", "mixed_bfloat16"
    assert [plan.dtype_policy for plan in plans] == list(zip(policies, reasons, strict=True))
    chosen, given = (plan.model.get_weights() for plan in plans[:2])
    assert all(np.array_equal(*pair) for pair in zip(chosen, given, strict=True))


def test_xla_is_off_unless_one_device_is_told_to_use_it(monkeypatch):
    fake_gpus(monkeypatch)
    assert environment.use_xla("auto", "none") == (False, "it slows convolutions on a CPU")
    fake_gpus(monkeypatch, (8, 0))
    why = "not measured on a GPU; --xla=on turns it on"
    assert environment.use_xla("auto", "none") == (False, why)
    assert environment.use_xla("on", "none") == (True, "by --xla")
    assert environment.use_xla("off", "none") == (False, "by --xla")
    for strategy in ("mirrored", "multiworker"):
        assert environment.use_xla("auto", strategy) == (False, "several replicas")
        assert environment.use_xla("off", strategy) == (False, "by --xla")
        with pytest.raises(UsageError, match=f"--xla=on is for one device.*strategy {strategy}"):
            environment.use_xla("on", strategy)


def test_xla_on_replicas_is_refused_before_the_data_is_read(tmp_path):
    flags = config.TrainConfig.from_flags(xla="on", replicas=2, data=f"folder:{tmp_path}/none")
    with pytest.raises(UsageError, match="--xla=on is for one device"):
        planning.estimate(flags)


@pytest.mark.parametrize(("xla", "microbatches"), [("auto", 1), ("on", 1), ("on", 2), ("off", 1)])
def test_xla_compiles_the_training_step_if_it_is_on(image_folder, small_network, xla, microbatches):
    flags = {"model": small_network, "data": f"folder:{image_folder}", "batch_size": 16, "xla": xla}
    flags["accumulate_steps"] = microbatches
    plan = planning.prepare(config.TrainConfig.from_flags(**flags))
    run = plan.model.make_train_function()
    traced = run.get_concrete_function(iter(plan.batches(0)), tf.constant(1))
    functions = traced.graph.as_graph_def().library.function
    compiled = sum(f.attr["_XlaMustCompile"].b for f in functions)
    assert (compiled > 0) == (xla == "on")
    assert compiled >= microbatches or xla != "on"  # the sums and the update are two functions
    assert planning.describe_run(plan)["xla"] == (xla == "on")
    if xla == "on":
        weights = plan.model.get_weights()
        plan.model.fit(plan.batches(0), verbose=0)
        assert not np.array_equal(weights[0], plan.model.get_weights()[0])


@pytest.mark.parametrize("xla", [False, True])
def test_training_asks_for_precision_and_xla(monkeypatch, image_folder, xla):
    monkeypatch.setattr(environment, "use_xla", lambda flag, strategy: (xla, f"{flag} {strategy}"))
    monkeypatch.setattr(environment, "dtype_policy", {"auto": ("mixed_bfloat16", "so")}.get)
    flags = config.TrainConfig.from_flags(
        model="lenet5", data=f"folder:{image_folder}", batch_size=16
    )
    plan = planning.prepare(flags)
    assert plan.model.jit_compile is xla
    assert plan.model.get_layer("features").compute_dtype == "bfloat16"
    described = planning.describe_run(plan)
    assert (described["dtype_policy"], described["xla"]) == ("mixed_bfloat16", xla)
    assert f"mixed_bfloat16 (so), XLA {'on' if xla else 'off'} (auto none)" in plan.summary()


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
