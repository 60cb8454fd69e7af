"""The networks. Each module here is a family with a table `VARIANTS` of name -> Variant; a new
family is one new file. `build` finds a variant by name.
"""

import dataclasses
import importlib
import json
import pathlib
import pkgutil
import zipfile
from collections.abc import Callable

import keras
import numpy as np

from keras_cifar.core.errors import UserError, reason, unknown
from keras_cifar.core.files import open_file, size_of
from keras_cifar.data import Split
from keras_cifar.models import layers  # noqa: F401  A saved model may have our layers.
from keras_cifar.models.classifier import Classifier

# What is in a `.keras` file of ours, whose objects are Keras's and ours. It is refused with anything
# else, and with the layers of Keras that hold code or read other files; Keras, in its safe mode, has
# checks of its own after these. Of config.json, more bytes than resnet1202's by a factor of six.
_MEMBERS = ("config.json", "metadata.json", "model.weights.h5")
_PACKAGES = ("keras", "keras_cifar")
_WITH_CODE = frozenset(
    (
        *("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"),
        *("StringLookup", "IntegerLookup", "TextVectorization"),
    )
)
MAX_CONFIG = 2**25

# Training images that `adapt` looks at: 961,000 patches of 32 x 32 images, for 12 variances.
ADAPTED_TO = 1000

# Images up to this side, in pixels, get the small-image form of networks made for ImageNet.
SMALL_IMAGE = 64


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named network.

    Attributes:
        builder: (input_shape, num_classes, name) -> Classifier.
        paper: authors, year and arXiv number or venue.
        image_size: the side of the paper's images, in pixels, and the classes it was made for.
        min_size: the smallest side that is taken, in pixels.
    """

    builder: Callable[..., Classifier]
    paper: str
    image_size: int
    num_classes: int
    min_size: int


def variants() -> dict[str, Variant]:
    """Every variant by name, family after family."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "VARIANTS", {})
    return found


def build(
    name: str, input_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10
) -> Classifier:
    """Builds the network `name` for uint8 images of `input_shape` (height, width, 3).

    Raises:
        UsageError: no such network.
        UserError: the images are too small for it.
    """
    table = variants()
    if name not in table:
        raise unknown("model", name, table)
    variant = table[name]
    if min(input_shape[:2]) < variant.min_size:
        raise UserError(
            f"{name} needs images of at least {variant.min_size} x {variant.min_size} pixels and "
            f"these have {input_shape[1]} x {input_shape[0]}; give --image_size={variant.min_size}"
        )
    return variant.builder(input_shape=tuple(input_shape), num_classes=num_classes, name=name)


def adapt(model: Classifier, split: Split) -> None:
    """Has the layers that are made from images, such as `layers.Whitening`, be made from a split's."""
    for layer in model.layers:
        if hasattr(layer, "adapt"):
            below = keras.Model(model.inputs[0], layer.input)
            inputs = below(split.spread(ADAPTED_TO).images, training=True)
            layer.adapt(np.asarray(inputs, np.float32))


def load(path: pathlib.Path) -> keras.Model:
    """The plain functional model of a `.keras` file, which cannot carry code.

    Raises:
        UserError: the file is missing, damaged, or holds more than such a model.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist: the run has not completed an epoch")
    try:
        _check_file(path)
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # A damaged file can fail anywhere in Keras, h5py or zipfile.
        raise UserError(f"{path} cannot be loaded: {reason(error)}") from None


def _check_file(path: pathlib.Path) -> None:
    """Raises ValueError where a `.keras` file has more in it than a network and its weights."""
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        if sorted(archive.namelist()) != sorted(_MEMBERS):
            raise ValueError(f"it holds other files than {', '.join(_MEMBERS)}")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its files are compressed, which Keras does not do")
        if archive.getinfo("config.json").file_size > MAX_CONFIG:
            raise ValueError(f"its config.json has more than {MAX_CONFIG:,} bytes")
        config = json.loads(archive.read("config.json"))
        stored = size_of(file)
    _check_objects(config)
    # Without allocating them: a number in config.json can ask for any amount of memory.
    with keras.StatelessScope(initialize_variables=False):
        needed = 2 * keras.saving.deserialize_keras_object(config, safe_mode=True).count_params()
    if needed > stored:  # of float16, the smallest that a weight can be
        raise ValueError(
            f"its network needs at least {needed:,} bytes of weights and it has {stored:,}"
        )


def _check_objects(value: object) -> None:
    """Raises ValueError where a model's configuration names what is none of Keras's or ours."""
    if isinstance(value, dict):
        if value.get("class_name") in _WITH_CODE:
            raise ValueError(
                f"it has a {value['class_name']} layer, which can run code or read files"
            )
        # `package>Name` or `Name`, and `package.module`.
        named = [str(value.get("registered_name") or "").rpartition(">")[0], value.get("module")]
        for name in filter(None, named):
            if str(name).partition(".")[0] not in _PACKAGES:
                raise ValueError(f"it names {str(name)!r}, which is neither Keras's nor ours")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_objects(item)


def is_small(input_shape: tuple[int, int, int]) -> bool:
    """Whether the small-image form is due."""
    return min(input_shape[:2]) <= SMALL_IMAGE


def count_parameters(model: keras.Model) -> int:
    """Trainable parameters."""
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def count_multiply_adds(model: keras.Model) -> int:
    """Multiply-adds of one image's forward pass: those of convolutions and dense layers."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            total += int(np.prod(layer.kernel.shape)) * int(np.prod(layer.output.shape[1:3]))
        elif isinstance(layer, keras.layers.Dense):
            total += int(np.prod(layer.kernel.shape))
    return total


def describe(name: str) -> tuple[str, int, int, int, str]:
    """(name, image size, parameters, multiply-adds, paper) at the paper's size and classes.

    The weights are not allocated.
    """
    variant = variants()[name]
    shape = (variant.image_size, variant.image_size, 3)
    with keras.StatelessScope(initialize_variables=False):
        model = build(name, shape, variant.num_classes).deployable
        return (
            name,
            variant.image_size,
            count_parameters(model),
            count_multiply_adds(model),
            variant.paper,
        )
