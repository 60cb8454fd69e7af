"""A model on a split: every example once -> figures, JSON and a picture in the run directory."""

import os
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_cifar import data, models
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import replacing, write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.data import Split
from keras_cifar.evaluation import metrics, plots

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
    """Writes the figures, the predictions they are made of and the confusion matrix's picture.

    They are `RUN/eval/<name>.json`, `.npz` (labels int64 [N], probabilities float32 [N, K]) and
    `_confusion.png`; returns what the JSON holds.

    Args:
        name: of the split: train, val or test.
        spec: the --data that it comes from, for the record.
    """
    probabilities = predict(model, split)
    with replacing(run.predictions(name)) as temporary:
        np.savez(temporary, labels=split.labels, probabilities=probabilities)
    figures = metrics.summarize(probabilities, split.labels, class_names)
    figures = {"split": name, "data": spec, "fingerprint": split.fingerprint} | figures
    write_json(run.evaluation(name), figures)
    plots.confusion(figures["confusion"], class_names, run.confusion(name))
    return figures


def evaluate_run(
    run: Run,
    name: str,
    spec: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> dict:
    """Evaluates a run's selected model on a split of the run's data, or of other data.

    Args:
        name: of the split: train, val or test.
        spec: other data (as --data) of the same classes; None is the run's.
        data_dir: where TFDS keeps it; None is the run's.
        cache_dir: where decoded images are kept; None is the run's.

    Raises:
        UserError: the run or the data is not there, damaged, or not what the run was made with.
    """
    model, dataset, spec = load_run(run, name, spec, data_dir, cache_dir)
    return evaluate(model, name, dataset.split(name), dataset.class_names, spec, run)


def load_run(
    run: Run,
    name: str,
    spec: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> tuple[keras.Model, data.Dataset, str]:
    """(the run's selected model, the data, its --data); as `evaluate_run`."""
    config = run.read_config()
    model = models.load(run.model)
    dataset = load_data(run, name, spec, data_dir, cache_dir)
    return model, dataset, spec or config["flags"]["data"]


def load_data(
    run: Run,
    name: str,
    spec: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> data.Dataset:
    """The run's data, or other data, of which a split is to be looked at; as `evaluate_run`."""
    config = run.read_config()
    flags, class_names = config["flags"], tuple(config["class_names"])
    height, width, _ = config["image_shape"]
    dataset = data.load(
        spec or flags["data"],
        data_dir or _known(flags["data_dir"]),
        # As the run had it, so that the images it decoded are found again.
        flags["image_size"] if spec is None else height if height == width else None,
        # Of other data, nothing need be held out to look at all of train.
        flags["val_fraction"] if spec is None or name == "val" else 0.0,
        flags["seed"],
        cache_dir or _known(flags.get("cache_dir")),  # Runs of the first version have none.
        # Of other data every picture counts.
        data.BadImages(
            spec is None and flags.get("on_bad_image") == "skip", flags.get("max_bad_share", 0.0)
        ),
    )
    if dataset.class_names != class_names:
        raise UserError(
            f"--data={spec or flags['data']} has the classes {', '.join(dataset.class_names)} and "
            f"the run was trained on {', '.join(class_names)}"
        )
    split = dataset.split(name)
    if spec is None and split.fingerprint != config["splits"].get(name, {}).get("fingerprint"):
        raise UserError(
            f"the {name} images of --data={flags['data']} have changed since the training; name them "
            "with --data to evaluate them all the same"
        )
    return dataset


def _known(directory: str | None) -> str | None:
    """A directory that config.json names, where it exists; a run from elsewhere makes none here."""
    return directory if directory and os.path.isdir(os.path.expanduser(directory)) else None
