"""Weights for a network from elsewhere: a run, a .keras file, pretrained:NAME, PyTorch, ImageNet."""

import importlib.util
import json
import pathlib
import typing

import keras
import numpy as np

from keras_cifar import models, pretrained
from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import read
from keras_cifar.core.run_directory import Run
from keras_cifar.models import applications, classifier, weighted
from keras_cifar.models.classifier import Scaling
from keras_cifar.pretrained import imagenet, state_dict

HUB = "hf:"  # of a repository of huggingface.co
MAX_CONFIG = 2**20  # bytes of config.json there


class Weights(typing.NamedTuple):
    """Weights of a network.

    Attributes:
        layers: the arrays of each layer, by its name in our network.
        scaling: what the layer `scale` does to the pixels; None where it stays as the network has it.
        class_names: of its head; None where the file does not tell them.
        text: what they are and where they come from.
    """

    layers: dict[str, list[np.ndarray]]
    scaling: Scaling | None
    class_names: tuple[str, ...] | None
    text: str


def find(source: str, model: keras.Model) -> Weights:
    """Finds the weights that `source` names, for a network.

    Args:
        source: a run directory, a `.keras` file that `train` wrote, `pretrained:NAME`, `imagenet`, a
            state dict of PyTorch in a file (state_dict.SUFFIXES), or `hf:REPOSITORY` of huggingface.co.
        model: named like its variant.

    Raises:
        UsageError: there are no such weights for this network.
        UserError: a file is missing or damaged, or is of another network.
    """
    path = pathlib.Path(source).expanduser()
    if source.startswith(pretrained.PREFIX):
        theirs, card = pretrained.load(source.removeprefix(pretrained.PREFIX))
        return _of_keras(theirs, card.class_names, source)
    if source == imagenet.NAME and model.name in applications.VARIANTS:
        text = f"the ImageNet weights of {model.name} (keras.applications)"
        return Weights(applications.imagenet_weights(model), None, None, text)
    if source == imagenet.NAME:
        path, origin = imagenet.find(model.name)
        return _of_torch(path, model, f"the ImageNet weights of {model.name} ({origin})")
    if source.startswith(HUB):
        path, pixels = _download(source.removeprefix(HUB))
        return _of_torch(path, model, f"the weights of {source}", pixels)
    if path.suffix in state_dict.SUFFIXES:
        return _of_torch(path, model, f"the weights of {path}")
    if path.is_dir():
        names = tuple(Run(path).read_config()["class_names"])
        return _of_keras(models.load(Run(path).model), names, Run(path).model)
    return _of_keras(models.load(path), None, path)


def assign(model: keras.Model, found: Weights, source: str, class_names: tuple | None) -> str:
    """Copies weights into a model; returns a summary as text.

    Args:
        source: of the weights, for messages.
        class_names: of the model. If those of the weights differ, the last layer keeps its own.

    Raises:
        UserError: the weights are of another network.
    """
    mine = weighted(model)
    different = sorted(found.layers.keys() ^ mine.keys())
    if different:
        raise UserError(
            f"--init_from={source} is another network: only one of it and {model.name} has the layer "
            f"{different[0]}"
        )
    new = []
    for name, layer in mine.items():
        arrays = found.layers[name]
        shapes = [[tuple(x.shape) for x in each] for each in (layer.weights, arrays)]
        if name == classifier.HEAD and (
            shapes[0] != shapes[1] or (found.class_names or class_names) != class_names
        ):
            new.append(name)
        elif shapes[0] != shapes[1]:
            raise UserError(
                f"--init_from={source} does not fit: layer {name} has shapes {shapes[1]} instead of "
                f"{shapes[0]}; use the same --model and --image_size"
            )
        else:
            layer.set_weights(arrays)
    if found.scaling:
        classifier.set_scaling(model, found.scaling)
    # Files do not have auxiliary classifiers.
    network = getattr(model, "logits_model", model)
    new += [name for name in weighted(network) if name not in mine]
    return found.text + (f"; new layers: {', '.join(new)}" if new else "")


