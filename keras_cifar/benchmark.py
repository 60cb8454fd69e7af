"""Measures this machine: the training step, the input pipeline, both together, prediction, memory.

python -m keras_cifar.benchmark --model resnet32 --peers

Every contender works in a process of its own and takes turns with the others; the measurements are
medians of the rounds. The peers are plain Keras 3 as pip installs it, and PyTorch and PaddlePaddle
where they are installed.
"""

import dataclasses
import pathlib

from keras_cifar.benchmarking.options import BenchmarkOptions
from keras_cifar.core import cli, files


def main(options: BenchmarkOptions) -> None:
    """Runs the command."""
    from keras_cifar import benchmarking

    result = benchmarking.measure(options)
    print(f"machine   {result['machine']}")
    if options.json:
        flags = {"flags": dataclasses.asdict(options)}
        files.write_json(pathlib.Path(options.json), flags | result)
        print(f"json      {options.json}")


if __name__ == "__main__":
    cli.run("benchmark", main, BenchmarkOptions, __doc__)
