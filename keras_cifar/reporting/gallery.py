"""The images of a report: mistakes under Grad-CAM, and an image under disturbances."""

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
MAX_SIDE = 96  # pixels; a report holds hundreds of images
MAX_PNG_SIDE = 64  # pixels; larger images are smaller as JPEG


def load(run: Run, record: Record, max_mistakes: int = MISTAKES, disturbed: bool = True) -> Gallery:
    """The images of a run, from its data and its model.

    Args:
        max_mistakes: shown at most.
        disturbed: whether disturbed images are shown.

    Returns:
        A gallery, which names what is missing where the evaluation, the data or the model is.
    """
    if not record.metrics:
        return Gallery("the run is not evaluated")
    try:
        spec, own = record.metrics["data"], record.config["flags"]["data"]
        source = DataSource(None if spec == own else spec)
        split = evaluator.load_data(record.config, record.split, source).split(record.split)
        return from_model(record, models.load(run.model), split, max_mistakes, disturbed)
    except UserError as error:
        return Gallery(str(error))


def from_model(
    record: Record,
    model: keras.Model,
    split: Split,
    max_mistakes: int = MISTAKES,
    disturbed: bool = True,
) -> Gallery:
    """As `load`, for a model and a split in memory."""
    if split.fingerprint != record.metrics["fingerprint"]:
        return Gallery("the images have changed since the evaluation")
    return Gallery(
        mistakes=_mistakes(record, model, split, max_mistakes),
        disturbed=_disturbed(record, split) if disturbed else {},
    )


def _mistakes(record: Record, model: keras.Model, split: Split, count: int) -> tuple[dict, ...]:
    found = record.metrics.get("mistakes", [])[:count]
    if not found:
        return ()
    names = record.config["class_names"]
    images = split.take(np.array([m["row"] for m in found])).images
    heat = grad_cam.GradCam(model).heat(images, [names.index(m["predicted"]) for m in found])
    overlays = grad_cam.overlay(images, heat)
    return tuple(
        mistake
        | {"top": _top(record, mistake["row"]), "image": _url(pixels), "overlay": _url(overlay)}
        for mistake, pixels, overlay in zip(found, images, overlays, strict=True)
    )


def _top(record: Record, row: int) -> list[tuple[str, float]]:
    """(class, probability) of the most probable classes; none where no predictions are stored."""
    if record.probabilities is None:
        return []
    probabilities = record.probabilities[row]
    best = np.argsort(-probabilities, kind="stable")[:SHOWN]
    return [(record.config["class_names"][i], float(probabilities[i])) for i in best]


def _disturbed(record: Record, split: Split) -> dict[str, list[str]]:
    """The first image at each strength of the evaluated disturbances."""
    if not record.disturbances:
        return {}
    images = split.take(np.arange(min(disturbances.NEIGHBOURS, len(split)))).images
    measured = record.disturbances["disturbances"]
    return {
        name: [_url(pixels) for pixels in shown[1:]]
        for name, shown in disturbances.gallery(images, record.disturbances["seed"]).items()
        if name in measured
    }


def _url(pixels: np.ndarray) -> str:
    """An image uint8 [H, W, 3] as a data: URL."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    kind = "PNG" if max(image.size) <= MAX_PNG_SIDE else "JPEG"
    encoded = io.BytesIO()
    image.save(encoded, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
