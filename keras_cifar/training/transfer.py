"""Transfer learning: a run that starts with trained weights, some of them frozen."""

import pathlib

import keras

from keras_cifar import models, pretrained
from keras_cifar.core.errors import UsageError, UserError, unknown
from keras_cifar.core.run_directory import Run
from keras_cifar.models.classifier import Classifier

HEAD = "logits"  # of every family: the layer that depends on the number of classes


def take_weights(model: Classifier, source: str, class_names: tuple[str, ...]) -> str:
    """Copies the weights of `source` into a model, layer by layer; returns a summary as text.

    Args:
        source: a run directory, a `.keras` file that `train` wrote, or pretrained:NAME.
        class_names: of the model. If those of `source` differ, the last layer keeps its own weights.

    Raises:
        UserError: the model does not exist, is damaged, or is another network.
    """
    path, names = pathlib.Path(source).expanduser(), None
    if source.startswith(pretrained.PREFIX):
        path = source
        theirs, card = pretrained.load(source.removeprefix(pretrained.PREFIX))
        names = card.class_names
    elif path.is_dir():
        names, path = tuple(Run(path).read_config()["class_names"]), Run(path).model
        theirs = models.load(path)
    else:
        theirs = models.load(path)
    theirs, mine = _weighted(theirs), _weighted(model)
    different = sorted(theirs.keys() ^ mine.keys())
    if different:
        raise UserError(
            f"--init_from={source} is another network: only one of it and {model.name} has the layer "
            f"{different[0]}"
        )
    new = []
    for name, layer in mine.items():
        shapes = [[tuple(w.shape) for w in x.weights] for x in (layer, theirs[name])]
        if name == HEAD and (shapes[0] != shapes[1] or names not in (None, tuple(class_names))):
            new.append(name)
        elif shapes[0] != shapes[1]:
            raise UserError(
                f"--init_from={source} does not fit: layer {name} has shapes {shapes[1]} instead of "
                f"{shapes[0]}; use the same --model and --image_size"
            )
        else:
            layer.set_weights(theirs[name].get_weights())
    # Files do not have auxiliary classifiers.
    new += [name for name in _weighted(model.logits_model) if name not in mine]
    return f"the weights of {path}" + (f"; new layers: {', '.join(new)}" if new else "")


def freeze(model: Classifier, name: str) -> None:
    """Freezes a layer and all layers that its output depends on.

    Frozen batch normalization uses its moving statistics in training too.

    Raises:
        UsageError: the model has no such layer, or no other layer with weights.
    """
    layers = {layer.name: layer for layer in model.layers}
    if name not in layers:
        raise unknown("layer in --freeze", name, _weighted(model))
    for layer in keras.Model(model.inputs[0], layers[name].output).layers:
        layer.trainable = False
    if not model.logits_model.trainable_variables:
        raise UsageError(f"--freeze={name} leaves nothing to train")


def _weighted(model: keras.Model) -> dict[str, keras.Layer]:
    return {layer.name: layer for layer in model.layers if layer.weights}
