"""Uneven classes: how much each image counts in the loss, or how often it is drawn."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf


def class_weights(labels: np.ndarray, classes: int) -> list[float]:
    """The weight of each of K classes in the loss, so that all count alike: N / (K n_class).

    scikit-learn's `balanced`, after King and Zeng 2001, Logistic Regression in Rare Events Data. The
    mean weight of an image is 1. A class that no label has is none of the K, and has weight 1.

    Args:
        labels: int [N], of the training images.
    """
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    return np.where(counts, len(labels) / (present * np.maximum(counts, 1)), 1.0).tolist()


def even_order(labels: np.ndarray) -> Callable[[tf.Tensor], tf.Tensor]:
    """A function from a seed int32 [2] to the examples of a pass in which classes are equally frequent.

    It returns int32 [N], as many as there are `labels` int [N]. The numbers of examples of two classes
    differ by at most 1, and the classes come in a random order. A class shows all its examples in a
    random order before it shows them again, so a small one repeats them and a large one shows a part.
    """
    own = np.unique(labels, return_inverse=True)[1].astype(np.int32)
    sizes = np.bincount(own).astype(np.int32)
    count, classes, starts = len(labels), len(sizes), np.cumsum(sizes, dtype=np.int32) - sizes
    own, sizes, starts = (tf.constant(array) for array in (own, sizes, starts))

    def order(seed):
        def shuffled(size, purpose):
            drawn = tf.random.experimental.stateless_fold_in(seed, purpose)
            return tf.random.experimental.stateless_shuffle(tf.range(size), drawn)

        random = shuffled(count, 0)
        by_class = tf.gather(random, tf.argsort(tf.gather(own, random), stable=True))
        # The class of each place in the order. If there is a remainder, any classes are in it.
        drawn = tf.gather(shuffled(classes, 1), shuffled(count, 2) % classes)
        places = tf.argsort(drawn, stable=True)
        drawn = tf.gather(drawn, places)
        # How many places before belong to the same class.
        earlier = tf.range(count) - tf.gather(tf.searchsorted(drawn, tf.range(classes)), drawn)
        examples = tf.gather(starts, drawn) + earlier % tf.gather(sizes, drawn)
        return tf.scatter_nd(places[:, None], tf.gather(by_class, examples), [count])

    return order
