"""Plots show what they are given, as PNG files and as elements of a page."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from keras_cifar.evaluation import plots

LIGHT = np.array([31, 111, 235])  # the first colour


def pixels(figure, path) -> np.ndarray:
    plots.save(figure, path / "a.png")
    with Image.open(path / "a.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def history(*accuracies, **others) -> list[dict]:
    rows = [{"loss": 2 - accuracy, "accuracy": accuracy} for accuracy in accuracies]
    return [{"epoch": epoch, **row, **others} for epoch, row in enumerate(rows, start=1)]


def lines(figure, axes: int = 0) -> list[tuple[list, list, str]]:
    """(x, y, style) of the lines of a plot."""
    found = figure.axes[axes].lines
    return [(list(x.get_xdata()), list(x.get_ydata()), x.get_linestyle()) for x in found]


def test_curves_are_loss_and_error_of_the_history(tmp_path):
    figure = plots.curves([history(0.25, 0.5, val_loss=2.0, val_accuracy=0.3)])
    assert lines(figure) == [([1, 2], [1.75, 1.5], "--"), ([1, 2], [2, 2], "-")]
    assert lines(figure, 1) == [([1, 2], [0.75, 0.5], "--"), ([1, 2], [0.7, 0.7], "-")]
    drawn = pixels(figure, tmp_path)
    assert (np.abs(drawn - LIGHT).max(axis=-1) < 20).sum() > 100


def test_curves_of_several_runs_share_an_axis_and_leave_out_missing_values():
    rows = history(0.25, 0.5, 0.5)
    rows[1]["loss"] = None
    others = [history(0.5, val_loss=2.0), []]
    (_, values, _), *rest = lines(plots.curves([rows, *others], ["loss"], plots.SMALL))
    assert np.isnan(values).tolist() == [False, True, False]
    assert rest == [([1], [1.5], "--"), ([1], [2], "-")]


@pytest.mark.parametrize("classes", [2, 20, 100])
def test_confusion_shows_shares_of_each_true_class(tmp_path, classes):
    matrix = np.eye(classes, dtype=int) * 3 + np.eye(classes, k=1, dtype=int)
    figure = plots.confusion(matrix.tolist(), [f"class {i}" for i in range(classes)])
    (image,) = figure.axes[0].images
    np.testing.assert_array_equal(image.get_array()[0, :3], [0.75, 0.25, 0][:classes])
    assert len(figure.axes[0].texts) == (classes**2 if classes <= 20 else 0)
    if classes == 2:
        assert pixels(figure, tmp_path).std() > 0


@pytest.mark.parametrize(
    "name", ["日本 <b>&", "$x^{ \\frac$", "a" * 255, '"#1f6feb" id="x"', "\ud800\n"]
)
def test_any_class_name_is_drawn_as_it_is(name):
    figure = plots.confusion([[5, 0], [1, 4]], (name, "b"))
    root = ElementTree.fromstring(svg(figure, title=name))
    texts = [element.text for element in root.iter("text")]
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    assert texts.count(shown if len(shown) <= 20 else shown[:19] + "…") == 2
    assert root.get("aria-label") == shown


def svg(figure, title="title", identifier="chart") -> str:
    # As a file of its own it needs the declaration that a page does without.
    return plots.svg(figure, title, identifier).replace("xlink:href", "href")


def test_an_svg_has_the_colours_and_the_font_of_the_page():
    rows = history(0.25, 0.5, val_accuracy=0.3)
    text = svg(plots.curves([rows], ["error"], plots.SMALL))
    assert {"--c1", "--c2", "--text", "--line"} <= set(re.findall(r"var\((--\w+)\)", text))
    assert "font-family" not in text
    assert "<style" not in text
    assert [t.text for t in ElementTree.fromstring(text).iter("text")].count("epoch") == 1


def test_identifiers_are_those_of_one_svg_and_repeat():
    figures = [plots.curves([history(0.25, 0.5)], ["loss"], plots.SMALL) for _ in range(3)]
    first, second, again = map(svg, figures, "ttt", ("a", "b", "a"))
    found = [set(re.findall(r' id="([^"]+)"', text)) for text in (first, second)]
    assert found[0].isdisjoint(found[1])
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', first)) <= found[0]
    assert first == again


def test_a_large_confusion_matrix_in_a_page_is_one_small_image(random):
    matrix = (random.random((30, 30)) < 0.1).astype(int)
    text = svg(plots.confusion(matrix.tolist(), list(map(str, range(30)))))
    (image,) = ElementTree.fromstring(text).iter("image")
    data = base64.b64decode(image.get("href").partition("base64,")[2])
    opaque = np.asarray(Image.open(io.BytesIO(data)))[..., 3] > 0
    np.testing.assert_array_equal(opaque, matrix > 0)
    assert len(text) < 100_000


def test_a_reliability_diagram_has_a_bar_for_each_bin_with_images():
    empty = {"low": 0.0, "high": 0.5, "count": 0, "confidence": None, "accuracy": None}
    full = {"low": 0.5, "high": 1.0, "count": 4, "confidence": 0.8, "accuracy": 0.75}
    (axes,) = plots.reliability([empty, full]).axes
    (bar,) = axes.patches
    assert (bar.get_x(), bar.get_height()) == (0.5, 0.75)


def test_a_gallery_shows_each_image_at_its_place(tmp_path):
    images = {name: np.zeros((6, 8, 8, 3), np.uint8) for name in ("a", "b", "c")}
    black = pixels(plots.gallery(images), tmp_path)
    images["b"][2] = (255, 0, 0)
    red = pixels(plots.gallery(images), tmp_path)
    dark = black.sum(axis=-1) == 0
    for axis, place in ((0, 1.5 / 3), (1, 2.5 / 6)):  # the second of 3, the third of 6
        whole = np.flatnonzero(dark.mean(axis=axis) > 0.4)  # no letters
        changed = np.flatnonzero((black != red).any(axis=-1).any(axis=axis))
        middle = (changed[0] + changed[-1]) / 2 - whole[0]
        assert middle / (whole[-1] - whole[0]) == pytest.approx(place, abs=0.02)


@pytest.mark.parametrize("shape", [(1, 1), (8, 30), (224, 224)])
def test_a_gallery_of_any_size(tmp_path, random, shape):
    images = {"a": random.integers(0, 256, (6, *shape, 3), np.uint8)}
    assert pixels(plots.gallery(images), tmp_path).std() > 0


def place(picture: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """(row, column) where a picture shows a tile, pixel for pixel."""
    same = np.ones(np.subtract(picture.shape[:2], tile.shape[:2]) + 1, bool)
    for row, column in ((0, 0), (5, 9), (-1, -1)):  # few positions pass
        row, column = row % len(tile), column % tile.shape[1]
        part = picture[row : row + same.shape[0], column : column + same.shape[1]]
        same &= (part == tile[row, column]).all(-1)
    height, width = tile.shape[:2]
    (found,) = (
        (y, x)
        for y, x in np.argwhere(same)
        if np.array_equal(picture[y : y + height, x : x + width], tile)
    )
    return found


@pytest.mark.parametrize(("shape", "factor"), [((32, 32), 4), ((20, 48), 2), ((100, 128), 1)])
def test_samples_are_enlarged_by_a_whole_factor(tmp_path, random, shape, factor):
    images = random.integers(0, 256, (8, *shape, 3), np.uint8)
    figure = plots.samples(images, np.eye(3)[np.arange(8) % 3], ("ape", "$x^{ \\frac$", "a" * 255))
    picture = pixels(figure, tmp_path)
    tiles = [image.repeat(factor, 0).repeat(factor, 1) for image in images]
    places = [place(picture, tile) for tile in tiles]
    assert places == sorted(places)  # from left to right, then from top to bottom
    assert len({row for row, _ in places}) == 2
    names = ["ape", "$x^{ \\frac$", "a" * 19 + "…"]
    assert [text.get_text() for text in figure.texts] == [names[i % 3] for i in range(8)]
    for (row, column), text in zip(places, figure.texts, strict=True):  # each below its image
        x, y = np.multiply(text.get_position(), picture.shape[1::-1])
        assert abs(x - column - tiles[0].shape[1] / 2) < 1
        assert 0 < picture.shape[0] - y - row - len(tiles[0]) < 5


def test_large_samples_are_made_smaller(tmp_path):
    images = np.zeros((2, 300, 600, 3), np.uint8)
    images[0, :, :300], images[1, :, 300:] = (250, 0, 0), (0, 0, 250)
    picture = pixels(plots.samples(images, np.eye(2), ("ape", "bee")), tmp_path)
    assert picture.size < images.size / 4
    for colour in ((250, 0, 0), (0, 0, 250)):
        rows, columns = np.nonzero((picture == colour).all(-1))
        assert abs(np.ptp(rows) - 64) < 3
        assert abs(np.ptp(columns) - 64) < 5


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ([0, 1, 0], "bee"),
        ([0.3, 0.0, 0.7], "cow 0.7\n+ ape 0.3"),
        ([0.5, 0.3, 0.2], "ape 0.5\n+ bee 0.3"),
        ([0.96, 0.04, 0], "ape"),
    ],
)
def test_samples_name_the_two_largest_shares(label, text):
    image = np.zeros((1, 4, 4, 3), np.uint8)
    (found,) = plots.samples(image, np.array([label], np.float32), ("ape", "bee", "cow")).texts
    assert found.get_text() == text


@pytest.mark.parametrize(("shape", "count"), [((1, 1), 1), ((3, 200), 24), ((200, 3), 7)])
def test_samples_of_any_size_and_name(tmp_path, shape, count):
    images, labels = np.zeros((count, *shape, 3), np.uint8), np.ones((count, 1), np.float32)
    assert pixels(plots.samples(images, labels, ("日本 \ud800\n",)), tmp_path).std() > 0
