"""Run directories without a training: what reports are made of, written by hand."""

import csv
import json

import numpy as np

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.files import write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import metrics

BINS = 15
COLUMNS = (
    *("epoch", "loss", "accuracy", "val_loss", "val_accuracy"),
    *("learning_rate", "seconds", "images_per_second"),
)
# What the first version wrote of an evaluation.
FIRST = ("count", "loss", "accuracy", "top5_accuracy", "per_class", "confusion")
SPLITS = {
    "train": {"count": 90, "fingerprint": "a"},
    "test": {"count": 20, "fingerprint": "b"},
}


def predictions(count: int, classes: int, seed: int = 0, absent: tuple = ()) -> tuple:
    """(labels int64 [N], probabilities float32 [N, K]), of which most are right."""
    random = np.random.default_rng(seed)
    present = [i for i in range(classes) if i not in absent]
    labels = random.choice(present, count)
    logits = random.normal(size=(count, classes)) + 3 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels.astype(np.int64), probabilities.astype(np.float32)


def write_run(path, names, flags=None, epochs=3, **changes) -> Run:
    """config.json and history.csv of a run that was trained for so many of three epochs."""
    run = Run(path)
    defaults = {"model": "lenet5", "data": "digits", "epochs": 3}
    config = {
        "flags": TrainConfig.from_flags(**defaults | (flags or {})).flags(),
        "class_names": list(names),
        "image_shape": [32, 32, 3],
        "splits": SPLITS,
        "parameter_count": 61706,
        "versions": {"keras": "3"},
    }
    write_json(run.config, config | changes)
    if epochs:
        with open(run.history, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for epoch in range(1, epochs + 1):
                figures = [2 / epoch, 1 - 0.5 / epoch, 2.2 / epoch, 1 - 0.6 / epoch]
                writer.writerow([epoch, *figures, 1e-3, 2.5, 100 + epoch])
    return run


def evaluate(run: Run, names, labels, probabilities, fingerprint="b", data="digits", new=True):
    """The files of an evaluation of the test split; without what older versions did not write."""
    figures = metrics.summarize(probabilities, labels, tuple(names))
    figures = {name: figures[name] for name in FIRST}
    figures = {"split": "test", "data": data, "fingerprint": fingerprint} | figures
    if new:
        figures |= details(figures, names, labels, probabilities)
        np.savez(_made(run.evaluation("test")).with_suffix(".npz"),
                 labels=labels, probabilities=probabilities)  # fmt: skip
    write_json(run.evaluation("test"), figures)


def details(figures: dict, names, labels, probabilities) -> dict:
    """Intervals (here, of a fixed width), calibration, confused pairs and mistakes."""
    predicted, sure = probabilities.argmax(1), probabilities.max(1).astype(float)
    right = predicted == labels
    edges = np.linspace(0, 1, BINS + 1)
    which = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for i in range(BINS):
        inside = which == i
        means = [float(x[inside].mean()) if inside.any() else None for x in (sure, right)]
        bins.append({"low": edges[i], "high": edges[i + 1], "count": int(inside.sum()),
                     "confidence": means[0], "accuracy": means[1]})  # fmt: skip
    gaps = [b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["count"]]
    matrix = np.array(figures["confusion"]) * (1 - np.eye(len(names), dtype=int))
    pairs = sorted(zip(*np.nonzero(matrix), strict=True), key=lambda p: -matrix[p])[:20]
    wrong = np.flatnonzero(~right)
    wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:48]
    return {
        "intervals": {"level": 0.95} | {
            name: [figures[name] - 0.0123, figures[name] + 0.0123]
            for name in ("accuracy", "top5_accuracy", "loss")
        },
        "calibration": {"expected_calibration_error": sum(gaps) / len(labels), "bins": bins},
        "confused": [{"true": names[t], "predicted": names[p], "count": int(matrix[t, p])}
                     for t, p in pairs],
        "mistakes": [{"row": int(i), "true": names[labels[i]], "predicted": names[predicted[i]],
                      "probability": float(sure[i]),
                      "true_probability": float(probabilities[i, labels[i]])} for i in wrong],
    }  # fmt: skip


def disturb(run: Run, names=("rotation", "jpeg"), accuracy=0.7) -> None:
    """The file of the disturbances."""
    rows = {name: {"strengths": [1, 2, 3, 4, 5], "unit": "degrees",
                   "accuracy": [accuracy - 0.1 * i for i in range(5)]} for name in names}  # fmt: skip
    found = {"split": "test", "data": "digits", "fingerprint": "b", "count": 20, "seed": 0,
             "clean_accuracy": 0.9, "mean_accuracy": accuracy - 0.2, "disturbances": rows}  # fmt: skip
    write_json(run.evaluation("test").with_name("test_disturbances.json"), found)


def data_of(page: str) -> dict:
    """The figures for machines in a report."""
    begin = page.index('<script type="application/json" id="data">') + 42
    return json.loads(page[begin : page.index("</script>", begin)])


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
