"""Split -> batches. The order is a function of (seed, step) alone, and the augmentation of an example
of (seed, step, its position in the batch): the same seed gives the same batches whoever computes which
part of them, and a run can go on at any step.
"""

import types
import weakref

import numpy as np
import tensorflow as tf

from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.data import augmentation
from keras_cifar.data.splits import ALIGNMENT, Split
from keras_cifar.distributed.sharding import ReplicaRange, bounds, endless

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
    # The tuning thread sleeps for up to a minute and misses, one time in three, that an iterator is
    # to end: the end of an evaluation, and of the process, would wait for it. It made nothing faster.
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options)


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Full batches in one pass over a split.

    Raises:
        UserError: the split is smaller than a batch.
    """
    if len(split) < batch_size:
        raise UserError(
            f"--batch_size={batch_size} is more than the {len(split)} training images; lower it"
        )
    return len(split) // batch_size


def training_batches(
    split: Split,
    classes: int,
    batch_size: int,
    augment: str,
    seed: int,
    start_step: int = 0,
    share: ReplicaRange | None = None,
    microbatches: int = 1,
) -> tf.data.Dataset:
    """Endless batches of (images uint8 [B, H, W, 3], labels float32 [B, K]).

    Each pass is a new permutation of all images, of which the remainder of less than a batch is
    left out: another one each time.

    Args:
        start_step: the step of the run that the first batch is for.
        share: the replicas to read for. The elements are then shards: for each microbatch of each
            batch, for each of these replicas, the examples of it that `bounds` gives it. All replicas'
            shards in order are the batch. A process reads and augments only its own, besides the
            partners of what is mixed.
        microbatches: into how many equal microbatches, one after another, each batch is split.
    """
    steps = steps_per_epoch(split, batch_size)
    stored, rows, labels = _as_tensors(split)
    transform = augmentation.parse(augment)
    positions, sizes = _positions(batch_size, share, microbatches)
    order_seed, augment_seed = (seed, 0), (seed, 1)
    first = tf.constant(np.random.default_rng(seed).random(len(split)) < 0.5)

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
        alternating = tf.gather(first, indices) ^ (step // steps % 2 == 1)
        return transform(read, batch_size, drawn, positions, alternating)

    passes = tf.data.Dataset.range(start_step // steps, tf.int64.max)
    batches = passes.flat_map(one_pass).skip(start_step % steps).enumerate(start_step)
    batches = batches.map(batch, tf.data.AUTOTUNE, deterministic=True)
    return _finished(endless(_in_pieces(batches, sizes)))


def evaluation_steps(split: Split, batch_size: int) -> int:
    """The batches of `evaluation_batches` in one pass over a split: the last may be filled up."""
    return -(-len(split) // batch_size)


def evaluation_batches(
    split: Split, classes: int, batch_size: int, share: ReplicaRange | None = None
) -> tf.data.Dataset:
    """Every example once, in order, as (images uint8 [B, H, W, 3], labels float32 [B, K]).

    All batches are full, so that any number of replicas can share them: the last is filled up with
    images whose label is all zero, which `Classifier` does not count.

    Args:
        share: the replicas to read for. The elements are then pieces, as in `training_batches`, and
            begin again after those of `evaluation_steps` batches, without end.
    """
    stored, rows, labels = _as_tensors(split)
    positions, sizes = _positions(batch_size, share)

    def batch(indices):
        if positions is not None:
            indices = tf.gather(indices, positions)
        filling = indices >= len(split)
        indices = tf.where(filling, tf.zeros_like(indices), indices)
        # one_hot makes an index of -1 all zero.
        label = tf.where(filling, -tf.ones_like(indices), tf.gather(labels, indices))
        return tf.gather(stored, tf.gather(rows, indices)), tf.one_hot(label, classes)

    count = evaluation_steps(split, batch_size) * batch_size
    indices = tf.data.Dataset.range(count).batch(batch_size, drop_remainder=True)
    if share is None:
        return _finished(indices.map(batch, tf.data.AUTOTUNE, deterministic=True))
    batches = indices.repeat().map(batch, tf.data.AUTOTUNE, deterministic=True)
    return _finished(endless(_in_pieces(batches, sizes)))


def _positions(
    batch_size: int, share: ReplicaRange | None, microbatches: int = 1
) -> tuple[tf.Tensor | None, list[int]]:
    """(positions int32 [n] in a batch of a share's examples, sizes of the pieces that these make).

    The positions are None where they are the whole batch.

    Raises:
        UsageError: the microbatches would not be equal, or a shard empty.
    """
    if share is None:
        return None, [batch_size]
    size = batch_size // microbatches
    if batch_size % microbatches or size < share.total:
        raise UsageError(
            f"--batch_size={batch_size} cannot be split into {microbatches} equal microbatches with "
            f"an image or more for each of {share.total} replicas"
        )
    limits = bounds(size, share.total)[share.first : share.first + share.count + 1]
    sizes = microbatches * np.diff(limits).tolist()
    if share.count == share.total:
        return None, sizes
    starts = size * np.arange(microbatches)[:, None]
    positions = starts + np.arange(limits[0], limits[-1])
    return tf.constant(positions.ravel(), tf.int32), sizes


def _in_pieces(batches: tf.data.Dataset, sizes: list[int]) -> tf.data.Dataset:
    """Cuts each batch into pieces of these sizes, in order."""
    if len(sizes) == 1:
        return batches
    limits = tf.constant(np.cumsum([0, *sizes]))

    def cut_equally(*batch):
        shape = len(sizes), sizes[0]
        stacked = (tf.reshape(part, (*shape, *part.shape[1:])) for part in batch)
        return tf.data.Dataset.from_tensor_slices(tuple(stacked))

    def cut(*batch):
        def piece(number):
            return tuple(part[limits[number] : limits[number + 1]] for part in batch)

        return tf.data.Dataset.range(len(sizes)).map(piece)

    # Several times as fast, and with shapes that are known.
    return batches.flat_map(cut_equally if len(set(sizes)) == 1 else cut)


def _finished(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return _in_place(dataset.prefetch(tf.data.AUTOTUNE))
