"""Runs beside each other: what they reached, what it took, which flags differ. No TensorFlow here."""

import dataclasses
import pathlib
import statistics

import numpy as np

from keras_cifar.core.config import COMPARED
from keras_cifar.core.errors import UserError, check_directory
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation.text import aligned


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run has come to.

    Attributes:
        flags: of the run.
        parameters: that are trained.
        history: a dict an epoch, as in history.csv; empty before the first one.
        metrics: of the test images, as in test.json; None where they were not looked at.
    """

    flags: dict
    parameters: int
    history: list[dict[str, float]]
    metrics: dict | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run, or the runs of several seeds, under one name."""

    name: str
    results: tuple[Result, ...]

    @property
    def flags(self) -> dict:
        """The flags that its runs share."""
        first = self.results[0].flags
        return {
            name: value
            for name, value in first.items()
            if all(result.flags.get(name) == value for result in self.results)
        }

    def curve(self) -> tuple[str, np.ndarray, np.ndarray]:
        """(what was measured, accuracy [R, E], seconds so far [R, E]) of its R runs after E epochs.

        Validation accuracy; training accuracy where nothing was held out. Of runs that are not equally
        far, the epochs that all have.
        """
        rows = [result.history for result in self.results]
        epochs = min(map(len, rows))
        validated = all("val_accuracy" in row for history in rows for row in history)
        key = "val_accuracy" if validated else "accuracy"
        values = [[row[key] for row in history[:epochs]] for history in rows]
        seconds = [np.cumsum([row["seconds"] for row in history[:epochs]]) for history in rows]
        what = "validation" if validated else "train"
        return what, np.array(values), np.array(seconds)


def load(path: str) -> Entry:
    """Reads a run directory, or one of several seeds.

    Raises:
        UserError: it is neither, or damaged.
    """
    run = Run(path)
    check_directory(run.path, "run directory")
    if run.config.exists():
        return Entry(path, (_result(run),))
    seeds = sorted(run.path.glob("seed_*/config.json"), key=lambda p: (len(p.parent.name), p))
    if not seeds:
        raise UserError(f"{run.path} is no run directory: it has neither config.json nor seed_N")
    return Entry(path, tuple(_result(Run(config.parent)) for config in seeds))


def _result(run: Run) -> Result:
    config = run.read_config()
    flags = config["flags"]
    metrics = run.read_metrics("test", flags["data"])
    return Result(flags, config.get("parameter_count", 0), run.read_history(), metrics)


# ---- Words


def table(entries: list[Entry]) -> str:
    """A line an entry: test accuracy, error, time, speed, epochs, parameters."""
    rows = [("run", "test accuracy", "", "error", "time", "images/s", "epochs", "parameters")]
    for entry in entries:
        rows.append((entry.name, *_accuracy(entry), *_effort(entry)))
    return aligned(rows, left=3)


def differences(entries: list[Entry]) -> str:
    """A line a flag that differs between entries and decides the result; empty where none does."""
    names = [name for name in entries[0].flags if name in COMPARED]
    rows = [("flag", *(entry.name for entry in entries))]
    for name in dict.fromkeys(names):
        # Runs of other versions may lack it, and seeds differ within an entry of several.
        values = [str(entry.flags.get(name, "-")) for entry in entries]
        if len(set(values)) > 1:
            rows.append((f"--{name}", *values))
    return aligned(rows, left=len(rows[0])) if len(rows) > 1 else ""


def _accuracy(entry: Entry) -> tuple[str, str, str]:
    """Test accuracy, how sure it is, and error."""
    found = [result.metrics for result in entry.results if result.metrics]
    if not found:
        return "not tested", "", ""
    values = [metrics["accuracy"] for metrics in found]
    mean = statistics.fmean(values)
    if len(entry.results) > 1:
        sure = f"{len(values)} of {len(entry.results)} seeds"
        if len(values) > 1:
            sure = f"± {statistics.stdev(values):.4f}, {sure}"
    else:
        low, high = found[0].get("intervals", {}).get("accuracy", (None, None))
        sure = "" if low is None else f"[{low:.4f}, {high:.4f}]"
    return f"{mean:.4f}", sure, f"{1 - mean:.2%}"


def _effort(entry: Entry) -> tuple[str, str, str, str]:
    """Time, images a second, epochs and parameters; of several runs, the mean of one."""
    histories = [result.history for result in entry.results]
    seconds = statistics.fmean(sum(row["seconds"] for row in history) for history in histories)
    speeds = [row["images_per_second"] for history in histories for row in history]
    epochs = statistics.fmean(map(len, histories))
    return (
        duration(seconds),
        f"{statistics.median(speeds):,.0f}" if speeds else "",
        f"{round(epochs, 1):g}",
        f"{entry.results[0].parameters:,}",
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def picture(entries: list[Entry], path: pathlib.Path) -> None:
    """Draws accuracy over epochs and over time.

    Raises:
        UserError: no run has completed an epoch.
    """
    from keras_cifar.evaluation import (
        plots,  # which takes half a second, and a table needs none of it
    )

    curves = [
        (entry.name, *entry.curve()) for entry in entries if all(r.history for r in entry.results)
    ]
    if not curves:
        raise UserError("there is nothing to draw: no run has completed an epoch")
    plots.progress(curves, path)
