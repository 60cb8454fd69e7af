"""Workers that are lost, stopped, stuck, missing or different: how the others end; how a run resumes.

The workers are processes of this machine. The cases of the default run are started two at a time, as
most of their time is spent waiting.
"""

import concurrent.futures
import contextlib
import csv
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

import numpy as np
import pytest

from tests.distributed.test_rendezvous import free_addresses
from tests.training.kills import saved_state

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


def lose(root: pathlib.Path, victim: int, number: int, count: int = 2) -> dict[int, Ended]:
    """Signals a worker during training; returns how the others ended."""
    with Workers(root, count) as workers:
        for index in range(count):
            workers.start(index)
        workers.wait_for(STARTED)
        workers.processes[victim].send_signal(number)
        since = time.monotonic()
        found = {i: workers.ended(i, since) for i in range(count) if i != victim}
        if number in (signal.SIGINT, signal.SIGTERM):
            found[victim] = workers.ended(victim, since)
        check_saved(workers.run)
        return found


def stuck(root: pathlib.Path, victim: int) -> dict[int, Ended]:
    with Workers(root) as workers:
        for index in range(2):
            program = ("-c", STUCK) if index == victim else ("-m", "keras_cifar.train")
            workers.start(index, "--peer_timeout=5", program=program)
        workers.wait_for(STARTED)
        return {1 - victim: workers.ended(1 - victim, time.monotonic())}


def killed_at_start(root: pathlib.Path, victim: int, count: int) -> dict[int, Ended]:
    with Workers(root, count) as workers:
        for index in range(count):
            program = ("-c", KILLED) if index == victim else ("-m", "keras_cifar.train")
            workers.start(index, program=program)
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


def on_images(root: pathlib.Path, seeds: dict[int, int]) -> dict[int, Ended]:
    """Each worker has its own images in a folder of the same name, or no folder."""
    from PIL import Image

    for index, seed in seeds.items():
        random = np.random.default_rng(seed)
        for number in range(60):
            folder = root / f"machine{index}" / "images" / "train" / str(number % 2)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (28, 28, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder.parent.parent / "test").symlink_to("train")
    flags = ["--data=folder:images", "--batch_size=16", f"--cache_dir={root / 'cache'}"]
    return started_with(root, flags, flags)


def check_saved(run: pathlib.Path) -> None:
    from keras_cifar import models

    models.load(run / "model.keras")
    assert saved_state(run / "checkpoint")[1]["history"]


ACTIONS = {
    "SIGSTOP to 0": functools.partial(lose, victim=0, number=signal.SIGSTOP),
    "SIGSTOP to 1": functools.partial(lose, victim=1, number=signal.SIGSTOP),
    "SIGINT to 1": functools.partial(lose, victim=1, number=signal.SIGINT),
    "SIGTERM to 0": functools.partial(lose, victim=0, number=signal.SIGTERM),
    "SIGKILL to 2 of 3": functools.partial(lose, victim=2, number=signal.SIGKILL, count=3),
    "stuck 0": functools.partial(stuck, victim=0),
    "stuck 1": functools.partial(stuck, victim=1),
    "0 dies at the start": functools.partial(killed_at_start, victim=0, count=2),
    "1 of 3 dies at the start": functools.partial(killed_at_start, victim=1, count=3),
    "0 is missing": lambda root: started_with(root, None, ["--startup_timeout=3"]),
    "1 is missing": lambda root: started_with(root, ["--startup_timeout=3"], None),
    "other flags": lambda root: started_with(root, [], ["--learning_rate=0.5"]),
    "no data": lambda root: on_images(root, {0: 0}),
    "other data": lambda root: on_images(root, {0: 0, 1: 1}),
}

