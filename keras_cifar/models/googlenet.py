"""GoogLeNet (Inception v1): nine blocks of four parallel branches, and two auxiliary classifiers.

Szegedy et al. 2014, "Going Deeper with Convolutions", arXiv:1409.4842, table 1. Trainable
parameters at 224 x 224 with 1,000 classes:

| name | deployed | with the auxiliary classifiers |
|---|---|---|
| googlenet | 6,998,552 | 13,378,280 |
| googlenet_bn | 7,013,112 | 13,393,352 |

`googlenet_bn` normalises after each convolution and has no local response normalisation (Ioffe and
Szegedy 2015, arXiv:1502.03167); its 5 x 5 convolutions remain. The auxiliary classifiers are trained
with weight 0.3 and are not deployed.

On images of up to 64 pixels, the first convolution of the stem is 3 x 3 with stride 1, and its first
pooling is left out: at 32 x 32 the first block gets 16 x 16 (28 x 28 in the paper) and the last 4 x 4
(7 x 7). The auxiliary classifiers' 5 x 5 average pooling shrinks to the image where that is smaller.
"""

import functools

import keras

from keras_cifar.models import Variant, classifier, is_small, layers

# 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection; "pool" halves the resolution.
BLOCKS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "pool3": None,
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "pool4": None,
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
AUXILIARY_AFTER = ("4a", "4d")
DROPOUT, AUXILIARY_DROPOUT = 0.4, 0.7


def inception_block(x, widths: tuple[int, ...], conv, name: str):
    """Four branches, concatenated (figure 2b)."""
    one, three_reduce, three, five_reduce, five, projection = widths
    pooled = keras.layers.MaxPooling2D(3, 1, "same", name=f"{name}_pool")(x)
    branches = [
        conv(x, one, 1, name=f"{name}_1x1"),
        conv(conv(x, three_reduce, 1, name=f"{name}_3x3_reduce"), three, 3, name=f"{name}_3x3"),
        conv(conv(x, five_reduce, 1, name=f"{name}_5x5_reduce"), five, 5, name=f"{name}_5x5"),
        conv(pooled, projection, 1, name=f"{name}_projection"),
    ]
    return keras.layers.Concatenate(name=f"{name}_concat")(branches)


def auxiliary_classifier(x, num_classes: int, conv, name: str):
    """Pool, 1 x 1 convolution, dense 1,024, dropout, logits (section 5)."""
    size = min(5, *x.shape[1:3])
    x = keras.layers.AveragePooling2D(size, 3, name=f"{name}_pool")(x)
    x = conv(x, 128, 1, name=f"{name}_1x1")
    x = keras.layers.Flatten(name=f"{name}_flatten")(x)
    x = layers.dense_relu(x, 1024, name=f"{name}_dense", dropout=AUXILIARY_DROPOUT)
    return layers.logits(x, num_classes, name=f"{name}_logits")


def googlenet(
    batch_norm: bool = False,
    input_shape: classifier.Shape = (224, 224, 3),
    num_classes: int = 1000,
    name: str = "googlenet",
) -> classifier.Classifier:
    """Builds the network with its auxiliary classifiers."""
    conv = functools.partial(layers.conv_relu, batch_norm=batch_norm)

    def normalise(x, name):
        return x if batch_norm else layers.LocalResponseNormalization(name=name)(x)

    images, x = classifier.image_input(input_shape)
    if is_small(input_shape):
        x = conv(x, 64, 3, name="stem1")
    else:
        x = conv(x, 64, 7, 2, name="stem1")
        x = keras.layers.MaxPooling2D(3, 2, "same", name="stem1_pool")(x)
    x = normalise(x, "stem1_lrn")
    x = conv(x, 64, 1, name="stem2_reduce")
    x = conv(x, 192, 3, name="stem2")
    x = normalise(x, "stem2_lrn")
    x = keras.layers.MaxPooling2D(3, 2, "same", name="stem2_pool")(x)
    auxiliary = []
    for block, widths in BLOCKS.items():
        if widths is None:
            x = keras.layers.MaxPooling2D(3, 2, "same", name=block)(x)
            continue
        x = inception_block(x, widths, conv, f"inception{block}")
        if block in AUXILIARY_AFTER:
            auxiliary.append(
                auxiliary_classifier(x, num_classes, conv, f"auxiliary{len(auxiliary) + 1}")
            )
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    x = layers.Dropout(DROPOUT, name="features_drop")(x)
    logits = layers.logits(x, num_classes)
    return classifier.Classifier.build_from(images, logits, name, auxiliary)


_PAPER = "Szegedy et al. 2014, arXiv:1409.4842"
VARIANTS = {
    name: Variant(functools.partial(googlenet, batch_norm), paper, 224, 1000, min_size=16)
    for name, batch_norm, paper in (
        ("googlenet", False, _PAPER),
        ("googlenet_bn", True, f"{_PAPER}; BN: arXiv:1502.03167"),
    )
}
