"""Plots of a run or a study as figures of matplotlib, saved as PNG or turned into SVG for a page."""

import html
import io
import pathlib
import re
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from keras_cifar.core.errors import one_line
from keras_cifar.core.files import replacing

MAX_NUMBERED = 20  # classes of a confusion matrix with a number in each cell
MAX_NAMED = 120  # classes of a confusion matrix with names at its sides
MAX_NAME = 20  # letters of such a name
MAX_MIXED = 15  # letters of a name with its share
MAX_MARKED = 30  # epochs of a curve with a marker at each

DPI = 110  # pixels an inch of a PNG
MAX_SAMPLES, COLUMNS = 24, 6  # training images of a picture, and how many side by side
TILE, GAP = 128, 24  # pixels of the longer side of such an image, at most, and around it

SMALL = (4.3, 2.8)  # inches of a chart that is readable on a phone
LARGE = (8, 5)  # inches of each plot of a study
CURVES = (("", "--", "train"), ("val_", "-", "validation"))

# Colours for a white background. An HTML page has a variable for each, for light and dark.
LINES = ("#1f6feb", "#c2410c", "#15803d", "#9333ea", "#8a6500", "#0e7490", "#be185d", "#4d5562")
TEXT, SOFT, GRID = "#1a1a1a", "#56606b", "#d5dae0"
VARIABLES = {TEXT: "var(--text)", SOFT: "var(--soft)", GRID: "var(--line)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(LINES, start=1)
}
HEAT = LinearSegmentedColormap.from_list("heat", [f"{LINES[0]}00", LINES[0]])  # from transparent

styled = matplotlib.rc_context(
    {
        **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), TEXT),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
        "axes.prop_cycle": cycler(color=LINES),
        "axes.facecolor": "none",
        "axes.grid": True,
        "text.parse_math": False,  # A dollar sign in a name begins no formula.
        "svg.fonttype": "none",
        "svg.hashsalt": "keras_cifar",
    }
)


# ---- Training images