def take(model: keras.Model, source: str, class_names: tuple[str, ...]) -> str:
    """Finds weights and assigns them to a model; returns a summary as text."""
    return assign(model, find(source, model), source, class_names)


def _of_keras(theirs: keras.Model, names: tuple[str, ...] | None, path: object) -> Weights:
    layers = {name: layer.get_weights() for name, layer in weighted(theirs).items()}
    return Weights(layers, classifier.get_scaling(theirs), names, f"the weights of {path}")


def _of_torch(path: pathlib.Path, model: keras.Model, text: str, pixels=None) -> Weights:
    """Weights from a state dict for a model; `pixels` is the (mean, std) that they expect."""
    layout = models.variants()[model.name].torch
    if layout is None:
        choices = sorted(name for name, variant in models.variants().items() if variant.torch)
        raise UsageError(
            f"{path}: weights of PyTorch are for {', '.join(choices)}, not for {model.name}"
        )
    tensors = state_dict.load(path)
    alternatives = layout.names([layer.name for layer in model.layers])
    prefixes = max(
        alternatives, key=lambda each: sum(f"{x}.weight" in tensors for x in each.values())
    )
    layers = {
        name: [_taken(tensors, f"{prefixes[name]}.{kind}", path, model) for kind in _kinds(layer)]
        for name, layer in weighted(model).items()
    }
    unknown = sorted(name for name in tensors if not name.endswith("num_batches_tracked"))
    if unknown:
        raise UserError(f"{path} is not of {model.name}: it has the unknown tensor {unknown[0]}")
    for name, layer in weighted(model).items():
        layers[name][0] = _kernel(model, layer, layers[name][0])
    mean, std = pixels or (layout.mean, layout.std)
    scaling = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return Weights(layers, scaling, None, text)


def _kinds(layer: keras.Layer) -> tuple[str, ...]:
    """The names of a layer's tensors in PyTorch, in Keras's order."""
    names = ("weight", "bias", "running_mean", "running_var")
    return names[: len(layer.weights)]


def _taken(tensors: dict, name: str, path: pathlib.Path, model: keras.Model) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path} is not of {model.name}: it lacks the tensor {name}")
    return np.asarray(tensors.pop(name), np.float32)


def _kernel(model: keras.Model, layer: keras.Layer, kernel: np.ndarray) -> np.ndarray:
    """A kernel of PyTorch [out, in, height, width] or [out, in] as Keras has it."""
    if isinstance(layer, keras.layers.DepthwiseConv2D) and kernel.ndim == 4:
        return kernel.transpose(2, 3, 0, 1)
    if isinstance(layer, keras.layers.Conv2D) and kernel.ndim == 4:
        return kernel.transpose(2, 3, 1, 0)
    if isinstance(layer, keras.layers.Dense):
        kernel = kernel.reshape(len(kernel), -1)  # timm has convolutions over the whole map
        for other in model.layers:
            if isinstance(other, keras.layers.Flatten) and other.output is layer.input:
                height, width, channels = other.input.shape[1:]
                if kernel.shape[1] == height * width * channels:  # PyTorch flattens channels first.
                    maps = kernel.reshape(-1, channels, height, width)
                    kernel = maps.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
        return kernel.T
    return kernel


def _download(repository: str) -> tuple[pathlib.Path, tuple | None]:
    """(model.safetensors of a repository of huggingface.co, the (mean, std) that its card names)."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError(f"{HUB}{repository} needs another package: pip install huggingface_hub")
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(repository, "model.safetensors")
        config = json.loads(
            read(huggingface_hub.hf_hub_download(repository, "config.json"), MAX_CONFIG)
        )
        card = config.get("pretrained_cfg", {})
        pixels = (card["mean"], card["std"]) if {"mean", "std"} <= card.keys() else None
    except Exception as error:  # of the network, the repository or its files
        raise UserError(
            f"{HUB}{repository} cannot be downloaded ({reason(error)}); download "
            f"model.safetensors from https://huggingface.co/{repository} and give its path"
        ) from None
    return pathlib.Path(path), pixels
