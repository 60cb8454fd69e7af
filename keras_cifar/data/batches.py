"""Split -> batches.

The order of the examples depends on (seed, step) alone, and an example's augmentation on (seed, step,
its position in the batch). So any processes can compute a batch, and a run can resume at any step.
"""

import os
import weakref
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.data import augmentation, balance, crops
from keras_cifar.data.splits import ImageFiles, Split
from keras_cifar.distributed.sharding import ReplicaRange, bounds, endless, without_autotune


def _reader(split: Split, classes: int) -> Callable[[tf.Tensor], augmentation.Batch]:
    """Examples int64 [n] of a split -> (images uint8 [n, H, W, 3], labels float32 [n, K]).

    The images of a split in files are `crops.Encoded`.
    """
    labels = tf.constant(split.labels)
    images = _pixels(split) if split.files is None else _encoded(split, split.files)

    def read(examples):
        return images(examples), tf.one_hot(tf.gather(labels, examples), classes)

    return read


def _pixels(split: Split) -> Callable[[tf.Tensor], tf.Tensor]:
    """Examples -> their images.

    NumPy gathers the images of each batch, without holding Python's lock. A tensor of all images would
    copy a memory-mapped file into memory.
    """
    # TensorFlow keeps `gather` forever. The split lives as long as `images`, which the data set keeps.
    reference = weakref.ref(split)

    def gather(examples):
        split = reference()
        return split.stored[examples if split.rows is None else split.rows[examples]]

    def images(examples):
        gathered = tf.numpy_function(gather, [examples], tf.uint8, stateful=False)
        return tf.ensure_shape(gathered, (*examples.shape, *split.image_shape))

    return images


