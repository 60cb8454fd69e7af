"""Where a run computes: one device, or replicas on several."""

import dataclasses

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
