"""The networks of `keras.applications`, by their names in lower case: `efficientnetv2b0`, `xception`.

Keras's own function makes the graph. It is rebuilt with the layers of this package, so that several
replicas normalize by the statistics of the whole batch and draw dropout masks of their own, and so that
batch normalization has our momentum: Keras's networks have up to 0.999, for ImageNet's long training,
with which the moving statistics lag in short runs. Everything else is as Keras has it.

Preprocessing is the layer `scale`, which replaces `preprocess_input` and what a network has of its own.
The classifier is a dense layer, also where Keras has a 1 x 1 convolution of averaged maps (MobileNets).
"""

import collections
import functools
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.core.errors import UserError, reason
from keras_cifar.models import Variant, classifier, layers
from keras_cifar.models.batch_norm import BATCH_NORM_MOMENTUM, BatchNormalization

# This package has networks of these names, which differ from Keras's.
OURS = ("resnet50", "resnet101", "resnet152", "vgg16", "vgg19")

# Keras's functions by name.
FUNCTIONS: dict[str, Callable[..., keras.Model]] = {
    name.lower(): function
    for name, function in vars(keras.applications).items()
    if name[0].isupper() and name.lower() not in OURS
}

# The default sides in Keras's documentation, in pixels, where they are not 224.
SIZES = {
    "efficientnetb1": 240, "efficientnetb2": 260, "efficientnetb3": 300, "efficientnetb4": 380,
    "efficientnetb5": 456, "efficientnetb6": 528, "efficientnetb7": 600,
    "efficientnetv2b1": 240, "efficientnetv2b2": 260, "efficientnetv2b3": 300,
    "efficientnetv2s": 384, "efficientnetv2m": 480, "efficientnetv2l": 480,
    "inceptionresnetv2": 299, "inceptionv3": 299, "nasnetlarge": 331, "xception": 299,
}  # fmt: skip
# The smallest sides that Keras accepts, where they are not 32.
MIN_SIZES = {"inceptionresnetv2": 75, "inceptionv3": 75, "xception": 71}

# These begin with a normalization whose numbers come with the weights of ImageNet. They are the means
# and deviations of ImageNet's channels, which `imagenet_utils` knows as the mode "torch".
NORMALIZED_BY_WEIGHTS = tuple(f"efficientnetb{number}" for number in range(8))
# How far preprocessing may be from that of the weights: the normalized pixels are in [-2.2, 2.7].
PREPROCESSING_TOLERANCE = 0.05

_PREPROCESSING = (keras.layers.Rescaling, keras.layers.Normalization)


def application(
    input_shape: classifier.Shape = (224, 224, 3), num_classes: int = 1000, name: str = "xception"
) -> classifier.Classifier:
    """Builds the network `name` of keras.applications with random weights."""
    with keras.StatelessScope(initialize_variables=False):  # allocates no weights
        options = {"classes": num_classes, "classifier_activation": None}
        theirs = FUNCTIONS[name](weights=None, input_shape=tuple(input_shape), **options)
    images, x = classifier.image_input(input_shape, *_affine(name, theirs))
    head = _weighted(theirs)[-1]
    x = _rebuild(keras.Model(theirs.input, head.input), images, x)
    x = keras.layers.Flatten(name="features")(x)
    logits = layers.logits(x, num_classes, kernel_initializer=head.kernel_initializer)
    return classifier.Classifier.build_from(images, logits, name)


def imagenet_weights(model: keras.Model) -> dict[str, list[np.ndarray]]:
    """The weights that Keras has for ImageNet, by the layers of a model that `application` built.

    Keras downloads them once. The last layer is that of 1,000 classes.

    Raises:
        UserError: the download failed, or the weights belong to other preprocessing.
    """
    name, size = model.name, VARIANTS[model.name].image_size
    try:
        theirs = FUNCTIONS[name](weights="imagenet", input_shape=(size, size, 3))
    except Exception as error:
        # Some errors of a download do not say of what; Keras's function knows it.
        calls = [x.frame.f_locals for x in inspect.trace() if x.function == "get_file"]
        if not calls:
            raise
        why = reason(error).rpartition(" -- ")[2]
        path = os.path.join(calls[0]["datadir"], calls[0]["fname"])
        raise UserError(
            f"{calls[0]['origin']} cannot be downloaded: {why}; download it elsewhere and save it as "
            f"{path}"
        ) from None
    scaling = model.get_layer("scale")
    own = _black_and_white() * scaling.scale + scaling.offset
    if np.abs(_preprocess(name, _preprocessing(theirs)) - own).max() > PREPROCESSING_TOLERANCE:
        raise UserError(f"the weights that Keras has for {name} belong to other preprocessing")
    names, (*layers, head) = _names(theirs), _weighted(theirs)
    found = {names.get(layer.name, layer.name): layer.get_weights() for layer in layers}
    # The kernel of a 1 x 1 convolution becomes that of a dense layer.
    kernel, bias = head.get_weights()
    return found | {classifier.HEAD: [kernel.reshape(kernel.shape[-2:]), bias]}


