"""Drawings as SVG text, whose colours are the page's: they change with light and dark.

Written by hand: a chart of matplotlib takes 0.2 s, 40 KB, and the colours of one background.
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 260  # in units of which a letter has 13, about pixels of a telephone
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 40  # around the axes

# Of a confusion matrix: colours that are told apart, and classes above which names are left out.
SHADES = 16
MAX_NAMED = 120


class _Axes:
    """Maps values to places, and draws frame, ticks and titles."""

    def __init__(self, x: Sequence[float], y: Sequence[float], titles: tuple[str, str]):
        self.x_ticks, self.y_ticks = x, y
        (self.x0, self.x1), (self.y0, self.y1) = (x[0], x[-1]), (y[0], y[-1])
        self.titles = titles

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - BOTTOM - TOP)

    def draw(self) -> str:
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{value:g}</text>')
        for value in self.x_ticks:
            at = "end" if value == self.x_ticks[-1] and len(self.x_ticks) > 1 else "middle"
            x, y = self.x(value), HEIGHT - BOTTOM + 16
            parts.append(f'<text x="{x:.1f}" y="{y}" class="{at}">{value:g}</text>')
        across, up = self.titles
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" class="middle">{across}</text>')
        at = f"12 {(TOP + HEIGHT - BOTTOM) / 2:.0f}"
        parts.append(f'<text class="middle" transform="translate({at}) rotate(-90)">{up}</text>')
        return "".join(parts)


def _ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from at most `low` to at least `high`; just inside of both where whole."""
    steps = (s * 10.0**e for e in range(-9, 12) for s in (1, 2, 5))
    step = next(s for s in steps if s * most >= high - low and (not whole or s >= 1))
    if whole:
        inside = [n * step for n in range(int(low // step) + 1, int(high // step) + 1)]
        return [low, *(t for t in inside if low + step / 2 < t < high - step / 2), high]
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    return [round(n * step, 9) for n in range(first, max(last, first + 1) + 1)]


def _svg(width: float, height: float, title: str, body: str, kind: str = "chart") -> Markup:
    return Markup(
        f'<svg class="{kind}" width="{width:g}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg>'
    )


def lines(title: str, up: str, series: list[tuple[int, bool, list]]) -> Markup:
    """Values over the epochs.

    Args:
        title: for those who do not see it.
        up: the title of the vertical axis.
        series: of (number of its colour, whether it is dashed, (epoch, value or None) in order).
    """
    points = [point for _, _, line in series for point in line if point[1] is not None]
    if not points:
        return Markup("")
    epochs, values = zip(*points, strict=True)
    last = max(max(epochs), min(epochs) + 1)
    axes = _Axes(_ticks(min(epochs), last, whole=True), _ticks(0, max(values) or 1), ("epoch", up))
    parts = [axes.draw()]
    for colour, dashed, line in series:
        known = [(axes.x(e), axes.y(v)) for e, v in line if v is not None]
        kind = f"line c{colour}" + " dashed" * dashed
        if len(known) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in known)
            parts.append(f'<path class="{kind}" d="M{path}"/>')
        if len(known) < 30:
            parts += [
                f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in known
            ]
    return _svg(WIDTH, HEIGHT, title, "".join(parts))


def reliability(title: str, bins: list[dict]) -> Markup:
    """Accuracy of the images whose probability is in each bin, beside the diagonal."""
    axes = _Axes(
        [0, 0.2, 0.4, 0.6, 0.8, 1], [0, 0.2, 0.4, 0.6, 0.8, 1], ("probability", "accuracy")
    )
    parts, bottom = [axes.draw()], axes.y(0)
    for row in bins:
        if row["count"]:
            left, right, top = axes.x(row["low"]), axes.x(row["high"]), axes.y(row["accuracy"])
            parts.append(
                f'<rect class="bar" x="{left + 0.5:.1f}" y="{top:.1f}" '
                f'width="{right - left - 1:.1f}" height="{bottom - top:.1f}"/>'
            )
            x, y = axes.x(row["confidence"]), top
            parts.append(f'<circle class="c1" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    parts.append(f'<path class="diagonal" d="M{axes.x(0)} {bottom}L{axes.x(1)} {axes.y(1)}"/>')
    return _svg(WIDTH, HEIGHT, title, "".join(parts))


def matrix(title: str, shares: np.ndarray, names: Sequence[str]) -> Markup:
    """A confusion matrix of many classes: float [K, K] in [0, 1], a row a true class.

    Cells of one shade are one path, so that 100 x 100 of them take 100 KB and not a megabyte.
    """
    count, cell = len(names), 9
    labelled = count <= MAX_NAMED
    longest = max(map(len, names)) if labelled else 0
    margin = 20 + min(longest, 20) * 4.8
    side = count * cell
    parts = [f'<g transform="translate({margin:g} {margin:g})">']
    shade = np.ceil(shares * SHADES).astype(int)
    for level in range(1, SHADES + 1):
        rows, columns = np.nonzero(shade == level)
        path = "".join(
            f"M{c * cell} {r * cell}h{cell}v{cell}h-{cell}z"
            for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
        )
        if path:
            parts.append(f'<path class="heat" opacity="{level / SHADES:g}" d="{path}"/>')
    parts.append(f'<rect class="frame" width="{side}" height="{side}"/>')
    if labelled:
        for i, name in enumerate(names):
            short = escape(name if len(name) <= 20 else name[:19] + "…")
            at = (i + 0.8) * cell
            parts.append(f'<text class="end small" x="-3" y="{at:.1f}">{short}</text>')
            turned = f"translate({at:.1f} -3) rotate(-90)"
            parts.append(f'<text class="small" transform="{turned}">{short}</text>')
    middle, edge = side / 2, 10 - margin
    parts.append(f'<text class="middle" x="{middle}" y="{edge:.1f}">predicted</text>')
    turned = f"translate({edge:.1f} {middle}) rotate(-90)"
    parts.append(f'<text class="middle" transform="{turned}">true</text></g>')
    return _svg(margin + side + 2, margin + side + 2, title, "".join(parts), "matrix")
