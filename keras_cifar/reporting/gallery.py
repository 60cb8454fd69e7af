"""The images of a report: mistakes under Grad-CAM, and an image under disturbances."""

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
from keras_cifar.reporting.record import Record, data_url

MISTAKES = 24  # on a page
SHOWN = 3  # of the most probable classes
MAX_SIDE = 96  # pixels; a report holds hundreds of images
MAX_PNG_SIDE = 64  # pixels; larger images are smaller as JPEG


def load(run: Run, record: Record, runs: int = 1) -> Gallery:
    """The images of a run, from its data and its model; or a gallery that says why there are none.

    The more `runs` share the page, the fewer mistakes are shown; a disturbed image only for one run.
    """
    if not record.metrics:
        return Gallery("the run is not evaluated")
    try:
        spec, own = record.metrics["data"], record.config["flags"]["data"]
        source = DataSource(None if spec == own else spec)
        split = evaluator.load_data(record.config, record.split, source).split(record.split)
        return from_model(record, models.load(run.model), split, runs)
    except UserError as error:
        return Gallery(str(error))


def from_model(record: Record, model: keras.Model, split: Split, runs: int = 1) -> Gallery:
    """As `load`, for a model and a split in memory."""
    if split.fingerprint != record.metrics["fingerprint"]:
        return Gallery("the images have changed since the evaluation")
    mistakes = _mistakes(record, model, split, MISTAKES // runs)
    return Gallery("", mistakes, _disturbed(record, split) if runs == 1 else {})


def _mistakes(record: Record, model: keras.Model, split: Split, count: int) -> tuple[dict, ...]:
    found = record.metrics.get("mistakes", [])[:count]
    if not found:
        return ()
    names = record.config["class_names"]
    images = split.take(np.array([m["row"] for m in found])).images
    heat = grad_cam.GradCam(model).heat(images, [names.index(m["predicted"]) for m in found])
    overlays = grad_cam.overlay(images, heat)
    shown = []
    for mistake, pixels, overlay in zip(found, images, overlays, strict=True):
        top = []
        if record.probabilities is not None:
            probabilities = record.probabilities[mistake["row"]]
            best = np.argsort(-probabilities, kind="stable")[:SHOWN]
            top = [(names[i], float(probabilities[i])) for i in best]
        shown.append(mistake | {"top": top, "image": _url(pixels), "overlay": _url(overlay)})
    return tuple(shown)


def _disturbed(record: Record, split: Split) -> dict[str, list[str]]:
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
    return data_url(image, "PNG" if max(image.size) <= MAX_PNG_SIDE else "JPEG")
