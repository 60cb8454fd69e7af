"""Writes Grad-CAM overlays of classified image files."""

import pathlib

import keras
import numpy as np
from PIL import Image

from keras_cifar.core.files import replacing
from keras_cifar.evaluation import grad_cam

SIDE = 224  # pixels that the sides of an overlay have at least


class OverlayWriter:
    """Writes an overlay for each image into a folder; the `on_batch` of `predictions`."""

    def __init__(self, model: keras.Model, folder: str):
        self._grad_cam = grad_cam.GradCam(model)
        self._folder = pathlib.Path(folder).expanduser()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files = 0

    def __call__(self, batch: list[tuple], predictions: list[dict]) -> None:
        """Writes the overlays of a batch of (file, pixels or None, error or None)."""
        good = [i for i, (_, _, error) in enumerate(batch) if error is None]
        if good:
            images = np.stack([batch[i][1] for i in good])
            classes = np.array([predictions[i]["top"][0]["index"] for i in good])
            heat = self._grad_cam.heat(images, classes)
            overlays = grad_cam.enlarge(grad_cam.overlay(images, heat), SIDE)
            for i, pixels in zip(good, overlays, strict=True):
                name = grad_cam.file_name(self._files + i + 1, batch[i][0])
                with replacing(self._folder / name) as temporary:
                    Image.fromarray(pixels).save(temporary)
        self._files += len(batch)
