"""What `python -m keras_cifar.benchmark` measures: one kind of measurement a file, each contender in a
process of its own.
"""

import contextlib
import dataclasses
import importlib.metadata

from keras_cifar.benchmarking.options import BenchmarkOptions
from keras_cifar.core import environment


def measure(options: BenchmarkOptions) -> dict:
    """Measures what the flags ask for and prints it.

    Raises:
        UsageError: a flag names no network or augmentation.
    """
    from keras_cifar import models
    from keras_cifar.benchmarking import comparison, distribution, growth, photos, serving
    from keras_cifar.data import augmentation

    result = {"machine": _machine()}
    if options.serving:  # first, since it takes cores away, which TensorFlow counts when it starts
        return result | {"serving": serving.measure(options)}
    augmentation.parse(options.augment)
    models.find(options.model)
    policy = environment.dtype_policy(options.dtype_policy)[0]
    options = dataclasses.replace(options, dtype_policy=policy)
    kinds = {"distribution": distribution, "growth": growth, "photos": photos}
    for name, kind in kinds.items():
        if getattr(options, name):
            return result | {name: kind.measure(options)}
    network = models.build(options.model).deployable
    # A multiplication and an addition; forward, and twice that backward.
    return result | comparison.measure(options, 6 * models.count_multiply_adds(network))


def _machine() -> str:
    """The processors, and the versions of what is compared."""
    machine = [environment.machine()]
    for name in ("tensorflow", "keras", "torch", "torchvision", "paddlepaddle"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(machine)