def _encoded(split: Split, files: ImageFiles) -> Callable[[tf.Tensor], crops.Encoded]:
    """Examples -> their files."""
    paths = tf.constant([os.fsencode(path) for path in files.paths])
    rows = tf.constant(np.arange(len(split)) if split.rows is None else split.rows)
    reference = weakref.ref(files)  # as in `_pixels`

    def read(row):
        return reference().read(row)

    def images(examples):
        own = tf.gather(rows, examples)
        return crops.Encoded(tf.gather(paths, own), own, split.image_shape[:2], read)

    return images


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Full batches in one pass over a split; UserError if it is smaller than a batch."""
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
    replicas: ReplicaRange | None = None,
    microbatches: int = 1,
    balanced: bool = False,
) -> tf.data.Dataset:
    """Endless batches of (images uint8 [B, H, W, 3], labels float32 [B, K]).

    Each pass is a new permutation of all images, or with `balanced` an order in which all classes are
    equally frequent, without those that remain after its full batches.

    Args:
        start_step: the step of the run that the first batch is for.
        replicas: the replicas to read for. The elements are then shards: for each microbatch of each
            batch, for each of these replicas, the examples that `bounds` gives it. The shards of all
            replicas in order are the batch. Only these examples and their partners are read.
        microbatches: into how many equal microbatches each batch is split.
        balanced: as many examples of each class: see `balance.even_order`.
    """
    steps = steps_per_epoch(split, batch_size)
    read_examples, stateless = _reader(split, classes), tf.random.experimental
    transform = augmentation.parse(augment)
    positions, sizes = _positions(batch_size, replicas, microbatches)
    first = tf.constant(np.random.default_rng(seed).random(len(split)) < 0.5)

    def drawn(purpose, number):
        return stateless.stateless_fold_in(tf.constant((seed, purpose)), tf.cast(number, tf.int32))

    def shuffled(seed):
        return stateless.stateless_shuffle(tf.range(len(split)), seed)

    order_of = balance.even_order(split.labels) if balanced else shuffled

    def one_pass(number):
        order = order_of(drawn(0, number))
        return tf.data.Dataset.from_tensor_slices(order).batch(batch_size, drop_remainder=True)

    def batch(step, indices):
        def read(positions):
            return read_examples(indices if positions is None else tf.gather(indices, positions))

        alternating = tf.gather(first, indices) ^ (step // steps % 2 == 1)
        return transform(read, batch_size, drawn(1, step), positions, alternating)

    passes = tf.data.Dataset.range(start_step // steps, tf.int64.max)
    batches = passes.flat_map(one_pass).skip(start_step % steps).enumerate(start_step)
    batches = batches.map(batch, tf.data.AUTOTUNE, deterministic=True)
    batches = endless(_split_batches(batches, sizes))
    return without_autotune(batches.prefetch(tf.data.AUTOTUNE))


def evaluation_steps(split: Split, batch_size: int) -> int:
    """The batches of `evaluation_batches` in one pass over a split; the last may be padded."""
    return -(-len(split) // batch_size)


def evaluation_batches(
    split: Split, classes: int, batch_size: int, replicas: ReplicaRange | None = None
) -> tf.data.Dataset:
    """Every example once, in order, as (images uint8 [B, H, W, 3], labels float32 [B, K]).

    All batches are full, so that any number of replicas can share them: the last is padded with
    images whose label is all zero, which `Classifier` does not count. With `replicas`, the elements are
    shards, as in `training_batches`, and repeat without end after `evaluation_steps` batches.
    """
    split = split.decoded()
    read = _reader(split, classes)
    positions, sizes = _positions(batch_size, replicas)

    def batch(indices):
        if positions is not None:
            indices = tf.gather(indices, positions)
        padding = indices >= len(split)
        images, label = read(tf.where(padding, tf.zeros_like(indices), indices))
        return images, tf.where(padding[:, None], 0.0, label)

    count = evaluation_steps(split, batch_size) * batch_size
    indices = tf.data.Dataset.range(count).batch(batch_size, drop_remainder=True)
    if replicas is not None:
        indices = indices.repeat()
    batches = indices.map(batch, tf.data.AUTOTUNE, deterministic=True)
    batches = endless(_split_batches(batches, sizes)) if replicas else batches
    return without_autotune(batches.prefetch(tf.data.AUTOTUNE))


def _positions(
    batch_size: int, replicas: ReplicaRange | None, microbatches: int = 1
) -> tuple[tf.Tensor | None, list[int]]:
    """(positions int32 [n] of these replicas' examples, or None for all; sizes of their shards)."""
    if replicas is None:
        return None, [batch_size]
    size = batch_size // microbatches
    if batch_size % microbatches or size < replicas.total:
        raise UsageError(
            f"--batch_size={batch_size} cannot be split into {microbatches} equal microbatches with "
            f"an image or more for each of {replicas.total} replicas"
        )
    limits = bounds(size, replicas.total)[replicas.first : replicas.first + replicas.count + 1]
    sizes = microbatches * np.diff(limits).tolist()
    if replicas.count == replicas.total:
        return None, sizes
    starts = size * np.arange(microbatches)[:, None]
    positions = starts + np.arange(limits[0], limits[-1])
    return tf.constant(positions.ravel(), tf.int32), sizes


def _split_batches(batches: tf.data.Dataset, sizes: list[int]) -> tf.data.Dataset:
    if len(sizes) == 1:
        return batches
    limits = tf.constant(np.cumsum([0, *sizes]))

    def equal(*batch):
        shape = len(sizes), sizes[0]
        stacked = (tf.reshape(tensor, (*shape, *tensor.shape[1:])) for tensor in batch)
        return tf.data.Dataset.from_tensor_slices(tuple(stacked))

    def unequal(*batch):
        def shard(number):
            return tuple(tensor[limits[number] : limits[number + 1]] for tensor in batch)

        return tf.data.Dataset.range(len(sizes)).map(shard)

    # The first is several times as fast, and has static shapes.
    return batches.flat_map(equal if len(set(sizes)) == 1 else unequal)
