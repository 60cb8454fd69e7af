"""The run directory: the paths of its files, its lock and its config.json. Standard library only."""

import contextlib
import csv
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Iterator

from keras_cifar.core import places
from keras_cifar.core.config import DTYPE_POLICIES, TrainConfig, canonical
from keras_cifar.core.errors import UsageError, UserError, check_directory, check_utf8, reason
from keras_cifar.core.files import TEMPORARY, read

MAX_CONFIG = 2**26  # bytes of config.json; a class name takes about 20, ImageNet-21k has 21,841
MAX_HISTORY = 2**26  # bytes of history.csv; an epoch takes about 150
MAX_METRICS = 2**28  # bytes of test.json; the confusion matrix of 5,000 classes has 100 MB

LOCK = ".lock"


class Run:
    """A run directory; it is created when something is written.

    The methods that read a file raise UserError if it is damaged.

    Args:
        path: the directory.
        restart: the flag of the command that resumes this run; by default --run_dir.
    """

    def __init__(self, path: str | pathlib.Path, restart: str | None = None):
        self.path = pathlib.Path(path).expanduser()
        self.restart = restart or f"--run_dir={self.path}"
        self._is_locked = False
        self.config = self.path / "config.json"
        self.checkpoint = self.path / "checkpoint"
        self.model = self.path / "model.keras"
        self.skipped = self.path / "skipped.csv"
        self.samples = self.path / "samples.png"
        self.history = self.path / "history.csv"
        self.curves = self.path / "curves.png"
        self.tensorboard = self.path / "tensorboard"
        self.export = self.path / "export"
        self.report = self.path / "report.html"
        self.tracking = self.path / "tracking.json"
        self.seeds = self.path / "seeds.json"

    def read_metrics(self, split: str) -> dict | None:
        """The metrics of a split of the run's own images; None if there are none."""
        path = self.evaluation(split)
        if not path.exists():
            return None
        config = self.read_config()
        with _damage(path):
            metrics = json.loads(read(path, MAX_METRICS))
            float(metrics["accuracy"])
            return metrics if is_own(config, split, metrics) else None

    def other_data(self, record: dict) -> str | None:
        """The --data of an evaluation, `record`; None if its images are the run's own."""
        own = is_own(self.read_config(), record["split"], record)
        return None if own else record["data"]

    def read_history(self) -> list[dict[str, float]]:
        """The rows of history.csv, one for each epoch; empty before the first."""
        if not self.history.exists():
            return []
        with _damage(self.history):
            lines = read(self.history, MAX_HISTORY).decode("utf-8").splitlines()
            history = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
            for row in history:
                int(row["epoch"]), row["seconds"], row["images_per_second"], row["accuracy"]
        return history

    def of_seed(self, seed: int) -> "Run":
        """The run of a seed below a directory of several."""
        return Run(self.path / f"seed_{seed}", self.restart)

    def _of_split(self, suffix: str, split: str, data: str | None = None) -> pathlib.Path:
        other = f"-{_file_name(data)}" if data else ""
        return self.path / "eval" / f"{split}{other}{suffix}"

    # The files of a split: its metrics, its labels and probabilities, the plot of its confusion
    # matrix, its accuracy under disturbances, and a plot of an image under all of them. `data` is the
    # --data of other images than the run's own.
    evaluation = functools.partialmethod(_of_split, ".json")
    predictions = functools.partialmethod(_of_split, ".npz")
    confusion = functools.partialmethod(_of_split, "_confusion.png")
    disturbances = functools.partialmethod(_of_split, "_disturbances.json")
    gallery = functools.partialmethod(_of_split, "_disturbances.png")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the directory, so that no other process trains here; the lock ends with the process.

        Removes the temporary files of a killed process. A directory that was created here is removed
        if nothing was written. Does nothing in a body of its own.

        Raises:
            UserError: another process trains here, or the directory cannot be written.
        """
        if self._is_locked:
            yield
            return
        is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"{self.path} is in use: {file.read().strip() or 'another process'} trains there; "
                    "wait until it ends or choose another --run_dir"
                ) from None
            except OSError:
                pass  # The file system has no locks.
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            for pattern in (f"{TEMPORARY}*", f"*/{TEMPORARY}*"):
                for left in self.path.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False
                if self.is_empty():  # after a wrong flag or missing data
                    (self.path / LOCK).unlink(missing_ok=True)
                    if is_new:
                        shutil.rmtree(self.path, ignore_errors=True)

    def is_empty(self) -> bool:
        """Whether the directory has no files but those of a process that was killed at its start."""
        if not self.path.is_dir():
            return not self.path.exists()
        names = [path.name for path in self.path.iterdir()]
        return all(name == LOCK or name.startswith(TEMPORARY) for name in names)

    def read_config(self) -> dict:
        """The contents of config.json; flags have their present names, new flags their defaults.

        Where an earlier revision wrote no `paths`, they are relative to the current directory.

        Raises:
            UserError: there is no such run, or the file is damaged.
        """
        check_directory(self.path, "run directory")
        if not self.config.exists():
            raise UserError(f"{self.path} is not a run directory: it has no config.json")
        with _damage(self.config):
            config = json.loads(read(self.config, MAX_CONFIG).decode("utf-8"))
            _check_config(config)
            config["flags"] = canonical(config["flags"])
            config["paths"] = places.recorded(config["flags"], config.get("paths"))
        return config


@contextlib.contextmanager
def _damage(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A damaged file can raise almost anything.
        raise UserError(f"{path} is damaged: {reason(error)}") from None


def is_own(config: dict, split: str, record: dict) -> bool:
    """Whether an evaluation of a split is of the images of the run with this config.json.

    Earlier revisions wrote evaluations of other data to the same file.
    """
    own = config["splits"].get(split)
    return own is not None and record.get("fingerprint") == own["fingerprint"]


def default_run_dir(config: TrainConfig) -> str:
    """The name of a new directory below runs/."""
    data = _short_name(config.data.data)
    return f"runs/{config.model.model}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"


def _short_name(data: str) -> str:
    """The last part of a --data, as a part of a file's name."""
    return re.sub(r"\W+", "-", data.rstrip("/").rpartition("/")[2]).strip("-")[:40]


