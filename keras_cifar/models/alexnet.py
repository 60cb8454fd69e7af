"""AlexNet: five convolutions and three dense layers.

Krizhevsky, Sutskever, Hinton 2012, "ImageNet Classification with Deep Convolutional Neural
Networks", NIPS, section 3.5, with its local response normalisation, overlapping pooling, and the
second, fourth and fifth convolution in two groups of channels.

| name | parameters at 224 x 224, 1,000 classes |
|---|---|
| alexnet | 60,965,224 |

The paper says 224 x 224, and its sizes need 227 x 227: the first convolution is padded for that. On
images of up to 64 pixels it is 5 x 5 with stride 1 and same padding. Initial weights are He et
al.'s; biases are zero, not one.
"""

import keras

from keras_cifar.models import Variant, classifier, is_small, layers

DROPOUT = 0.5


def halved_conv(x, filters: int, size: int, name: str):
    """A convolution in two groups of channels: the paper's two GPUs."""
    half = x.shape[-1] // 2
    halves = [
        layers.conv(channels, filters // 2, size, name=f"{name}_{side}_conv")
        for side, channels in (("a", x[..., :half]), ("b", x[..., half:]))
    ]
    return keras.layers.Concatenate(name=f"{name}_concat")(halves)


def alexnet(
    input_shape: classifier.Shape = (224, 224, 3), num_classes: int = 1000, name: str = "alexnet"
) -> classifier.Classifier:
    """Builds the network."""

    def relu(x, name):
        return keras.layers.ReLU(name=f"{name}_relu")(x)

    images, x = classifier.image_input(input_shape)
    if is_small(input_shape):
        x = layers.conv(x, 96, 5, name="conv1_conv")
    else:
        x = keras.layers.ZeroPadding2D(((2, 1), (2, 1)), name="conv1_pad")(x)
        x = layers.conv(x, 96, 11, 4, name="conv1_conv", padding="valid")
    x = layers.LocalResponseNormalization(name="conv1_lrn")(relu(x, "conv1"))
    x = keras.layers.MaxPooling2D(3, 2, name="conv1_pool")(x)
    x = relu(halved_conv(x, 256, 5, "conv2"), "conv2")
    x = layers.LocalResponseNormalization(name="conv2_lrn")(x)
    x = keras.layers.MaxPooling2D(3, 2, name="conv2_pool")(x)
    x = layers.conv_relu(x, 384, 3, name="conv3")
    x = relu(halved_conv(x, 384, 3, "conv4"), "conv4")
    x = relu(halved_conv(x, 256, 3, "conv5"), "conv5")
    x = keras.layers.MaxPooling2D(3, 2, name="conv5_pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = layers.dense_relu(x, 4096, name="dense1", dropout=DROPOUT)
    x = layers.dense_relu(x, 4096, name="features")
    x = layers.Dropout(DROPOUT, name="features_drop")(x)
    logits = layers.logits(x, num_classes)
    return classifier.Classifier.build_from(images, logits, name)


VARIANTS = {"alexnet": Variant(alexnet, "Krizhevsky et al. 2012, NIPS", 224, 1000, min_size=16)}
