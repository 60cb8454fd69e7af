"""Networks with weights from elsewhere, ready for service without training."""

import pathlib

import keras

from keras_cifar import models
from keras_cifar.core.errors import UserError, unknown
from keras_cifar.evaluation.run_export import read_labels
from keras_cifar.exporters import saved_model, verification
from keras_cifar.models.classifier import HEAD
from keras_cifar.pretrained import imagenet, weights


def load(
    network: str,
    source: str = imagenet.NAME,
    image_size: int | None = None,
    labels: str | None = None,
) -> tuple[keras.Model, tuple[str, ...], str]:
    """Builds a network with the weights of `source` and all of its classes.

    Args:
        network: a name in `models.variants()`.
        source: as in `weights.find`.
        image_size: the side of the images in pixels; None is the network's own.
        labels: a file with a class name a line; None takes ImageNet's where there are 1,000 classes.

    Returns:
        The functional model, its class names, and what its weights are as text.

    Raises:
        UsageError: an unknown network, or no weights for it.
        UserError: the weights or the labels are missing or do not fit.
    """
    table = models.variants()
    if network not in table:
        raise unknown("model", network, table)
    side = image_size or table[network].image_size

    def build(classes: int) -> keras.Model:
        return models.build(network, (side, side, 3), classes).deployable

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
    return model, names, weights.assign(model, found._replace(class_names=None), source, None)


def export(
    network: str,
    source: str,
    image_size: int | None,
    labels: str | None,
    out: str,
    version: int | None = None,
) -> tuple[pathlib.Path, str]:
    """Writes the SavedModel of such a network; the arguments are those of `load` and of `export`.

    Returns (the version's directory, the results of verification as text).
    """
    model, names, text = load(network, source, image_size, labels)
    path = saved_model.export(model, pathlib.Path(out).expanduser(), names, version)
    return path, f"weights   {text}\nexport    {path}\n{verification.summary(path)}"
