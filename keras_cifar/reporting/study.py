"""The trials of `tune` as a table. No TensorFlow here, and no Optuna."""

import json
import pathlib

from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import read
from keras_cifar.evaluation.text import aligned
from keras_cifar.reporting.comparison import duration

MAX_RECORD = 2**20  # bytes; one takes some hundred
# In the order of the table: trials that were trained to their end come first.
STATES = ("complete", "pruned", "failed", "unfinished")
# `val_accuracy` is that of the selected epoch, `epochs` and `seconds` those of all, `params` the values
# of the searched flags, `error` why a trial failed.
UNFINISHED = {
    "state": "unfinished",
    "val_accuracy": None,
    "epochs": 0,
    "seconds": 0.0,
    "params": {},
    "error": "",
}


def trials_dir(study: str | pathlib.Path) -> pathlib.Path:
    """Where the run directories of trials are, NNNN, and their records, NNNN.json."""
    return pathlib.Path(study).expanduser() / "trials"


def load(study: str | pathlib.Path) -> list[dict]:
    """The records of a directory as `ranked` returns them; empty if it is no study.

    Raises:
        UserError: a record is damaged.
    """
    found = {}
    for path in trials_dir(study).glob("[0-9]*.json"):
        try:
            found[int(path.stem)] = record = json.loads(read(path, MAX_RECORD))
            summary(record), table(ranked({0: record}))
        except Exception as error:  # A damaged file can raise almost anything.
            raise UserError(f"{path} is damaged: {reason(error)}") from None
    return ranked(found)


def ranked(trials: dict[int, dict]) -> list[dict]:
    """The records of trials by number, with `number`: by state, the highest accuracy first."""

    def rank(trial: dict) -> tuple:
        return STATES.index(trial["state"]), -(trial["val_accuracy"] or 0), trial["number"]

    return sorted((UNFINISHED | {"number": n} | trial for n, trial in trials.items()), key=rank)


def trained(study: str, trials: list[dict]) -> list[str]:
    """The run directories, of these trials, that have an epoch or more and are on this machine."""
    paths = [trials_dir(study) / f"{t['number']:04}" for t in trials if t["epochs"]]
    return [str(path) for path in paths if path.exists()]


def table(trials: list[dict]) -> str:
    """A line a trial: its state, validation accuracy, epochs, time and searched flags."""
    names = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
    rows = [("trial", "state", "validation", "epochs", "time", *(f"--{name}" for name in names))]
    for trial in trials:
        accuracy = trial["val_accuracy"]
        cells = (
            f"{trial['number']:04}",
            trial["state"],
            "" if accuracy is None else f"{accuracy:.4f}",
        )
        values = (short(trial["params"].get(name, "")) for name in names)
        rows.append((*cells, str(trial["epochs"]), duration(trial["seconds"]), *values))
    return aligned(rows, left=2)


def summary(trial: dict) -> str:
    """A record as a line of text."""
    accuracy, why = trial["val_accuracy"], trial["error"]
    reached = "" if accuracy is None else f", validation accuracy {accuracy:.4f}"
    return f"{trial['state']} after {trial['epochs']} epochs{reached}{why and f': {why}'}"


def short(value: object) -> str:
    """The value of a flag as text, of a number four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
