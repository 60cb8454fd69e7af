"""What a run directory holds, as the report shows it. Files of older runs may lack any of it."""

import dataclasses
import io
import json
import math
import pathlib
import shlex

import numpy as np

from keras_cifar.core.config import FLAGS, SPLITS
from keras_cifar.core.errors import UserError, one_line, reason
from keras_cifar.core.files import read
from keras_cifar.core.run_directory import Run

MAX_FILE = 2**30  # bytes; the predictions of ImageNet's 50,000 images take 200 MB

# Flags that say where things are and not what is computed; another machine has other places.
PLACES = ("run_dir", "dry_run", "list_models", "cache_dir", "workers", "worker_index")

SCALARS = ("count", "loss", "accuracy", "top5_accuracy")  # of a split
PER_CLASS = ("precision", "recall", "f1", "count")


@dataclasses.dataclass(frozen=True)
class Record:
    """A run as it was written.

    Attributes:
        name: of its directory.
        config: the contents of config.json.
        history: a dict an epoch; what is not finite is None.
        evaluations: the contents of eval/<split>.json, by split.
        split: the one that is shown in full: test, or else another that was evaluated; None without.
        disturbances: the contents of eval/<split>_disturbances.json, or None.
        predictions: labels int64 [N] and probabilities float32 [N, K] of that split, or None.
    """

    name: str
    config: dict
    history: list[dict]
    evaluations: dict[str, dict]
    split: str | None
    disturbances: dict | None
    predictions: dict[str, np.ndarray] | None

    @property
    def figures(self) -> dict | None:
        """The evaluation that is shown in full."""
        return self.evaluations.get(self.split)

    @property
    def seconds(self) -> float:
        """That all epochs took."""
        return sum(row.get("seconds") or 0.0 for row in self.history)

    @property
    def images_per_second(self) -> float | None:
        """The median of the epochs'; None before the first."""
        rates = [row["images_per_second"] for row in self.history if row.get("images_per_second")]
        return float(np.median(rates)) if rates else None

    def flags(self) -> dict:
        """The flags that decided the result and have not their default, and always model and data."""
        defaults = {name: field.default for name, field in FLAGS.items()}
        return {
            name: value
            for name, value in self.config["flags"].items()
            if name in ("model", "data")
            or (name not in PLACES and value != defaults.get(name) and value is not None)
        }

    def command(self) -> str:
        """The command that makes the run again, into a directory of its own."""
        words = [_flag(name, value) for name, value in self.flags().items()]
        lines = ["python -m keras_cifar.train", *(shlex.quote(one_line(word)) for word in words)]
        return " \\\n  ".join(lines)

    def is_complete(self) -> bool:
        """Whether the training came to its end; without patience, after all of its epochs."""
        flags = self.config["flags"]
        return len(self.history) >= flags["epochs"] or bool(
            flags.get("early_stopping") and self.evaluations
        )


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    return f"--{name}={value}"


def load(run: Run) -> Record:
    """Reads a run directory.

    Raises:
        UserError: it is none, or a file of it is damaged.
    """
    config = run.read_config()
    try:
        _check_config(config)
    except Exception as error:  # A damaged file can raise almost anything.
        raise UserError(f"{run.config} is damaged: {reason(error)}") from None
    evaluations = {}
    for name in reversed(SPLITS):
        found = _read(run.evaluation(name), _evaluation)
        if found is not None:
            if list(found["per_class"]) != config["class_names"]:
                raise UserError(f"{run.evaluation(name)} is of other classes than the run")
            evaluations[name] = found
    split = next(iter(evaluations), None)
    disturbances = predictions = None
    if split:
        disturbances = _read(run.disturbances(split), _disturbances)
        predictions = _read(run.predictions(split), _predictions)
        shape = (evaluations[split]["count"], len(config["class_names"]))
        if predictions and predictions["probabilities"].shape != shape:
            raise UserError(
                f"{run.predictions(split)} is not of the figures in {run.evaluation(split)}"
            )
    history = [{k: _finite(v) for k, v in row.items()} for row in run.read_history()]
    name = run.path.resolve().name or str(run.path)
    return Record(name, config, history, evaluations, split, disturbances, predictions)


def load_all(runs: list[Run]) -> list[Record]:
    """`load` of each; where two directories have the same name, they are named by their paths."""
    records = [load(run) for run in runs]
    names = [record.name for record in records]
    return [
        dataclasses.replace(record, name=str(run.path.resolve()))
        if names.count(record.name) > 1
        else record
        for run, record in zip(runs, records, strict=True)
    ]


def _check_config(config: dict) -> None:
    """Raises unless what is shown of config.json beside the flags can be."""
    config["flags"]["epochs"], config["flags"]["model"]
    config.get("versions", {}).items()
    _numbers(
        *(config.get(name) for name in ("parameter_count", "multiply_adds", "steps_per_epoch"))
    )


def _read(path: pathlib.Path, parse):
    """What `parse` makes of a file's bytes; None where there is no file."""
    if not path.exists():
        return None
    try:
        return parse(read(path, MAX_FILE))
    except Exception as error:  # Damage shows as anything.
        raise UserError(f"{path} is damaged: {reason(error)}") from None


def _evaluation(data: bytes) -> dict:
    figures = json.loads(data, parse_constant=_constant)
    names = figures["per_class"]
    if np.array(figures["confusion"], np.int64).shape != (len(names), len(names)):
        raise ValueError("the confusion matrix does not belong to the classes")
    _numbers(*(figures[name] for name in SCALARS))
    _numbers(*(row[name] for row in names.values() for name in PER_CLASS))
    _numbers(*(v for name in SCALARS for v in figures.get("intervals", {}).get(name, ())))
    for mistake in figures.get("mistakes", ()):
        _numbers(mistake["probability"], mistake["true_probability"])
        if not {mistake["true"], mistake["predicted"]} <= names.keys():
            raise ValueError("a mistake is of none of its classes")
        if mistake["row"] not in range(figures["count"]):
            raise ValueError("a mistake is of none of its images")
    for pair in figures.get("confused", ()):
        _numbers(pair["count"])
        if not {pair["true"], pair["predicted"]} <= names.keys():
            raise ValueError("a confusion is of none of its classes")
    if "calibration" in figures:
        _numbers(figures["calibration"]["expected_calibration_error"])
        for row in figures["calibration"]["bins"]:
            _numbers(row["low"], row["high"], row["count"], row["confidence"], row["accuracy"])
    return figures


def _disturbances(data: bytes) -> dict:
    found = json.loads(data, parse_constant=_constant)
    _numbers(found["clean_accuracy"], found["mean_accuracy"], found["count"], found["seed"])
    for row in found["disturbances"].values():
        if len(row["strengths"]) != len(np.array(row["accuracy"], np.float64)):
            raise ValueError("strengths and accuracies do not belong together")
    return found


def _predictions(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in ("labels", "probabilities")}
    if found["probabilities"].ndim != 2 or len(found["labels"]) != len(found["probabilities"]):
        raise ValueError("labels and probabilities do not belong together")
    return found


def _numbers(*values: object) -> None:
    """Raises unless each is a number or, where there is none, None."""
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{value!r} is no number")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _constant(name: str) -> None:
    """NaN and Infinity, which Python writes into JSON and browsers do not read."""
    return None
