"""Trained networks that come with the package: NAME.safetensors, its weights, and NAME.json, its card.

Kernels are in float16 and everything else, of which there is little and which can be very small, in
float32. `python -m keras_cifar.pretrained RUN NAME` makes both files. Standard library only, as every
command knows the names; TensorFlow is imported where a network is built.
"""

import dataclasses
import json
import pathlib
import typing

from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import read

if typing.TYPE_CHECKING:
    import keras

PREFIX = "pretrained:"  # of the name, where a model may also be a path
DIRECTORY = pathlib.Path(__file__).parent
WEIGHTS, CARD = ".safetensors", ".json"

LARGEST = 4_000_000  # bytes of the weights: everybody who installs the package gets them


@dataclasses.dataclass(frozen=True)
class Card:
    """What is to be known of a network.

    Attributes:
        model: its name in `models`.
        image_shape: (height, width, 3) of its images.
        class_names: in the order of the probabilities.
        data: on which it was trained and tested.
        recipe: with which it was trained; None where there is none.
        accuracy: on the test images, of these very weights.
        count: of the test images.
        temperature: what the logits are divided by (temperature scaling); None where they are left.
        calibration_error: expected calibration error on the test images, after that (Guo et al. 2017,
            arXiv:1706.04599).
        limits: what it is not good for.
        licence: of the weights.
        source: who trained it, and from which revision of the code.
    """

    model: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    data: str
    recipe: str | None
    accuracy: float
    count: int
    temperature: float | None
    calibration_error: float
    limits: str
    licence: str
    source: str


def names() -> list[str]:
    """The networks there are, in order."""
    cards = {path.stem for path in DIRECTORY.glob(f"*{CARD}")}
    return sorted(cards & {path.stem for path in DIRECTORY.glob(f"*{WEIGHTS}")})


def card(name: str) -> Card:
    """The card of a network.

    Raises:
        UsageError: there is none of this name.
        UserError: the card is damaged.
    """
    if name not in names():
        there = f"choose one of: {', '.join(names())}" if names() else "this installation has none"
        raise UsageError(f"unknown model {PREFIX + name!r}; {there}")
    path = DIRECTORY / f"{name}{CARD}"
    try:
        values = json.loads(read(path, LARGEST))
        lists = {key: tuple(values[key]) for key in ("image_shape", "class_names")}
        return Card(**values | lists)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {reason(error)}") from None


def describe() -> str:
    """The cards of all networks, as text."""
    if not names():
        return "no models come with this installation"
    parts = []
    for name in names():
        mine = card(name)
        height, width, _ = mine.image_shape
        temperature = f", temperature {mine.temperature:.3f}" if mine.temperature else ""
        lines = {
            "model": f"{mine.model}, images of {width} x {height}",
            "classes": ", ".join(mine.class_names),
            "data": mine.data,
            "recipe": mine.recipe or "none",
            "accuracy": f"{mine.accuracy:.4f} on {mine.count:,} test images",
            "calibration": f"expected error {mine.calibration_error:.4f}{temperature}",
            "limits": mine.limits,
            "licence": mine.licence,
            "source": mine.source,
            "weights": f"{(DIRECTORY / (name + WEIGHTS)).stat().st_size:,} bytes",
        }
        parts.append(
            "\n".join([f"{PREFIX}{name}", *(f"  {key:<13}{text}" for key, text in lines.items())])
        )
    return "\n\n".join(parts)


def load(name: str) -> tuple["keras.Model", Card]:
    """(the plain functional model of a network, float32, its temperature in it; its card).

    Raises:
        UsageError: there is none of this name.
        UserError: a file of it is damaged.
    """
    mine = card(name)
    from keras_cifar import models
    from keras_cifar.core import tensors
    from keras_cifar.evaluation.temperature import scale_logits

    model = models.build(mine.model, mine.image_shape, len(mine.class_names)).deployable
    path = DIRECTORY / f"{name}{WEIGHTS}"
    try:
        stored = tensors.unpack(read(path, LARGEST), rounded(model))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {reason(error)}") from None
    assign(model, stored)
    return (scale_logits(model, mine.temperature) if mine.temperature else model), mine


def rounded(model: "keras.Model") -> dict:
    """The weights of a model as they are stored: float16 where there are two dimensions or more."""
    arrays = {}
    for weight in model.weights:
        values = weight.numpy()
        arrays[weight.path] = values.astype("float16" if values.ndim > 1 else "float32", order="C")
    return arrays


def assign(model: "keras.Model", stored: dict) -> None:
    """Gives a model weights as `rounded` makes them."""
    for weight in model.weights:
        weight.assign(stored[weight.path].astype("float32"))
