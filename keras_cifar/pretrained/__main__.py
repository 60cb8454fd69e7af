"""Puts a run's selected model into the package, for those who develop it.

python -m keras_cifar.pretrained RUN NAME --data 'JPEG CIFAR-10'

The weights are rounded to float16, which must not change the test accuracy by 0.001, and take at most
4 MB.
"""

import dataclasses

from keras_cifar import pretrained
from keras_cifar.core import cli
from keras_cifar.core.options import check, option
from keras_cifar.core.run_directory import Run
from keras_cifar.export import TEMPERATURES, check_temperature


@dataclasses.dataclass(frozen=True)
class PretrainedOptions:
    """The command's flags."""

    data: str = option("", "what the run's images are, in words, for the card", "Card")
    temperature: str | None = option(
        None, f"divides the logits: {TEMPERATURES} (default: 1)", "Card"
    )
    limits: str = option(
        "pictures of other things than its classes, and other pictures than those of its data",
        "what the network is not good for",
        "Card",
    )
    licence: str = option("Apache-2.0", "of the weights", "Card")

    def __post_init__(self):
        check(
            self.data, "--data=WORDS is needed: what the run's images are, such as 'JPEG CIFAR-10'"
        )
        check_temperature(self.temperature)


def main(options: PretrainedOptions, arguments: list[str]) -> None:
    """Runs the command."""
    check(len(arguments) == 2, "give a run directory and a name")
    from keras_cifar.pretrained import saving

    run, name = arguments
    card, before, size = saving.save(
        Run(run), name, options.data, options.limits, options.licence, options.temperature
    )
    print(
        f"test accuracy {card.accuracy:.4f} on {card.count:,} images, {before:.4f} before rounding; "
        f"{size:,} bytes"
    )
    for suffix in (pretrained.WEIGHTS, pretrained.CARD):
        print(pretrained.DIRECTORY / f"{name}{suffix}")


if __name__ == "__main__":
    cli.run("pretrained", main, PretrainedOptions, __doc__, "RUN NAME")
