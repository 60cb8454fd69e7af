#!/usr/bin/env python3
"""Classifies images as before 2012: low-level features, encoding, pooling, a linear classifier.

python scripts/classical.py --data folder:cifar10 [--features hog]

`patches` is the form that did best on CIFAR-10: whitened patches, k-means, the "triangle" encoding,
sums over quadrants and a linear SVM (Coates, Lee and Ng 2011, "An Analysis of Single-Layer Networks
in Unsupervised Feature Learning", 79.6 % with 4,000 centroids). `hog` are histograms of oriented
gradients (Dalal and Triggs 2005) with the same classifier. They need 'keras_cifar[classical]'.
"""

import dataclasses
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from keras_cifar.core import cli
from keras_cifar.core.errors import needing
from keras_cifar.core.options import POSITIVE, Options, option

PATCH = 6  # pixels of a side; section 4.4 of the paper
SAMPLED = 200_000  # patches from which whitening and centroids are computed; the paper has 400,000
# Added to the variance of a patch, whose pixels are in [0, 255], and to those of its components.
CONTRAST_EPSILON, WHITENING_EPSILON = 10.0, 0.1
BLOCK = 50  # images that are encoded at a time
HOG = {"orientations": 9, "pixels_per_cell": (4, 4), "cells_per_block": (2, 2), "channel_axis": -1}


@dataclasses.dataclass(frozen=True)
class ClassicalOptions(Options):
    """The command's flags."""

    data: str = option("digits", "as of train", "Data")
    features: str = option("patches", "low-level features", "Features", ("patches", "hog"))
    centroids: int = option(
        800, "of k-means; four times as many features", "Features", limit=POSITIVE
    )
    svm_c: float = option(0.01, "the weight of the SVM's losses", "Classifier", limit=POSITIVE)
    seed: int = option(0, "of patches and centroids", "Features")


def patch_encoder(images: np.ndarray, centroids: int, seed: int):
    """A function from uint8 [N, H, W, 3] to features float32 [N, 4 K], learned from images alone."""
    import tensorflow as tf
    from sklearn.cluster import MiniBatchKMeans

    def patches_of(images):
        """float32 [N, h, w, D]: each patch of each image, with a mean of 0 and equal contrast."""
        size = [1, PATCH, PATCH, 1]
        x = tf.image.extract_patches(tf.cast(images, tf.float32), size, [1] * 4, [1] * 4, "VALID")
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        return (x - mean) * tf.math.rsqrt(variance + CONTRAST_EPSILON)

    random, each = np.random.default_rng(seed), -(-SAMPLED // len(images))
    sample = []
    for start in range(0, len(images), BLOCK):
        found = patches_of(images[start : start + BLOCK]).numpy()
        sample.append(random.permutation(found.reshape(-1, found.shape[-1]))[: each * BLOCK])
    sample = np.concatenate(sample)
    mean = sample.mean(0)
    variances, components = np.linalg.eigh(np.cov(sample, rowvar=False))
    scaled = components / np.sqrt(variances + WHITENING_EPSILON)
    whitening = (scaled @ components.T).astype(np.float32)
    means = MiniBatchKMeans(centroids, batch_size=10_000, n_init=1, random_state=seed)
    centres = means.fit((sample - mean) @ whitening).cluster_centers_.astype(np.float32)

    @tf.function(autograph=False)
    def encode(images):
        x = tf.tensordot(patches_of(images) - mean, whitening, 1)
        square = tf.reduce_sum(x**2, -1, keepdims=True) + tf.reduce_sum(centres**2, -1)
        distance = tf.sqrt(tf.maximum(square - 2 * tf.tensordot(x, centres.T, 1), 0.0))
        # The "triangle": how much nearer a centroid is than the mean one.
        near = tf.nn.relu(tf.reduce_mean(distance, -1, keepdims=True) - distance)
        high, wide = (side // 2 for side in near.shape[1:3])
        halves = near[:, :high], near[:, high:]
        quadrants = [part for half in halves for part in (half[:, :, :wide], half[:, :, wide:])]
        return tf.concat([tf.reduce_sum(quadrant, [1, 2]) for quadrant in quadrants], -1)

    return lambda x: np.concatenate([encode(x[i : i + BLOCK]) for i in range(0, len(x), BLOCK)])


def hog_features(images: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients, float32 [N, D], of uint8 [N, H, W, 3]."""
    with needing("classical", "--features=hog"):
        from skimage.feature import hog
    return np.stack([hog(image, **HOG) for image in images]).astype(np.float32)


def main(options: ClassicalOptions) -> None:
    """Trains on the training images, tests on the test images, prints the accuracy."""
    from sklearn.svm import LinearSVC

    from keras_cifar import data

    start, dataset = time.perf_counter(), data.load(options.data, val_fraction=0.0)
    train, test, encode = dataset.train, dataset.test, hog_features
    if options.features == "patches":
        encode = patch_encoder(train.images, options.centroids, options.seed)
    x, others = encode(train.images), encode(test.images)
    mean, deviation = x.mean(0), np.sqrt(x.var(0) + 0.01)
    encoded = time.perf_counter()
    print(
        f"features  {x.shape[1]:,} of {options.features}, {(encoded - start) / 60:.1f} min",
        flush=True,
    )
    svm = LinearSVC(C=options.svm_c, dual=False, tol=1e-2).fit((x - mean) / deviation, train.labels)
    accuracy = svm.score((others - mean) / deviation, test.labels)
    minutes = (time.perf_counter() - start) / 60
    print(f"test accuracy {accuracy:.4f} on {len(test):,} images, {minutes:.1f} min")


if __name__ == "__main__":
    cli.run("classical.py", main, ClassicalOptions, __doc__)
