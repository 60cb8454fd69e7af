"""Pictures of a run. Numbers in, PNG files out."""

import pathlib
import warnings

import numpy as np
from matplotlib.figure import Figure

from keras_cifar.core.files import replacing

# Above this many classes a cell's number would be too small to read.
MAX_NUMBERED = 20


def curves(history: list[dict], path: pathlib.Path) -> None:
    """Draws loss and error of training and validation over the epochs: the chapter's plot.

    Args:
        history: a dict an epoch, with epoch, loss, accuracy and, where validated, val_*.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, title, value in zip(
        figure.subplots(1, 2),
        ("cross-entropy", "error"),
        (lambda row, p: row[f"{p}loss"], lambda row, p: 1 - row[f"{p}accuracy"]),
        strict=True,
    ):
        for prefix, label in (("", "train"), ("val_", "validation")):
            if f"{prefix}loss" in history[0]:
                values = [value(row, prefix) for row in history]
                axes.plot(epochs, values, marker="." if len(epochs) < 40 else None, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def progress(runs: list[tuple], path: pathlib.Path) -> None:
    """Draws the accuracy of runs over epochs and over time, of several seeds the mean in a band.

    Args:
        runs: (name, what was measured, accuracy [R, E], seconds so far [R, E]) of each, of R seeds
            after E epochs. The band is a standard deviation on each side, time the mean of the seeds.
    """
    longest = max(seconds.mean(axis=0)[-1] for *_, seconds in runs)
    scale, unit = (1, "seconds") if longest < 120 else (60, "minutes")
    if longest > 7200:
        scale, unit = 3600, "hours"
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ("epoch", unit), strict=True):
        for name, what, values, seconds in runs:
            epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(axis=0)
            x = epochs if label == "epoch" else seconds.mean(axis=0) / scale
            (line,) = axes.plot(
                x, mean, marker="." if len(x) < 40 else None, label=f"{name} ({what})"
            )
            if len(values) > 1:
                spread = values.std(axis=0, ddof=1)
                axes.fill_between(
                    x, mean - spread, mean + spread, alpha=0.25, color=line.get_color()
                )
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="accuracy")
    figure.axes[0].locator_params(axis="x", integer=True)
    for text in figure.axes[0].legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def confusion(matrix: list[list[int]], class_names: tuple[str, ...], path: pathlib.Path) -> None:
    """Draws a confusion matrix, each row as shares of its true class."""
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(class_names)
    side = min(3.5 + 0.45 * classes, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = max(3, min(10, 60 * side / (classes * 5)))
    # A dollar sign in a name begins no formula.
    axes.set_xticks(range(classes), class_names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(classes), class_names, fontsize=size, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    if classes <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column, row, str(count), ha="center", va="center", color=colour, fontsize=size - 2
            )
    figure.colorbar(picture, shrink=0.8, label="share of the true class")
    _save(figure, path)


def gallery(pictures: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Draws an image under all disturbances: one a column, the strengths from top to bottom.

    Args:
        pictures: for each name uint8 [6, H, W, 3], as `disturbances.gallery` gives them.
    """
    every = np.stack(list(pictures.values()), axis=1)  # [6, names, H, W, 3]
    rows, columns, height, width, _ = every.shape
    gap = max(1, min(height, width) // 10)
    framed = np.pad(every, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    height, width = height + gap, width + gap
    # One picture of all, as it is drawn much sooner than many.
    montage = framed.swapaxes(1, 2).reshape(rows * height, columns * width, 3)[:-gap, :-gap]
    figure = Figure(figsize=(columns + 0.8, rows * height / width + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(montage)
    strengths = ["as it is", *(f"strength {number}" for number in range(1, rows))]
    axes.set_xticks((np.arange(columns) + 0.5) * width - gap / 2, pictures)
    axes.set_yticks((np.arange(rows) + 0.5) * height - gap / 2, strengths)
    axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: pathlib.Path) -> None:
    with replacing(path) as temporary, warnings.catch_warnings():
        # That the font lacks a letter of a name, or a name takes all of the room, stops nothing.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(temporary, dpi=110)
