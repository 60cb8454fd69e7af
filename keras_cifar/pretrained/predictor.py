"""Predictors and networks by what --model names: a run, an export, a URL or pretrained:NAME."""

import typing

from keras_cifar import pretrained
from keras_cifar.core.errors import UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.inference.predictor import Predictor
from keras_cifar.inference.remote import RemotePredictor

if typing.TYPE_CHECKING:
    import keras

URLS = ("http://", "https://")


class PretrainedPredictor(Predictor):
    """A Predictor of a pretrained network, by the functions that an export would have."""

    def __init__(self, name: str):
        from keras_cifar.exporters import saved_model

        model, card = pretrained.load(name)
        self.path = pretrained.DIRECTORY / f"{name}{pretrained.WEIGHTS}"
        self.size, self.class_names = card.image_shape[:2], card.class_names
        # Kept, since the functions do not keep the variables alive.
        self._loaded, functions = saved_model.functions(model, card.class_names, card.rule)
        self._use({name: f.get_concrete_function() for name, f in functions.items()})


def load_predictor(
    model: str, timeout: float, labels: str | None = None
) -> Predictor | RemotePredictor:
    """Loads the predictor of a run, an export, a URL or pretrained:NAME, or raises UserError."""
    if model.startswith(pretrained.PREFIX):
        return PretrainedPredictor(model.removeprefix(pretrained.PREFIX))
    if model.startswith(URLS):
        return RemotePredictor(model, timeout, labels)
    return Predictor(model)


def load_network(model: str, predictor: Predictor) -> "keras.Model":
    """Loads the Keras model behind a predictor, which gives gradients.

    Raises:
        UserError: `model` is neither a run nor pretrained, or its export is of another model.
    """
    from keras_cifar import models

    if model.startswith(pretrained.PREFIX):
        return pretrained.load(model.removeprefix(pretrained.PREFIX))[0]
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
