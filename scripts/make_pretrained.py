#!/usr/bin/env python3
"""Adds a run's selected model to the networks that come with the package, for its developers.

python scripts/make_pretrained.py RUN NAME --data 'JPEG CIFAR-10'

The weights are rounded to float16, which must change the test accuracy by less than 0.001, and take
at most 4 MB.
"""

import dataclasses
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import keras_cifar
from keras_cifar import pretrained
from keras_cifar.core import cli
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import replacing, write_json
from keras_cifar.core.options import check, check_temperature, option
from keras_cifar.core.run_directory import Run

TOLERANCE = 0.001  # the test accuracy with float16 kernels differs by less than this


@dataclasses.dataclass(frozen=True)
class PretrainedOptions:
    """The command's flags."""

    data: str = option("", "a description of the run's images, for the card", "Card")
    temperature: str | None = option(None, "as python -m keras_cifar.export takes it", "Card")
    limits: str = option(
        "images of other things than its classes, and other images than those of its data",
        "what the network is not suited for",
        "Card",
    )
    licence: str = option("Apache-2.0", "of the weights", "Card")

    def __post_init__(self):
        check(self.data, "--data=TEXT is needed: the run's images, such as 'JPEG CIFAR-10'")
        check_temperature(self.temperature)


def main(options: PretrainedOptions, arguments: list[str]) -> None:
    """Runs the command."""
    check(len(arguments) == 2, "give a run directory and a name")
    directory, name = arguments
    card, before, size = save(Run(directory), name, options)
    print(
        f"test accuracy {card.accuracy:.4f} on {card.count:,} images, {before:.4f} before rounding; "
        f"{size:,} bytes"
    )
    for suffix in (pretrained.WEIGHTS, pretrained.CARD):
        print(pretrained.DIRECTORY / f"{name}{suffix}")


def save(run: Run, name: str, options: PretrainedOptions) -> tuple[pretrained.Card, float, int]:
    """Writes NAME.safetensors and NAME.json into the package.

    Returns:
        (the card, the test accuracy before rounding, the bytes of the weights).

    Raises:
        UsageError: the name is invalid.
        UserError: the run or its images are missing, the weights take too many bytes, float16 changes
            the accuracy too much, or the model in the code has changed since the training.
    """
    from keras_cifar import models
    from keras_cifar.core import tensors
    from keras_cifar.evaluation import evaluator, metrics
    from keras_cifar.evaluation.temperature import find_temperature, scale_logits

    valid = re.fullmatch(r"[a-z0-9_]+", name)
    check(valid, f"the name {name!r} must consist of lower-case letters, digits and _")
    config = run.read_config()
    flags, shape = config["flags"], tuple(config["image_shape"])
    model = models.load(run.model)
    contents = tensors.save(pretrained.rounded_weights(model), {"name": name})
    if len(contents) > pretrained.MAX_BYTES:
        raise UserError(
            f"the weights of {run.path} take {len(contents):,} bytes, more than "
            f"{pretrained.MAX_BYTES:,}, which everybody who installs the package would download"
        )
    temperature = None
    if options.temperature:
        temperature = find_temperature(options.temperature, run)["temperature"]
    # As `pretrained.load` will build it.
    rounded = models.build(flags["model"], shape, len(config["class_names"])).deployable
    try:
        stored = tensors.load(contents, pretrained.rounded_weights(rounded))
    except ValueError:
        raise UserError(
            f"{run.model} differs from what --model={flags['model']} builds now"
        ) from None
    pretrained.assign_weights(rounded, stored)
    if temperature:
        rounded = scale_logits(rounded, temperature)
    split = evaluator.load_data(config, "test").test
    probabilities = evaluator.predict(rounded, split)
    before = accuracy(evaluator.predict(model, split), split)
    after = accuracy(probabilities, split)
    if abs(after - before) >= TOLERANCE:
        raise UserError(
            f"in float16 the test accuracy of {run.path} is {after:.4f}, and it was {before:.4f}: a "
            f"difference of {TOLERANCE} or more"
        )
    error = metrics.calibration_error(probabilities, split.labels)
    card = pretrained.Card(
        model=flags["model"],
        image_shape=shape,
        class_names=tuple(config["class_names"]),
        data=options.data,
        recipe=flags.get("recipe"),
        accuracy=after,
        count=len(split),
        temperature=temperature,
        calibration_error=error["expected_calibration_error"],
        limits=options.limits,
        licence=options.licence,
        source=f"trained with keras_cifar {keras_cifar.__version__}, revision "
        f"{config.get('git_revision') or 'unknown'}",
        rule=flags["resize"],
    )
    with replacing(pretrained.DIRECTORY / f"{name}{pretrained.WEIGHTS}") as temporary:
        temporary.write_bytes(contents)
    # The card last: a network without a card does not exist.
    write_json(pretrained.DIRECTORY / f"{name}{pretrained.CARD}", dataclasses.asdict(card))
    return card, before, len(contents)


def accuracy(probabilities, split) -> float:
    """The fraction of images whose most probable class is the label."""
    return float((probabilities.argmax(axis=1) == split.labels).mean())


if __name__ == "__main__":
    cli.run("scripts/make_pretrained.py", main, PretrainedOptions, __doc__, "RUN NAME")
