"""The benchmark: contenders in processes of their own, what it computes and what it prints."""

import contextlib
import functools
import json
import os
import subprocess
import sys

import pytest

from keras_cifar import benchmark, benchmarking, models
from keras_cifar.benchmarking import (
    comparison,
    contest,
    distribution,
    growth,
    ours,
    photos,
    scaling,
    serving,
    turns,
)
from keras_cifar.benchmarking.comparison import FIT, GEMM, PIPELINE, PREDICT, STEP
from keras_cifar.benchmarking.contest import Contest
from keras_cifar.benchmarking.options import BenchmarkOptions
from keras_cifar.core import environment
from keras_cifar.core.errors import UsageError

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
    package = str(contest.WORKERS)
    monkeypatch.setattr(contest, "WORKERS", tmp_path)

    def write(name, code):
        (tmp_path / f"{name}.py").write_text(code.replace("{package!r}", repr(package)))

    write("counter", COUNTER)
    return write


def test_contenders_take_turns_and_their_medians_count(scripts):
    with Contest(BenchmarkOptions(rounds=3, seconds=0.5)) as contest:
        contest.add("a", "counter", kind="x")
        contest.add("b", "counter")
        measured = contest.take_turns()
        assert contest.workers["a"].turns[0]["settings"]["kind"] == "x"
        assert contest.workers["b"].turns[0]["settings"]["seconds"] == 0.5
    assert list(measured) == ["a", "b"]
    assert (measured["a"]["median"], measured["a"]["low"], measured["a"]["high"]) == (2, 1, 3)
    assert 1e6 < measured["a"]["peak_memory"] < 1e8  # its own and not its parent's


def test_a_contender_that_fails_is_named_and_left_out(scripts, capsys):
    scripts("broken", "raise ValueError('what broke')")
    late = COUNTER.replace("turns.wait()", "turns.wait()\n    if number == 2: sys.exit('too late')")
    scripts("late", late)
    with Contest(BenchmarkOptions(rounds=3)) as contest:
        for name in ("broken", "late", "counter"):
            contest.add(name, name)
        assert list(contest.take_turns()) == ["counter"]
    said = capsys.readouterr().err
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


@pytest.mark.parametrize(
    ("step", "fit", "pipeline", "fraction", "start"),
    [
        (100, 50, 60, 0.7, "the input pipeline"),
        (100, 80, 1000, 0.7, "what surrounds the step"),
        (100, 99, 1000, 0.7, "arithmetic: the step reaches 0.70"),
        (100, 99, 1000, 0.3, "memory and small kernels"),
    ],
)
def test_what_training_is_bound_by(step, fit, pipeline, fraction, start):
    rates = {STEP: {"median": step}, FIT: {"median": fit}, PIPELINE: {"median": pipeline}}
    found = comparison.bound(rates, fraction, {"convolutions": 0.8, "dropout": 0.2})
    assert found.startswith(start)
    assert ("80% of its kernels' time is convolutions" in found) == (fit == 99)


class InProcess(contest.Worker, turns.Turns):
    """Both sides of a contender, which works its turn when it is started; the rate of peers is 2."""

    def __init__(self, script, settings, variables, followers=()):
        self.turns, self.error, self.settings, self.reported = [], None, settings, None
        if script == "ours":
            with contextlib.suppress(StopIteration):
                ours.WORK[settings["what"]](self)
        else:
            self.report(2.0)

    def wait(self):
        if self.reported:
            raise StopIteration

    def report(self, rate, **more):
        self.reported = {"rate": rate, "peak_memory": 1} | more

    def turn(self):
        self.turns.append(self.reported)
        return self.reported

    def close(self):
        pass


