"""The benchmark: contenders in processes of their own, what it computes and what it says."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from keras_cifar import benchmark
from keras_cifar.benchmark import FIT, GEMM, PIPELINE, PREDICT, STEP, BenchmarkOptions, Contest
from keras_cifar.core import environment

# A contender that takes no time, and whose rates are 1, 2, 3, ...
COUNTER = """
import itertools, os, sys
sys.path.insert(0, {package!r})
from turns import Turns
turns = Turns()
print("noise that a library makes")
for number in itertools.count(1):
    turns.wait()
    turns.report(number, oned_nn=os.environ.get("TF_ENABLE_ONEDNN_OPTS"), settings=turns.settings)
"""


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """A directory of contenders in place of the real one; `write(name, code)` adds one."""
    package = str(benchmark.WORKERS)
    monkeypatch.setattr(benchmark, "WORKERS", tmp_path)

    def write(name, code):
        (tmp_path / f"{name}.py").write_text(code.replace("{package!r}", repr(package)))

    write("counter", COUNTER)
    return write


def test_contenders_take_turns_and_their_medians_count(scripts):
    with Contest(BenchmarkOptions(rounds=3, seconds=0.5)) as contest:
        contest.add("a", "counter", kind="x")
        contest.add("b", "counter")
        figures = contest.take_turns()
        assert contest.workers["a"].turns[0]["settings"]["kind"] == "x"
        assert contest.workers["b"].turns[0]["settings"]["seconds"] == 0.5
    assert list(figures) == ["a", "b"]
    assert (figures["a"]["median"], figures["a"]["low"], figures["a"]["high"]) == (2, 1, 3)
    assert 1e6 < figures["a"]["peak_memory"] < 1e8  # its own and not its parent's


def test_a_contender_that_fails_is_named_and_left_out(scripts, capsys):
    scripts("missing", COUNTER.replace("turns.wait()", "turns.fail('is not installed')"))
    scripts("broken", "raise ValueError('what broke')")
    late = COUNTER.replace("turns.wait()", "turns.wait()\n    if number == 2: sys.exit('too late')")
    scripts("late", late)
    with Contest(BenchmarkOptions(rounds=3)) as contest:
        for name in ("missing", "broken", "late", "counter"):
            contest.add(name, name)
        assert list(contest.take_turns()) == ["counter"]
    said = capsys.readouterr().err
    assert "missing is not installed" in said
    assert "broken failed: ValueError: what broke" in said
    assert "late failed: too late" in said


@pytest.mark.parametrize("user", [None, "0"])
def test_peers_do_not_get_our_switches(monkeypatch, scripts, user):
    monkeypatch.setattr(environment, "changed", set())
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if user:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", user)
    environment.configure()
    with Contest(BenchmarkOptions()) as contest:
        assert contest.add("peer", "counter").turn()["oned_nn"] == user
        worker = contest.add("other", "counter", {"TF_ENABLE_ONEDNN_OPTS": "7"})
        assert worker.turn()["oned_nn"] == "7"
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == (user or "1")


def figures(step, fit, pipeline):
    return {name: {"median": v} for name, v in ((STEP, step), (FIT, fit), (PIPELINE, pipeline))}


def test_what_training_is_bound_by():
    shares = {"convolutions": 0.8, "dropout": 0.2}
    assert "the input pipeline" in benchmark.bound(figures(100, 50, 60), 0.7, shares)
    assert "what surrounds the step" in benchmark.bound(figures(100, 80, 1000), 0.7, shares)
    assert benchmark.bound(figures(100, 99, 1000), 0.7, shares).startswith("arithmetic")
    memory = benchmark.bound(figures(100, 99, 1000), 0.3, shares)
    assert memory.startswith("memory")
    assert "80% of its kernels' time is convolutions" in memory


def test_the_command_measures_everything(tmp_path):
    out = tmp_path / "figures.json"
    flags = ["--model=lenet5", "--rounds=1", "--seconds=0.1", "--batch_size=32", f"--json={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "keras_cifar.benchmark", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "bound by " in done.stdout
    assert done.stdout.rstrip().endswith(f"figures   {out}")
    result = json.loads(out.read_text())
    assert set(result["figures"]) == {STEP, FIT, PIPELINE, PREDICT, GEMM}
    for row in result["figures"].values():
        assert 0 < row["low"] <= row["median"] <= row["high"]
    # LeNet-5's multiply-adds: 28 x 28 x 6 x 75, 10 x 10 x 16 x 150 and 400 x 120 + 120 x 84 + 840.
    assert result["flops_an_image"] == 6 * (28 * 28 * 6 * 75 + 10 * 10 * 16 * 150 + 58_920)
    step, gemm = (result["figures"][name]["median"] for name in (STEP, GEMM))
    fraction = step * result["flops_an_image"] / 1e9 / gemm
    assert result["fraction_of_matrix_multiply"] == pytest.approx(fraction)
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert 0.1 < result["shares"]["convolutions"] < 0.95
    # Predicting imports TensorFlow too, but not Keras.
    cold = result["cold_start"]
    assert cold["predict"]["median"] > 0.3 * cold["import"]["median"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet20", "vgg_bn_drop"])
def test_plain_keras_is_the_same_network(model):
    """Its multiply-adds and variables are ours: what is compared is the same work."""
    code = "\n".join(
        [
            "import sys, json",
            f"sys.argv = ['x', json.dumps(dict(model={model!r}, batch_size=2, what='step'))]",
            f"sys.path.insert(0, {str(benchmark.WORKERS)!r})",
            "import turns; turns.Turns.repeat = lambda *a: None",
            "import plain_keras; m = plain_keras.model",
            "sys.stderr.write(json.dumps(['SHAPES', [list(v.shape) for v in m.weights]]))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    theirs = json.loads(done.stderr[done.stderr.rindex('["SHAPES"') :])[1]
    from keras_cifar import models

    ours = models.build(model).deployable.weights
    assert sorted(theirs) == sorted(list(v.shape) for v in ours if "seed" not in v.path)


def test_wrong_usage_is_one_line():
    for flag in (
        "--rounds=0",
        "--seconds=-1",
        "--batch_size=0",
        "--model=lenet7",
        "--augment=flop",
    ):
        done = subprocess.run(
            [sys.executable, "-m", "keras_cifar.benchmark", flag], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("benchmark: error: ")
        assert done.stderr.count("\n") == 1


def test_the_tables_median_is_of_the_turns():
    rates = np.array([3.0, 1.0, 2.0])
    worker = benchmark.Worker.__new__(benchmark.Worker)
    worker.turns = [{"rate": rate, "peak_memory": 5} for rate in rates]
    assert worker.figures == {"median": 2.0, "low": 1.0, "high": 3.0, "peak_memory": 5}


@pytest.mark.slow
def test_serving_is_measured_for_each_number_of_clients(tmp_path):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    out = tmp_path / "figures.json"
    flags = ["--serving", "--model=lenet5", "--rounds=1", "--seconds=0.3", f"--json={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "keras_cifar.benchmark", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    servers = json.loads(out.read_text())["serving"]
    assert "serve" in servers
    for rows in servers.values():
        assert list(rows) == ["1", "4", "16"]
        for clients, row in rows.items():
            assert 0 < row["p50"] <= row["p99"]
            # Each client has one request at a time.
            assert row["rate"] * row["p50"] < 2 * int(clients)
