"""Split -> batches. The order and the augmentation are functions of (seed, step) alone, so the
same seed gives the same batches, and a run can go on at any step.
"""

import tensorflow as tf

from keras_cifar import augmentation
from keras_cifar.data import Split
from keras_cifar.errors import UserError


def steps_in(split: Split, batch_size: int) -> int:
    """Full batches in one pass over a split.

    Raises:
        UserError: the split is smaller than a batch.
    """
    if len(split) < batch_size:
        raise UserError(
            f"--batch_size={batch_size} is more than the {len(split)} training images; lower it"
        )
    return len(split) // batch_size


def training(
    split: Split, classes: int, batch_size: int, augment: str, seed: int, start_step: int = 0
) -> tf.data.Dataset:
    """Endless batches of (images uint8 [B, H, W, 3], labels float32 [B, K]).

    Each pass is a new permutation of all images, of which the remainder of less than a batch is
    left out: another one each time.

    Args:
        start_step: the step of the run that the first batch is for.
    """
    steps = steps_in(split, batch_size)
    images, labels = tf.constant(split.images), tf.constant(split.labels)
    transform = augmentation.parse(augment)
    order_seed, augment_seed = (seed, 0), (seed, 1)

    def one_pass(number):
        fold = tf.random.experimental.stateless_fold_in
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(split)), fold(tf.constant(order_seed), tf.cast(number, tf.int32))
        )
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)

    def batch(step, indices):
        fold = tf.random.experimental.stateless_fold_in
        return transform(
            tf.gather(images, indices),
            tf.one_hot(tf.gather(labels, indices), classes),
            fold(tf.constant(augment_seed), tf.cast(step, tf.int32)),
        )

    passes = tf.data.Dataset.range(start_step // steps, tf.int64.max)
    batches = passes.flat_map(one_pass).skip(start_step % steps).enumerate(start_step)
    return batches.map(batch, tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def evaluation(split: Split, classes: int, batch_size: int) -> tf.data.Dataset:
    """Every example once, in order, as (images uint8 [B, H, W, 3], labels float32 [B, K]).

    The last batch holds what is left.
    """
    images, labels = tf.constant(split.images), tf.constant(split.labels)

    def batch(indices):
        return tf.gather(images, indices), tf.one_hot(tf.gather(labels, indices), classes)

    indices = tf.data.Dataset.range(len(split)).batch(batch_size)
    return indices.map(batch, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
