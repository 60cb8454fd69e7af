"""EfficientNet-Lite 0 to 4, for CPUs and integers: without squeeze-and-excite, with ReLU6.

Tan, Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
arXiv:1905.11946; the Lite form is that of Liu 2020, https://blog.tensorflow.org/2020/03/higher-accuracy-
on-vision-models-with-efficientnet-lite.html. Trainable parameters with 1,000 classes:

| name | width | depth | pixels | parameters |
|---|---|---|---|---|
| efficientnet_lite0 | 1.0 | 1.0 | 224 | 4,652,008 |
| efficientnet_lite1 | 1.0 | 1.1 | 240 | 5,416,680 |
| efficientnet_lite2 | 1.1 | 1.2 | 260 | 6,092,072 |
| efficientnet_lite3 | 1.2 | 1.4 | 280 | 8,197,096 |
| efficientnet_lite4 | 1.4 | 1.8 | 300 | 13,006,568 |

Stem, head and the number of blocks in the first and last stage do not grow with width and depth. Pixels
become (pixel - 127) / 128, as in the weights of the authors.
"""

import functools
import itertools
import math

import keras

from keras_cifar.models import TorchLayout, Variant, classifier, layers
from keras_cifar.models.batch_norm import BatchNormalization

PAPER = "Tan and Le 2019, arXiv:1905.11946"

# (blocks, kernel, stride of the first block, expansion, filters) of each stage of EfficientNet-B0.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280  # filters
EPSILON = 1e-3  # of batch normalization
DROP_CONNECT = 0.2  # of the last block; it grows from 0 with the number of the block
DIVISOR = 8  # of numbers of filters

# Those of the authors' implementation, by its fans: of a depthwise kernel, 1 filter.
_INITIALIZER = functools.partial(keras.initializers.VarianceScaling, 2.0, "fan_out")


def _scaled_filters(filters: int, width: float) -> int:
    """The multiple of DIVISOR nearest to `filters` times `width`, at least nine tenths of it."""
    scaled = filters * width
    rounded = max(DIVISOR, int(scaled + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * scaled else rounded


def _norm(x, name: str, relu: bool = True):
    x = BatchNormalization(epsilon=EPSILON, name=f"{name}_bn")(x)
    return keras.layers.ReLU(6.0, name=f"{name}_relu")(x) if relu else x


def _conv_norm(x, filters: int, size: int, stride: int, name: str, relu: bool = True):
    """Convolution -> BN -> ReLU6; padding is TensorFlow's, which depends on the parity of the input."""
    options = {"use_bias": False, "kernel_initializer": _INITIALIZER(), "name": f"{name}_conv"}
    return _norm(keras.layers.Conv2D(filters, size, stride, "same", **options)(x), name, relu)


def inverted_residual(x, filters: int, size: int, stride: int, expansion: int, drop: float, name):
    """1 x 1 expansion, depthwise and 1 x 1 convolution beside a shortcut (Sandler et al. 2018)."""
    shortcut = x
    if expansion > 1:
        x = _conv_norm(x, expansion * x.shape[-1], 1, 1, f"{name}_expand")
    options = {"use_bias": False, "depthwise_initializer": _INITIALIZER()}
    depthwise = f"{name}_depthwise"
    x = keras.layers.DepthwiseConv2D(size, stride, "same", name=f"{depthwise}_conv", **options)(x)
    x = _conv_norm(_norm(x, depthwise), filters, 1, 1, f"{name}_project", relu=False)
    if stride > 1 or shortcut.shape[-1] != filters:
        return x
    if drop:  # stochastic depth: Huang et al. 2016, arXiv:1603.09382
        x = layers.Dropout(drop, noise_shape=(None, 1, 1, 1), name=f"{name}_drop")(x)
    return keras.layers.Add(name=f"{name}_add")([x, shortcut])


def efficientnet_lite(
    width: float,
    depth: float,
    dropout: float,
    input_shape: classifier.Shape = (224, 224, 3),
    num_classes: int = 1000,
    name: str = "efficientnet_lite0",
) -> classifier.Classifier:
    """Builds the network; `width` and `depth` multiply B0's filters and blocks."""
    images, x = classifier.image_input(input_shape, scale=1 / 128, offset=-127 / 128)
    x = _conv_norm(x, STEM, 3, 2, "stem")
    ends = (0, len(STAGES) - 1)
    counts = [n if i in ends else math.ceil(n * depth) for i, (n, *_) in enumerate(STAGES)]
    rates = (DROP_CONNECT * number / sum(counts) for number in itertools.count())
    stages = zip(counts, STAGES, strict=True)
    for stage, (count, (_, size, stride, expansion, filters)) in enumerate(stages):
        filters = _scaled_filters(filters, width)
        for index in range(count):
            options = (size, stride if index == 0 else 1, expansion, next(rates))
            x = inverted_residual(x, filters, *options, f"stage{stage}_block{index}")
    x = _conv_norm(x, HEAD, 1, 1, "head")
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    x = layers.Dropout(dropout, name="features_drop")(x)
    logits = layers.logits(x, num_classes)
    return classifier.Classifier.build_from(images, logits, name)


def _torch_names(names: list[str]) -> list[dict[str, str]]:
    """Of the authors' weights as converted by ML Illustrated (lukemelas's names), and of timm."""
    blocks = list(dict.fromkeys("_".join(n.split("_")[:2]) for n in names if n[:5] == "stage"))
    lukemelas = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "head_conv": "_conv_head"}
    lukemelas |= {"head_bn": "_bn1", "logits": "_fc"}
    timm = {"stem_conv": "conv_stem", "stem_bn": "bn1", "head_conv": "conv_head"}
    timm |= {"head_bn": "bn2", "logits": "classifier"}
    for number, block in enumerate(blocks):
        theirs = f"blocks.{block.removeprefix('stage').replace('_block', '.')}"
        parts = [p for p in ("expand", "depthwise", "project") if f"{block}_{p}_conv" in names]
        pointwise = {
            "expand": "pw",
            "depthwise": "dw",
            "project": "pwl" if len(parts) > 2 else "pw",
        }
        for index, part in enumerate(parts):
            bn = index + 3 - len(parts)
            lukemelas[f"{block}_{part}_conv"] = f"_blocks.{number}._{part}_conv"
            lukemelas[f"{block}_{part}_bn"] = f"_blocks.{number}._bn{bn}"
            timm[f"{block}_{part}_conv"] = f"{theirs}.conv_{pointwise[part]}"
            timm[f"{block}_{part}_bn"] = f"{theirs}.bn{index + 1}"
    return [lukemelas, timm]


_PIXELS = ((127 / 255,) * 3, (128 / 255,) * 3)
VARIANTS = {
    f"efficientnet_lite{number}": Variant(
        functools.partial(efficientnet_lite, width, depth, dropout),
        PAPER,
        size,
        1000,
        min_size=32,
        torch=TorchLayout(_torch_names, *_PIXELS),
    )
    for number, (width, depth, size, dropout) in enumerate(
        (
            (1.0, 1.0, 224, 0.2),
            (1.0, 1.1, 240, 0.2),
            (1.1, 1.2, 260, 0.3),
            (1.2, 1.4, 280, 0.3),
            (1.4, 1.8, 300, 0.3),
        )
    )
}
