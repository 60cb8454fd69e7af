"""Formats that a model is handed over in, a module each.

Each has

    NEEDS_IMAGES = False  # or True: it cannot do without `samples`
    export(model, base, class_names, version=None, samples=None, **record) -> base/<version>

which is complete, and was compared with the model, before it appears. `folding` is no format: it
makes the network that is exported out of the one that was trained.
"""

import importlib
import pkgutil

from keras_cifar.core.errors import UserError

FORMATS = tuple(
    sorted({m.name for m in pkgutil.iter_modules(__path__)} - {"bundle", "folding", "verification"})
)

LABELS = "labels.txt"  # a class name a line


def labels_text(class_names: tuple[str, ...]) -> str:
    """The contents of LABELS."""
    return "".join(f"{name}\n" for name in class_names)


def needed(name: str):
    """A module of the extra `formats`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this format needs packages that are not there ({error}): "
            "pip install 'keras_cifar[formats]'"
        ) from None
