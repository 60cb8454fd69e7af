"""Trains with several worker processes on this machine, each with its share of GPUs and CPU threads.

python -m keras_cifar.launch --workers 2 -- --model resnet32 --data cifar10

What follows -- are flags of keras_cifar.train. Each line of a worker's output begins with its number;
of a progress bar only its last state is shown. When one worker fails, the others are terminated, and
all are started again from the last checkpoint as often as --max_restarts says.
"""

import dataclasses
import functools
import sys

from keras_cifar.core import cli, environment
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError
from keras_cifar.core.options import NOT_NEGATIVE, POSITIVE, Options, check, option
from keras_cifar.core.run_directory import default_run_dir
from keras_cifar.distributed import launcher


@dataclasses.dataclass(frozen=True)
class LaunchOptions(Options):
    """The command's flags."""

    workers: int = option(0, "how many processes to start, at least 1", "Workers", limit=POSITIVE)
    max_restarts: int = option(
        0,
        "how often all are started again when one was lost or failed",
        "Workers",
        limit=NOT_NEGATIVE,
    )


def main(options: LaunchOptions, train_flags: list[str]) -> None:
    """Runs the command."""
    config = check_flags(train_flags)
    # The default contains the time, and must be the same for all.
    run_dir = config.output.run_dir or default_run_dir(config)
    commands = functools.partial(
        train_commands, options.workers, [*train_flags, f"--run_dir={run_dir}"]
    )
    environments = environment.shares(options.workers)
    launcher.run_with_restarts(commands, environments, options.max_restarts)


def check_flags(train_flags: list[str]) -> TrainConfig:
    """Reads the flags that all workers share.

    Raises:
        UsageError: a flag that keras_cifar.train would refuse, or that the launcher sets itself.
    """
    config, rest = cli.parse(TrainConfig, train_flags)
    if rest or "--" in train_flags:
        raise UsageError(f"unexpected argument {(rest or ['--'])[0]!r}; flags begin with --")
    devices = config.devices
    for name in ("workers", "worker_index"):
        check(getattr(devices, name) is None, f"--{name} after -- is set by the launcher itself")
    check(
        devices.strategy in ("auto", "multiworker"),
        f"--strategy={devices.strategy} after --: several workers need --strategy=multiworker",
    )
    return config


def train_commands(count: int, train_flags: list[str]) -> list[list[str]]:
    """Builds the command line of each worker, on ports that are free now."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in launcher.free_ports(count))
    common = [sys.executable, "-u", "-m", "keras_cifar.train", *train_flags]
    common += ["--strategy=multiworker", f"--workers={addresses}"]
    return [[*common, f"--worker_index={index}"] for index in range(count)]


if __name__ == "__main__":
    cli.run("launch", main, LaunchOptions, __doc__, "[-- TRAIN FLAGS]", tensorflow=False)
