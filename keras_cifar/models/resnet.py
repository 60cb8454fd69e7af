"""ResNets for ImageNet, with basic and with bottleneck blocks.

He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, table 1.
Trainable parameters at 224 x 224 with 1,000 classes (torchvision's):

| name | blocks a stage | block | parameters |
|---|---|---|---|
| resnet18 | 2, 2, 2, 2 | basic | 11,689,512 |
| resnet34 | 3, 4, 6, 3 | basic | 21,797,672 |
| resnet50 | 3, 4, 6, 3 | bottleneck | 25,557,032 |
| resnet101 | 3, 4, 23, 3 | bottleneck | 44,549,160 |
| resnet152 | 3, 8, 36, 3 | bottleneck | 60,192,808 |

As in torchvision, and unlike the paper, the stride of a bottleneck is on its 3 x 3 convolution. Images
of up to 64 pixels get a 3 x 3 stem with stride 1 and no max pooling, so that the last stage has an
eighth of the resolution.
"""

import functools
import re

import keras

from keras_cifar.models import TorchLayout, Variant, classifier, is_small, layers
from keras_cifar.models.resnet_cifar import PAPER, basic_block, residual_network

WIDTHS = (64, 128, 256, 512)
EXPANSION = 4  # of a bottleneck's output over its middle


def bottleneck_block(x, filters: int, stride: int, name: str):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut (figure 5, right)."""
    shortcut, wide = x, filters * EXPANSION
    if x.shape[-1] != wide or stride != 1:
        shortcut = layers.conv_norm(x, wide, 1, stride, name=f"{name}_shortcut", relu=False)
    x = layers.conv_norm(x, filters, 1, name=f"{name}_1")
    x = layers.conv_norm(x, filters, 3, stride, name=f"{name}_2")
    x = layers.conv_norm(x, wide, 1, name=f"{name}_3", relu=False)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def resnet(
    block,
    blocks: tuple[int, ...],
    input_shape: classifier.Shape = (224, 224, 3),
    num_classes: int = 1000,
    name: str = "resnet",
) -> classifier.Classifier:
    """Builds the network; `blocks` are the numbers of blocks in each of its four stages."""
    images, x = classifier.image_input(input_shape)
    if is_small(input_shape):
        x = layers.conv_norm(x, WIDTHS[0], 3, name="stem")
    else:
        x = layers.conv_norm(x, WIDTHS[0], 7, 2, name="stem")
        # ReLU's output is never negative, so zero padding does not change the maximum.
        x = keras.layers.ZeroPadding2D(1, name="stem_pool_pad")(x)
        x = keras.layers.MaxPooling2D(3, 2, name="stem_pool")(x)
    return residual_network(images, x, block, blocks, WIDTHS, num_classes, name)


def _torch_names(names: list[str]) -> list[dict[str, str]]:
    """Of torchvision, and of timm, which are the same."""
    found = {"stem_conv": "conv1", "stem_bn": "bn1", "logits": "fc"}
    for name in names:
        if match := re.fullmatch(r"stage(\d)_block(\d+)_(\d|shortcut)_(conv|bn)", name):
            stage, block, part, kind = match.groups()
            own = f"{kind}{part}" if part != "shortcut" else f"downsample.{'01'[kind == 'bn']}"
            found[name] = f"layer{int(stage) + 1}.{block}.{own}"
    return [found]


VARIANTS = {
    name: Variant(
        functools.partial(resnet, block, blocks),
        PAPER,
        224,
        1000,
        min_size=8,
        torch=TorchLayout(_torch_names),
    )
    for name, block, blocks in (
        ("resnet18", basic_block, (2, 2, 2, 2)),
        ("resnet34", basic_block, (3, 4, 6, 3)),
        ("resnet50", bottleneck_block, (3, 4, 6, 3)),
        ("resnet101", bottleneck_block, (3, 4, 23, 3)),
        ("resnet152", bottleneck_block, (3, 8, 36, 3)),
    )
}
