"""The contents of a run directory that the report shows. Older runs may lack some of them."""

import base64
import dataclasses
import io
import json
import math
import pathlib
import shlex
from collections.abc import Iterable

import numpy as np
from PIL import Image

from keras_cifar.core.config import DEFAULTS, SPLITS
from keras_cifar.core.errors import UserError, one_line, reason
from keras_cifar.core.files import read
from keras_cifar.core.image_size import resize_rule
from keras_cifar.core.run_directory import Run, is_own
from keras_cifar.evaluation.metrics import PER_CLASS

MAX_FILE = 2**30  # bytes; the predictions of ImageNet's 50,000 images take 200 MB
MAX_SAMPLES = 2048  # pixels of a side of samples.png

# Flags that name places, of one machine or of a tracker, and do not change the result.
PLACES = ("run_dir", "dry_run", "list_models", "cache_dir", "workers", "worker_index", "track")

SCALARS = ("count", "loss", "accuracy", "top5_accuracy")  # of a split
MISTAKE = ("row", "probability", "true_probability")
BIN = ("low", "high", "count", "confidence", "accuracy")


@dataclasses.dataclass(frozen=True)
class Record:
    """A run as it was written."""

    name: str  # of its directory
    config: dict  # the contents of config.json
    history: list[dict]  # a dict an epoch; None stands for a value that is not finite
    evaluations: dict[str, dict]  # of the run's own images: eval/<split>.json, by split
    split: str | None  # shown in full: test, or else another evaluated split
    disturbances: dict | None  # the contents of eval/<split>_disturbances.json
    probabilities: np.ndarray | None  # float32 [N, K], the predictions on that split
    samples: str | None  # samples.png as a data: URL

    @property
    def metrics(self) -> dict | None:
        """The evaluation that is shown in full."""
        return self.evaluations.get(self.split)

    @property
    def seconds(self) -> float:
        """The time of all epochs."""
        return sum(row.get("seconds") or 0.0 for row in self.history)

    @property
    def images_per_second(self) -> float | None:
        """The median over the epochs; None before the first."""
        rates = [row["images_per_second"] for row in self.history if row.get("images_per_second")]
        return float(np.median(rates)) if rates else None

    def flags(self) -> dict:
        """Model, data, and all other flags that are not at their default and decide the result."""
        flags = self.config["flags"]
        defaults = DEFAULTS | {"resize": resize_rule("auto", flags["image_size"])}
        return {
            name: value
            for name, value in flags.items()
            if name in ("model", "data")
            or (name not in PLACES and value != defaults.get(name) and value is not None)
        }

    def command(self) -> str:
        """The command that repeats the run in a new directory."""
        return command(self.flags())

    def is_complete(self) -> bool:
        """Whether the training is complete: all epochs are done, or early stopping ended it."""
        flags = self.config["flags"]
        stopped = bool(flags["early_stopping"] and self.evaluations)
        return stopped or len(self.history) >= flags["epochs"]


def command(flags: dict) -> str:
    """The command that trains with these flags."""
    words = ["python -m keras_cifar.train"]
    for name, value in flags.items():
        word = f"--{name}={value}"
        if isinstance(value, bool):
            word = f"--{name}" if value else f"--no{name}"
        words.append(shlex.quote(one_line(word)))
    return " \\\n  ".join(words)


