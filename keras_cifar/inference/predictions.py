"""Classifies image files, and writes the predictions as text, CSV, JSON or feature vectors."""

import csv
import pathlib
from collections.abc import Callable
from typing import TextIO

import numpy as np
import tqdm

from keras_cifar.core.errors import one_line
from keras_cifar.core.files import replacing, to_json
from keras_cifar.inference import image_files

UNKNOWN = "unknown"  # the answer where no class is probable enough


def classify_files(
    predictor,
    arguments: list[str],
    top_k: int,
    with_features: bool = False,
    on_batch: Callable[[list, list], None] | None = None,
) -> tuple[list[dict], list[np.ndarray]]:
    """Classifies all image files that the arguments name; shows the progress on a terminal.

    Args:
        arguments: as `image_files.find` takes them.
        on_batch: is called with each batch of `image_files.decode` and its predictions.

    Returns:
        (a prediction for each file as --format=json prints it, the feature vectors if requested).
    """
    predictions, features = [], []
    with tqdm.tqdm(desc="classifying", unit=" files", leave=False, disable=None) as progress:
        files = image_files.find(arguments)
        for batch in image_files.decode(files, predictor.size, predictor.rule):
            good = [pixels for _, pixels, error in batch if error is None]
            images = np.stack(good) if good else np.empty((0, *predictor.size, 3), np.uint8)
            found = iter(_top_classes(predictor, images, top_k))
            rows = [
                {"file": file, "top": [] if error else next(found), "error": error}
                for file, _, error in batch
            ]
            if with_features and good:
                features += list(predictor.features(images))
            if on_batch:
                on_batch(batch, rows)
            predictions += rows
            progress.update(len(batch))
    return predictions, features


def _top_classes(predictor, images: np.ndarray, top_k: int) -> list[list[dict]]:
    """The most probable classes of each image; equal ones in the order of the classes."""
    probabilities = predictor.classify(images)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    return [
        [
            {"label": predictor.class_names[i], "index": int(i), "probability": float(row[i])}
            for i in best
        ]
        for row, best in zip(probabilities, order, strict=True)
    ]


def mark_unknown(predictions: list[dict], min_probability: float) -> str:
    """Makes the answer `unknown` where the largest probability is below `min_probability`.

    The first entry of `top` gets the label UNKNOWN, and the label it had as `guess`, by which it
    differs from a class of that name; its index and probability stay. Returns how many these are, as
    text; empty for a `min_probability` of 0, below which nothing is.
    """
    best = [row["top"][0] for row in predictions if row["top"]]
    below = [first for first in best if first["probability"] < min_probability]
    for first in below:
        first.update(label=UNKNOWN, guess=first["label"])
    counts = f"{len(below)} of {len(best)} images, below --min_probability={min_probability}"
    return counts if min_probability else ""


def write(predictions: list[dict], format: str, file: TextIO) -> None:
    """Writes predictions as `text`, `csv` or `json`."""
    if format == "csv":
        _write_csv(predictions, file)
    elif format == "json":
        print(to_json(predictions), file=file)
    else:
        for row in predictions:
            answer = _answer(row["top"]) or "error: " + row["error"]
            print(one_line(f"{row['file']}: {answer}"), file=file)


def _answer(top: list[dict]) -> str:
    classes = ", ".join(f"{c.get('guess', c['label'])} {c['probability']:.1%}" for c in top)
    return f"{top[0]['label']} ({classes})" if top and "guess" in top[0] else classes


def _write_csv(predictions: list[dict], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["file", "rank", "label", "index", "probability", "error"])
    for row in predictions:
        for rank, c in enumerate(row["top"], start=1):
            writer.writerow([row["file"], rank, c["label"], c["index"], c["probability"], ""])
        if row["error"]:
            writer.writerow([row["file"], "", "", "", "", row["error"]])


def describe_failures(predictions: list[dict]) -> str:
    """How many files could not be classified, and why the first could not; empty where all could."""
    failed = [f"{row['file']}: {row['error']}" for row in predictions if row["error"]]
    counts = f"{len(failed)} of {len(predictions)} files could not be classified"
    return one_line(f"{counts}, the first: {failed[0]}") if failed else ""


def write_features(path: str, predictions: list[dict], features: list[np.ndarray]) -> None:
    """Writes an .npz file: files string [N], features float32 [N, D], labels string [N]."""
    good = [row for row in predictions if not row["error"]]
    with replacing(pathlib.Path(path).expanduser()) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            files=np.array([row["file"] for row in good], np.str_),
            features=np.array(features, np.float32).reshape(len(good), -1 if good else 0),
            labels=np.array([row["top"][0]["label"] for row in good], np.str_),
        )
