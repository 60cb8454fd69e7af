"""Predictors and networks by what --model names.

It is a run, an export, a URL, pretrained:NAME, or imagenet:NETWORK.
"""

import sys
import typing

from keras_cifar import pretrained
from keras_cifar.core.config import URLS
from keras_cifar.core.errors import UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.inference.predictor import Predictor
from keras_cifar.inference.remote import RemotePredictor
from keras_cifar.pretrained import imagenet

if typing.TYPE_CHECKING:
    import keras

PREFIXES = (pretrained.PREFIX, imagenet.PREFIX)


class NetworkPredictor(Predictor):
    """A Predictor of a Keras model, by the functions that an export would have."""

    def __init__(self, network: "keras.Model", class_names: tuple[str, ...], rule: str, name: str):
        from keras_cifar.exporters import saved_model

        self.path, self.size, self.class_names = name, network.input_shape[1:3], class_names
        # Kept, since the functions do not keep the variables alive.
        self._loaded, functions = saved_model.functions(network, class_names, rule)
        self._use({name: f.get_concrete_function() for name, f in functions.items()})


def load_predictor(
    model: str, timeout: float, labels: str | None = None, dtype_policy: str = "float32"
) -> Predictor | RemotePredictor:
    """Loads the predictor of what --model names, or raises UserError."""
    if model.startswith(URLS):
        return RemotePredictor(model, timeout, labels)
    if model.startswith(PREFIXES):
        predictor = NetworkPredictor(*_load(model), model)
    else:
        predictor = Predictor(model)
    predictor.choose_precision(dtype_policy)
    return predictor


def _load(model: str) -> tuple["keras.Model", tuple[str, ...], str]:
    """(network, class names, rule of resizing) of pretrained:NAME or imagenet:NETWORK."""
    if model.startswith(pretrained.PREFIX):
        network, card = pretrained.load(model.removeprefix(pretrained.PREFIX))
        return network, card.class_names, card.rule
    from keras_cifar.pretrained import network as networks

    found = networks.load(model.removeprefix(imagenet.PREFIX))
    print(f"weights   {found.text}", file=sys.stderr)
    return found.model, found.class_names, found.rule


def load_network(model: str, predictor: Predictor) -> "keras.Model":
    """Loads the Keras model behind a predictor, which gives gradients.

    Raises:
        UserError: `model` is no run and no network with weights, or its export is of another model.
    """
    from keras_cifar import models

    if model.startswith(PREFIXES):
        return _load(model)[0]
    path = Run(model).model
    if not path.exists():
        raise UserError(
            f"--explain needs a run with its model.keras, and --model={model} is none; an export gives "
            "no gradients"
        )
    network = models.load(path)
    shapes = (network.input_shape[1:3], network.output_shape[1])
    if shapes != (tuple(predictor.size), len(predictor.class_names)):
        raise UserError(f"{path} and {predictor.path} are for different images or classes")
    return network
