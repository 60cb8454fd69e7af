"""The cost of replicas and processes on this machine, and a model's prediction for many GPUs."""

import csv
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import tempfile

from keras_cifar.benchmarking.contest import columns, package_environment, show, spread
from keras_cifar.benchmarking.options import BenchmarkOptions

EPOCHS = 4  # of a turn; the first is not counted, as it traces
PREDICTED_GPUS = (1, 8, 64, 1024)

# ---- The assumptions of the prediction, all of NVIDIA's A100. None was measured here.

# ResNet-50 in mixed precision trains at 2,600 images/s (github.com/huggingface/pytorch-image-models,
# issue 1491), each of which takes 6 x 4.09e9 operations.
GPU_FLOPS = 2600 * 6 * 4.09e9
# A layer's kernels, forward and backward, take no less than about 20 us to be launched.
LAYER_SECONDS = 20e-6
# Bytes a second that each GPU of a ring passes on: 8 on NVLink (github.com/NVIDIA/nccl-tests, issue
# 149), and machines of 8 with four 200 Gb/s InfiniBand cards (issue 119).
BANDWIDTH = {8: 200e9, 1024: 85e9}
# From one GPU to the next, on NVLink and between machines: assumed.
LATENCY = {8: 2e-6, 1024: 5e-6}
MACHINE = 8  # GPUs
# Images a second of `crop(4)|flip` on one core (README, 2 cores), and cores for each GPU.
INPUT_RATE, CORES = 50_000 * 32 * 32, 8  # in pixels, as larger images take longer


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The communication between replicas in a training step.

    Attributes:
        collectives: all-reduces, each of which waits for the one before it.
        bytes: of one replica that all of them reduce.
    """

    collectives: int
    bytes: int


def traffic(model) -> Traffic:
    """The traffic of a Classifier in float32: gradients and metrics once, each normalization twice."""
    import keras

    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    gradients = sum(4 * v.value.shape.num_elements() for v in model.trainable_variables)
    # Count, means and mean squares in float64, forward; their gradients, backward.
    statistics_bytes = sum(2 * 8 * (2 * x.gamma.shape[0] + 1) for x in norms)
    return Traffic(1 + 2 * len(norms), gradients + 3 * 4 + statistics_bytes)


def predict(
    found: Traffic, multiply_adds: int, layers: int, pixels: int, batch: int, gpus: int
) -> dict[str, float]:
    """Seconds of a step on `gpus` GPUs with `batch` images each, and the images a second of all.

    compute = 6 multiply_adds batch / GPU_FLOPS + layers LAYER_SECONDS
    all-reduce = 2 (gpus - 1) / gpus bytes / bandwidth + collectives 2 (gpus - 1) latency, as a ring
        that does not overlap with the computation
    input = batch pixels / (CORES INPUT_RATE), beside both
    """
    compute = 6 * multiply_adds * batch / GPU_FLOPS + layers * LAYER_SECONDS
    reach = MACHINE if gpus <= MACHINE else max(BANDWIDTH)
    reduce = 2 * (gpus - 1) / gpus * found.bytes / BANDWIDTH[reach]
    # Where NCCL takes a tree instead of a ring, for small messages, it is 2 log2(gpus) hops.
    ring = reduce + found.collectives * 2 * (gpus - 1) * LATENCY[reach]
    tree = reduce + found.collectives * 2 * (gpus - 1).bit_length() * LATENCY[reach]
    source = batch * pixels / (CORES * INPUT_RATE)
    return {
        "compute": compute,
        "ring": ring,
        "tree": tree,
        "input": source,
        "ring_rate": gpus * batch / max(compute + ring, source),
        "tree_rate": gpus * batch / max(compute + tree, source),
    }


def measure(options: BenchmarkOptions) -> dict:
    """Measures and prints the cost of distribution here, then predicts it for many GPUs."""
    measured = {name: spread(values) for name, values in _train(options).items()}
    base = measured["one device"]["median"]
    print(f"{'images a second':<34}{'median':>10}{'low':>10}{'high':>10}{'of one':>10}")
    for name, row in measured.items():
        print(f"{name:<34}{columns(row)}{row['median'] / base:>10.2f}")
    return {"measured": measured} | _print_prediction(options)


def _train(options: BenchmarkOptions) -> dict[str, list[float]]:
    """Images a second of `train` on one device, on two virtual ones and in two processes.

    All have as many threads in total. The rate of a round is the median of its epochs but the first.
    """
    train = ["--epochs", str(EPOCHS), "--val_fraction=0", "--precise_bn_batches=0", "--noexport"]
    for name in ("model", "data", "augment", "batch_size", "dtype_policy"):
        train += [f"--{name}={getattr(options, name)}"]
    train += [f"--steps_per_epoch={options.steps}"]
    forms = {
        "one device": ["keras_cifar.train", "--strategy=none", *train],
        "2 virtual replicas": ["keras_cifar.train", "--replicas=2", *train],
        "2 processes": ["keras_cifar.launch", "--workers=2", "--", *train],
    }
    rates = {name: [] for name in forms}
    for number in range(options.rounds):
        for name, command in forms.items():
            show(f"round {number + 1} of {options.rounds}: {name}")
            with tempfile.TemporaryDirectory() as scratch:
                command = [sys.executable, "-m", *command, f"--run_dir={scratch}/run"]
                env = package_environment()
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{name}: {done.stderr.strip()}")
                with open(pathlib.Path(scratch) / "run" / "history.csv") as file:
                    epochs = [float(row["images_per_second"]) for row in csv.DictReader(file)]
            rates[name].append(statistics.median(epochs[1:]))
    show("")
    return rates


def _print_prediction(options: BenchmarkOptions) -> dict:
    """Prints and returns the prediction for the network at its paper's image size."""
    from keras_cifar import models

    variant = models.variants()[options.model]
    size = variant.image_size
    model = models.build(options.model, (size, size, 3), variant.num_classes)
    found, network = traffic(model), model.deployable
    work = models.count_multiply_adds(network), len(network.layers), size * size
    print(f"\na step all-reduces {found.bytes:,} bytes in {found.collectives} collectives")
    print(f"\npredicted for A100s with {options.batch_size} images of {size} x {size} each")
    print(f"{'GPUs':>6}{'compute, ms':>13}{'ring, ms':>10}{'tree, ms':>10}{'ring':>14}{'tree':>14}")
    rows = {gpus: predict(found, *work, options.batch_size, gpus) for gpus in PREDICTED_GPUS}
    for gpus, row in rows.items():
        milliseconds = [1e3 * row[key] for key in ("compute", "ring", "tree")]
        print("{:>6}{:>13.2f}{:>10.2f}{:>10.2f}".format(gpus, *milliseconds), end="")
        for rate in (row["ring_rate"], row["tree_rate"]):
            print(f"{rate:>9,.0f}{rate / gpus / rows[1]['ring_rate']:>5.0%}", end="")
        print()
    return {"traffic": dataclasses.asdict(found), "predicted": rows}
