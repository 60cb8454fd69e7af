"""Exports a run's selected model: with its temperature, verified on the run's own images."""

import importlib
import pathlib
import sys

from keras_cifar import models
from keras_cifar.core.errors import UserError, check_utf8, reason
from keras_cifar.core.files import read
from keras_cifar.core.run_directory import Run
from keras_cifar.data.splits import check_class_name
from keras_cifar.evaluation import evaluator, text
from keras_cifar.evaluation.temperature import find_temperature, scale_logits
from keras_cifar.exporters import verification
from keras_cifar.inference.predictor import MAX_LABELS


def export_run(
    directory: str,
    format: str,
    out: str | None = None,
    version: int | None = None,
    labels: str | None = None,
    temperature: str | None = None,
) -> tuple[pathlib.Path, str]:
    """Exports a run's selected model; the arguments are the flags of `export`.

    Returns (the version's directory, the results of temperature scaling and verification as text).

    Raises:
        UserError: the run or the labels are missing or invalid, the format needs images that are
            missing, or the export differs from the model.
    """
    run = Run(directory)
    config = run.read_config()
    class_names = tuple(config["class_names"])
    if labels:
        class_names = read_labels(labels, len(class_names))
    default = run.export if format == "saved_model" else run.path / format
    base = pathlib.Path(out).expanduser() if out else default
    check_utf8("out", base)
    exporter = importlib.import_module(f"keras_cifar.exporters.{format}")
    model = models.load(run.model)
    record, lines = verification.origin(run.model), []
    if temperature:
        fitted = record["calibration"] = find_temperature(temperature, run)
        model = scale_logits(model, fitted["temperature"])
        if "images" in fitted:
            lines.append(text.temperature_summary(fitted))
    samples = None
    try:
        split = "val" if "val" in config["splits"] else "test"
        dataset = evaluator.load_data(config, split)
        samples = verification.of_dataset(dataset, config["flags"]["data"])
    except UserError as error:
        if exporter.NEEDS_IMAGES:
            raise
        print(f"the run's images cannot be loaded ({error})", file=sys.stderr)
    rule = config["flags"]["resize"]
    path = exporter.export(model, base, class_names, version, samples, rule, **record)
    return path, "\n".join([*lines, f"export    {path}", verification.summary(path)])


def read_labels(path: str, count: int) -> tuple[str, ...]:
    """The names in a text file, one a line; UserError unless it holds `count` class names."""
    try:
        names = tuple(read(pathlib.Path(path).expanduser(), MAX_LABELS).decode().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels={path} cannot be read: {reason(error)}") from None
    if len(names) != count:
        counts = f"{len(names):,} names and the run has {count:,} classes"
        raise UserError(f"--labels={path} has {counts}")
    for name in names:
        check_class_name(name, f"--labels={path}")
    return names
