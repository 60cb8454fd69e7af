"""Exports a run's selected model for serving, and verifies it against the model on real images.

python -m keras_cifar.export --run RUN
"""

import dataclasses
import math
import pathlib

from keras_cifar.core import cli
from keras_cifar.core.options import check, option
from keras_cifar.exporters import FORMATS

GROUP = "Export"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The command's flags."""

    run: str = option("", "the run directory", GROUP)
    format: str = option("saved_model", "what is written", GROUP, FORMATS)
    out: str | None = option(
        None, "the base path (default: RUN/export, or RUN/FORMAT for other formats)", GROUP
    )
    version: int | None = option(None, "the version's number (default: the next one)", GROUP)
    labels: str | None = option(
        None, "a text file of names to show for the classes, one a line, in their order", GROUP
    )
    temperature: str | None = option(
        None,
        "divides the logits, for probabilities that match the accuracy: a number; auto, fitted on the "
        "run's validation images; or another run with the same flags, fitted on that run's, where "
        "this run was trained on all images (default: 1)",
        GROUP,
    )

    def __post_init__(self):
        check(self.run, "--run=RUN is needed: the run directory")
        check(self.version is None or self.version > 0, f"--version={self.version} must be above 0")
        check_temperature(self.temperature)


def check_temperature(text: str | None) -> None:
    """Raises UsageError for an invalid --temperature."""
    try:
        valid = text in (None, "auto") or 0 < float(text) < math.inf
    except ValueError:
        valid = bool(text) and pathlib.Path(text).expanduser().is_dir()
    check(valid, f"--temperature={text} must be auto, a number above 0, or a run directory")


def main(options: ExportOptions) -> None:
    """Runs the command."""
    from keras_cifar.evaluation.run_export import export_run
    from keras_cifar.exporters import bundle

    path, summary = export_run(
        options.run,
        options.format,
        options.out,
        options.version,
        options.labels,
        options.temperature,
    )
    print(summary)
    if options.format == "saved_model":
        print(f"classify images: python -m keras_cifar.predict --model {path} IMAGE ...")
        for purpose, line in bundle.commands(path.parent).items():
            print(f"{purpose}: {line}")
        print(f"all of this is in {path.parent / bundle.NOTES}")


if __name__ == "__main__":
    cli.run("export", main, ExportOptions, __doc__)