def _file_name(data: str) -> str:
    """A part of a file's name for each --data, also where two have the same last part."""
    data = places.absolute("data", data)
    return f"{_short_name(data)}-{hashlib.sha256(os.fsencode(data)).hexdigest()[:8]}"


def with_its_rule(config: TrainConfig, run: Run) -> TrainConfig:
    """The configuration with the --resize of the run in this directory, if its own is `auto`.

    So the command of a run that began before there was --resize, when all stretched, resumes it.
    """
    if config.data.resize != "auto" or not run.config.exists():
        return config
    return config.replace(resize=run.read_config()["flags"]["resize"])


def previous_config(config: TrainConfig, run: Run) -> dict | None:
    """The config.json of this run directory; None if it is new.

    Raises:
        UsageError: the run has other flags, or the directory has other files.
    """
    check_utf8("run_dir", run.path)
    if not run.config.exists():
        if not run.is_empty():
            raise UsageError(
                f"--run_dir={run.path} exists and is not a run directory; choose another"
            )
        return None
    previous = run.read_config()
    # What `auto` was. Before there was the flag, all runs used the whole batch.
    used = {"norm_batch": previous.get("norm_batch", "whole")}
    differences = config.differences(previous["flags"] | used, previous["paths"])
    given = previous["flags"].get("norm_batch", "auto")
    if config.fit.norm_batch == "auto" != given:  # which nobody left to a machine
        differences.append(f"--norm_batch was {given!r}, is 'auto'")
    if differences:
        raise UsageError(
            f"{run.path} has a run with other flags: {'; '.join(differences)}; "
            "choose another --run_dir or the same flags"
        )
    return previous


def _check_config(config: dict) -> None:
    """Raises an exception unless the values of config.json have the types and ranges of ours."""
    flags = config["flags"]
    TrainConfig.from_json(flags)
    for name in ("data", "data_dir", "image_size", "val_fraction", "seed"):
        flags[name]
    if any(type(path) is not str for path in dict(config.get("paths", {})).values()):
        raise TypeError("paths has something other than text")
    if config.get("dtype_policy", "float32") not in DTYPE_POLICIES[1:]:
        raise TypeError("dtype_policy is none of Keras's")
    names, shape = config["class_names"], config["image_shape"]
    if type(names) is not list or not names or any(type(name) is not str for name in names):
        raise TypeError("class_names is not a list of names")
    valid = type(shape) is list and all(type(side) is int for side in shape)
    # A larger model does not fit into memory.
    if not valid or shape[2:] != [3] or not all(0 < side <= 2**14 for side in shape):
        raise TypeError("image_shape is not [height, width, 3]")
    for split in config["splits"].values():
        if type(split["count"]) is not int or type(split["fingerprint"]) is not str:
            raise TypeError("splits has no count and fingerprint")
