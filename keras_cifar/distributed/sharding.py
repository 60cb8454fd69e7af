"""Which replica reads what: per-replica shards of batches."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class ReplicaRange:
    """The replicas that one process feeds: `count` from `first` on, of `total` in all processes."""

    first: int = 0
    count: int = 1
    total: int = 1

    @classmethod
    def of(cls, context: tf.distribute.InputContext) -> "ReplicaRange":
        """That of the process for which `strategy.distribute_datasets_from_function` asks."""
        count = context.num_replicas_in_sync // context.num_input_pipelines
        return cls(context.input_pipeline_id * count, count, context.num_replicas_in_sync)


def bounds(examples: int, replicas: int) -> list[int]:
    """Where the parts of each replica begin and end, as equal as can be: replicas + 1 positions."""
    return [examples * replica // replicas for replica in range(replicas + 1)]


@dataclasses.dataclass(frozen=True)
class ShardedBatches:
    """Batches that are cut into the replicas' pieces; iterate over these, not over the data set.

    Attributes:
        dataset: yields (images, labels) for each replica of this process; endless where `steps` is
            given.
        steps: batches in a pass; None is until it ends.
    """

    dataset: tf.data.Dataset | tf.distribute.DistributedDataset
    steps: int | None

    def __iter__(self) -> Iterator:
        iterator = iter(self.dataset)
        _stop_reading_first(iterator)
        return iterator


def _stop_reading_first(iterator: Iterator) -> None:
    """Has the thread that reads ahead for replicas end before what it reads is freed.

    TensorFlow frees the data set first where no optimization has rewritten it, as `pipeline` has it:
    a thread that was just then computing a batch reads freed memory, and the process dies (SIGSEGV).
    To be initialized again, with no data, is the one way to end the thread by itself.
    """
    # This is private. Where TensorFlow has changed it the reading goes on as ever, and a test says so.
    try:
        for worker in getattr(iterator, "_iterators", ()):
            reader = worker._iterator._multi_device_iterator_resource
            # Called when Python is about to free the iterator, and still has it.
            weakref.finalize(worker, _stop_reading, reader, worker._dataset.take(0))
    except AttributeError:
        pass


def _stop_reading(reader: tf.Tensor, nothing: tf.data.Dataset) -> None:
    # Python may be anywhere when it frees the iterator: tracing a function, on another device.
    with contextlib.suppress(tf.errors.OpError), tf.init_scope(), tf.device(reader.device):
        tf.raw_ops.MultiDeviceIteratorInit(
            dataset=tf.data.experimental.to_variant(nothing),
            multi_device_iterator=reader,
            max_buffer_size=1,
        )


def pieces(
    strategy: tf.distribute.Strategy,
    make: Callable[[ReplicaRange], tf.data.Dataset],
    steps: int | None,
) -> ShardedBatches:
    """The pieces that `make` yields one after another for the replicas of a share."""
    dataset = strategy.distribute_datasets_from_function(
        lambda context: make(ReplicaRange.of(context))
    )
    return ShardedBatches(dataset, steps)


def cut(
    strategy: tf.distribute.Strategy,
    dataset: tf.data.Dataset,
    steps: int | None,
    parts: int | None,
) -> ShardedBatches:
    """Cuts whole batches (images [B, ...], labels [B, K]) for the replicas.

    Args:
        steps: batches in a pass; None is as many as the data set has.
        parts: in training, of a batch, one after another. Fewer examples than parts, or in a part
            than replicas, go whole into each, with labels of so much less weight. None is for
            evaluation: there a batch is filled with examples whose label is all zero.

    Raises:
        ValueError: there are no batches, or nobody knows how many.
    """
    known = int(dataset.cardinality())
    if known == 0:
        raise ValueError("the data set is empty")
    if steps is None and known > 0:
        steps = known
    if steps is None and known == tf.data.INFINITE_CARDINALITY:
        raise ValueError("the data set is endless: give the number of steps")
    if steps is None and strategy.num_replicas_in_sync > 1:
        raise ValueError("the data set does not know its length: give the number of steps")
    if steps is not None:
        dataset = dataset.repeat()

    def make(share: ReplicaRange) -> tf.data.Dataset:
        if share.total * (parts or 1) == 1:
            return dataset
        number = share.total * (parts or 1)
        replicas = range(share.first, share.first + share.count)
        mine = [part * share.total + r for part in range(parts or 1) for r in replicas]

        def pieces_of(images, labels):
            size = tf.shape(labels)[0]
            if parts is None:
                missing = tf.maximum(number - size, 0)
                images, labels = (
                    tf.pad(x, [[0, missing], *[[0, 0]] * (x.shape.rank - 1)])
                    for x in (images, labels)
                )
                size += missing

            def piece(index):
                part = _nth(index // share.total, parts or 1, images, labels)
                return _nth(index % share.total, share.total, *part)

            indices = tf.data.Dataset.from_tensor_slices(tf.constant(mine))
            return indices.map(piece)

        return endless(dataset.flat_map(pieces_of).prefetch(tf.data.AUTOTUNE))

    return pieces(strategy, make, steps)


def _nth(index, number: int, images, labels) -> tuple:
    """One of so many equal shares of examples; all of them where they are fewer, for their share."""
    size = tf.shape(labels)[0]
    whole = size < number
    start, end = size * index // number, size * (index + 1) // number
    start, end = tf.where(whole, 0, start), tf.where(whole, size, end)
    # Each of them then counts once in all.
    weight = tf.cast(tf.where(whole, 1 / number, 1.0), labels.dtype)
    return images[start:end], labels[start:end] * weight


def endless(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The same data set, which says that it has no end.

    Where tf.distribute does not know that, it asks all replicas in each step whether they have data
    left, and hides the static shapes.
    """
    return dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
