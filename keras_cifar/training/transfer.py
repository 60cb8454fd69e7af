"""A run that begins with the weights of another one."""

import pathlib

import keras

from keras_cifar import models, pretrained
from keras_cifar.core.errors import UsageError, UserError, unknown
from keras_cifar.core.run_directory import Run
from keras_cifar.models.classifier import Classifier

HEAD = "logits"  # of every family: the layer that depends on the number of classes


def take_weights(model: Classifier, source: str, class_names: tuple[str, ...]) -> str:
    """Gives a model the weights of `source`, layer by layer.

    Args:
        source: a run directory, a `.keras` file that `train` wrote, or pretrained:NAME.
        class_names: the model's. Those of another run keep the model's own last layer, as does
            another number of them.

    Returns:
        What was taken and what was not, in words.

    Raises:
        UserError: there is no such model, it is damaged, or it is of another network.
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
    theirs = _weighted(theirs)
    mine = _weighted(model)
    different = sorted(theirs.keys() ^ mine.keys())
    if different:
        raise UserError(
            f"--init_from={source} is of another network: it and {model.name} do not both have the "
            f"layer {different[0]}"
        )
    new = []
    for name, layer in mine.items():
        shapes = [[tuple(w.shape) for w in x.weights] for x in (layer, theirs[name])]
        if name == HEAD and (shapes[0] != shapes[1] or names not in (None, tuple(class_names))):
            new.append(name)
        elif shapes[0] != shapes[1]:
            raise UserError(
                f"--init_from={source} does not fit: layer {name} has the shapes {shapes[1]} there and "
                f"{shapes[0]} here; give the same --model and --image_size"
            )
        else:
            layer.set_weights(theirs[name].get_weights())
    # Auxiliary classifiers are in no file.
    new += [name for name in _weighted(model.logits_model) if name not in mine]
    line = f"the weights of {path}"
    return f"{line}; new are {', '.join(new)}" if new else line


def freeze(model: Classifier, name: str) -> None:
    """Keeps a layer, and all layers that its output is computed from, as they are.

    Their normalization uses its moving statistics, in training too.

    Raises:
        UsageError: there is no such layer, or none would be left to train.
    """
    layers = {layer.name: layer for layer in model.layers}
    if name not in layers:
        raise unknown("layer in --freeze", name, _weighted(model))
    for layer in keras.Model(model.inputs[0], layers[name].output).layers:
        layer.trainable = False
    if not model.logits_model.trainable_variables:
        raise UsageError(f"--freeze={name} leaves no layer to train")


def _weighted(model: keras.Model) -> dict[str, keras.Layer]:
    return {layer.name: layer for layer in model.layers if layer.weights}
