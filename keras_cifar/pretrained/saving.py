"""A run's selected model -> the two files of a network that comes with the package."""

import dataclasses
import re

import numpy as np

import keras_cifar
from keras_cifar import models, pretrained
from keras_cifar.core import tensors
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.files import replacing, write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.data import Split
from keras_cifar.evaluation import evaluator, metrics
from keras_cifar.evaluation.temperature import find_temperature, scale_logits
from keras_cifar.pretrained import Card

TOLERANCE = 0.001  # by which float16 may change the test accuracy; less than this, either way


def save(
    run: Run, name: str, data: str, limits: str, licence: str, temperature: str | None = None
) -> tuple[Card, float, int]:
    """Writes NAME.safetensors and NAME.json beside those that are there.

    Args:
        data: what the run's images are, in words; the card has no paths.
        limits: what the network is not good for, in words.
        licence: of the weights.
        temperature: as `find_temperature` takes it; None leaves the logits as they are.

    Returns:
        (the card, the test accuracy before rounding, the bytes of the weights).

    Raises:
        UsageError: the name is none.
        UserError: a run or its images are not there, the weights take too many bytes, float16 changes
            the accuracy too much, the model is not what its name in `models` makes, or there is no such
            temperature.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UsageError(f"the name {name!r} must consist of lower-case letters, digits and _")
    config = run.read_config()
    flags, shape = config["flags"], tuple(config["image_shape"])
    model = models.load(run.model)
    arrays = pretrained.rounded(model)
    contents = b"".join(tensors.pack(arrays, {"name": name}))
    if len(contents) > pretrained.LARGEST:
        raise UserError(
            f"the weights of {run.path} take {len(contents):,} bytes, more than "
            f"{pretrained.LARGEST:,}, which everybody who installs the package would get"
        )
    divisor = find_temperature(temperature, run)["temperature"] if temperature else None
    # As it will be loaded.
    small = models.build(flags["model"], shape, len(config["class_names"])).deployable
    try:
        pretrained.assign(small, tensors.unpack(contents, pretrained.rounded(small)))
    except ValueError:
        raise UserError(f"{run.model} is not what --model={flags['model']} makes now") from None
    if divisor:
        small = scale_logits(small, divisor)
    split = evaluator.load_data(config, "test").test
    probabilities = evaluator.predict(small, split)
    before = _accuracy(evaluator.predict(model, split), split)
    after = _accuracy(probabilities, split)
    if abs(after - before) >= TOLERANCE:
        raise UserError(
            f"in float16 the test accuracy of {run.path} is {after:.4f}, and it was {before:.4f}: a "
            f"difference of {TOLERANCE} or more"
        )
    error = metrics.calibration_error(probabilities, split.labels)
    card = Card(
        model=flags["model"],
        image_shape=shape,
        class_names=tuple(config["class_names"]),
        data=data,
        recipe=flags.get("recipe"),
        accuracy=after,
        count=len(split),
        temperature=divisor,
        calibration_error=error["expected_calibration_error"],
        limits=limits,
        licence=licence,
        source=f"trained with keras_cifar {keras_cifar.__version__}, revision "
        f"{config.get('git_revision') or 'unknown'}",
    )
    with replacing(pretrained.DIRECTORY / f"{name}{pretrained.WEIGHTS}") as temporary:
        temporary.write_bytes(contents)
    # The card last: without it the network is not there.
    write_json(pretrained.DIRECTORY / f"{name}{pretrained.CARD}", dataclasses.asdict(card))
    return card, before, len(contents)


def _accuracy(probabilities: np.ndarray, split: Split) -> float:
    return float(np.mean(probabilities.argmax(axis=1) == split.labels))
