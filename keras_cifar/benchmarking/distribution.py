"""The cost of replicas and processes on this machine, and a model's prediction for many GPUs."""

import csv
import pathlib
import statistics
import tempfile

from keras_cifar.benchmarking.contest import columns, run_python, show, spread
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


def traffic(model) -> dict[str, int]:
    """What a training step of a Classifier in float32 communicates.

    Gradients and metrics are all-reduced once, the statistics of each normalization twice.

    Returns:
        The number of collectives, each of which waits for the one before it, and the bytes of one
        replica that all of them reduce.
    """
    import keras

    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    gradients = sum(4 * v.value.shape.num_elements() for v in model.trainable_variables)
    # Count, means and mean squares in float64, forward; their gradients, backward.
    statistics = sum(2 * 8 * (2 * x.gamma.shape[0] + 1) for x in norms)
    return {"collectives": 1 + 2 * len(norms), "bytes": gradients + 3 * 4 + statistics}


def predict(
    found: dict, multiply_adds: int, layers: int, pixels: int, batch: int, gpus: int
) -> dict[str, float]:
    """Seconds of a step on `gpus` GPUs with `batch` images each, and the images a second of all.

    The all-reduce does not overlap the computation; reading images overlaps both.
    """
    compute = 6 * multiply_adds * batch / GPU_FLOPS + layers * LAYER_SECONDS
    reach = MACHINE if gpus <= MACHINE else max(BANDWIDTH)
    reduce = 2 * (gpus - 1) / gpus * found["bytes"] / BANDWIDTH[reach]
    latency = found["collectives"] * LATENCY[reach]
    # Where NCCL takes a tree instead of a ring, for small messages, it is 2 log2(gpus) hops.
    ring = reduce + latency * 2 * (gpus - 1)
    tree = reduce + latency * 2 * (gpus - 1).bit_length()
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
    train.append(f"--steps_per_epoch={options.steps}")
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
                run_python("-m", *command, f"--run_dir={scratch}/run")
                with open(pathlib.Path(scratch) / "run" / "history.csv") as file:
                    epochs = [float(row["images_per_second"]) for row in csv.DictReader(file)]
            rates[name].append(statistics.median(epochs[1:]))
    show("")
    return rates


def _print_prediction(options: BenchmarkOptions) -> dict:
    """Predicts for the network at its paper's image size."""
    from keras_cifar import models

    variant = models.variants()[options.model]
    size = variant.image_size
    model = models.build(options.model, (size, size, 3), variant.num_classes)
    found, network = traffic(model), model.deployable
    work = models.count_multiply_adds(network), len(network.layers), size * size
    print(f"\na step all-reduces {found['bytes']:,} bytes in {found['collectives']} collectives")
    print(f"\npredicted for A100s with {options.batch_size} images of {size} x {size} each")
    print(f"{'GPUs':>6}{'compute, ms':>13}{'ring, ms':>10}{'tree, ms':>10}{'ring':>14}{'tree':>14}")
    rows = {gpus: predict(found, *work, options.batch_size, gpus) for gpus in PREDICTED_GPUS}
    for gpus, row in rows.items():
        compute, ring, tree = (1e3 * row[key] for key in ("compute", "ring", "tree"))
        line = f"{gpus:>6}{compute:>13.2f}{ring:>10.2f}{tree:>10.2f}"
        for rate in (row["ring_rate"], row["tree_rate"]):
            line += f"{rate:>9,.0f}{rate / gpus / rows[1]['ring_rate']:>5.0%}"
        print(line)
    return {"traffic": found, "predicted": rows}
