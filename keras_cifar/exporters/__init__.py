"""Export formats, a module each.

Each has

    NEEDS_IMAGES = False  # or True: it needs `samples` with training images
    export(model, base, class_names, version=None, samples=None, rule=..., **record) -> base/<version>

The version appears when it is complete and its predictions agree with the model's (`verification`).
"""

import importlib
import pkgutil

from keras_cifar.core.errors import needing

_NO_FORMATS = {"bundle", "folding", "verification"}
FORMATS = tuple(sorted({m.name for m in pkgutil.iter_modules(__path__)} - _NO_FORMATS))

LABELS = "labels.txt"  # a class name a line


def labels_text(class_names: tuple[str, ...]) -> str:
    """The contents of LABELS."""
    return "".join(f"{name}\n" for name in class_names)


def import_extra(name: str):
    """Imports a module of the extra `formats`; raises UserError if it is not installed."""
    with needing("formats", "this format"):
        return importlib.import_module(name)
