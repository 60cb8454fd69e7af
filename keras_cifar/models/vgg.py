"""VGG: groups of 3 x 3 convolutions with max pooling between them.

Simonyan, Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv:1409.1556, table 1. Trainable parameters at 224 x 224 with 1,000 classes, and of
`vgg_bn_drop`, the network of the PaddlePaddle tutorial, at 32 x 32 with 10:

| name | convolutions a group | parameters | with BN (`_bn`) |
|---|---|---|---|
| vgg11 | 1, 1, 2, 2, 2 | 132,863,336 | 132,868,840 |
| vgg13 | 2, 2, 2, 2, 2 | 133,047,848 | 133,053,736 |
| vgg16 | 2, 2, 3, 3, 3 | 138,357,544 | 138,365,992 |
| vgg19 | 2, 2, 4, 4, 4 | 143,667,240 | 143,678,248 |
| vgg_bn_drop | 2, 2, 3, 3, 3 | 15,254,602 | |

The `_bn` variants (Ioffe and Szegedy 2015, arXiv:1502.03167) normalise after each convolution, which
keeps its bias, as in torchvision. At 32 x 32, five poolings leave one pixel of 512 channels for the
dense layers, instead of 7 x 7. With He et al.'s initial weights the plain networks train without the
paper's stepwise start. `vgg_bn_drop`, which has no published count, has biases in all of its
convolutions and dense layers.
"""

import functools

import keras

from keras_cifar.models import TorchLayout, Variant, classifier, layers

WIDTHS = (64, 128, 256, 512, 512)
GROUPS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

# The tutorial's rates for vgg_bn_drop: after each convolution except the last of a group.
FIRST_DROPOUT = 0.3  # in the first group
DROPOUT = 0.4  # in the others
HEAD_DROPOUT = 0.5


def conv_group(x, filters: int, dropouts: tuple[float, ...], batch_norm: bool, name: str):
    """Convolution (-> BN) -> ReLU -> dropout for each rate, then 2 x 2 max pooling."""
    for index, rate in enumerate(dropouts):
        conv_name = f"{name}_{index + 1}"
        x = layers.conv_relu(x, filters, 3, name=conv_name, batch_norm=batch_norm)
        if rate:
            x = layers.Dropout(rate, name=f"{conv_name}_drop")(x)
    return keras.layers.MaxPooling2D(2, name=f"{name}_pool")(x)


def vgg(
    groups: tuple[int, ...],
    batch_norm: bool,
    input_shape: classifier.Shape = (224, 224, 3),
    num_classes: int = 1000,
    name: str = "vgg",
) -> classifier.Classifier:
    """Builds a network of the paper; `groups` are the convolutions in each of its five groups."""
    images, x = classifier.image_input(input_shape)
    for index, (count, filters) in enumerate(zip(groups, WIDTHS, strict=True)):
        x = conv_group(x, filters, (0.0,) * count, batch_norm, f"group{index + 1}")
    x = keras.layers.Flatten(name="flatten")(x)
    x = layers.dense_relu(x, 4096, name="dense1", dropout=HEAD_DROPOUT)
    x = layers.dense_relu(x, 4096, name="features")
    x = layers.Dropout(HEAD_DROPOUT, name="features_drop")(x)
    logits = layers.logits(x, num_classes)
    return classifier.Classifier.build_from(images, logits, name)


def vgg_bn_drop(
    input_shape: classifier.Shape = (32, 32, 3), num_classes: int = 10, name: str = "vgg_bn_drop"
) -> classifier.Classifier:
    """Builds the tutorial's network: 16 layers, BN and dropout in the groups, a head of 512 units."""
    images, x = classifier.image_input(input_shape)
    for index, (count, filters) in enumerate(zip(GROUPS["vgg16"], WIDTHS, strict=True)):
        rate = FIRST_DROPOUT if index == 0 else DROPOUT
        x = conv_group(x, filters, (rate,) * (count - 1) + (0.0,), True, f"group{index + 1}")
    x = keras.layers.Flatten(name="flatten")(x)
    x = layers.Dropout(HEAD_DROPOUT, name="flatten_drop")(x)
    x = keras.layers.Dense(512, name="dense1")(x)
    x = layers.BatchNormalization(name="dense1_bn")(x)
    x = keras.layers.ReLU(name="dense1_relu")(x)
    x = layers.Dropout(HEAD_DROPOUT, name="dense1_drop")(x)
    x = keras.layers.Dense(512, name="features")(x)
    logits = layers.logits(x, num_classes)
    return classifier.Classifier.build_from(images, logits, name)


def _torch_names(names: list[str]) -> list[dict[str, str]]:
    """Of torchvision, which numbers all layers of the groups, and of timm, whose head differs."""
    groups = {name: f"features.{i}" for i, name in enumerate(n for n in names if n[:5] == "group")}
    heads = (
        {"dense1": "classifier.0", "features": "classifier.3", "logits": "classifier.6"},
        {"dense1": "pre_logits.fc1", "features": "pre_logits.fc2", "logits": "head.fc"},
    )
    return [groups | head for head in heads]


_PAPER = "Simonyan and Zisserman 2014, arXiv:1409.1556"
VARIANTS = {
    "vgg_bn_drop": Variant(vgg_bn_drop, _PAPER + " (PaddlePaddle tutorial)", 32, 10, min_size=32)
} | {
    f"{name}{suffix}": Variant(
        functools.partial(vgg, groups, batch_norm),
        _PAPER,
        224,
        1000,
        min_size=32,
        torch=TorchLayout(_torch_names),
    )
    for suffix, batch_norm in (("", False), ("_bn", True))
    for name, groups in GROUPS.items()
}
