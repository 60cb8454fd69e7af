"""Train image classifiers with Keras on TensorFlow and put them into service.

For library users: `from keras_cifar import data, models, layers, optimizers`. Everything else is in a
room below this package; docs/architecture.md shows which.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

from keras_cifar.core import environment

__version__ = "0.2.0"

environment.configure()

# Modules that can also be imported from here, and where they are. `import keras_cifar.layers` registers
# the layers of a model.keras with Keras; earlier revisions had it here, and scripts use it.
_PUBLIC = {
    "keras_cifar.layers": "keras_cifar.models.layers",
    "keras_cifar.optimizers": "keras_cifar.training.optimizers",
}


class _PublicModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of _PUBLIC by either name, as one module."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname in _PUBLIC:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec):
        module = importlib.import_module(_PUBLIC[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_PublicModules())