# ---- Preprocessing


def _preprocessing(theirs: keras.Model) -> list[keras.Layer]:
    """The layers at the beginning of Keras's network that scale pixels."""
    return list(
        itertools.takewhile(lambda layer: isinstance(layer, _PREPROCESSING), theirs.layers[1:])
    )


def _black_and_white() -> np.ndarray:
    """float64 [2, 1, 1, 3]; a new array, as Keras scales pixels in place."""
    return np.broadcast_to([[[[0.0]]], [[[255.0]]]], (2, 1, 1, 3)).copy()


def _affine(name: str, theirs: keras.Model) -> tuple[list[float], list[float]]:
    """(scale, offset) of each channel: what Keras does to pixels before the first convolution."""
    if name in NORMALIZED_BY_WEIGHTS:
        x = keras.applications.imagenet_utils.preprocess_input(_black_and_white(), mode="torch")
    else:
        configs = [(type(x), x.get_config()) for x in _preprocessing(theirs)]
        x = _preprocess(name, [kind.from_config(c | {"dtype": "float64"}) for kind, c in configs])
    black, white = x[:, 0, 0]
    return ((white - black) / 255).tolist(), black.tolist()


def _preprocess(name: str, preprocessing: Sequence[keras.Layer]) -> np.ndarray:
    """float64 [2, 1, 1, 3]: what Keras makes of a black and a white pixel."""
    module = FUNCTIONS[name].__module__.rpartition(".")[2]
    x = getattr(keras.applications, module).preprocess_input(_black_and_white())
    x = tf.constant(x)  # Keras would round an array of float64.
    for layer in preprocessing:
        x = layer(x)
    return np.asarray(x, np.float64)


# ---- Rebuilding


def _rebuild(trunk: keras.Model, images, scaled):
    """The output of a network of Keras by new layers, for images that are `scaled` already."""
    names, passed = _names(trunk), _preprocessing(trunk)

    def clone(operation):
        if operation in passed or isinstance(operation, keras.Sequential):
            return operation
        config = operation.get_config()
        if operation.name in names:
            config["name"] = names[operation.name]
        if isinstance(operation, keras.layers.BatchNormalization):
            return BatchNormalization.from_config(config | {"momentum": BATCH_NORM_MOMENTUM})
        if isinstance(operation, keras.layers.Dropout):
            return layers.Dropout.from_config(config)
        return type(operation).from_config(config)

    def call(operation, *args, **kwargs):
        x, *others = (scaled if value is images else value for value in args)
        if operation in passed:
            return x
        if isinstance(operation, keras.Sequential):
            return functools.reduce(lambda x, layer: clone(layer)(x), operation.layers, x)
        return operation(x, *others, **kwargs)

    return keras.models.clone_model(trunk, images, clone, call).output


def _layers(theirs: keras.Model) -> Iterator[keras.Layer]:
    """The layers of a network of Keras, also those of the sequences in it."""
    for layer in theirs.layers:
        yield from layer.layers if isinstance(layer, keras.Sequential) else [layer]


def _weighted(theirs: keras.Model) -> list[keras.Layer]:
    """The layers with weights, but for preprocessing."""
    return [x for x in _layers(theirs) if x.weights and not isinstance(x, _PREPROCESSING)]


def _names(theirs: keras.Model) -> dict[str, str]:
    """Names for what Keras numbers by how many layers a process has made: numbers from 0 instead."""
    names, counts = {}, collections.Counter()
    for operation in theirs.operations:
        kind = re.sub(r"_\d+$", "", operation.name)
        if kind.replace("_", "") == type(operation).__name__.lower():
            names[operation.name] = f"{kind}_{counts[kind]}" if counts[kind] else kind
            counts[kind] += 1
    return names


# ---- The table


def _paper(function: Callable) -> str:
    """The reference in the documentation of one of Keras's functions."""
    found = re.search(r"\[([^]]+)\]\(\s*\S*arxiv\.org/\w+/([\d.]+\d)", function.__doc__ or "")
    return f"{' '.join(found[1].split())}, arXiv:{found[2]}" if found else "keras.applications"


VARIANTS = {
    name: Variant(
        application, _paper(function), SIZES.get(name, 224), 1000, MIN_SIZES.get(name, 32)
    )
    for name, function in FUNCTIONS.items()
}
