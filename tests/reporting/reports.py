"""Run directories without a training, as input of reports."""

import json

import numpy as np

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.files import write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import metrics

COLUMNS = "epoch,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds,images_per_second"
# The parts of an evaluation that the first version wrote.
FIRST = ("count", "loss", "accuracy", "top5_accuracy", "per_class", "confusion")
SPLITS = {"train": {"count": 90, "fingerprint": "a"}, "test": {"count": 20, "fingerprint": "b"}}


def predictions(count: int, classes: int, seed: int = 0, absent: tuple = ()) -> tuple:
    """(labels int64 [N], probabilities float32 [N, K]); most predictions are right."""
    random = np.random.default_rng(seed)
    present = [i for i in range(classes) if i not in absent]
    labels = random.choice(present, count)
    logits = random.normal(size=(count, classes)) + 3 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels.astype(np.int64), probabilities.astype(np.float32)


def write_run(path, names, flags=None, epochs=3, **changes) -> Run:
    """config.json and history.csv of a run after some of its three epochs."""
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
    rows = [COLUMNS]
    for epoch in range(1, epochs + 1):
        values = [epoch, 2 / epoch, 1 - 0.5 / epoch, 2.2 / epoch, 1 - 0.6 / epoch]
        rows.append(",".join(map(str, [*values, 1e-3, 2.5, 100 + epoch])))
    if epochs:
        run.history.write_text("\n".join(rows) + "\n")
    return run


def evaluate(run: Run, names, labels, probabilities, fingerprint="b", data="digits", new=True):
    """The files of an evaluation of the test split; without what older versions did not write."""
    found = metrics.summarize(probabilities, labels, tuple(names))
    if not new:
        found = {name: found[name] for name in FIRST}
    found = {"split": "test", "data": data, "fingerprint": fingerprint} | found
    write_json(run.evaluation("test"), found)
    if new:
        np.savez(run.predictions("test"), labels=labels, probabilities=probabilities)


def disturb(run: Run, names=("rotation", "jpeg"), accuracy=0.7) -> None:
    """The file of an evaluation under disturbances."""
    rows = {name: {"strengths": [1, 2, 3, 4, 5], "unit": "degrees",
                   "accuracy": [accuracy - 0.1 * i for i in range(5)]} for name in names}  # fmt: skip
    own = run.read_config()["splits"]["test"]["fingerprint"]
    found = {"split": "test", "data": "digits", "fingerprint": own, "count": 20, "seed": 0,
             "clean_accuracy": 0.9, "mean_accuracy": accuracy - 0.2, "disturbances": rows}  # fmt: skip
    write_json(run.disturbances("test"), found)


def data_of(page: str) -> dict:
    """The metrics that a report holds for programs."""
    begin = page.index('<script type="application/json" id="data">') + 42
    return json.loads(page[begin : page.index("</script>", begin)])