@styled
def samples(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Training images, uint8 [N, H, W, 3], each above its class or its classes.

    `labels`, float32 [N, K], are one-hot or mixed: the two largest shares are named.
    """
    tiles = [_tile(pixels) for pixels in images]
    tall, wide, _ = tiles[0].shape
    columns = min(len(tiles), COLUMNS)
    height, width = tall + 2 * GAP, TILE + GAP  # of a tile with its names
    shape = -(-len(tiles) // columns) * height, columns * width
    canvas = np.full((*shape, 3), 255, np.uint8)
    figure = Figure((shape[1] / DPI, shape[0] / DPI), dpi=DPI)
    for number, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        row, column = divmod(number, columns)
        top, left = row * height + GAP // 2, column * width + (width - wide) // 2
        canvas[top : top + tall, left : left + wide] = tile
        place = (column + 0.5) / columns, 1 - (top + tall + 2) / shape[0]
        text = _classes(label, class_names)
        figure.text(*place, text, ha="center", va="top", fontsize=7, linespacing=1)
    figure.figimage(canvas)  # a pixel becomes a pixel; that of axes would be interpolated
    return figure


def _tile(pixels: np.ndarray) -> np.ndarray:
    """A small image with each pixel enlarged by a whole factor, a large one made smaller."""
    factor = TILE // max(pixels.shape[:2])
    if factor:
        return pixels.repeat(factor, 0).repeat(factor, 1)
    image = Image.fromarray(pixels)
    image.thumbnail((TILE, TILE))
    return np.asarray(image)


def _classes(label: np.ndarray, names: Sequence[str]) -> str:
    """The class of a label, or of a mixed one the two with the largest shares, as text."""
    first, *rest = np.argsort(-label, kind="stable")[:2]
    if not rest or label[rest[0]] < 0.05:  # which would be 0.0
        return _shortened(names[first])
    shares = (f"{_shortened(names[i], MAX_MIXED)} {label[i]:.1f}" for i in (first, *rest))
    return "\n+ ".join(shares)


# ---- Metrics over the epochs


@styled
def curves(
    histories: Sequence[list[dict]],
    metrics: Sequence[str] = ("loss", "error"),
    size: tuple[float, float] = (9, 3.6),
) -> Figure:
    """Loss and error over the epochs, as in the tutorial: training dashed, validation solid.

    `histories` has of each run a dict an epoch: epoch, loss, accuracy and, where validated, val_*. None
    stands for a value that is not finite. `size` is in inches.
    """
    figure = Figure(size, layout="constrained")
    columns = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(columns, metrics, strict=True):
        column = "loss" if metric == "loss" else "accuracy"
        for number, history in enumerate(histories):
            epochs = [row["epoch"] for row in history]
            for offset, (prefix, style, what) in enumerate(CURVES):
                values = np.array([row.get(prefix + column) for row in history], float)
                if np.isnan(values).all():
                    continue
                values = values if metric == "loss" else 1 - values
                color = LINES[number if len(histories) > 1 else offset]
                axes.plot(epochs, values, style, marker=_marker(values), color=color, label=what)
        axes.set(xlabel="epoch", ylabel="cross-entropy" if metric == "loss" else metric)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        if len(histories) == 1 and axes.lines:
            axes.legend()
    return figure


@styled
def progress(runs: Sequence[tuple]) -> Figure:
    """Accuracy of runs over epochs and over time.

    Args:
        runs: (name, what was measured, accuracy [R, E], seconds so far [R, E]) of each, of R seeds
            after E epochs. Shown are means over the seeds, with a standard deviation on each side.
    """
    longest = max(seconds.mean(axis=0)[-1] for *_, seconds in runs)
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((name for name, length in units.items() if longest >= 2 * length), "seconds")
    figure = Figure((10, 4), layout="constrained")
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ("epoch", unit), strict=True):
        for name, what, values, seconds in runs:
            mean, x = values.mean(axis=0), np.arange(1, values.shape[1] + 1)
            if label == unit:
                x = seconds.mean(axis=0) / units[unit]
            text = one_line(f"{name} ({what})")
            (line,) = axes.plot(x, mean, marker=_marker(mean), label=text)
            if len(values) > 1:
                spread = values.std(axis=0, ddof=1)
                band = mean - spread, mean + spread
                axes.fill_between(x, *band, alpha=0.25, color=line.get_color())
        axes.set(xlabel=label)
    first = figure.axes[0]
    first.set(ylabel="accuracy")
    first.locator_params(axis="x", integer=True)
    first.legend(fontsize=8)
    return figure


@styled
def range_test(
    rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, marks: dict[str, float]
) -> Figure:
    """The loss over the learning rate, both float [N] and smoothed, with some rates marked by name."""
    figure = Figure((6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color=SOFT, alpha=0.4, label="each step")
    axes.plot(rates, smoothed, label="smoothed")
    for number, (name, rate) in enumerate(marks.items(), start=1):
        axes.axvline(rate, color=LINES[number], linestyle="--", label=f"{name}: {rate:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def study(found) -> Figure:
    """Optuna's plots of a study: accuracy by trial and by epoch, the flags, and their importance."""
    from matplotlib import pyplot  # here, as Optuna is an extra and pyplot belongs to its plots
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as optuna_plots

    value = {"target_name": "validation accuracy"}
    plots = (
        (optuna_plots.plot_optimization_history, value),
        (optuna_plots.plot_intermediate_values, {}),
        (optuna_plots.plot_parallel_coordinate, value),
        (optuna_plots.plot_param_importances, value),  # needs two trials
    )
    done = found.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    matplotlib.use("agg")
    width, height = LARGE
    sheet = Figure((2 * width, 2 * height), dpi=DPI)
    # Optuna changes the style, and warns where all trials are equal.
    with matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):
        for index, (plot, options) in enumerate(plots if len(done) > 1 else plots[:-1]):
            figure = plot(found, **options).figure
            figure.set(size_inches=LARGE, dpi=DPI, layout_engine="tight")
            figure.canvas.draw()
            left, bottom = index % 2 * width * DPI, (1 - index // 2) * height * DPI
            sheet.figimage(np.asarray(figure.canvas.buffer_rgba()), left, bottom)
            pyplot.close(figure)
    return sheet


def _marker(values: Sequence) -> str | None:
    return "." if len(values) < MAX_MARKED else None


# ---- Evaluation


@styled
def confusion(matrix: list[list[int]], class_names: Sequence[str]) -> Figure:
    """A confusion matrix whose colours are shares of the true class."""
    counts, classes = np.array(matrix), len(class_names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side, size = (0.45, 10) if classes <= MAX_NUMBERED else (0.14, 7)  # inches, points
    length = min(2.5 + side * classes, 20)
    figure = Figure((length, length), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap=HEAT, vmin=0, vmax=1, interpolation="none")
    names = [_shortened(name) for name in class_names] if classes <= MAX_NAMED else []
    style = {"fontsize": size, "ha": "right", "va": "center", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, rotation=90, **style)
    axes.set_yticks(range(len(names)), names, **style)
    axes.set(xlabel="predicted", ylabel="true (colours: shares of a row)")
    axes.grid(False)
    if classes <= MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.6 else TEXT
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure


def _shortened(name: str, letters: int = MAX_NAME) -> str:
    name = one_line(name)
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


@styled
def reliability(bins: list[dict]) -> Figure:
    """Accuracy of the images in each bin of `metrics.calibration_error`, beside the diagonal."""
    keys = ("low", "high", "confidence", "accuracy")
    rows = [[row[key] for key in keys] for row in bins if row["count"]]
    low, high, confidence, accuracy = np.reshape(rows, (-1, 4)).T
    figure = Figure(SMALL, layout="constrained")
    axes = figure.subplots()
    axes.bar(low, accuracy, 0.95 * (high - low), align="edge", alpha=0.55)
    axes.plot(confidence, accuracy, "o", markersize=4)
    axes.plot([0, 1], [0, 1], "--", color=SOFT)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability", ylabel="accuracy")
    return figure


def gallery(images: dict[str, np.ndarray]) -> Figure:
    """An image under all disturbances: one a column, the strengths from top to bottom.

    `images` has uint8 [6, H, W, 3] for each name, as `disturbances.gallery` gives them.
    """
    every = np.stack(list(images.values()), axis=1)  # [6, names, H, W, 3]
    rows, columns, height, width, _ = every.shape
    gap = max(1, min(height, width) // 10)
    framed = np.pad(every, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    height, width = height + gap, width + gap
    # One image of all, which is drawn much faster than many.
    montage = framed.swapaxes(1, 2).reshape(rows * height, columns * width, 3)[:-gap, :-gap]
    figure = Figure((columns + 0.8, rows * height / width + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(montage)
    strengths = ["undisturbed", *(f"strength {number}" for number in range(1, rows))]
    axes.set_xticks((np.arange(columns) + 0.5) * width - gap / 2, images)
    axes.set_yticks((np.arange(rows) + 0.5) * height - gap / 2, strengths)
    axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


# ---- Files and pages


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure as PNG."""
    with replacing(path) as temporary:
        _write(figure, temporary, dpi=DPI)


@styled
def svg(figure: Figure, title: str, identifier: str) -> str:
    """A figure as an <svg> element, in the colours and the font of the HTML page around it.

    `title` describes it to readers who do not see it. `identifier` begins all ids in it, so that a page
    can have several figures.
    """
    file = io.StringIO()
    _write(figure, file, format="svg", facecolor="none", metadata={"Date": None})

    def adapt(tag: re.Match) -> str:
        text = re.sub(r"font-family:[^;\"]*;?", "", tag[0])
        text = re.sub("#[0-9a-f]{6}", lambda colour: VARIABLES.get(colour[0], colour[0]), text)
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{identifier}-", text)

    # Without the header and the style sheet, which would be that of the whole page.
    _, start, rest = file.getvalue().partition('<g id="figure_1">')
    body = re.sub("<[^>]*>", adapt, start + rest)  # Texts have no < or >.
    width, height = 72 * figure.get_size_inches()
    box = f'width="{width:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {box} role="img" aria-label="{html.escape(one_line(title))}">{body}'


def _write(figure: Figure, file, **options) -> None:
    with warnings.catch_warnings():
        # A letter that the font lacks, or a name that takes all of the room, stops nothing.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, **options)
