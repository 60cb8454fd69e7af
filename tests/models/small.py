"""A small network, examples for it, and the formulas that it is compared with."""

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.models import classifier, layers
from tests.conftest import colour_images

CLASSES = 3


def network(norm: bool = True, heads: int = 1) -> tuple:
    """(input, logits of each head): a convolution on 8 x 8 images, with or without normalization."""
    keras.utils.set_random_seed(1)
    images, x = classifier.image_input((8, 8, 3))
    x = layers.conv_norm(x, 4, 3, name="conv") if norm else layers.conv(x, 4, 3, name="conv")
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    names = ["logits", *(f"auxiliary{index}" for index in range(1, heads))]
    return images, [keras.layers.Dense(CLASSES, name=name)(x) for name in names]


def functional(norm: bool = True, heads: int = 1) -> keras.Model:
    return keras.Model(*network(norm, heads))


def tiny() -> classifier.Classifier:
    images, (logits,) = network()
    return classifier.Classifier.build_from(images, logits, "tiny")


def examples(count: int = 10) -> tuple:
    """(uint8 [N, 8, 8, 3], float32 [N, CLASSES]): some labels are mixed."""
    images, labels = colour_images(count, 8, CLASSES)
    labels = np.eye(CLASSES, dtype=np.float32)[labels]
    labels[::2] = labels[::2] * 0.7 + labels[::2][::-1] * 0.3
    return images, labels


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def cross_entropies(labels, logits) -> np.ndarray:
    """float64 [N]."""
    return -(labels * log_softmax(logits)).sum(axis=1)


def values(model) -> dict[str, np.ndarray]:
    return {v.path: v.numpy() for v in model.weights}


def kernels(layer, shape: tuple, dtype: str = "float32", training: bool = True) -> set[str]:
    """The kinds of the operations that a call makes."""
    call = tf.function(lambda x: layer(x, training=training), autograph=False)
    graph = call.get_concrete_function(tf.TensorSpec(shape, dtype)).graph
    return {operation.type for operation in graph.get_operations()}
