"""The flags of `python -m keras_cifar.benchmark`, which all measurements take."""

import dataclasses

from keras_cifar.core.config import DTYPE_POLICIES, XLA
from keras_cifar.core.options import POSITIVE, Options, option


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions(Options):
    """What is measured, and for how long."""

    model: str = option("resnet32", "network; peers have resnetN and vgg_bn_drop", "Work")
    data: str = option("digits", "as of train", "Work")
    augment: str = option("crop(4)|flip", "as of train", "Work")
    batch_size: int = option(128, "images a step", "Work", limit=POSITIVE)
    dtype_policy: str = option(
        "auto", "as of train; peers have float32 too", "Work", DTYPE_POLICIES
    )
    xla: str = option("auto", "as of train", "Work", XLA)
    peers: bool = option(False, "compare with plain Keras, PyTorch and PaddlePaddle", "Comparison")
    growth: bool = option(False, "instead: by batch size, depth, number of images", "Comparison")
    distribution: bool = option(False, "instead: the cost of replicas and workers", "Comparison")
    serving: bool = option(False, "instead: serve over REST and gRPC, beside FastAPI", "Comparison")
    photos: bool = option(False, "instead: crops of JPEG files beside torchvision", "Comparison")
    steps: int = option(20, "of an epoch, with --distribution", "Comparison", limit=POSITIVE)
    rounds: int = option(5, "turns of each contender", "Comparison", limit=POSITIVE)
    seconds: float = option(5.0, "of a turn", "Comparison", limit=POSITIVE)
    json: str | None = option(None, "also write all measurements to this file", "Output")
