"""Signals at random instants of every command; INSTANTS=100 says how many in all."""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from keras_cifar.core.files import TEMPORARY
from keras_cifar.core.run_directory import Run
from tests.data.test_crops import write_photos
from tests.training.kills import differences

INSTANTS = int(os.environ.get("INSTANTS", "20"))
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LINE = r"{}: error: stopped by {}; [^\n]+\n"

TRAIN = [
    *("--model=lenet5", "--data=digits", "--epochs=2", "--batch_size=64", "--checkpoint_every=5"),
    "--run_dir=run",
]
PHOTOS = [
    *("--model=lenet5", "--data=folder:photos", "--image_size=32", "--epochs=2", "--batch_size=16"),
    *("--on_bad_image=skip", "--augment=resized_crop|flip", "--cache_dir=cache", "--run_dir=run"),
]
# {name: (module, its flags)}
COMMANDS = {
    "train": ("train", TRAIN),
    "train, seeds": ("train", [*TRAIN, "--seeds=2", "--noexport"]),
    "train, photographs": ("train", PHOTOS),
    "evaluate": ("evaluate", ["--run=trained"]),
    "export": ("export", ["--run=trained", "--out=exported"]),
    "predict": ("predict", ["--model=trained", "photos/test"]),
    "serve": ("serve", ["--model=trained", "--port=0"]),
}


class Command:
    """A command in a directory, which may be signalled."""

    def __init__(self, directory: pathlib.Path, module: str, flags: list[str]):
        self.name = module
        self._directory = directory
        self._arguments = [sys.executable, "-m", f"keras_cifar.{module}", *flags]

    def run(self, seconds: float | None = None, number: int = 0) -> tuple[int, str, float]:
        """(status, stderr, seconds); a signal comes `seconds` after the handlers are there."""
        env = os.environ | {"XDG_CACHE_HOME": str(self._directory / "default_cache")}
        with subprocess.Popen(
            self._arguments,
            cwd=self._directory,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while process.poll() is None and not catches(process.pid):
                time.sleep(0.001)
            start = time.monotonic()
            if seconds is not None:
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
            _, error = process.communicate(timeout=300)
        # Of images that cannot be read there is a line each.
        lines = [x for x in error.splitlines(keepends=True) if not x.startswith("skipped ")]
        return process.returncode, "".join(lines), time.monotonic() - start

    def left(self) -> list[str]:
        """What is half-written."""
        patterns = (f"{TEMPORARY}*", "*.building-*")
        return [str(path) for pattern in patterns for path in self._directory.rglob(pattern)]


def catches(process: int) -> bool:
    """Whether a process has a handler of SIGTERM."""
    try:
        status = pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    return bool(int(re.search(r"SigCgt:\t(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.fixture
def directory(tmp_path, trained_run) -> pathlib.Path:
    shutil.copytree(trained_run.path, tmp_path / "trained")
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "train" / "a" / "bad.png").write_bytes(b"no image")
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says who catches signals")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_instant_is_one_line_and_the_command_can_be_given_again(directory, name):
    module, flags = COMMANDS[name]
    command, choose = Command(directory, module, flags), random.Random(name)
    is_server = module == "serve"
    _, _, whole = command.run(15.0, signal.SIGTERM) if is_server else command.run()
    if (directory / "run").exists():
        (directory / "run").rename(directory / "whole")
    shutil.rmtree(directory / "default_cache", ignore_errors=True)
    shutil.rmtree(directory / "cache", ignore_errors=True)
    stopped = 0
    for _ in range(-(-INSTANTS // len(COMMANDS))):
        number, seconds = choose.choice(SIGNALS), choose.uniform(0, whole)
        status, error, took = command.run(seconds, number)
        print(f"{name}: {signal.Signals(number).name} after {seconds:.2f} s: {status} {took:.2f}")
        assert took < seconds + 30
        if status:
            stopped += 1
            # Python itself ends after the work: SIGTERM has no handler any more.
            if status != -signal.SIGTERM:
                assert status == 128 + number, error
                assert re.fullmatch(LINE.format(module, signal.Signals(number).name), error), error
        assert not command.left()
        if not status and (directory / "run").exists():
            shutil.rmtree(directory / "run")
    assert stopped
    if is_server:
        return
    status, error, _ = command.run()
    assert (status, error) == (0, "")
    if (directory / "run" / "model.keras").exists():
        one, two = Run(directory / "whole"), Run(directory / "run")
        assert differences(one, two) == []
