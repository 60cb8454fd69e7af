"""Small networks that learn CIFAR-10 with the least computation.

Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498, section 3 and its
listing; after Page 2019, "How to train your ResNet". A frozen whitening convolution, then groups of
two convolutions with pooling after the first, identity-like initial weights, normalization without
scale, global max pooling, and small logits. Outside of training an image and its mirror image are
averaged (`layers.AddMirrored`), at twice the multiply-adds; the networks with `_views` average six
views, at six times. At 32 x 32 with 10 classes:

| name | widths | trainable parameters | multiply-adds |
|---|---|---|---|
| airbench94 | 64, 256, 256 | 1,971,352 | 118.1 million |
| airbench95 | 128, 384, 384 | 4,604,440 | 301.6 million |
| airbench_deep | 64, 384, 384 | 6,950,616 | 298.9 million |
| airbench_small | 64, 128, 128 | 568,728 | 54.2 million |
| each with `_views` | as above | as above | as above |

The small and the deep one are not in the paper. On two CPU cores the small one is more accurate after
five minutes, and the deep one after 45: its groups have the third convolution and the shortcut of the
paper's airbench96, whose widths are 128, 384, 512. Unlike the paper's, GELU is approximated by a
sigmoid, and the whitening's bias is trained to the end.
"""

import functools

import keras

from keras_cifar.models import Variant, classifier, layers

LOGIT_SCALE = 1 / 9  # section 3 of the paper


def group(x, filters: int, depth: int, name: str):
    """Convolution -> pool -> BN -> GELU -> convolution -> BN -> GELU.

    With a `depth` of 3, the second convolution and a third are a residual block.
    """
    outputs = []
    for index in range(1, depth + 1):
        options = {"bias": False, "initializer": layers.IdentityPlus()}
        x = layers.conv(x, filters, 3, name=f"{name}_{index}_conv", **options)
        if index == 1:
            x = keras.layers.MaxPooling2D(2, name=f"{name}_pool")(x)
        x = layers.BatchNormalization(scale=False, name=f"{name}_{index}_bn")(x)
        if index == 3:
            x = keras.layers.Add(name=f"{name}_add")([x, outputs[0]])
        x = layers.SigmoidGelu(name=f"{name}_{index}_gelu")(x)
        outputs.append(x)
    return x


def airbench(
    widths: tuple[int, ...] = (64, 256, 256),
    depth: int = 2,
    shift: int = 0,
    input_shape: classifier.Shape = (32, 32, 3),
    num_classes: int = 10,
    name: str = "airbench94",
) -> classifier.Classifier:
    """Builds the network; `widths` are the numbers of filters in each group, `depth` of convolutions.

    `shift` are the pixels by which more views are moved outside of training, 0 for none.
    """
    # Whitening amplifies the rounding of pixels.
    precise = {"dtype": layers.variable_dtype()}
    images, x = classifier.image_input(input_shape)
    x = layers.AddMirrored(shift, name="mirrored", **precise)(x)
    x = layers.Whitening(2, name="whitening", **precise)(x)
    x = layers.SigmoidGelu(name="whitening_gelu", **precise)(x)
    for index, filters in enumerate(widths):
        x = group(x, filters, depth, f"group{index}")
    x = keras.layers.GlobalMaxPooling2D(name="pool")(x)
    x = keras.layers.Rescaling(LOGIT_SCALE, name="small", **precise)(x)
    x = layers.MeanOfMirrored(shift, name="features", **precise)(x)
    logits = layers.logits(x, num_classes, use_bias=False)
    return classifier.Classifier.build_from(images, logits, name)


_PAPER = "Jordan 2024, arXiv:2404.00498"
VARIANTS = {
    f"{name}{suffix}": Variant(
        functools.partial(airbench, widths, depth, shift), _PAPER, 32, 10, min_size=9
    )
    for name, widths, depth in (
        ("airbench94", (64, 256, 256), 2),
        ("airbench95", (128, 384, 384), 2),
        ("airbench_deep", (64, 384, 384), 3),
        ("airbench_small", (64, 128, 128), 2),
    )
    for suffix, shift in (("", 0), ("_views", 1))
}