def load(run: Run) -> Record:
    """Reads a run directory.

    Raises:
        UserError: it is not a run directory, or a file of it is damaged.
    """
    config = run.read_config()
    _read(run.config, _check_config)
    found = {name: _read(run.evaluation(name), _metrics) for name in reversed(SPLITS)}
    evaluations = {name: m for name, m in found.items() if m and is_own(config, name, m)}
    for name, metrics in evaluations.items():
        if list(metrics["per_class"]) != config["class_names"]:
            raise UserError(f"{run.evaluation(name)} has other classes than the run")
    split = next(iter(evaluations), None)
    disturbances = probabilities = None
    if split:
        disturbances = _read(run.disturbances(split), _disturbances)
        if disturbances and not is_own(config, split, disturbances):
            disturbances = None
        probabilities = _read(run.predictions(split), _probabilities)
        shape = (evaluations[split]["count"], len(config["class_names"]))
        if probabilities is not None and probabilities.shape != shape:
            raise UserError(f"{run.predictions(split)} does not belong to {run.evaluation(split)}")
    history = [
        {name: value if math.isfinite(value) else None for name, value in row.items()}
        for row in run.read_history()
    ]
    name = run.path.resolve().name or str(run.path)
    samples = _read(run.samples, _samples)
    return Record(name, config, history, evaluations, split, disturbances, probabilities, samples)


def load_all(runs: list[Run]) -> list[Record]:
    """`load` of each; runs whose directories have the same name are named by their paths."""
    records = [load(run) for run in runs]
    names = [record.name for record in records]
    for index, run in enumerate(runs):
        if names.count(names[index]) > 1:
            records[index] = dataclasses.replace(records[index], name=str(run.path.resolve()))
    return records


def _read(path: pathlib.Path, parse):
    if not path.exists():
        return None
    try:
        return parse(read(path, MAX_FILE))
    except Exception as error:  # A damaged file can raise almost anything.
        raise UserError(f"{path} is damaged: {reason(error)}") from None


# ---- Checks of what the page formats


def _check_config(data: bytes) -> None:
    config = json.loads(data)
    dict(config.get("versions", {}))
    names = ("parameter_count", "multiply_adds", "steps_per_epoch")
    _check_numbers(config.get(name) for name in names)


def _metrics(data: bytes) -> dict:
    metrics = _json(data)
    classes, calibration = metrics["per_class"], metrics.get("calibration")
    np.array(metrics["confusion"], np.int64).reshape(len(classes), len(classes))
    # Older versions did not write what `get` reads.
    confused, mistakes = metrics.get("confused", []), metrics.get("mistakes", [])
    rows = [(metrics, SCALARS), *((row, PER_CLASS) for row in classes.values())]
    rows += [(row, ("count",)) for row in confused] + [(row, MISTAKE) for row in mistakes]
    if calibration is not None:
        rows.append((calibration, ("expected_calibration_error",)))
        rows += [(row, BIN) for row in calibration["bins"]]
    if "intervals" in metrics:
        rows += [(metrics["intervals"][name], (0, 1)) for name in SCALARS[1:]]
    _check_numbers(row[name] for row, names in rows for name in names)
    if not {row[key] for row in confused + mistakes for key in ("true", "predicted")} <= set(
        classes
    ):
        raise ValueError("it has an unknown class")
    if not all(0 <= row["row"] < metrics["count"] for row in mistakes):
        raise ValueError("a mistake has the number of no image")
    return metrics


def _disturbances(data: bytes) -> dict:
    found = _json(data)
    _check_numbers(found[key] for key in ("clean_accuracy", "mean_accuracy", "count", "seed"))
    for row in found["disturbances"].values():
        for pair in zip(row["strengths"], row["accuracy"], strict=True):
            _check_numbers(pair)
    return found


def _probabilities(data: bytes) -> np.ndarray:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return arrays["probabilities"]


def _samples(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if max(image.size) > MAX_SAMPLES:
            raise ValueError(f"a side has more than {MAX_SAMPLES:,} pixels")
        return data_url(image.convert("RGB"), "JPEG")  # a tenth as large where it has photographs


def data_url(image: Image.Image, kind: str) -> str:
    """An image as a data: URL of a file of a kind: PNG or JPEG."""
    encoded = io.BytesIO()
    image.save(encoded, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _json(data: bytes) -> dict:
    # NaN and Infinity, which Python writes into JSON and browsers do not read, become None.
    return json.loads(data, parse_constant=lambda _: None)


def _check_numbers(values: Iterable) -> None:
    for value in values:
        if value is not None and not isinstance(value, int | float):
            raise TypeError(f"{value!r} is not a number")
