"""Evaluates a model on a split, each example once: metrics, predictions and a confusion matrix."""

import dataclasses
import os
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_cifar import data, models
from keras_cifar.core import places
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import replacing, write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.data import Split
from keras_cifar.evaluation import plots, selective
from keras_cifar.evaluation.metrics import summarize

BATCH_SIZE = 256


def predict(model: keras.Model, split: Split) -> np.ndarray:
    """Probabilities float32 [N, K] of every example of a split, in order."""
    step = compiled(model, split.image_shape)
    batches = data.evaluation_batches(split, model.output_shape[-1], BATCH_SIZE)
    return np.concatenate([step(images).numpy() for images, _ in batches])[: len(split)]


def compiled(model: keras.Model, image_shape: tuple[int, int, int]) -> Callable:
    """The model as images uint8 [n, H, W, 3] -> outputs float32 [n, K], for any n but 0."""

    @tf.function(input_signature=[tf.TensorSpec((None, *image_shape), tf.uint8)], autograph=False)
    def step(images):
        return tf.cast(model(images, training=False), tf.float32)

    return step


def evaluate(
    model: keras.Model, name: str, split: Split, class_names: tuple[str, ...], spec: str, run: Run
) -> dict:
    """Evaluates a model on a split and writes its metrics, predictions and confusion matrix.

    The files are `RUN/eval/<name>.json`, `.npz` (labels int64 [N], probabilities float32 [N, K]) and
    `_confusion.png`, or `<name>-<data>-<hash>` of other images than the run's own. Returns what the
    JSON holds; `spec` is the --data of the split, for the record.
    That of `val` has `min_probability`, see `selective.propose`; a threshold from test would be fitted
    to the images that measure it.
    """
    probabilities = predict(model, split)
    metrics = summarize(probabilities, split.labels, class_names)
    metrics = {"split": name, "data": spec, "fingerprint": split.fingerprint} | metrics
    other = run.other_data(metrics)
    with replacing(run.predictions(name, other)) as temporary:
        np.savez(temporary, labels=split.labels, probabilities=probabilities)
    if name == "val":
        proposed = selective.propose_for_export(run, probabilities, split.labels)
        metrics["min_probability"] = proposed
    write_json(run.evaluation(name, other), metrics)
    plots.save(plots.confusion(metrics["confusion"], class_names), run.confusion(name, other))
    return metrics


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Where the images of an evaluation come from, as the flags; None is the run's own value."""

    data: str | None = None
    data_dir: str | None = None
    cache_dir: str | None = None


RUNS_OWN = DataSource()


def evaluate_run(run: Run, name: str, source: DataSource = RUNS_OWN) -> dict:
    """`evaluate` of a run's selected model on its split `name`; errors as `load_run`."""
    model, dataset, spec = load_run(run, name, source)
    return evaluate(model, name, dataset.split(name), dataset.class_names, spec, run)


def load_run(run: Run, name: str, source: DataSource = RUNS_OWN) -> tuple:
    """(the run's selected model, the data, its --data: with an absolute path if it was given).

    Raises:
        UserError: the run or the data is missing, damaged, or not what the run was made with.
    """
    config, model = run.read_config(), models.load(run.model)
    given = places.absolute("data", source.data) if source.data else None
    return model, load_data(config, name, source), given or config["flags"]["data"]


def load_data(config: dict, name: str, source: DataSource = RUNS_OWN) -> data.Dataset:
    """The data from which a split is to be evaluated; `config` holds the run's config.json.

    Raises:
        UserError: the data is missing, or its classes or images are not those of the run.
    """
    flags, class_names = config["flags"], tuple(config["class_names"])
    height, width, _ = config["image_shape"]
    own, spec = source.data is None, source.data or places.find(config, "data")
    dataset = data.load(
        spec,
        source.data_dir or _existing(config, "data_dir"),
        # The run's own flag, so that the images which the run decoded are found in the cache.
        flags["image_size"] if own else f"{height}x{width}",
        # Other data needs no validation split for an evaluation of train.
        flags["val_fraction"] if own or name == "val" else 0.0,
        flags["seed"],
        source.cache_dir or _existing(config, "cache_dir"),
        # In other data every image counts.
        data.BadImages(own and flags["on_bad_image"] == "skip", flags["max_bad_share"]),
        flags["resize"],
        flags["augment"] if own else "",
    )
    if dataset.class_names != class_names:
        raise UserError(
            f"--data={spec} has the classes {', '.join(dataset.class_names)} "
            f"and the run was trained on {', '.join(class_names)}"
        )
    split = dataset.split(name)
    if own and split.fingerprint != config["splits"].get(name, {}).get("fingerprint"):
        raise UserError(
            f"the {name} images of --data={spec} have changed since the training; name them "
            "with --data to evaluate them all the same"
        )
    return dataset


def _existing(config: dict, flag: str) -> str | None:
    """A directory that config.json names, or None where this machine does not have it."""
    directory = places.find(config, flag)
    return directory if directory and os.path.isdir(os.path.expanduser(directory)) else None