def command(out, *flags):
    """Runs the command; what it prints and what it writes."""
    argv = [sys.executable, "-m", "keras_cifar.benchmark", "--model=lenet5", "--rounds=1", *flags]
    done = subprocess.run([*argv, f"--json={out}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def check_comparison(printed, result, out):
    """Checks what the benchmark of lenet5 printed and wrote."""
    assert "bound by " in printed
    assert printed.rstrip().endswith(f"json      {out}")
    for row in result["figures"].values():
        assert 0 < row["low"] <= row["median"] <= row["high"]
    # LeNet-5's multiply-adds: 28 x 28 x 6 x 75, 10 x 10 x 16 x 150 and 400 x 120 + 120 x 84 + 840.
    assert result["flops_an_image"] == 6 * (28 * 28 * 6 * 75 + 10 * 10 * 16 * 150 + 58_920)
    step, gemm = (result["figures"][name]["median"] for name in (STEP, GEMM))
    fraction = step * result["flops_an_image"] / 1e9 / gemm
    assert result["fraction_of_matrix_multiply"] == pytest.approx(fraction)
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert 0.1 < result["shares"]["convolutions"] < 0.95


@pytest.mark.parametrize("gain", [0.3, 1.6])
def test_each_kind_of_work_is_measured(gain, rewriting, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "bfloat16_gain", lambda: gain)
    cold = {"predict": contest.spread([3.0]), "import": contest.spread([2.0])}
    monkeypatch.setattr(contest, "Worker", InProcess)
    monkeypatch.setattr(comparison, "PREDICTED", 100)
    monkeypatch.setattr(comparison, "cold_start", lambda rounds, export: cold)
    out = tmp_path / "measurements.json"
    flags = {"model": "lenet5", "batch_size": 32, "peers": True, "json": str(out)}
    benchmark.main(BenchmarkOptions(rounds=1, seconds=0.1, **flags))
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    check_comparison(printed, result, out)
    rate = result["figures"][STEP]["median"]
    assert f"{rate / 2:>8.2f}  training step / PaddlePaddle" in printed
    half = {f"{peer}, bfloat16" for peer in ("plain Keras", "PyTorch eager", "torch.compile")}
    assert half <= result["figures"].keys() if gain > 1 else not half & result["figures"].keys()
    policy = "mixed_bfloat16" if gain > 1 else "float32"
    assert f"batches of 32, {policy}, digits" in printed
    assert bool(rewriting) == (gain > 1)
    assert "1.00  s more than the import" in printed


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_rows_have_the_precision_that_they_name(policy, scripts):
    for name in ("plain_keras", "pytorch", "paddlepaddle"):
        scripts(name, COUNTER)
    with Contest(BenchmarkOptions(dtype_policy=policy)) as contest:
        comparison._add_peers(contest)
        for name, worker in contest.workers.items():
            settings = worker.turn()["settings"]
            assert settings["dtype_policy"] == ("float32" if "bfloat16" not in name else policy)
    assert len(contest.workers) == (8 if policy == "float32" else 13)


@pytest.mark.parametrize(
    ("policy", "dtype"), [("float32", "float32"), ("mixed_bfloat16", "<dtype: 'bfloat16'>")]
)
def test_matrices_have_the_precision_of_the_step(policy, dtype):
    code = (
        "import sys, turns\n"
        "turns.Turns.repeat = lambda self, once, amount: sys.stderr.write(f'{once().dtype!s}')\n"
        "import gemm"
    )
    argv = [sys.executable, "-c", code, json.dumps({"dtype_policy": policy})]
    env = os.environ | {"PYTHONPATH": str(contest.WORKERS)}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=env)
    assert done.stderr.endswith(dtype)


def test_crops_of_photographs_are_measured_beside_torchvision(monkeypatch, capsys):
    monkeypatch.setattr(contest, "Worker", InProcess)
    for name, value in {"COUNT": 40, "MOTIFS": 2, "IMAGE_SIZE": 96}.items():
        monkeypatch.setattr(photos, name, value)
    options = {"model": "lenet5", "photos": True, "peers": True, "batch_size": 8, "seconds": 0.1}
    found = benchmarking.measure(BenchmarkOptions(rounds=1, **options))["photos"]
    assert list(found["measured"]) == [photos.OURS, photos.DECODED, photos.PEER]
    assert 0.1 < found["shares"]["JPEG"] < 0.95
    assert 0 < found["shares"]["resizing"] < found["shares"]["JPEG"]
    printed = capsys.readouterr().out
    size = int(printed.split(" kB each")[0].split()[-1])
    assert 80 < size < 110  # as photographs of 500 x 375 have
    ratio = found["measured"][photos.OURS]["median"] / 2
    assert f"{ratio:>8.2f}  crops of files / torchvision, 2 workers" in printed


def test_growth_is_measured_by_batch_size_and_images(monkeypatch, capsys):
    monkeypatch.setattr(contest, "Worker", InProcess)
    monkeypatch.setattr(growth, "GROWTH", {"batch_size": (8,), "images": (1_000,)})
    options = BenchmarkOptions(model="lenet5", growth=True, rounds=1, seconds=0.1)
    tables = benchmarking.measure(options)["growth"]
    found = {what: list(table) for what, table in tables.items()}
    assert found == {"batch_size": ["8"], "images": ["1,000"]}
    assert "batch_size    images/s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own(tmp_path):
    out = tmp_path / "measurements.json"
    printed, result = command(out, "--seconds=0.1", "--batch_size=32")
    check_comparison(printed, result, out)
    assert set(result["figures"]) == {STEP, FIT, PIPELINE, PREDICT, GEMM}
    # Predicting imports TensorFlow too, but not Keras.
    cold = result["cold_start"]
    assert cold["predict"]["median"] > 0.3 * cold["import"]["median"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet20", "vgg_bn_drop"])
def test_plain_keras_is_the_same_network(model):
    """Its multiply-adds and variables are ours: what is compared is the same work."""
    code = (
        "import sys, json, turns; turns.Turns.repeat = lambda *a: None; import plain_keras\n"
        "shapes = [list(v.shape) for v in plain_keras.model.weights]\n"
        "sys.stderr.write(json.dumps(['SHAPES', shapes]))"
    )
    settings = {"model": model, "batch_size": 2, "what": "step"}
    argv = [sys.executable, "-c", code, json.dumps(settings)]
    env = os.environ | {"PYTHONPATH": str(contest.WORKERS)}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=env)
    theirs = json.loads(done.stderr[done.stderr.rindex('["SHAPES"') :])[1]
    ours = models.build(model).deployable.weights
    assert sorted(theirs) == sorted(list(v.shape) for v in ours if "seed" not in v.path)


# A contender whose turn needs its follower: they meet at the file of the settings.
PAIR = """
import os, sys, time
sys.path.insert(0, {package!r})
from turns import Turns
turns = Turns()
while True:
    turns.wait()
    if turns.settings.get("follows"):
        open(turns.settings["file"], "w").close()
    while not os.path.exists(turns.settings["file"]):
        time.sleep(0.01)
    turns.report(os.getpid())
    time.sleep(0.01)
"""


def test_a_contender_may_have_several_processes(scripts, tmp_path):
    scripts("pair", PAIR)
    file = str(tmp_path / "file")
    with Contest(BenchmarkOptions(rounds=2)) as contest:
        contest.add("pair", "pair", None, [{"file": file}], file=file)
        measured = contest.take_turns()["pair"]
        worker = contest.workers["pair"]
        (follower,) = worker._followers
        assert measured["low"] == measured["high"] == worker._process.pid
    assert follower.poll() is not None


def test_distribution_is_measured_beside_pytorch_and_modelled(scripts, monkeypatch, capsys):
    def add(contest):
        contest.add("one device", "counter")

    monkeypatch.setattr(distribution, "_add_ours", add)
    scripts("pytorch", COUNTER)
    options = {"model": "resnet20", "distribution": True, "peers": True, "rounds": 3}
    found = benchmarking.measure(BenchmarkOptions(**options))["distribution"]
    assert list(found["measured"]) == ["one device", "PyTorch", "PyTorch DDP, 2 processes"]
    assert found["measured"]["one device"].items() >= {"median": 2, "low": 1, "high": 3}.items()
    printed = capsys.readouterr().out
    assert " ".join(printed.split("2 processes")[1].split()[:4]) == "2 1 3 1.00"
    # 19 convolutions and 2 shortcuts with a normalization each, which all-reduces twice.
    assert found["traffic"]["collectives_of_whole"] == 2 * 21
    alone, many = found["predicted"][1], found["predicted"][64]
    assert alone["replica"] == alone["whole"] > 0
    assert 64 * alone["replica"] > many["replica"] > many["whole"] > alone["replica"]


def test_the_model_of_many_gpus_hides_what_the_backward_pass_can():
    machines = scaling.Machines(8, within=1e9, between=1e8)
    seconds = functools.partial(scaling.step_seconds, machines)
    assert seconds(1, 0.3, 10**9) == 0.3
    size, host, last = 4 * 50e6, scaling.HOST_SECONDS, 25 * 2**20 / 1e9
    reduced = 2 * 7 / 8 * size / 1e9  # 0.35 s
    # The backward pass takes 0.6 of 0.9 s, or 0.2 of 0.3.
    assert seconds(8, 0.9, 50e6) == pytest.approx(0.9 + 2 * 7 / 8 * last + host)
    assert seconds(8, 0.3, 50e6) == pytest.approx(0.3 + reduced - 0.2 + host)
    waiting = seconds(8, 0.9, 50e6, 10) - seconds(8, 0.9, 50e6)
    assert waiting == pytest.approx(10 * 2 * 3 * machines.hop_within)
    assert seconds(16, 0.3, 50e6) > seconds(8, 0.3, 50e6) + 3


def test_the_model_of_many_gpus_is_near_what_others_measured():
    for one in scaling.PUBLISHED:
        assert abs(one.modelled() - one.efficiency) <= 0.15, one
    others = [one for one in scaling.PUBLISHED if "VGG" not in one.name]
    differences = [abs(one.modelled() - one.efficiency) for one in others]
    assert sum(differences) / len(differences) < 0.04


@pytest.mark.slow
def test_replicas_and_processes_are_measured(tmp_path):
    flags = ("--distribution", "--model=resnet20", "--batch_size=64", "--steps=1", "--data=digits")
    _, result = command(tmp_path / "measurements.json", *flags)
    rows = result["distribution"]["measured"]
    assert len(rows) == 6
    assert all(row["low"] > 0 for row in rows.values())


def test_wrong_usage():
    for name in ("rounds", "seconds", "batch_size", "steps"):
        with pytest.raises(UsageError, match=f"--{name}=0 must be greater than 0"):
            BenchmarkOptions(**{name: 0})
    for name in ("model", "augment"):
        with pytest.raises(UsageError, match="flop"):
            benchmarking.measure(BenchmarkOptions(**{name: "flop"}))


@pytest.mark.parametrize(
    ("cores", "servers", "clients"), [({0}, [0], {0}), ({3, 0, 5}, [0, 3], {5})]
)
def test_clients_leave_the_other_cores_to_the_server(cores, servers, clients, monkeypatch):
    set_to = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, to: set_to.append(to))
    with serving._core_of_clients() as core:
        assert core == clients
        assert set_to == [servers]
    assert set_to == [servers, sorted(cores)]


