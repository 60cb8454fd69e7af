"""Writes Grad-CAM overlays of classified image files."""

import pathlib
import re

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
        first, self._files = self._files + 1, self._files + len(batch)
        good = [i for i, (_, _, error) in enumerate(batch) if error is None]
        if not good:
            return
        images = np.stack([batch[i][1] for i in good])
        classes = np.array([predictions[i]["top"][0]["index"] for i in good])
        overlays = grad_cam.overlay(images, self._grad_cam.heat(images, classes))
        times = -(-SIDE // min(images.shape[1:3]))
        for i, pixels in zip(good, overlays, strict=True):
            # Plain letters, and a number that makes the name unique.
            stem = re.sub(r"[^A-Za-z0-9]+", "_", pathlib.PurePath(batch[i][0]).stem)[:60]
            with replacing(self._folder / f"{first + i:05}_{stem}.png") as temporary:
                Image.fromarray(pixels.repeat(times, 0).repeat(times, 1)).save(temporary)
