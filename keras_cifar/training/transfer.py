"""Transfer learning: which of the weights that a run starts with stay as they are, and how long."""

import dataclasses

import keras

from keras_cifar.core.errors import UsageError, unknown
from keras_cifar.models import weighted
from keras_cifar.models.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class FrozenLayers:
    """The layers that --freeze names, and those of their variables that are never trained."""

    layers: list[keras.Layer]
    constants: list[keras.Variable]

    def set_trainable(self, trainable: bool) -> bool:
        """Unfreezes or freezes the layers; returns whether that changes anything.

        Frozen batch normalization uses its moving statistics in training too.
        """
        changed = any(layer.trainable != trainable for layer in self.layers)
        for layer in self.layers:
            layer.trainable = trainable
        for variable in self.constants:  # such as the filters of `layers.Whitening`
            variable.trainable = False
        return changed


def freeze(model: Classifier, name: str) -> FrozenLayers:
    """Freezes a layer and all layers that its output depends on.

    Raises:
        UsageError: the model has no such layer, or no other layer with weights.
    """
    layers = {layer.name: layer for layer in model.layers}
    if name not in layers:
        raise unknown("layer in --freeze", name, weighted(model))
    below = keras.Model(model.inputs[0], layers[name].output).layers
    frozen = FrozenLayers(below, [v for layer in below for v in layer.non_trainable_variables])
    frozen.set_trainable(False)
    if not model.logits_model.trainable_variables:
        raise UsageError(f"--freeze={name} leaves nothing to train")
    return frozen
