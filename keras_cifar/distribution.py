"""Where a run computes: one device, or replicas on several."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_cifar.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Share:
    """The replicas that one process feeds: `count` from `first` on, of `total` in all processes."""

    first: int = 0
    count: int = 1
    total: int = 1

    @classmethod
    def of(cls, context: tf.distribute.InputContext) -> "Share":
        """That of the process for which `strategy.distribute_datasets_from_function` asks."""
        count = context.num_replicas_in_sync // context.num_input_pipelines
        return cls(context.input_pipeline_id * count, count, context.num_replicas_in_sync)


def bounds(examples: int, replicas: int) -> list[int]:
    """Where the parts of each replica begin and end, as equal as can be: replicas + 1 positions."""
    return [examples * replica // replicas for replica in range(replicas + 1)]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Batches that are cut into the replicas' pieces.

    Attributes:
        dataset: yields (images, labels) for each replica of this process; endless where `steps` is
            given.
        steps: batches in a pass; None is until it ends.
    """

    dataset: tf.data.Dataset | tf.distribute.DistributedDataset
    steps: int | None


def pieces(
    strategy: tf.distribute.Strategy, make: Callable[[Share], tf.data.Dataset], steps: int | None
) -> Pieces:
    """The pieces that `make` yields one after another for the replicas of a share."""
    dataset = strategy.distribute_datasets_from_function(lambda context: make(Share.of(context)))
    return Pieces(dataset, steps)


def cut(
    strategy: tf.distribute.Strategy,
    dataset: tf.data.Dataset,
    steps: int | None,
    parts: int | None,
) -> Pieces:
    """Cuts whole batches (images [B, ...], labels [B, K]) for the replicas.

    Args:
        steps: batches in a pass; None is as many as the data set has.
        parts: in training, of a batch, one after another. A batch of fewer examples than pieces goes
            whole into each piece, which changes no mean. None is for evaluation: there it is filled
            with examples whose label is all zero.

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

    def make(share: Share) -> tf.data.Dataset:
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
                start, end = size * index // number, size * (index + 1) // number
                if parts is not None:
                    whole = size < number
                    start, end = tf.where(whole, 0, start), tf.where(whole, size, end)
                return images[start:end], labels[start:end]

            indices = tf.data.Dataset.from_tensor_slices(tf.constant(mine))
            return indices.map(piece)

        return endless(dataset.flat_map(pieces_of).prefetch(tf.data.AUTOTUNE))

    return pieces(strategy, make, steps)


def endless(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The same data set, which says that it has no end.

    Where tf.distribute does not know that, it asks all replicas in each step whether they have data
    left, and hides the static shapes.
    """
    return dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))


def choose(name: str, replicas: int | None) -> tuple[tf.distribute.Strategy, str, str]:
    """Chooses the strategy of a run; call it before TensorFlow computes anything.

    Args:
        name: auto, none, mirrored or multiworker.
        replicas: how many; None is one for each GPU. Without enough GPUs, that many virtual
            devices share the CPU.

    Returns:
        (the strategy, its name, why it was chosen).

    Raises:
        UsageError: the machine or this version cannot do what was asked for.
    """
    if name == "multiworker":
        raise UsageError("--strategy=multiworker is not there yet; use mirrored on one machine")
    gpus = len(tf.config.list_physical_devices("GPU"))
    wanted = replicas or max(gpus, 1)
    if name == "auto":
        name = "mirrored" if wanted > 1 else "none"
    if name == "none":
        if (replicas or 1) > 1:
            raise UsageError(f"--replicas={replicas} needs --strategy=mirrored or auto")
        return tf.distribute.get_strategy(), "none", "one GPU" if gpus else "the CPU"
    if gpus:
        if wanted > gpus:
            raise UsageError(f"--replicas={wanted} is more than this machine's {gpus} GPUs")
        devices, kind = [f"GPU:{i}" for i in range(wanted)], "GPU"
    else:
        _split_cpu(wanted)
        devices, kind = [f"CPU:{i}" for i in range(wanted)], "virtual CPU device"
    reason = f"{wanted} {kind}{'s' if wanted > 1 else ''}"
    return tf.distribute.MirroredStrategy(devices), "mirrored", reason


def _split_cpu(count: int) -> None:
    """Makes `count` virtual devices of the CPU."""
    if len(tf.config.get_visible_devices("CPU")) == 0:
        raise UsageError("this process sees no CPU device")
    cpu = tf.config.get_visible_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError:
        # TensorFlow has started. That is well where it did so with enough devices.
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise UsageError(
                f"--replicas={count} must be chosen before TensorFlow starts computing"
            ) from None
