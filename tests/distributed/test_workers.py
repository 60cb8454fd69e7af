"""Workers that are lost, stopped, stuck, missing or different: how the others end; how a run resumes.

The workers are processes of this machine. The cases of the default run are started two at a time, as
most of their time is spent waiting.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from keras_cifar.core.run_directory import Run
from tests.conftest import write_folder
from tests.distributed.test_rendezvous import free_addresses
from tests.training.kills import saved_state, without_times

LIMIT = 60  # seconds, within which every other worker must have ended
STARTED = "epoch 2/"  # in worker 0's output: all functions are traced and a checkpoint is saved

# A worker whose Python hangs in the third epoch, while TensorFlow's threads go on with heartbeats.
STUCK = """
import time
from keras_cifar import train
from keras_cifar.core import cli
from keras_cifar.training import recorder
from keras_cifar.core.config import TrainConfig
original = recorder.Recorder.on_train_batch_end
def stuck(self, batch, logs=None):
    original(self, batch, logs)
    if self.epochs_done == 2:
        time.sleep(600)
recorder.Recorder.on_train_batch_end = stuck
cli.run("train", train.main, TrainConfig, "")
"""

# A worker whose device fails in the third epoch.
FAILING = (
    "from keras_cifar.core import environment; environment.import_tensorflow()"
    + STUCK.replace(
        "time.sleep(600)",
        "import tensorflow as tf; raise tf.errors.InternalError(None, None, 'no memory')",
    )
)

# A worker that dies after the flags are compared, before TensorFlow's servers are connected.
KILLED = """
import os
from keras_cifar import train
from keras_cifar.core import cli
from keras_cifar.distributed import strategy
from keras_cifar.core.config import TrainConfig
strategy._multiworker = lambda *_: os.kill(os.getpid(), 9)
cli.run("train", train.main, TrainConfig, "")
"""


@dataclasses.dataclass
class Ended:
    """How a worker ended: its status, its stderr, and how many seconds after the failure."""

    status: int
    error: str
    seconds: float


class Workers(contextlib.ExitStack):
    """The processes of one run, each in its own directory; killed at the end."""

    def __init__(self, root: pathlib.Path, count: int = 2):
        super().__init__()
        self.root, self.addresses, self.processes = root, free_addresses(count), {}

    def start(self, index: int, *flags: str, program: tuple = ("-m", "keras_cifar.train")) -> None:
        home = self.root / f"machine{index}"
        home.mkdir(parents=True, exist_ok=True)
        argv = [
            *("--data=digits", "--model=lenet5", "--batch_size=96", "--epochs=500", "--noexport"),
            *("--augment=crop(2)", "--run_dir=run", f"--workers={','.join(self.addresses)}"),
            *(f"--worker_index={index}", *flags),
        ]
        out = self.enter_context(open(home / "out", "w"))  # noqa: SIM115  Closed at the end.
        err = self.enter_context(open(home / "err", "w"))  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, *program, *argv],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=os.environ | {"TF_NUM_INTRAOP_THREADS": "1"},
        )
        self.callback(process.wait)
        self.callback(process.kill)
        self.processes[index] = process

    def start_all(self, *flags: str, odd: int | None = None, program: str = "") -> None:
        """Starts every worker by the command, but for the odd one by a program."""
        for index in range(len(self.addresses)):
            own = ("-c", program) if index == odd else ("-m", "keras_cifar.train")
            self.start(index, *flags, program=own)

    @property
    def run(self) -> pathlib.Path:
        return self.root / "machine0" / "run"

    def output(self, index: int) -> str:
        return (self.root / f"machine{index}" / "out").read_text()

    def wait_for(self, text: str) -> None:
        """Waits until worker 0 has printed it."""
        deadline = time.monotonic() + 600  # on a busy machine
        while text not in self.output(0):
            assert self.processes[0].poll() is None, self.ended(0, 0).error
            assert time.monotonic() < deadline, self.output(0)
            time.sleep(0.02)

    def ended(self, index: int, since: float, limit: float = LIMIT) -> Ended:
        status = self.processes[index].wait(max(0.1, since + limit - time.monotonic()))
        seconds = time.monotonic() - since
        return Ended(status, (self.root / f"machine{index}" / "err").read_text(), seconds)


def lose(
    root: pathlib.Path, victim: int, number: int, count: int = 2, flags: tuple = ()
) -> dict[int, Ended]:
    """Signals a worker during training; returns how the others ended."""
    with Workers(root, count) as workers:
        workers.start_all(*flags)
        workers.wait_for(STARTED)
        workers.processes[victim].send_signal(number)
        since = time.monotonic()
        found = {i: workers.ended(i, since) for i in range(count) if i != victim}
        if number in (signal.SIGINT, signal.SIGTERM):
            found[victim] = workers.ended(victim, since)
        check_saved(workers.run)
        return found


def stuck(root: pathlib.Path, victim: int, flags: tuple = ()) -> dict[int, Ended]:
    with Workers(root) as workers:
        workers.start_all("--peer_timeout=5", *flags, odd=victim, program=STUCK)
        workers.wait_for(STARTED)
        return {1 - victim: workers.ended(1 - victim, time.monotonic())}


def failing(root: pathlib.Path, victim: int) -> dict[int, Ended]:
    with Workers(root) as workers:
        workers.start_all(odd=victim, program=FAILING)
        workers.wait_for(STARTED)
        since = time.monotonic()
        return {index: workers.ended(index, since) for index in range(2)}


def killed(root: pathlib.Path, victim: int, count: int) -> dict[int, Ended]:
    with Workers(root, count) as workers:
        workers.start_all(odd=victim, program=KILLED)
        assert workers.processes[victim].wait(120) == -signal.SIGKILL
        since = time.monotonic()
        return {i: workers.ended(i, since) for i in range(count) if i != victim}


def started_with(root: pathlib.Path, *flags: tuple) -> dict[int, Ended]:
    """Starts worker i with flags[i], unless that is None; returns how the workers ended."""
    with Workers(root) as workers:
        since = time.monotonic()
        indices = [index for index, own in enumerate(flags) if own is not None]
        for index in indices:
            workers.start(index, *flags[index])
        found = {index: workers.ended(index, since) for index in indices}
        assert not workers.run.exists()
        return found


def on_images(root: pathlib.Path, *splits: tuple[str, ...]) -> dict[int, Ended]:
    """Each worker has its own images, which depend on the order of its splits, or no folder."""
    for index, names in enumerate(splits):
        write_folder(root / f"machine{index}/images", dict.fromkeys(names, 60), 28, classes=2)
    flags = ["--data=folder:images", "--batch_size=16", f"--cache_dir={root / 'cache'}"]
    return started_with(root, flags, flags)


def check_saved(run: pathlib.Path) -> None:
    from keras_cifar import models

    models.load(run / "model.keras")
    assert saved_state(run / "checkpoint")[1]["history"]


FIRST, SECOND = "worker 0 (ADDRESS)", "worker 1 (ADDRESS)"
GONE = "ended or cannot be reached; nothing that was saved is lost: start all workers again"
LATE = "kept the others waiting for more than --peer_timeout=5 s; nothing that was saved"
FAILED = "itself failed: no memory; nothing that was saved is lost"
SILENT = "ended while the others waited for it"
MISSING = "has not started within 3 s"
RATES = f"{SECOND} differs: --learning_rate is 0.5 there and 0.001 at worker 0"
IMAGES = f"{SECOND} differs: the train images is '54 ("
NO_FOLDER = "folder images does not exist"
BY_INT, BY_TERM, BY_OTHER = (
    f"stopped by {who}" for who in ("SIGINT", "SIGTERM", "a signal to another worker")
)
STATUS = {BY_INT: 130, BY_TERM: 143, BY_OTHER: 143}
WAIT, RATE = ["--startup_timeout=3"], ["--learning_rate=0.5"]
# Workers that wait for each other in each layer, and not through TensorFlow.
WHOLE = ("--model=resnet20", "--image_size=8", "--norm_batch=whole")
# What happens, and what each worker prints. Left to `-m slow` but for SIGSTOP to 0.
CASES = {
    "SIGSTOP to 0": (lambda root: lose(root, 0, signal.SIGSTOP), {1: f"{FIRST} {GONE}"}),
    "SIGSTOP to 1": (lambda root: lose(root, 1, signal.SIGSTOP), {0: f"{SECOND} {GONE}"}),
    "SIGTERM to 0": (lambda root: lose(root, 0, signal.SIGTERM), {0: BY_TERM, 1: BY_OTHER}),
    "SIGINT to 1": (lambda root: lose(root, 1, signal.SIGINT), {0: BY_OTHER, 1: BY_INT}),
    "SIGKILL to 2 of 3": (
        lambda root: lose(root, 2, signal.SIGKILL, 3),
        {0: "worker", 1: "worker"},
    ),
    "SIGKILL to 2 of 3, whole": (
        lambda root: lose(root, 2, signal.SIGKILL, 3, WHOLE),
        {0: f"worker 2 (ADDRESS) {GONE}", 1: f"worker 2 (ADDRESS) {GONE}"},
    ),
    "SIGSTOP to 0, whole": (
        lambda root: lose(root, 0, signal.SIGSTOP, 2, WHOLE),
        {1: f"{FIRST} {GONE}"},
    ),
    "SIGSTOP to 1, whole": (
        lambda root: lose(root, 1, signal.SIGSTOP, 2, WHOLE),
        {0: f"{SECOND} {GONE}"},
    ),
    "SIGTERM to 1, whole": (
        lambda root: lose(root, 1, signal.SIGTERM, 2, WHOLE),
        {0: BY_OTHER, 1: BY_TERM},
    ),
    "stuck 0, whole": (lambda root: stuck(root, 0, WHOLE), {1: f"{FIRST} {LATE}"}),
    "stuck 1, whole": (lambda root: stuck(root, 1, WHOLE), {0: f"{SECOND} {LATE}"}),
    # TensorFlow itself crashed once in 15 such runs when its collective timed out.
    "stuck 0": (lambda root: stuck(root, 0), {1: f"{FIRST} {LATE}"}),
    "stuck 1": (lambda root: stuck(root, 1), {0: f"{SECOND} {LATE}"}),
    "0 fails": (lambda root: failing(root, 0), {0: f"{FIRST} {FAILED}", 1: f"{FIRST} {GONE}"}),
    "1 fails": (lambda root: failing(root, 1), {0: f"{SECOND} {GONE}", 1: f"{SECOND} {FAILED}"}),
    "0 dies at the start": (lambda root: killed(root, 0, 2), {1: f"{FIRST} {SILENT}"}),
    "1 of 3 dies at the start": (
        lambda root: killed(root, 1, 3),
        {0: f"{SECOND} {SILENT}", 2: f"{SECOND} {SILENT}"},
    ),
    "0 is missing": (lambda root: started_with(root, None, WAIT), {1: f"{FIRST} {MISSING}"}),
    "1 is missing": (lambda root: started_with(root, WAIT, None), {0: f"{SECOND} {MISSING}"}),
    "other flags": (lambda root: started_with(root, [], RATE), {0: RATES, 1: RATES}),
    "no data": (
        lambda root: on_images(root, ("train", "test")),
        {0: f"{SECOND} ended: {NO_FOLDER}", 1: NO_FOLDER},
    ),
    "other data": (
        lambda root: on_images(root, ("train", "test"), ("test", "train")),
        {0: IMAGES, 1: IMAGES},
    ),
}


def check(found: dict[int, Ended], lines: dict[int, str]) -> None:
    assert found.keys() == lines.keys()
    for index, ended in found.items():
        assert ended.status == STATUS.get(lines[index], 1)
        assert ended.seconds < LIMIT
        error = re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", ended.error)
        assert error.startswith(f"train: error: {lines[index]}"), error
        assert error.count("\n") == 1, error


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_other_worker_ends_within_a_minute_with_one_line(tmp_path, name):
    action, expected = CASES[name]
    check(action(tmp_path), expected)


# ---- Runs that lose a worker and resume

FLAGS = ("--epochs=6", "--ema=0.9", "--augment=crop(2)|flip|mixup(0.2)")


def results(run: pathlib.Path) -> tuple[str, list, dict]:
    """(a digest of the checkpoint's variables, history without times, metrics of the test split)."""
    saved, _ = saved_state(run / "checkpoint")
    rows = without_times(Run(run).read_history())
    return saved, rows, json.loads((run / "eval" / "test.json").read_text())


def train(root: pathlib.Path, resumed: bool = False) -> tuple[str, list, dict]:
    with Workers(root) as workers:
        workers.start_all(*FLAGS)
        since = time.monotonic()
        assert [workers.ended(i, since, limit=900).status for i in range(2)] == [0, 0]
        # Only the chief writes.
        assert not (root / "machine1" / "run").exists()
        assert workers.output(1) == "this worker is done; worker 0 has the results\n"
        assert bool(re.search("resuming from", workers.output(0))) == resumed
        return results(workers.run)


kill = functools.partial(lose, number=signal.SIGKILL, flags=FLAGS)


def test_every_other_worker_ends_and_the_run_resumes_to_the_same_end(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(train, tmp_path / "whole")
        check(kill(tmp_path / "run", victim=1), {0: f"{SECOND} {GONE}"})
        assert train(tmp_path / "run", resumed=True) == whole.result()
    assert len(whole.result()[1]) == 6


@pytest.mark.slow
def test_a_run_that_lost_its_chief_resumes_to_the_same_end(tmp_path):
    whole = train(tmp_path / "whole")
    check(kill(tmp_path / "run", victim=0), {1: f"{FIRST} {GONE}"})
    assert train(tmp_path / "run", resumed=True) == whole


# Kills worker 1 in its first two starts, when its chief has saved so many epochs.
KILLED_TWICE = """
import json, os, pathlib, signal, sys, threading, time
from keras_cifar import launch
from keras_cifar.core import cli, run_directory
from keras_cifar.distributed import launcher
original = launcher.run_workers
starts = []
def run_workers(commands, environments):
    starts.append(1)
    threading.Thread(target=kill, args=(len(starts),), daemon=True).start()
    original(commands, environments)
def kill(number):
    run = run_directory.Run(pathlib.Path("run"))
    while number < 3:
        time.sleep(0.05)
        try:
            done = len(run.read_history())
        except Exception:
            continue
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            flags = (process / "cmdline").read_bytes().split(b"\\0") if process.exists() else []
            if done >= 2 * number and b"--worker_index=1" in flags and b"--run_dir=run" in flags:
                os.kill(int(process.name), signal.SIGKILL)
                return
launcher.run_workers = run_workers
cli.run("launch", launch.main, launch.LaunchOptions, "", "[-- TRAIN FLAGS]", tensorflow=False)
"""


@pytest.mark.slow
def test_a_launched_run_whose_worker_is_killed_twice_ends_with_the_same_bits(tmp_path):
    flags = ("--data=digits", "--model=lenet5", "--batch_size=96", "--noexport", "--run_dir=run")
    found = {}
    for name, program, restarts in (
        ("whole", ("-m", "keras_cifar.launch"), 0),
        ("killed", ("-c", KILLED_TWICE), 2),
        ("lost", ("-c", KILLED_TWICE), 1),
    ):
        home = tmp_path / name
        home.mkdir()
        argv = [*program, "--workers=2", f"--max_restarts={restarts}", "--", *FLAGS, *flags]
        done = subprocess.run([sys.executable, *argv], cwd=home, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
        again = (
            "worker 1 was killed by SIGKILL; starting all workers again (restart {} of at most {})"
        )
        assert lines[:restarts] == [again.format(n + 1, restarts) for n in range(restarts)]
        if name == "lost":
            assert done.returncode == 1
            assert lines[restarts:] == ["launch: error: worker 1 was killed by SIGKILL"]
        else:
            assert done.returncode == 0, done.stderr
            assert len(re.findall("resuming from", done.stdout)) == restarts
            found[name] = results(home / "run")
    assert found["killed"] == found["whole"]