GONE = "ended or cannot be reached; nothing that was saved is lost: start all workers again"
LATE = "kept the others waiting for more than --peer_timeout=5 s; nothing that was saved"
SILENT = "ended while the others waited for it"
# What each worker prints, in runs that are left to `-m slow` but for SIGSTOP to 0.
LINES = {
    "SIGSTOP to 0": {1: f"worker 0 (ADDRESS) {GONE}"},
    "SIGSTOP to 1": {0: f"worker 1 (ADDRESS) {GONE}"},
    "SIGTERM to 0": {0: "stopped by SIGTERM; step ", 1: "stopped by another worker"},
    "SIGINT to 1": {0: "stopped by another worker", 1: "stopped by SIGINT; step "},
    "SIGKILL to 2 of 3": {0: "worker ", 1: "worker "},
    # TensorFlow itself crashed once in 15 such runs when its collective timed out.
    "stuck 0": {1: f"worker 0 (ADDRESS) {LATE}"},
    "stuck 1": {0: f"worker 1 (ADDRESS) {LATE}"},
    "0 dies at the start": {1: f"worker 0 (ADDRESS) {SILENT}"},
    "1 of 3 dies at the start": dict.fromkeys((0, 2), f"worker 1 (ADDRESS) {SILENT}"),
    "0 is missing": {1: "worker 0 (ADDRESS) has not started within 3 s"},
    "1 is missing": {0: "worker 1 (ADDRESS) has not started within 3 s"},
    "other flags": dict.fromkeys(
        (0, 1), "worker 1 (ADDRESS) differs: --learning_rate is 0.5 there and 0.001 at worker 0"
    ),
    "no data": {
        0: "worker 1 (ADDRESS) ended: folder images does not exist",
        1: "folder images does not exist",
    },
    "other data": dict.fromkeys((0, 1), "worker 1 (ADDRESS) differs: the train images is '54 ("),
}
STATUS = {"stopped by SIGINT": 130, "stopped by SIGTERM": 143, "stopped by another worker": 143}


def check(found: dict[int, Ended], lines: dict[int, str]) -> None:
    assert found.keys() == lines.keys()
    for index, ended in found.items():
        assert ended.status == STATUS.get(lines[index].partition(";")[0], 1)
        assert ended.seconds < LIMIT
        error = re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", ended.error)
        assert error.startswith(f"train: error: {lines[index]}"), error
        assert error.count("\n") == 1, error


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_every_other_worker_ends_within_a_minute_with_one_line(tmp_path, name):
    check(ACTIONS[name](tmp_path), LINES[name])


# ---- Runs that lose a worker and resume

FLAGS = ("--epochs=6", "--ema=0.9", "--augment=crop(2)|flip|mixup(0.2)")


def results(run: pathlib.Path) -> tuple[bytes, list, dict]:
    """(all variables of the checkpoint, history without times, metrics of the test split)."""
    saved, _ = saved_state(run / "checkpoint")
    with open(run / "history.csv") as file:
        times = ("seconds", "images_per_second")
        rows = [{k: v for k, v in row.items() if k not in times} for row in csv.DictReader(file)]
    return saved, rows, json.loads((run / "eval" / "test.json").read_text())


def train(root: pathlib.Path, resumed: bool = False) -> tuple[bytes, list, dict]:
    with Workers(root) as workers:
        for index in range(2):
            workers.start(index, *FLAGS)
        since = time.monotonic()
        assert [workers.ended(i, since, limit=900).status for i in range(2)] == [0, 0]
        # Only the chief writes.
        assert not (root / "machine1" / "run").exists()
        assert workers.output(1) == "this worker is done; worker 0 has the results\n"
        assert bool(re.search("resuming from", workers.output(0))) == resumed
        return results(workers.run)


def kill(root: pathlib.Path, victim: int) -> dict[int, Ended]:
    with Workers(root) as workers:
        for index in range(2):
            workers.start(index, *FLAGS)
        workers.wait_for(STARTED)
        workers.processes[victim].kill()
        found = {1 - victim: workers.ended(1 - victim, time.monotonic())}
        check_saved(workers.run)
        assert len(saved_state(workers.run / "checkpoint")[1]["history"]) < 6
        return found


def test_every_other_worker_ends_and_the_run_resumes_to_the_same_end(tmp_path):
    stopped = "SIGSTOP to 0"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        whole = pool.submit(train, tmp_path / "whole")
        lost = pool.submit(kill, tmp_path / "run", victim=1)
        silent = pool.submit(ACTIONS[stopped], tmp_path / "stopped")
        check(lost.result(), {0: f"worker 1 (ADDRESS) {GONE}"})
        resumed = pool.submit(train, tmp_path / "run", resumed=True)
        check(silent.result(), LINES[stopped])
        assert resumed.result() == whole.result()
    assert len(whole.result()[1]) == 6


@pytest.mark.slow
def test_a_run_that_lost_its_chief_resumes_to_the_same_end(tmp_path):
    whole = train(tmp_path / "whole")
    check(kill(tmp_path / "run", victim=0), {1: f"worker 0 (ADDRESS) {GONE}"})
    assert train(tmp_path / "run", resumed=True) == whole
