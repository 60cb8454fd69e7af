"""Network in Network: convolutions followed by 1 x 1 convolutions, and no dense layer.

Lin, Chen, Yan 2013, "Network in Network", arXiv:1312.4400; the widths are those of the authors'
CIFAR-10 model.

| name | parameters at 32 x 32, 10 classes |
|---|---|
| nin | 966,986 |

The last 1 x 1 convolution has a channel for each class, and its average over the image is the
logit. The feature vector is the average of the 192 channels before it. The paper does not give the
padding of the pooling; here pooled sides are rounded up, as in the authors' framework. Images may
have any size from 8 pixels.
"""

import keras

from keras_cifar.models import Variant, classifier, layers

DROPOUT = 0.5


def mlpconv(x, size: int, widths: tuple[int, ...], name: str):
    """A convolution and two 1 x 1 convolutions, each with ReLU: section 3.1."""
    for index, filters in enumerate(widths):
        x = layers.conv_relu(x, filters, size if index == 0 else 1, name=f"{name}_{index + 1}")
    return x


def nin(
    input_shape: classifier.Shape = (32, 32, 3), num_classes: int = 10, name: str = "nin"
) -> classifier.Classifier:
    """Builds the network."""
    images, x = classifier.image_input(input_shape)
    x = mlpconv(x, 5, (192, 160, 96), "block1")
    x = keras.layers.MaxPooling2D(3, 2, "same", name="block1_pool")(x)
    x = layers.Dropout(DROPOUT, name="block1_drop")(x)
    x = mlpconv(x, 5, (192, 192, 192), "block2")
    x = keras.layers.AveragePooling2D(3, 2, "same", name="block2_pool")(x)
    x = layers.Dropout(DROPOUT, name="block2_drop")(x)
    x = mlpconv(x, 3, (192, 192), "block3")
    x = keras.layers.Identity(name="features")(x)
    x = mlpconv(x, 1, (num_classes,), "classes")
    dtype = layers.variable_dtype()
    logits = keras.layers.GlobalAveragePooling2D(dtype=dtype, name="logits")(x)
    return classifier.Classifier.build_from(images, logits, name)


VARIANTS = {"nin": Variant(nin, "Lin et al. 2013, arXiv:1312.4400", 32, 10, min_size=8)}
