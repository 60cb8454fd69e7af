"""Splits each batch into a shard for every replica; decides which process reads which shard."""

import dataclasses
from collections.abc import Callable, Iterator

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class ReplicaRange:
    """The replicas that one process feeds: `count` of the `total`, beginning with `first`."""

    first: int = 0
    count: int = 1
    total: int = 1


def replicas() -> int:
    """The number of replicas, in all processes, of the strategy in whose scope this is called."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def bounds(examples: int, replicas: int) -> list[int]:
    """Splits examples as equally as possible: the boundaries of the shards, replicas + 1 positions."""
    return [examples * replica // replicas for replica in range(replicas + 1)]


@dataclasses.dataclass(frozen=True)
class ShardedBatches:
    """Batches that are split into per-replica shards. Iterate over this object, not over `dataset`."""

    # Yields a shard (images, labels) for each replica of this process; endless if `steps` is given.
    dataset: tf.data.Dataset | tf.distribute.DistributedDataset
    steps: int | None  # batches in a pass; None means until the data set ends

    def __iter__(self) -> Iterator:
        return iter(self.dataset)


def shard_batches(
    strategy: tf.distribute.Strategy,
    make: Callable[[ReplicaRange], tf.data.Dataset],
    steps: int | None,
) -> ShardedBatches:
    """Distributes shards: `make(replicas)` yields them one after another for a range of replicas."""

    def for_process(context: tf.distribute.InputContext) -> tf.data.Dataset:
        total = context.num_replicas_in_sync
        count = total // context.num_input_pipelines
        return make(ReplicaRange(context.input_pipeline_id * count, count, total))

    return ShardedBatches(strategy.distribute_datasets_from_function(for_process), steps)


def split_batches(
    strategy: tf.distribute.Strategy,
    dataset: tf.data.Dataset,
    steps: int | None,
    microbatches: int | None,
) -> ShardedBatches:
    """Splits whole batches (images [B, ...], labels [B, K]) into per-replica shards.

    Args:
        steps: batches in a pass; None means as many as the data set has.
        microbatches: of each batch in training. Where there are fewer examples than microbatches or
            replicas, each gets all of them, with proportionally smaller labels. None is for
            evaluation: a small batch is padded with examples whose label is all zero.

    Raises:
        ValueError: the data set is empty, or its number of steps is unknown.
    """
    steps = _steps(strategy, dataset, steps)
    if steps is not None:
        dataset = dataset.repeat()

    def make(replicas: ReplicaRange) -> tf.data.Dataset:
        shards = replicas.total * (microbatches or 1)
        if shards == 1:
            return dataset
        own = range(replicas.first, replicas.first + replicas.count)
        indices = [m * replicas.total + r for m in range(microbatches or 1) for r in own]

        def split(images, labels):
            if microbatches is None:
                images, labels = _pad(images, shards), _pad(labels, shards)

            def shard(index):
                microbatch = _shard(index // replicas.total, microbatches or 1, images, labels)
                return _shard(index % replicas.total, replicas.total, *microbatch)

            return tf.data.Dataset.from_tensor_slices(tf.constant(indices)).map(shard)

        return endless(dataset.flat_map(split).prefetch(tf.data.AUTOTUNE))

    return shard_batches(strategy, make, steps)


def _steps(strategy: tf.distribute.Strategy, dataset: tf.data.Dataset, steps: int | None):
    known = int(dataset.cardinality())
    if known == 0:
        raise ValueError("the data set is empty")
    if steps is not None:
        return steps
    if known > 0:
        return known
    if known == tf.data.INFINITE_CARDINALITY:
        raise ValueError("the data set is endless: give the number of steps")
    if strategy.num_replicas_in_sync > 1:
        raise ValueError("the data set does not know its length: give the number of steps")
    return None


def _pad(values: tf.Tensor, size: int) -> tf.Tensor:
    missing = tf.maximum(size - tf.shape(values)[0], 0)
    return tf.pad(values, [[0, missing], *[[0, 0]] * (values.shape.rank - 1)])


def _shard(index, count: int, images, labels) -> tuple:
    """Shard `index` of `count`; all examples with labels / count where there are fewer than that."""
    size = tf.shape(labels)[0]
    whole = size < count
    start, end = size * index // count, size * (index + 1) // count
    start, end = tf.where(whole, 0, start), tf.where(whole, size, end)
    # The replicas together then count each example once.
    weight = tf.cast(tf.where(whole, 1 / count, 1.0), labels.dtype)
    return images[start:end], labels[start:end] * weight


def endless(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Declares a data set endless.

    Otherwise tf.distribute asks all replicas in each step whether they have data left, and hides the
    static shapes.
    """
    return dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))


def without_autotune(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The same data set, whose iterators can be freed at once.

    tf.data's autotune thread sleeps for up to a minute and misses, one time in three, that its iterator
    is deleted: whoever deletes it waits. It made nothing faster.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
