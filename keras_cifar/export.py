"""Exports a run's selected model for service, and checks it against the model on real images.

python -m keras_cifar.export --run RUN
"""

import dataclasses
import importlib
import math
import pathlib
import sys

from keras_cifar.core import cli
from keras_cifar.core.errors import UserError, check_utf8, one_line, reason
from keras_cifar.core.files import read
from keras_cifar.core.options import check, option
from keras_cifar.core.run_directory import Run
from keras_cifar.exporters import FORMATS

TEMPERATURES = (
    "a number; auto, which fits it on the run's validation images; or another run with the same flags, "
    "which fits it on that one's, where this run was trained on all images"
)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The command's flags."""

    run: str = option("", "the run directory", "Export")
    format: str = option("saved_model", "what is written", "Export", FORMATS)
    out: str | None = option(
        None, "the base path (default: RUN/export, or RUN/FORMAT for other formats)", "Export"
    )
    version: int | None = option(None, "the version's number (default: the next one)", "Export")
    labels: str | None = option(
        None, "a text file of names to show for the classes, one a line, in their order", "Export"
    )
    temperature: str | None = option(
        None,
        "divides the logits, so that probabilities are neither too sure nor too unsure: "
        f"{TEMPERATURES} (default: 1)",
        "Export",
    )

    def __post_init__(self):
        check(self.run, "--run=RUN is needed: the run directory")
        check(self.version is None or self.version > 0, f"--version={self.version} must be above 0")
        check_temperature(self.temperature)


def check_temperature(text: str | None) -> None:
    """Checks that a --temperature is one."""
    try:
        good = text in (None, "auto") or 0 < float(text) < math.inf
    except ValueError:
        good = pathlib.Path(text).expanduser().is_dir() if text else False
    check(good, f"--temperature={text} must be auto, a number above 0, or a run directory")


def main(options: ExportOptions) -> None:
    """Runs the command."""
    from keras_cifar import models
    from keras_cifar.evaluation import evaluator, text
    from keras_cifar.evaluation.temperature import find_temperature, scale_logits
    from keras_cifar.exporters import bundle, verification

    run = Run(options.run)
    config = run.read_config()
    class_names = tuple(config["class_names"])
    if options.labels:
        class_names = read_labels(options.labels, len(class_names))
    default = run.export if options.format == "saved_model" else run.path / options.format
    base = pathlib.Path(options.out).expanduser() if options.out else default
    check_utf8("out", base)
    exporter = importlib.import_module(f"keras_cifar.exporters.{options.format}")
    model = models.load(run.model)

    record = {}
    if options.temperature:
        record = {"calibration": find_temperature(options.temperature, run)}
        model = scale_logits(model, record["calibration"]["temperature"])
    samples = None
    try:
        split = "val" if "val" in config["splits"] else "test"
        samples = verification.of_dataset(
            evaluator.load_data(config, split), config["flags"]["data"]
        )
    except UserError as error:
        if exporter.NEEDS_IMAGES:
            raise
        print(f"the run's images are not to be had ({one_line(str(error))})", file=sys.stderr)

    path = exporter.export(model, base, class_names, options.version, samples, **record)
    if "images" in record.get("calibration", ()):
        print(text.temperature_summary(record["calibration"]))
    print(f"export    {path}\n{verification.summary(path)}")
    if options.format == "saved_model":
        print(f"classify pictures: python -m keras_cifar.predict --model {path} IMAGE ...")
        for what, line in bundle.commands(base).items():
            print(f"{what}: {line}")
        print(f"all of that is in {base / bundle.NOTES}")


def read_labels(path: str, count: int) -> tuple[str, ...]:
    """The names in a text file, one a line.

    Raises:
        UserError: the file cannot be read, or has another number of names than there are classes.
    """
    from keras_cifar.data.splits import check_class_name
    from keras_cifar.inference.predictor import MAX_LABELS

    try:
        names = tuple(read(pathlib.Path(path).expanduser(), MAX_LABELS).decode().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels={path} cannot be read: {reason(error)}") from None
    if len(names) != count:
        raise UserError(
            f"--labels={path} has {len(names):,} names and the run has {count:,} classes"
        )
    for name in names:
        check_class_name(name, f"--labels={path}")
    return names


if __name__ == "__main__":
    cli.run("export", main, ExportOptions, __doc__)
