"""Uneven classes: how much each image counts in the loss."""

import numpy as np


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
