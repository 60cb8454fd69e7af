"""Pretrained networks that come with the package: NAME.safetensors holds weights, NAME.json the card.

Kernels are stored in float16; all other weights, which are few and can be very small, in float32.
`scripts/make_pretrained.py` writes both files. Standard library only, as every command knows the
names; TensorFlow is imported where a network is built.
"""

import dataclasses
import json
import pathlib
import typing

from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import read
from keras_cifar.core.image_size import STRETCH

if typing.TYPE_CHECKING:
    import keras

PREFIX = "pretrained:"  # of a name where a model may also be a path
DIRECTORY = pathlib.Path(__file__).parent
WEIGHTS, CARD = ".safetensors", ".json"

MAX_BYTES = 4_000_000  # of the weights: everybody who installs the package downloads them


@dataclasses.dataclass(frozen=True)
class Card:
    """Facts about a network."""

    model: str  # its name in `models`
    image_shape: tuple[int, int, int]  # (height, width, 3)
    class_names: tuple[str, ...]  # in the order of the probabilities
    data: str  # what it was trained and tested on
    recipe: str | None
    accuracy: float  # of these weights on the test images
    count: int  # of test images
    temperature: float | None  # divides the logits; None where there is no temperature scaling
    calibration_error: float  # with the temperature (Guo et al. 2017, arXiv:1706.04599)
    limits: str  # what the network is not suited for
    licence: str  # of the weights
    source: str  # who trained it, with which revision of the code
    rule: str = STRETCH  # by which images get the shape, see `data.images.resize_images`


def names() -> list[str]:
    """The names of the networks, sorted."""
    cards = {path.stem for path in DIRECTORY.glob(f"*{CARD}")}
    return sorted(cards & {path.stem for path in DIRECTORY.glob(f"*{WEIGHTS}")})


def card(name: str) -> Card:
    """The card of a network; raises UsageError if there is no such network."""
    if name not in names():
        choices = ", ".join(names()) or "(this installation has none)"
        raise UsageError(f"unknown model {PREFIX + name!r}; choose one of: {choices}")
    path = DIRECTORY / f"{name}{CARD}"
    try:
        values = json.loads(read(path, MAX_BYTES))
        lists = {key: tuple(values[key]) for key in ("image_shape", "class_names")}
        return Card(**values | lists)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {reason(error)}") from None


def describe() -> str:
    """The cards of all networks, as text."""
    return "\n\n".join(map(_describe, names())) or "no models come with this installation"


def _describe(name: str) -> str:
    facts = card(name)
    height, width, _ = facts.image_shape
    scaling = f", temperature {facts.temperature:.3f}" if facts.temperature else ""
    return f"""{PREFIX}{name}
  model        {facts.model}, images of {width} x {height} ({facts.rule})
  classes      {", ".join(facts.class_names)}
  data         {facts.data}
  recipe       {facts.recipe or "none"}
  accuracy     {facts.accuracy:.4f} on {facts.count:,} test images
  calibration  expected error {facts.calibration_error:.4f}{scaling}
  limits       {facts.limits}
  licence      {facts.licence}
  source       {facts.source}
  weights      {(DIRECTORY / (name + WEIGHTS)).stat().st_size:,} bytes"""


def load(name: str) -> tuple["keras.Model", Card]:
    """Loads a network: (the functional model, float32, with its temperature; its card).

    Raises:
        UsageError: there is no such network.
        UserError: one of its files is damaged.
    """
    facts = card(name)
    from keras_cifar import models
    from keras_cifar.core import tensors
    from keras_cifar.evaluation.temperature import scale_logits

    model = models.build(facts.model, facts.image_shape, len(facts.class_names)).deployable
    path = DIRECTORY / f"{name}{WEIGHTS}"
    try:
        stored = tensors.load(read(path, MAX_BYTES), rounded_weights(model))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {reason(error)}") from None
    assign_weights(model, stored)
    return (scale_logits(model, facts.temperature) if facts.temperature else model), facts


def rounded_weights(model: "keras.Model") -> dict:
    """The weights of a model as they are stored: float16 where there are two dimensions or more."""
    arrays = {}
    for weight in model.weights:
        values = weight.numpy()
        arrays[weight.path] = values.astype("float16" if values.ndim > 1 else "float32", order="C")
    return arrays


def assign_weights(model: "keras.Model", stored: dict) -> None:
    """Sets the weights of a model to those of `rounded_weights`."""
    for weight in model.weights:
        weight.assign(stored[weight.path].astype("float32"))
