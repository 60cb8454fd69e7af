"""Split -> batches. The order and the augmentation are functions of (seed, step) alone, so the
same seed gives the same batches, and a run can go on at any step.
"""

import types
import weakref

import numpy as np
import tensorflow as tf

from keras_cifar import augmentation
from keras_cifar.data import Split
from keras_cifar.data.splits import ALIGNMENT
from keras_cifar.errors import UserError

# The tensors of each split, so that several pipelines share one copy.
_tensors = weakref.WeakKeyDictionary()


def _as_tensors(split: Split) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(stored uint8 [M, H, W, 3], rows int64 [N] of it, labels int64 [N]) of a split."""
    if split not in _tensors:
        rows = np.arange(len(split)) if split.rows is None else split.rows
        _tensors[split] = _shared(split.stored), tf.constant(rows), tf.constant(split.labels)
    return _tensors[split]


def _shared(array: np.ndarray) -> tf.Tensor:
    """A tensor in the memory of an array, so that pixels are there once and a mapped file stays one.

    It keeps the array alive. Where an array is laid out as no tensor is, the tensor is a copy.
    """
    if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous or not array.size:
        return tf.constant(array)
    # DLPack cannot say that memory is not to be written, so NumPy refuses to give it a mapped file.
    # Nothing writes to a tensor that a data set has captured.
    description = array.__array_interface__ | {"data": (array.ctypes.data, False)}
    alias = np.asarray(types.SimpleNamespace(__array_interface__=description, owner=array))
    return tf.experimental.dlpack.from_dlpack(alias.__dlpack__())


def _in_place(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Keeps TensorFlow from copying the tensors that a data set captures.

    Every rewriting of its graph does so: each of the optimizations, and sharding, which is for more
    workers than one. That would be all images once more, and in memory.
    """
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)


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
    stored, rows, labels = _as_tensors(split)
    transform = augmentation.parse(augment)
    order_seed, augment_seed = (seed, 0), (seed, 1)

    def one_pass(number):
        fold = tf.random.experimental.stateless_fold_in
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(split)), fold(tf.constant(order_seed), tf.cast(number, tf.int32))
        )
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)

    def batch(step, indices):
        def read(positions):
            chosen = indices if positions is None else tf.gather(indices, positions)
            label = tf.one_hot(tf.gather(labels, chosen), classes)
            return tf.gather(stored, tf.gather(rows, chosen)), label

        fold = tf.random.experimental.stateless_fold_in
        drawn = fold(tf.constant(augment_seed), tf.cast(step, tf.int32))
        return transform(read, batch_size, drawn)

    passes = tf.data.Dataset.range(start_step // steps, tf.int64.max)
    batches = passes.flat_map(one_pass).skip(start_step % steps).enumerate(start_step)
    batches = batches.map(batch, tf.data.AUTOTUNE, deterministic=True)
    return _in_place(batches.prefetch(tf.data.AUTOTUNE))


def evaluation(split: Split, classes: int, batch_size: int) -> tf.data.Dataset:
    """Every example once, in order, as (images uint8 [B, H, W, 3], labels float32 [B, K]).

    All batches are full, so that any number of replicas can share them: the last is filled up with
    images whose label is all zero, which `Classifier` does not count.
    """
    stored, rows, labels = _as_tensors(split)
    batches = -(-len(split) // batch_size)

    def batch(indices):
        filling = indices >= len(split)
        indices = tf.where(filling, tf.zeros_like(indices), indices)
        # one_hot makes an index of -1 all zero.
        label = tf.where(filling, -tf.ones_like(indices), tf.gather(labels, indices))
        return tf.gather(stored, tf.gather(rows, indices)), tf.one_hot(label, classes)

    indices = tf.data.Dataset.range(batches * batch_size).batch(batch_size, drop_remainder=True)
    batches = indices.map(batch, tf.data.AUTOTUNE, deterministic=True)
    return _in_place(batches.prefetch(tf.data.AUTOTUNE))
