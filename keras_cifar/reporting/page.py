"""Records and pictures of runs -> one HTML file, which asks nobody for anything."""

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import pathlib

import jinja2
import numpy as np
from markupsafe import Markup

from keras_cifar.core.config import FLAGS
from keras_cifar.core.errors import one_line
from keras_cifar.core.files import replacing
from keras_cifar.reporting import charts
from keras_cifar.reporting.record import SCALARS, Record

NONE = "\N{EN DASH}"  # what is shown where there is no figure
MAX_RUNS = 8  # whose lines are told apart
MAX_NUMBERED = 20  # classes of which a confusion matrix is a table of numbers
MAX_DRAWN = 1000  # classes of which it is drawn; a browser takes long for more


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Pictures of a run's evaluation, as data: URLs.

    Attributes:
        missing: why there are none; empty where there are some.
        mistakes: "row", "true", "predicted", "probability", "true_probability" as in the evaluation;
            "top", (class, probability) of the most probable or empty; "picture" and "overlay".
        disturbed: the same picture at each strength, by the disturbance's name.
    """

    missing: str = ""
    mistakes: tuple[dict, ...] = ()
    disturbed: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def write(path: pathlib.Path, records: list[Record], galleries: list[Gallery]) -> None:
    """Writes the report of one run or of several side by side."""
    with replacing(path) as temporary:
        # Bytes of files' names that are no text are written as \udcff.
        temporary.write_bytes(render(records, galleries).encode("utf-8", "backslashreplace"))


def render(records: list[Record], galleries: list[Gallery]) -> str:
    """The page: the same for the same records and galleries."""
    environment = _environment()
    script = _source("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = [
        _run(number, record, gallery)
        for number, (record, gallery) in enumerate(zip(records, galleries, strict=True), start=1)
    ]
    return environment.get_template("report.html").render(
        title="Report of " + (records[0].name if len(records) == 1 else f"{len(records)} runs"),
        style=Markup(_source("report.css")),
        script=Markup(script),
        script_hash=digest,
        runs=runs,
        curves=_curves(records) if len(records) > 1 else None,
        differing=_differing(records),
        data={"runs": [_data(record) for record in records]},
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What a run's files say may hold line ends and commands to terminals.
        finalize=lambda v: v if isinstance(v, Markup) or type(v) is not str else one_line(v),
    )
    environment.filters |= {"percent": _percent, "number": _number}
    return environment


def _source(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


def _percent(share: float | None, digits: int = 2) -> str:
    return NONE if share is None else f"{share:.{digits}%}"


def _number(value: float | None, digits: int = 4) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


# ---- What the template shows of a run


def _run(number: int, record: Record, gallery: Gallery) -> dict:
    figures = record.figures or {}
    return {
        "number": number,
        "id": f"run{number}",
        "record": record,
        "figures": figures,
        "gallery": gallery,
        "curves": _curves([record]),
        "flags": _flags(record),
        "confusion": _confusion(record) if figures else None,
        "calibration": _calibration(figures),
        "disturbances": _disturbances(record, gallery),
    }


def _flags(record: Record) -> list[tuple]:
    """(flag, value, default, what it is) of the flags that are not at their default."""
    rows = []
    for name, value in record.flags().items():
        field = FLAGS.get(name)
        default, what = (field.default, field.metadata["help"]) if field else (None, NONE)
        rows.append((f"--{name}", _words(value), _words(default), what))
    return rows


def _words(value: object) -> str:
    """The value of a flag."""
    return NONE if value in (None, "") else str(value)


def _curves(records: list[Record]) -> list[dict]:
    """Loss and error over the epochs; of several runs, in one plot."""
    drawn = []
    for title, up, key, value in (
        ("Loss", "cross-entropy", "loss", lambda v: v),
        ("Error", "share of wrong answers", "accuracy", lambda v: 1 - v),
    ):
        series, names = [], []
        for number, record in enumerate(records):
            for prefix, what in (("", "train"), ("val_", "validation")):
                name = prefix + key
                if not any(row.get(name) is not None for row in record.history):
                    continue
                line = [
                    (int(row["epoch"]), None if row.get(name) is None else value(row[name]))
                    for row in record.history
                ]
                alone = len(records) == 1
                colour = (2 if prefix else 1) if alone else number + 1
                series.append((colour, not prefix, line))
                names.append((colour, not prefix, what if alone else f"{record.name}, {what}"))
        words = f"{title} over the epochs, {', '.join(name for _, _, name in names)}"
        if series:
            drawn.append({"title": title, "svg": charts.lines(words, up, series), "legend": names})
    return drawn


def _differing(records: list[Record]) -> list[tuple[str, list[str]]]:
    """(flag, its value in each run) of the flags that differ."""
    all_flags = [record.flags() for record in records]
    names = dict.fromkeys(name for flags in all_flags for name in flags)
    defaults = {name: field.default for name, field in FLAGS.items()}
    rows = [
        (f"--{name}", [_words(flags.get(name, defaults.get(name))) for flags in all_flags])
        for name in names
    ]
    return [row for row in rows if len(set(row[1])) > 1]


def _confusion(record: Record) -> dict:
    """The matrix as a table of (name, (count, share of the true class) of each), or as a drawing."""
    names = list(record.figures["per_class"])
    counts = np.array(record.figures["confusion"], np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, drawing = [], None
    if len(names) <= MAX_NUMBERED:
        rows = [
            (name, list(zip(counts[i].tolist(), shares[i].tolist(), strict=True)))
            for i, name in enumerate(names)
        ]
    elif len(names) <= MAX_DRAWN:
        words = f"Confusion matrix of {len(names)} classes; the pairs that are confused most follow"
        drawing = charts.matrix(words, shares, names)
    return {"names": names, "rows": rows, "drawing": drawing}


def _calibration(figures: dict) -> dict | None:
    found = figures.get("calibration")
    if not found:
        return None
    error = found["expected_calibration_error"]
    words = f"Accuracy by probability; expected calibration error {error:.4f}"
    svg = charts.reliability(words, found["bins"])
    return {"error": error, "bins": found["bins"], "svg": svg}


def _disturbances(record: Record, gallery: Gallery) -> dict | None:
    if not record.disturbances:
        return None
    found = record.disturbances
    rows = [
        {
            "name": name,
            "unit": row.get("unit", ""),
            "cells": list(zip(row["strengths"], row["accuracy"], strict=True)),
            "mean": float(np.mean(row["accuracy"])),
            "pictures": gallery.disturbed.get(name, []),
        }
        for name, row in found["disturbances"].items()
    ]
    most = max((len(row["cells"]) for row in rows), default=0)
    return found | {"rows": rows, "levels": list(range(1, most + 1))}


def _data(record: Record) -> dict:
    """The figures for machines, in full precision."""
    kept = (*SCALARS, "intervals", "per_class", "calibration")
    return {
        "name": record.name,
        "flags": record.flags(),
        "history": record.history,
        "evaluations": {
            split: {name: figures[name] for name in kept if name in figures}
            for split, figures in record.evaluations.items()
        },
        "disturbances": record.disturbances,
    }
