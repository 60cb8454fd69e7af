"""LeNet-5, the first convolutional network in wide use.

LeCun, Bottou, Bengio, Haffner 1998, "Gradient-Based Learning Applied to Document Recognition",
Proceedings of the IEEE, section II.B.

| name | parameters at 32 x 32 x 3, 10 classes |
|---|---|
| lenet5 | 62,006 |

On the paper's single grey channel it would be 61,706. As has become usual, and unlike the paper, every
map of the third layer sees every map of the second, the subsampling has no trained coefficients, and
the output is a softmax. It takes images from 16 pixels on; the first dense layer adapts to their size.
"""

import keras

from keras_cifar.models import Variant, classifier, layers


def lenet5(
    input_shape: classifier.Shape = (32, 32, 3), num_classes: int = 10, name: str = "lenet5"
) -> classifier.Classifier:
    """Builds the network."""
    images, x = classifier.image_input(input_shape)
    for index, filters in enumerate((6, 16), start=1):
        x = layers.ConvWithBias(filters, 5, activation="tanh", name=f"conv{index}")(x)
        x = keras.layers.AveragePooling2D(2, name=f"conv{index}_pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)  # The paper's C5: 5 x 5 on 5 x 5 is dense.
    x = keras.layers.Dense(120, "tanh", name="dense1")(x)
    x = keras.layers.Dense(84, "tanh", name="features")(x)
    logits = layers.logits(x, num_classes)
    return classifier.Classifier.build_from(images, logits, name)


VARIANTS = {"lenet5": Variant(lenet5, "LeCun et al. 1998, Proc. IEEE", 32, 10, min_size=16)}
