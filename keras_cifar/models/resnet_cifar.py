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
PAPER = "He et al. 2015, arXiv:1512.03385"


def basic_block(x, filters: int, stride: int, name: str):
    """Two 3 x 3 convolutions beside a shortcut (figure 5, left)."""
    shortcut = x
    if x.shape[-1] != filters or stride != 1:
        shortcut = layers.conv_norm(x, filters, 1, stride, name=f"{name}_shortcut", relu=False)
    x = layers.conv_norm(x, filters, 3, stride, name=f"{name}_1")
    x = layers.conv_norm(x, filters, 3, name=f"{name}_2", relu=False)
    x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return keras.layers.ReLU(name=f"{name}_relu")(x)


def residual_network(images, x, block, blocks, widths, num_classes: int, name: str):
    """Stages of blocks and the classifier; each stage but the first halves the resolution."""
    for stage, (count, filters) in enumerate(zip(blocks, widths, strict=True)):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            x = block(x, filters, stride, f"stage{stage}_block{index}")
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    logits = layers.logits(x, num_classes)
    return classifier.Classifier.build_from(images, logits, name)


def resnet_cifar(
    depth: int = 32,
    input_shape: classifier.Shape = (32, 32, 3),
    num_classes: int = 10,
    name: str | None = None,
) -> classifier.Classifier:
    """Builds the network with `depth` layers with weights on its main path.

    Raises:
        ValueError: the depth is not 6n + 2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"the depth must be 6n + 2, such as 20 or 32; got {depth}")
    images, x = classifier.image_input(input_shape)
    x = layers.conv_norm(x, WIDTHS[0], 3, name="stem")
    name = name or f"resnet{depth}"
    return residual_network(images, x, basic_block, (blocks,) * 3, WIDTHS, num_classes, name)


VARIANTS = {
    f"resnet{depth}": Variant(functools.partial(resnet_cifar, depth), PAPER, 32, 10, min_size=4)
    for depth in (20, 32, 44, 56, 110, 1202)
}
