"""Exports a run's selected model for serving, and verifies it against the model on real images.

python -m keras_cifar.export --run RUN
python -m keras_cifar.export --model resnet50 --init_from imagenet --out DIR
"""

import dataclasses

from keras_cifar.core import cli
from keras_cifar.core.image_size import RESIZE
from keras_cifar.core.options import Options, check, check_temperature, option
from keras_cifar.exporters import FORMATS

GROUP, WEIGHTS = "Export", "Without a run"


@dataclasses.dataclass(frozen=True)
class ExportOptions(Options):
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
        "run's validation images; or another run with the same flags, fitted on its (default: 1)",
        GROUP,
    )
    model: str = option("", "a network, for the weights of --init_from", WEIGHTS)
    init_from: str = option("imagenet", "its weights, as for `train`", WEIGHTS)
    image_size: str | None = option(None, "as for `train` (default: the network's)", WEIGHTS)
    resize: str = option("auto", "as for `train`", WEIGHTS, RESIZE)

    def __post_init__(self):
        super().__post_init__()
        check(
            bool(self.run) != bool(self.model), "give --run=RUN, or --model=NETWORK and --out=DIR"
        )
        needs_run = self.format != "saved_model" or self.temperature
        check(not (self.model and needs_run), "--format and --temperature need --run=RUN")
        check(self.run or self.out, "--model needs --out=DIR, the base path")
        check(self.version is None or self.version > 0, f"--version={self.version} must be above 0")
        check_temperature(self.temperature)


def main(options: ExportOptions) -> None:
    """Runs the command."""
    from keras_cifar.exporters import bundle

    given = options.out, options.version
    if options.model:
        from keras_cifar.pretrained import network

        sizes = options.image_size, options.resize
        found = network.load(options.model, options.init_from, *sizes, options.labels)
        path, summary = network.export(found, *given)
    else:
        from keras_cifar.evaluation.run_export import export_run

        rest = options.labels, options.temperature
        path, summary = export_run(options.run, options.format, *given, *rest)
    print(summary)
    if options.format == "saved_model":
        print(f"classify images: python -m keras_cifar.predict --model {path} IMAGE ...")
        for purpose, line in bundle.commands(path.parent).items():
            print(f"{purpose}: {line}")
        print(f"all of this is in {path.parent / bundle.NOTES}")


if __name__ == "__main__":
    cli.run("export", main, ExportOptions, __doc__)
