"""Exports a run's selected model as a SavedModel that any TensorFlow runtime can serve.

python -m keras_cifar.export --run RUN
"""

import dataclasses
import pathlib

from keras_cifar import cli
from keras_cifar.config import check, option
from keras_cifar.errors import check_utf8
from keras_cifar.run import Run


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The command's flags."""

    run: str = option("", "the run directory", "Export")
    out: str | None = option(None, "the base path (default: RUN/export)", "Export")
    version: int | None = option(None, "the version's number (default: the next one)", "Export")

    def __post_init__(self):
        check(self.run, "--run=RUN is needed: the run directory")
        check(self.version is None or self.version > 0, f"--version={self.version} must be above 0")


def main(options: ExportOptions) -> None:
    """Runs the command."""
    from keras_cifar import models
    from keras_cifar.exporters import saved_model

    run = Run(options.run)
    class_names = tuple(run.read_config()["class_names"])
    base = pathlib.Path(options.out).expanduser() if options.out else run.export
    check_utf8("out", base)
    path = saved_model.export(models.load(run.model), base, class_names, options.version)
    print(f"export    {path}")
    print(f"classify pictures: python -m keras_cifar.predict --model {path} IMAGE ...")


if __name__ == "__main__":
    cli.run("export", main, ExportOptions, __doc__)
