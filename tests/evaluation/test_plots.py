"""The pictures are drawn and show what they are given."""

import numpy as np
import pytest
from PIL import Image

from keras_cifar.evaluation import plots


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def rows(*accuracies, validated=True):
    history = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        row = {"epoch": epoch, "loss": 2 - accuracy, "accuracy": accuracy}
        history.append(row | ({"val_loss": 2.0, "val_accuracy": 0.3} if validated else {}))
    return history


def test_curves_change_with_the_history(tmp_path):
    plots.curves(rows(0.1, 0.5), tmp_path / "a.png")
    plots.curves(rows(0.1, 0.9), tmp_path / "b.png")
    plots.curves(rows(0.1, 0.9, validated=False), tmp_path / "c.png")
    a, b, c = (pixels(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    assert a.shape == b.shape
    assert (a != b).any()
    assert (b != c).any()


def test_curves_of_one_epoch(tmp_path):
    plots.curves(rows(0.5), tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").std() > 0


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_of_any_number_of_classes(tmp_path, classes):
    names = tuple(f"class {i}" for i in range(classes))
    right, wrong = (
        np.eye(classes, dtype=int) * 5,
        np.roll(np.eye(classes, dtype=int) * 5, 1, axis=0),
    )
    plots.confusion(right.tolist(), names, tmp_path / "right.png")
    plots.confusion(wrong.tolist(), names, tmp_path / "wrong.png")
    assert (pixels(tmp_path / "right.png") != pixels(tmp_path / "wrong.png")).any()


@pytest.mark.parametrize("name", ["日本", "$x^{", "$$", "\\frac", "a" * 255, "<b>&"])
def test_any_class_name_is_drawn(tmp_path, name):
    plots.confusion([[5, 0], [1, 4]], (name, "b"), tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").std() > 0


def test_a_gallery_shows_each_picture_at_its_place(tmp_path):
    pictures = {name: np.zeros((6, 8, 8, 3), np.uint8) for name in ("a", "b", "c")}
    plots.gallery(pictures, tmp_path / "black.png")
    pictures["b"][2] = (255, 0, 0)
    plots.gallery(pictures, tmp_path / "red.png")
    black, red = pixels(tmp_path / "black.png"), pixels(tmp_path / "red.png")
    y, x = np.nonzero((black != red).any(axis=-1))
    dark = black.sum(axis=-1) == 0
    columns, rows = (np.flatnonzero(dark.mean(axis=axis) > 0.4) for axis in (0, 1))  # no letters
    places = [
        (d.min() + d.max() - 2 * a[0]) / 2 / (a[-1] - a[0]) for d, a in ((x, columns), (y, rows))
    ]
    assert places == pytest.approx([1.5 / 3, 2.5 / 6], abs=0.02)  # the second of 3, the third of 6


@pytest.mark.parametrize("shape", [(1, 1), (8, 30), (224, 224)])
def test_a_gallery_of_any_size(tmp_path, random, shape):
    pictures = {"a": random.integers(0, 256, (6, *shape, 3), np.uint8)}
    plots.gallery(pictures, tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").std() > 0