def test_clients_send_from_their_core_alone():
    before, seen = os.sched_getaffinity(0), []

    @contextlib.contextmanager
    def connect():
        yield lambda body: seen.append((body, os.sched_getaffinity(0)))

    contender = serving.Contender(connect, [b"a", b"b"], serving.PIXELS, lambda: 0.0)
    turn = serving._load(contender, clients=2, seconds=0.05, core={max(before)})
    assert len(turn.latencies) == len(seen) > 2
    assert {body for body, _ in seen} == {b"a", b"b"}
    assert all(cores == {max(before)} for _, cores in seen)
    assert os.sched_getaffinity(0) == before


@pytest.mark.slow
def test_serving_is_measured_for_each_number_of_clients(tmp_path):
    for package in ("uvicorn", "grpc_health"):
        pytest.importorskip(package, reason="the extra `serve` is not installed")
    out = tmp_path / "measurements.json"
    printed, result = command(out, "--serving", "--seconds=0.3", "--model=resnet18")
    cores = max(1, len(os.sched_getaffinity(0)) - 1)
    assert f"resnet18, one image of 224 x 224 a request, digits, servers on {cores} core" in printed
    assert result["serving"]["cores"] == cores
    for what, rate in result["serving"]["batches"].items():
        assert rate * result["serving"]["computing"][what] < cores + 0.1
    contenders, batches = result["serving"]["clients"], result["serving"]["batches"]
    assert {"REST images", "REST files", "gRPC tensors", "gRPC files"} <= contenders.keys()
    for name, rows in contenders.items():
        assert list(rows) == ["1", "4", "16", "64"]
        for clients, row in rows.items():
            what = "images" if name in ("REST images", "gRPC tensors") else "files"
            assert row["share"] == pytest.approx(row["rate"] / batches[what])
            assert 0 < row["p50"] <= row["p99"]
            # Each client has one request at a time.
            assert row["rate"] * row["p50"] < 2 * int(clients)
