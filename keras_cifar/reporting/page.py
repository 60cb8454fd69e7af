"""Writes the report of runs: one HTML file that needs no network."""

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import pathlib

import jinja2
from markupsafe import Markup

from keras_cifar.core.config import FLAGS
from keras_cifar.core.errors import one_line
from keras_cifar.core.files import replacing
from keras_cifar.evaluation import plots
from keras_cifar.reporting import comparison
from keras_cifar.reporting.record import SCALARS, Record

NONE = "\N{EN DASH}"  # stands for a missing value
MAX_RUNS = len(plots.LINES)  # each with a colour of its own


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images of a run's evaluation, as data: URLs.

    A mistake is as in the evaluation, with "top", (class, probability) of the most probable classes or
    empty, "image" and "overlay".
    """

    missing: str = ""  # the reason where there are no images
    mistakes: tuple[dict, ...] = ()
    disturbed: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # an image a strength


def write(path: pathlib.Path, records: list[Record], galleries: list[Gallery]) -> None:
    """Writes the report of one run, or of several side by side."""
    with replacing(path) as temporary:
        # Bytes of a file name that are no text appear as \udcff.
        temporary.write_bytes(render(records, galleries).encode("utf-8", "backslashreplace"))


def render(records: list[Record], galleries: list[Gallery]) -> str:
    """The page. Equal records and galleries give equal text."""
    script = _source("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pairs = zip(records, galleries, strict=True)
    runs = [_run(number, *pair) for number, pair in enumerate(pairs, start=1)]
    return (
        _environment()
        .get_template("report.html")
        .render(
            title="Report of " + (records[0].name if len(records) == 1 else f"{len(records)} runs"),
            style=Markup(_source("report.css")),
            script=Markup(script),
            script_hash=digest,
            runs=runs,
            fields=FLAGS,
            curves=_curves(records, "all") if len(records) > 1 else None,
            differing=comparison.differing([record.config["flags"] for record in records]),
            data={"runs": [_data(record) for record in records]},
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Text of a run's files may hold line ends and terminal commands.
        finalize=lambda v: v if isinstance(v, Markup) or type(v) is not str else one_line(v),
    )
    environment.filters |= {
        "percent": lambda value, digits=2: NONE if value is None else f"{value:.{digits}%}",
        "number": lambda value, digits=4: NONE if value is None else f"{value:,.{digits}f}",
        "flag": lambda value: NONE if value in (None, "") else str(value),
    }
    return environment


def _source(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


# ---- What the template shows of a run


def _run(number: int, record: Record, gallery: Gallery) -> dict:
    identifier, metrics = f"run{number}", record.metrics or {}
    names, matrix, reliability = list(metrics.get("per_class", ())), None, None
    if len(names) > plots.MAX_NUMBERED:
        title = f"Confusion matrix of {len(names)} classes; a table of the most confused follows"
        figure = plots.confusion(metrics["confusion"], names)
        matrix = Markup(plots.svg(figure, title, f"{identifier}-matrix"))
    if "calibration" in metrics:
        figure = plots.reliability(metrics["calibration"]["bins"])
        title = "Accuracy by probability of the predicted class"
        reliability = Markup(plots.svg(figure, title, f"{identifier}-reliability"))
    return {
        "number": number,
        "id": identifier,
        "record": record,
        "metrics": metrics,
        "gallery": gallery,
        "curves": _curves([record], identifier),
        "matrix": matrix,
        "reliability": reliability,
    }


def _curves(records: list[Record], identifier: str) -> list[tuple[str, Markup]]:
    """(title, chart) of loss and error over the epochs; several runs share a chart."""
    histories, drawn = [record.history for record in records], []
    for title in ("Loss", "Error") if any(histories) else ():
        figure = plots.curves(histories, [title.lower()], plots.SMALL)
        chart = plots.svg(figure, f"{title} over the epochs", f"{identifier}-{title.lower()}")
        drawn.append((title, Markup(chart)))
    return drawn


def _data(record: Record) -> dict:
    """The metrics in full precision, for programs that read the page."""
    kept = (*SCALARS, "intervals", "per_class", "calibration")
    return {
        "name": record.name,
        "flags": record.flags(),
        "history": record.history,
        "evaluations": {
            split: {name: metrics[name] for name in kept if name in metrics}
            for split, metrics in record.evaluations.items()
        },
        "disturbances": record.disturbances,
    }
