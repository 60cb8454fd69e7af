"""The pictures of a report: mistakes with what led to them, and a disturbed image."""

import base64
import io

import keras
import numpy as np
from PIL import Image

from keras_cifar import models
from keras_cifar.core.errors import UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.data import Split
from keras_cifar.evaluation import disturbances, evaluator, grad_cam
from keras_cifar.evaluation.evaluator import DataSource
from keras_cifar.reporting.page import Gallery
from keras_cifar.reporting.record import Record

MISTAKES = 24
SHOWN = 3  # of the most probable classes
LARGEST = 96  # pixels of a side; a report has hundreds of pictures in it
LOSSLESS = 64  # pixels of a side up to which a picture is small enough as a PNG
NEIGHBOURS = 16  # images that are disturbed with the one that is shown, as some mix several


def load(run: Run, record: Record, most: int = MISTAKES, disturbed: bool = True) -> Gallery:
    """The pictures of a run, from its data and its model.

    Args:
        most: mistakes that are shown.
        disturbed: whether the disturbed images are.

    Returns:
        A gallery that says what is missing where the run, the data or the model cannot be had.
    """
    if not record.figures:
        return Gallery("the run was not evaluated")
    try:
        spec = record.figures["data"]
        spec = None if spec == record.config["flags"]["data"] else spec
        split = evaluator.load_data(record.config, record.split, DataSource(spec)).split(
            record.split
        )
        return of(record, models.load(run.model), split, most, disturbed)
    except UserError as error:
        return Gallery(str(error))


def of(
    record: Record, model: keras.Model, split: Split, most: int = MISTAKES, disturbed: bool = True
) -> Gallery:
    """The pictures of a run whose model and data are at hand; otherwise as `load`."""
    if split.fingerprint != record.figures["fingerprint"]:
        return Gallery("the images have changed since the evaluation")
    return Gallery(
        mistakes=_mistakes(record, model, split, most),
        disturbed=_disturbed(record, split) if disturbed else {},
    )


def _mistakes(record: Record, model: keras.Model, split: Split, most: int) -> tuple[dict, ...]:
    found = record.figures.get("mistakes", [])[:most]
    if not found:
        return ()
    names = record.config["class_names"]
    images = split.take(np.array([m["row"] for m in found])).images
    heat = grad_cam.GradCam(model).heat(images, [names.index(m["predicted"]) for m in found])
    overlays = grad_cam.overlay(images, heat)
    return tuple(
        mistake
        | {"top": _top(record, mistake["row"]), "picture": _url(pixels), "overlay": _url(overlay)}
        for mistake, pixels, overlay in zip(found, images, overlays, strict=True)
    )


def _top(record: Record, row: int) -> list[tuple[str, float]]:
    """(class, probability) of the most probable, where the predictions were kept."""
    if record.predictions is None:
        return []
    probabilities = record.predictions["probabilities"][row]
    best = np.argsort(-probabilities, kind="stable")[:SHOWN]
    return [(record.config["class_names"][i], float(probabilities[i])) for i in best]


def _disturbed(record: Record, split: Split) -> dict[str, list[str]]:
    """The first image at each strength of the disturbances that were measured."""
    if not record.disturbances:
        return {}
    images = split.take(np.arange(min(NEIGHBOURS, len(split)))).images
    seed = record.disturbances["seed"]
    return {
        name: [
            _url(disturbances.apply(name, images, strength, seed)[0])
            for strength in range(1, len(row["strengths"]) + 1)
        ]
        for name, row in record.disturbances["disturbances"].items()
        if name in disturbances.DISTURBANCES
    }


def _url(pixels: np.ndarray) -> str:
    """A picture uint8 [H, W, 3] as a data: URL."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((LARGEST, LARGEST))
    kind = "PNG" if max(picture.size) <= LOSSLESS else "JPEG"
    encoded = io.BytesIO()
    picture.save(encoded, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
