"""What distribution costs on this machine, and what it would bring on many GPUs by a model."""

import csv
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable

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
INPUT_RATE, CORES = 50_000 * 32 * 32, 8  # in pixels, as larger pictures take longer


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What the replicas tell each other in a training step.

    Attributes:
        collectives: all-reduces that wait for each other.
        bytes: that they reduce, of one replica.
    """

    collectives: int
    bytes: int


def traffic(model) -> Traffic:
    """Of a Classifier in float32: gradients and figures once, each normalization twice."""
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
    all-reduce = 2 (gpus - 1) / gpus bytes / bandwidth + collectives 2 (gpus - 1) latency: a ring,
        nothing of which is hidden behind the computation
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


def measure(options, env: dict[str, str], say: Callable[[str], None]) -> dict[str, list[float]]:
    """Images a second of `train` on one device, on two virtual ones and in two processes.

    All have as many threads in total. A round is a run of each; its figure is the median of its
    epochs but the first.
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
        for name, (module, *arguments) in forms.items():
            say(f"round {number + 1} of {options.rounds}: {name}")
            with tempfile.TemporaryDirectory() as scratch:
                run = pathlib.Path(scratch) / "run"
                command = [sys.executable, "-m", module, *arguments, f"--run_dir={run}"]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{name}: {done.stderr.strip()}")
                with open(run / "history.csv") as file:
                    epochs = [float(row["images_per_second"]) for row in csv.DictReader(file)]
            rates[name].append(statistics.median(epochs[1:]))
    say("")
    return rates
