"""A model of data-parallel training on many GPUs, beside what others measured. None was measured here.

    step     = compute + exposed + statistics + host
    exposed  = the all-reduce of the gradients, less what the backward pass hides of it
    host     = what several processes on one machine cost each other

The statistics are those of batch normalization over the whole batch; a replica's own cost nothing.
"""

import dataclasses
import math

from keras_cifar.distributed.strategy import PACK_BYTES

# ResNet-50 in mixed precision trains at 2,470 images/s on an A100 (NVIDIA DeepLearningExamples,
# PyTorch/Classification/ConvNets/resnet50v1.5), each of which takes 6 x 4.09e9 operations.
GPU_FLOPS = 2470 * 6 * 4.09e9
# A layer's kernels, forward and backward, take no less than about 20 us to be launched.
LAYER_SECONDS = 20e-6
# The backward pass has two of three matrix multiplications; gradients are reduced beside it.
BACKWARD = 2 / 3
# On 8 A100s a step of NVIDIA's ResNet-50 takes 9.7 ms (TF32) and 19.6 ms (mixed precision) more than
# on one in PyTorch, 11.0 and 9.9 ms in TensorFlow.
HOST_SECONDS = 10e-3
# Images a second of `crop(4)|flip` on one core, and cores for each GPU.
INPUT_RATE, CORES = 30_000 * 32 * 32, 8  # in pixels, as larger images take longer


@dataclasses.dataclass(frozen=True)
class Machines:
    """Equal machines with GPUs: bytes a second of a ring of GPUs, and seconds of each hop."""

    gpus: int
    within: float
    between: float
    hop_within: float = 2e-6  # assumed, as is the next
    hop_between: float = 5e-6


# 8 A100s on NVLink (github.com/NVIDIA/nccl-tests, issue 149), four 200 Gb/s cards (issue 119).
A100 = Machines(8, 200e9, 85e9)
# 8 P100s on NVLink and one 50 Gb/s card: Goyal et al. 2017, arXiv:1706.02677, section 4.
BIG_BASIN = Machines(8, 30e9, 50e9 / 8)
# 4 P100s and one 25 Gb/s card: github.com/horovod/horovod, docs/benchmarks.rst.
PASCAL = Machines(4, 10e9, 25e9 / 8)


def step_seconds(
    machines: Machines, gpus: int, compute: float, parameters: int, collectives: int = 0
) -> float:
    """Seconds of a step on so many GPUs, of which one alone takes `compute`.

    Args:
        parameters: whose float32 gradients are all-reduced in packs.
        collectives: small ones that nothing overlaps, such as those of statistics.
    """
    if gpus == 1:
        return compute
    inside = gpus <= machines.gpus
    size, bandwidth = 4 * parameters, machines.within if inside else machines.between
    reduce = 2 * (gpus - 1) / gpus * size / bandwidth
    last = reduce * min(1, PACK_BYTES["GPU"] / size)  # begins when the backward pass has ended
    exposed = max(last, reduce - BACKWARD * compute)
    # NCCL takes trees for small messages.
    hops = 2 * math.ceil(math.log2(gpus))
    statistics = collectives * hops * (machines.hop_within if inside else machines.hop_between)
    return compute + exposed + statistics + HOST_SECONDS


@dataclasses.dataclass(frozen=True)
class Published:
    """A measurement of others: images a second of a GPU, and what `gpus` GPUs reached of it."""

    name: str
    machines: Machines
    gpus: int
    batch: int  # of each GPU
    parameters: int
    rate: float
    efficiency: float

    def modelled(self) -> float:
        """The efficiency that the model gives."""
        compute = self.batch / self.rate
        seconds = step_seconds(self.machines, self.gpus, compute, self.parameters)
        return compute / seconds


RESNET50, RESNET101, VGG16 = 25_600_000, 44_500_000, 138_400_000  # parameters
# NVIDIA: DeepLearningExamples, (PyTorch|TensorFlow)/Classification/ConvNets/resnet50v1.5. Goyal et al.:
# 29 hours of 90 epochs on 8 GPUs and 1 hour on 256. Horovod: docs/benchmarks.rst, with 1,656.82
# images/s of ResNet-101 on 16 GPUs; VGG-16 on one P100 from tensorflow.org/performance/benchmarks.
PUBLISHED = (
    Published("NVIDIA, PyTorch, TF32", A100, 8, 256, RESNET50, 938, 0.97),
    Published("NVIDIA, PyTorch, mixed precision", A100, 8, 256, RESNET50, 2470, 0.84),
    Published("NVIDIA, TensorFlow, TF32", A100, 8, 256, RESNET50, 909, 0.96),
    Published("NVIDIA, TensorFlow, mixed precision", A100, 8, 256, RESNET50, 2375, 0.92),
    Published("Goyal et al., of 8 GPUs", BIG_BASIN, 256, 32, RESNET50, 138, 0.90),
    Published("Horovod, ResNet-101", PASCAL, 512, 64, RESNET101, 104, 0.90),
    Published("Horovod, VGG-16", PASCAL, 512, 64, VGG16, 154, 0.68),
)


def traffic(model) -> dict[str, int]:
    """What a training step of a Classifier in float32 communicates.

    Returns:
        The bytes of the gradients, metrics and statistics of one replica that are reduced together,
        and the collectives more that the statistics of the whole batch take, each of which waits for
        the one before it.
    """
    from keras_cifar.models.batch_norm import norms
    from keras_cifar.models.training_step import METRICS

    layers = list(norms(model))
    parameters = sum(v.value.shape.num_elements() for v in model.trainable_variables)
    statistics = sum(2 * layer.moving_mean.shape[0] for layer in layers)
    size = 4 * (parameters + len(METRICS) - 1 + statistics)
    return {"parameters": parameters, "bytes": size, "collectives_of_whole": 2 * len(layers)}


def predict(
    found: dict, multiply_adds: int, layers: int, pixels: int, batch: int, gpus: int
) -> dict[str, float]:
    """Images a second of all A100s with `batch` images each, by either way of batch normalization."""
    compute = 6 * multiply_adds * batch / GPU_FLOPS + layers * LAYER_SECONDS
    source = batch * pixels / (CORES * INPUT_RATE)
    rates = {"compute": compute, "input": source}
    for name, collectives in (("replica", 0), ("whole", found["collectives_of_whole"])):
        seconds = step_seconds(A100, gpus, compute, found["parameters"], collectives)
        rates[name] = gpus * batch / max(seconds, source)
    return rates
