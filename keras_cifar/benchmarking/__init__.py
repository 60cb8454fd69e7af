"""What `python -m keras_cifar.benchmark` measures: one kind of measurement a file, each contender in a
process of its own.
"""

from keras_cifar.benchmarking.options import BenchmarkOptions


def measure(options: BenchmarkOptions) -> dict:
    """Measures what the flags ask for and prints it.

    Raises:
        UsageError: a flag names no network or augmentation.
    """
    from keras_cifar import models
    from keras_cifar.benchmarking import comparison, distribution, growth, serving
    from keras_cifar.data import augmentation

    augmentation.parse(options.augment)
    network = models.build(options.model).deployable
    if options.distribution:
        result = {"distribution": distribution.measure(options)}
    elif options.serving:
        result = {"serving": serving.measure(options)}
    elif options.growth:
        result = {"growth": growth.measure(options)}
    else:
        # A multiplication and an addition; forward, and twice that backward.
        result = comparison.measure(options, 6 * models.count_multiply_adds(network))
    return {"machine": machine()} | result


def machine() -> str:
    """The processors of this machine and the versions of the frameworks, in a line."""
    import contextlib
    import importlib.metadata

    from keras_cifar.core import environment

    found = [environment.machine()]
    for name in ("tensorflow", "keras", "torch", "paddlepaddle"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)
