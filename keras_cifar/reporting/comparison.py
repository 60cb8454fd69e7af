"""Runs side by side: accuracy, time, speed, and the flags that differ. No TensorFlow here."""

import dataclasses
import pathlib
import statistics

import numpy as np

from keras_cifar.core.config import COMPARED, FLAGS
from keras_cifar.core.errors import UserError, check_directory
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation.text import aligned


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run, or the runs of several seeds under one name."""

    name: str
    configs: list[dict]  # the contents of config.json of each run
    histories: list[list[dict[str, float]]]  # a dict an epoch of each run
    metrics: list[dict]  # of the test images of those runs that are evaluated

    @property
    def flags(self) -> dict:
        """The flags that its runs share."""
        first, *others = (config["flags"] for config in self.configs)
        return {k: v for k, v in first.items() if all(flags.get(k) == v for flags in others)}

    def curve(self) -> tuple[str, np.ndarray, np.ndarray]:
        """(what was measured, accuracy [R, E], seconds so far [R, E]) of R runs, all of E epochs.

        The accuracy is that of validation, or of training where a run has no validation split.
        """
        epochs = min(map(len, self.histories))
        validated = all("val_accuracy" in row for history in self.histories for row in history)
        key = "val_accuracy" if validated else "accuracy"
        values = [[row[key] for row in history[:epochs]] for history in self.histories]
        seconds = [[row["seconds"] for row in history[:epochs]] for history in self.histories]
        what = "validation" if validated else "train"
        return what, np.array(values), np.cumsum(seconds, axis=1)


def load(path: str) -> Entry:
    """Reads a run directory, or one of several seeds.

    Raises:
        UserError: it is neither, or damaged.
    """
    run = Run(path)
    check_directory(run.path, "run directory")
    runs = [run]
    if not run.config.exists():
        seeds = run.path.glob("seed_*/config.json")
        runs = [Run(p.parent) for p in sorted(seeds, key=lambda p: (len(p.parent.name), p))]
    if not runs:
        raise UserError(f"{run.path} is not a run directory: it has neither config.json nor seed_N")
    configs = [each.read_config() for each in runs]
    metrics = [each.read_metrics("test") for each in runs]
    histories = [each.read_history() for each in runs]
    return Entry(path, configs, histories, list(filter(None, metrics)))


# ---- Text


def table(entries: list[Entry]) -> str:
    """A line an entry: test accuracy, error, time, speed, epochs, parameters."""
    header = ("run", "test accuracy", "", "error", "time", "images/s", "epochs", "parameters")
    rows = [(entry.name, *_accuracy(entry), *_effort(entry)) for entry in entries]
    return aligned([header, *rows], left=3)


def differences(entries: list[Entry]) -> str:
    """A line a flag of `differing`; empty where there is none."""
    rows = [(name, *values) for name, values in differing([entry.flags for entry in entries])]
    header = ("flag", *(entry.name for entry in entries))
    return aligned([header, *rows], left=len(header)) if rows else ""


def differing(runs: list[dict]) -> list[tuple[str, list[str]]]:
    """(flag, its value in each run, "-" for none) of the flags that differ and decide the result."""
    names = [name for name in FLAGS if name in COMPARED]
    rows = [(f"--{name}", [str(flags.get(name, "-")) for flags in runs]) for name in names]
    return [row for row in rows if len(set(row[1])) > 1]


def _accuracy(entry: Entry) -> tuple[str, str, str]:
    if not entry.metrics:
        return "not tested", "", ""
    values = [metrics["accuracy"] for metrics in entry.metrics]
    mean = statistics.fmean(values)
    if len(entry.configs) > 1:
        spread = f"{len(values)} of {len(entry.configs)} seeds"
        if len(values) > 1:
            spread = f"± {statistics.stdev(values):.4f}, {spread}"
    else:
        low, high = entry.metrics[0].get("intervals", {}).get("accuracy", (None, None))
        spread = "" if low is None else f"[{low:.4f}, {high:.4f}]"
    return f"{mean:.4f}", spread, f"{1 - mean:.2%}"


def _effort(entry: Entry) -> tuple[str, str, str, str]:
    rows = [row for history in entry.histories for row in history]
    seconds = sum(row["seconds"] for row in rows) / len(entry.histories)
    speed = statistics.median(row["images_per_second"] for row in rows) if rows else None
    return (
        duration(seconds),
        "" if speed is None else f"{speed:,.0f}",
        f"{round(len(rows) / len(entry.histories), 1):g}",
        f"{entry.configs[0].get('parameter_count', 0):,}",
    )


def duration(seconds: float) -> str:
    """Seconds as text, in a suitable unit."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def draw(entries: list[Entry], path: pathlib.Path) -> None:
    """Draws accuracy over epochs and over time; UserError where no run has completed an epoch."""
    from keras_cifar.evaluation import plots  # takes half a second, which a table does not need

    curves = [(entry.name, *entry.curve()) for entry in entries if all(entry.histories)]
    if not curves:
        raise UserError("there is nothing to draw: no run has completed an epoch")
    plots.save(plots.progress(curves), path)
