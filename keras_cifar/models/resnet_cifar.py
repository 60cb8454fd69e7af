"""ResNets for small images: three stages of basic blocks, depth 6n + 2.

He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section
4.2; `resnet_cifar10` of the PaddlePaddle tutorial. Trainable parameters at 32 x 32 with 10 classes:

| name | blocks a stage | parameters |
|---|---|---|
| resnet20 | 3 | 272,474 |
| resnet32 | 5 | 466,906 |
| resnet44 | 7 | 661,338 |
| resnet56 | 9 | 855,770 |
| resnet110 | 18 | 1,730,714 |
| resnet1202 | 200 | 19,424,026 |

As in the tutorial, and unlike the paper's CIFAR networks, the shortcut is a 1 x 1 convolution with BN
where the width changes (option B). Unlike the tutorial's, the second convolution of a block has no
bias, which the following BN would subtract again.
"""

import functools

import keras

from keras_cifar.models import Variant, classifier, layers

WIDTHS = (16, 32, 64)


def basic_block(x, filters: int, stride: int, name: str):
    """Two 3 x 3 convolutions beside a shortcut (figure 5, left)."""
    shortcut = x
    if x.shape[-1] != filters or stride != 1:
        shortcut = layers.conv_norm(x, filters, 1, stride, name=f"{name}_shortcut", relu=False)
    x = layers.conv_norm(x, filters, 3, stride, name=f"{name}_1")
    x = layers.conv_norm(x, filters, 3, name=f"{name}_2", relu=False)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def resnet_cifar(
    depth: int = 32,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    name: str | None = None,
) -> classifier.Classifier:
    """Builds the network.

    Args:
        depth: number of layers with weights on the main path, 6n + 2.

    Raises:
        ValueError: the depth is not 6n + 2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"the depth must be 6n + 2, such as 20 or 32; got {depth}")
    images, x = classifier.image_input(input_shape)
    x = layers.conv_norm(x, WIDTHS[0], 3, name="stem")
    for stage, filters in enumerate(WIDTHS):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            x = basic_block(x, filters, stride, f"stage{stage}_block{block}")
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    logits = keras.layers.Dense(num_classes, name="logits")(x)
    return classifier.Classifier.build_from(images, logits, name or f"resnet{depth}")


VARIANTS = {
    f"resnet{depth}": Variant(
        functools.partial(resnet_cifar, depth),
        paper="He et al. 2015, arXiv:1512.03385",
        image_size=32,
        num_classes=10,
        min_size=4,
    )
    for depth in (20, 32, 44, 56, 110, 1202)
}
