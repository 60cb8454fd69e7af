"""Transfer learning: which of the weights that a run starts with stay as they are."""

import keras

from keras_cifar.core.errors import UsageError, unknown
from keras_cifar.models import weighted
from keras_cifar.models.classifier import Classifier


def freeze(model: Classifier, name: str) -> None:
    """Freezes a layer and all layers that its output depends on.

    Frozen batch normalization uses its moving statistics in training too.

    Raises:
        UsageError: the model has no such layer, or no other layer with weights.
    """
    layers = {layer.name: layer for layer in model.layers}
    if name not in layers:
        raise unknown("layer in --freeze", name, weighted(model))
    for layer in keras.Model(model.inputs[0], layers[name].output).layers:
        layer.trainable = False
    if not model.logits_model.trainable_variables:
        raise UsageError(f"--freeze={name} leaves nothing to train")
