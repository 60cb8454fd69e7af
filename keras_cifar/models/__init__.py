"""The networks. Each module here is a family with a table `VARIANTS` of name -> Variant; a new
family is one new file. `build` finds a variant by name.
"""

import dataclasses
import importlib
import pkgutil
import textwrap
from collections.abc import Callable

import keras
import numpy as np

from keras_cifar.core.errors import UserError, unknown
from keras_cifar.core.image_size import SMALL_IMAGE
from keras_cifar.data import Split
from keras_cifar.models.classifier import Classifier
from keras_cifar.models.keras_file import load

__all__ = [
    "Classifier",
    "TorchLayout",
    "Variant",
    "adapt",
    "build",
    "count_multiply_adds",
    "count_parameters",
    "describe",
    "is_small",
    "load",
    "table",
    "variants",
    "weighted",
]

# Images that `adapt` uses: they have 961,000 patches where they are 32 x 32, for 12 variances.
MAX_ADAPT_IMAGES = 1000

# Layers with one kernel, whose multiply-adds are counted.
COUNTED = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)

# Of pixels in [0, 1], which torchvision's and timm's networks subtract, and by which they divide.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class TorchLayout:
    """How a network looks in state dicts of PyTorch.

    Attributes:
        names: the names of the layers in order -> for each known implementation, the prefixes of the
            tensors of each layer with weights, by its name.
        mean, std: of the pixels that those implementations expect, in [0, 1].
    """

    names: Callable[[list[str]], list[dict[str, str]]]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named network.

    Attributes:
        builder: (input_shape, num_classes, name) -> Classifier.
        image_size, num_classes: those of the paper; sides are in pixels.
        min_size: the smallest side that it takes.
        torch: None where no weights of PyTorch are known to fit.
    """

    builder: Callable[..., Classifier]
    paper: str
    image_size: int
    num_classes: int
    min_size: int
    torch: TorchLayout | None = None


def variants() -> dict[str, Variant]:
    """Every variant by name, family after family."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "VARIANTS", {})
    return found


def find(name: str) -> Variant:
    """The variant of that name; raises UsageError if there is none."""
    table = variants()
    if name not in table:
        raise unknown("model", name, table)
    return table[name]


def build(
    name: str, input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10
) -> Classifier:
    """Builds the network `name` for uint8 images of `input_shape` (height, width, 3).

    Raises:
        UsageError: no such network.
        UserError: the images are too small for it.
    """
    variant = find(name)
    if min(input_shape[:2]) < variant.min_size:
        raise UserError(
            f"{name} needs images of at least {variant.min_size} x {variant.min_size} pixels and "
            f"these have {input_shape[1]} x {input_shape[0]}; give --image_size={variant.min_size}"
        )
    return variant.builder(input_shape=tuple(input_shape), num_classes=num_classes, name=name)


def adapt(model: Classifier, split: Split) -> None:
    """Adapts the layers that depend on training images, such as `layers.Whitening`, to a split."""
    for layer in model.layers:
        if hasattr(layer, "adapt"):
            below = keras.Model(model.inputs[0], layer.input)
            inputs = below(split.spread(MAX_ADAPT_IMAGES).images, training=True)
            layer.adapt(np.asarray(inputs, np.float32))


def is_small(input_shape: tuple[int, int, int]) -> bool:
    """Whether a network made for ImageNet takes its form for small images."""
    return min(input_shape[:2]) <= SMALL_IMAGE


def weighted(model: keras.Model) -> dict[str, keras.Layer]:
    """The layers of a model that have weights, by name, in their order."""
    return {layer.name: layer for layer in model.layers if layer.weights}


def has_depthwise(model: keras.Model) -> bool:
    """Whether the model has depthwise convolutions."""
    kinds = keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D
    return any(isinstance(layer, kinds) for layer in model.layers)


def count_parameters(model: keras.Model) -> int:
    """Trainable parameters."""
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def count_multiply_adds(model: keras.Model) -> int:
    """Multiply-adds of one image's forward pass: those of convolutions and dense layers."""
    total = 0
    for layer in model.layers:
        # A dense layer's output has no sides: the product of none is 1.
        pixels = int(np.prod(layer.output.shape[1:-1]))
        if isinstance(layer, keras.layers.SeparableConv2D):
            kernels = [layer.depthwise_kernel, layer.pointwise_kernel]
        elif isinstance(layer, COUNTED):
            kernels = [layer.kernel]
        else:
            kernels = []
        total += sum(pixels * int(np.prod(kernel.shape)) for kernel in kernels)
    return total


def describe(name: str) -> tuple[str, int, int, int, str]:
    """(name, image size, parameters, multiply-adds, paper) at the paper's size and classes."""
    variant = find(name)
    shape = (variant.image_size, variant.image_size, 3)
    with keras.StatelessScope(initialize_variables=False):  # allocates no weights
        model = build(name, shape, variant.num_classes).deployable
    sizes = count_parameters(model), count_multiply_adds(model)
    return name, variant.image_size, *sizes, variant.paper


def table() -> str:
    """The networks as text, at the size and number of classes of their papers."""
    from keras_cifar.models import applications

    lines = [f"{'name':<19}{'image':>6}{'parameters':>14}{'multiply-adds':>17}  paper"]
    for name in (name for name in variants() if name not in applications.VARIANTS):
        _, size, parameters, multiply_adds, paper = describe(name)
        lines.append(f"{name:<19}{size:>6}{parameters:>14,}{multiply_adds:>17,}  {paper}")
    # Building these takes minutes.
    theirs = f"and those of keras.applications: {', '.join(sorted(applications.VARIANTS))}"
    return "\n".join([*lines, *textwrap.wrap(theirs, 100)])
