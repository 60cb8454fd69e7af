"""How speed and memory grow with the batch size, the depth and the number of images."""

from keras_cifar.benchmarking.contest import Contest, print_table
from keras_cifar.benchmarking.options import BenchmarkOptions

GROWTH = {
    "batch_size": (32, 64, 128, 256, 512, 1024),
    "depth": (20, 32, 44, 56, 110),
    "images": (5_000, 10_000, 25_000, 50_000),
}


def measure(options: BenchmarkOptions) -> dict:
    """Measures and prints a table for each of GROWTH."""
    settings = {
        "batch_size": lambda value: {"what": "step", "batch_size": value},
        "depth": lambda value: {"what": "step", "model": f"resnet{value}"},
        "images": lambda value: {"what": "pipeline", "data": None, "images": value},
    }
    tables = {}
    for what, values in GROWTH.items():
        with Contest(options) as contest:
            for value in values:
                contest.add(f"{value:,}", "ours", **settings[what](value))
            tables[what] = contest.take_turns()
        print_table(what, "images/s", 12, tables[what])
        print(flush=True)
    return tables
