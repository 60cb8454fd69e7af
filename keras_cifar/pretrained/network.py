"""Networks with weights from elsewhere, ready for service without training."""

import pathlib
import typing

import keras

from keras_cifar import models
from keras_cifar.core.errors import UserError
from keras_cifar.core.image_size import image_sides, resize_rule
from keras_cifar.evaluation.run_export import read_labels
from keras_cifar.exporters import saved_model, verification
from keras_cifar.models.classifier import HEAD
from keras_cifar.pretrained import imagenet, weights


class Network(typing.NamedTuple):
    """A functional model with all that an export needs."""

    model: keras.Model
    class_names: tuple[str, ...]
    rule: str  # by which images get its size, see `data.images.resize_images`
    text: str  # what its weights are


def load(
    network: str,
    source: str = imagenet.NAME,
    image_size: str | int | None = None,
    resize: str = "auto",
    labels: str | None = None,
) -> Network:
    """Builds a network with the weights of `source` and all of its classes.

    Args:
        network: a name in `models.variants()`.
        source: as in `weights.find`.
        image_size, resize: as for `data.load`; None is the network's own size.
        labels: a file with a class name a line; None takes ImageNet's where there are 1,000 classes.

    Raises:
        UsageError: an unknown network, or no weights for it.
        UserError: the weights or the labels are missing or do not fit.
    """
    size = image_size or models.find(network).image_size
    rule, sides = resize_rule(resize, size), image_sides(size)

    def build(classes: int) -> keras.Model:
        return models.build(network, (*sides, 3), classes).deployable

    model = build(imagenet.CLASSES)
    found = weights.find(source, model)
    count = found.layers[HEAD][-1].shape[-1]
    names = found.class_names
    if labels:
        names = read_labels(labels, count)
    elif names is None and count == imagenet.CLASSES:
        names = imagenet.class_names()
    elif names is None:
        raise UserError(f"{source} does not name its {count:,} classes; give --labels=FILE")
    if count != imagenet.CLASSES:
        model = build(count)
    text = weights.assign(model, found._replace(class_names=None), source, None)
    return Network(model, names, rule, text)


def export(found: Network, out: str, version: int | None = None) -> tuple[pathlib.Path, str]:
    """Writes the SavedModel of a network below the base path `out`.

    Returns (the version's directory, the results of verification as text).
    """
    base = pathlib.Path(out).expanduser()
    path = saved_model.export(found.model, base, found.class_names, version, rule=found.rule)
    return path, f"weights   {found.text}\nexport    {path}\n{verification.summary(path)}"
