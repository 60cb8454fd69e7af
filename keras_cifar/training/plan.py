"""A run that is ready to start: config -> data -> pipeline -> model -> compile."""

import dataclasses
import importlib.metadata
import pathlib
import platform
import resource
import subprocess
import sys
import time

import keras
import tensorflow as tf

from keras_cifar import data, models
from keras_cifar.core import environment
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, unknown
from keras_cifar.data import augmentation
from keras_cifar.distributed import sharding, strategy
from keras_cifar.distributed.sharding import ReplicaRange, ShardedBatches
from keras_cifar.distributed.strategy import DistributedContext
from keras_cifar.models.classifier import Classifier
from keras_cifar.training import optimizers, transfer
from keras_cifar.training.checkpoint import TrainingProgress
from keras_cifar.training.optimizers import Schedule

PACKAGES = ("keras", "tensorflow", "numpy", "Pillow", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that is ready to start."""

    config: TrainConfig
    dataset: data.Dataset
    model: Classifier
    learning_rate: Schedule
    steps_per_epoch: int
    devices: DistributedContext
    dtype_policy: tuple[str, str]
    xla: tuple[bool, str]
    deterministic: bool
    origin: str

    def pieces_of(self, share: ReplicaRange, start_step: int) -> tf.data.Dataset:
        """What the replicas of a share train on, from a step of the run on."""
        config = self.config
        return data.training_batches(
            self.dataset.train,
            len(self.dataset.class_names),
            config.fit.batch_size,
            config.data.augment,
            config.fit.seed,
            start_step,
            share,
            config.fit.accumulate_steps,
        )

    def batches(self, start_step: int) -> ShardedBatches:
        """Training batches from a step of the run on, cut for the replicas."""
        return sharding.shard_batches(
            self.devices.strategy,
            lambda share: self.pieces_of(share, start_step),
            self.steps_per_epoch,
        )

    def validation(self) -> ShardedBatches | None:
        """Validation batches, cut for the replicas; None where nothing is held out."""
        val, classes, size = (
            self.dataset.val,
            len(self.dataset.class_names),
            self.config.fit.batch_size,
        )
        if val is None:
            return None
        return sharding.shard_batches(
            self.devices.strategy,
            lambda share: data.evaluation_batches(val, classes, size, share),
            data.evaluation_steps(val, size),
        )

    def describe(self) -> str:
        """What will be done, in a few lines."""
        config, dataset, optimizer = self.config, self.dataset, self.config.optimizer
        network = self.model.deployable
        height, width, _ = dataset.image_shape
        counts = ", ".join(f"{v['count']:,} {k}" for k, v in dataset.describe().items())
        left_out = len(dataset.train) % config.fit.batch_size
        choice, (policy, why_policy), (xla, why_xla) = (
            self.devices.spec,
            self.dtype_policy,
            self.xla,
        )
        return "\n".join(
            [
                f"model     {config.model.model}: {models.count_parameters(network):,} parameters, "
                f"{models.count_multiply_adds(network) / 1e6:,.1f} million multiply-adds an image",
                f"data      {config.data.data}: {counts} images of {width} x {height}, "
                f"{len(dataset.class_names)} classes",
                f"training  {config.fit.epochs} epochs of {self.steps_per_epoch} steps of "
                f"{config.fit.batch_size} images ({left_out} others are left out each pass), "
                f"{optimizer.optimizer}, learning rate {optimizer.learning_rate:g} "
                f"{optimizer.lr_schedule}",
                *([f"begins    with {self.origin}"] if self.origin else []),
                f"devices   strategy {choice.name} ({choice.reason}), {self._replica_batch()}, "
                f"{policy} ({why_policy}), XLA {'on' if xla else 'off'} ({why_xla})",
            ]
        )

    def place(self, position: TrainingProgress) -> str:
        """A position in words."""
        done, epochs = len(position.history), self.config.fit.epochs
        if not position.steps:
            return f"epoch {done} of {epochs}"
        return f"step {position.steps} of {self.steps_per_epoch} in epoch {done + 1} of {epochs}"

    def _replica_batch(self) -> str:
        """How a batch is shared, in words."""
        config, replicas = self.config, self.devices.spec.replicas
        size, larger = divmod(config.fit.batch_size // config.fit.accumulate_steps, replicas)
        text = f"{size} or {size + 1}" if larger else f"{size}"
        text += " images a replica"
        if config.fit.accumulate_steps > 1:
            text += f" in each of {config.fit.accumulate_steps} microbatches"
        return text


def check_names(config: TrainConfig) -> None:
    """Refuses what no machine can do, before anything is started.

    Raises:
        UsageError: an unknown model or schedule, or flags that contradict each other.
    """
    optimizers.parse_schedule(config.optimizer.lr_schedule)
    if config.model.model not in models.variants():
        raise unknown("model", config.model.model, models.variants())
    if config.fit.early_stopping and not config.data.val_fraction:
        raise UsageError("--early_stopping needs validation: --val_fraction must be above 0")


def prepare(
    config: TrainConfig, devices: DistributedContext | None = None, begins: bool = True
) -> Plan:
    """Checks the flags, loads the data and builds the compiled model.

    Args:
        devices: where to; None chooses them.
        begins: whether the weights of --init_from are read, if they are asked for.

    Raises:
        UsageError, UserError: as `train`.
    """
    check_names(config)
    # DistributedContext can be chosen only before TensorFlow computes anything.
    devices = devices or DistributedContext(strategy.choose(config.devices), config.devices)
    # All flags before the data: a wrong one shows before a long download.
    augmentation.parse(config.data.augment)
    replicas = devices.spec.replicas
    if config.fit.batch_size // config.fit.accumulate_steps < replicas:
        raise UsageError(
            f"--batch_size={config.fit.batch_size} has fewer images than there are replicas "
            f"({replicas}) times --accumulate_steps={config.fit.accumulate_steps}"
        )

    keras.utils.set_random_seed(config.fit.seed)
    deterministic = environment.make_deterministic(config.devices.deterministic)
    dtype_policy = environment.dtype_policy(config.devices.dtype_policy)
    keras.config.set_dtype_policy(dtype_policy[0])
    dataset = data.load(
        config.data.data,
        config.data.data_dir,
        config.data.image_size,
        config.data.val_fraction,
        config.fit.seed,
        config.data.cache_dir,
        data.BadImages(config.data.on_bad_image == "skip", config.data.max_bad_share),
    )
    # Before TensorFlow's workers wait for each other, who could not say why one of them does not come.
    splits = dataset.describe()
    devices.check_equal(
        {f"the {name} images": f"{s['count']} ({s['fingerprint']})" for name, s in splits.items()}
    )
    one_pass = data.steps_per_epoch(dataset.train, config.fit.batch_size)
    steps = config.fit.steps_per_epoch or one_pass
    xla = environment.use_xla(devices.spec.name)
    with devices.strategy.scope():
        model = models.build(config.model.model, dataset.image_shape, len(dataset.class_names))
        origin = ""
        if begins and not config.model.init_from:
            models.adapt(model, dataset.train)
        elif begins:
            origin = transfer.take_weights(model, config.model.init_from, dataset.class_names)
        if config.model.freeze:
            transfer.freeze(model, config.model.freeze)
        rate = optimizers.schedule(config.optimizer, config.fit.epochs, steps)
        optimizers.compile_model(
            model,
            config.optimizer,
            rate,
            accumulate_steps=config.fit.accumulate_steps,
            steps_per_execution=config.devices.steps_per_execution,
            jit_compile=xla[0],
        )
    return Plan(
        config, dataset, model, rate, steps, devices, dtype_policy, xla, deterministic, origin
    )


def estimate(config: TrainConfig) -> str:
    """What a run would do and take, in words: time and memory of three steps, nothing is kept.

    The steps are those of one replica on its part of a batch. Nobody is waited for.

    Raises:
        UsageError, UserError: as `train`.
    """
    choice = strategy.choose(config.devices)
    plan = prepare(config, DistributedContext(choice, config.devices, start=False))
    share = ReplicaRange(0, 1, choice.replicas)
    ends = [time.perf_counter()]

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            ends.append(time.perf_counter())

    # The first call traces and is not timed.
    steps = 3 * config.devices.steps_per_execution
    plan.model.fit(
        ShardedBatches(plan.pieces_of(share, start_step=0), steps), verbose=0, callbacks=[Clock()]
    )
    seconds = (ends[-1] - ends[1]) / (steps - config.devices.steps_per_execution)
    on_cpu = choice.devices[0].startswith("CPU")
    if on_cpu:
        seconds *= len(choice.devices)  # They share it.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        memory = tf.config.experimental.get_memory_info(choice.devices[0])["peak"]
    total = seconds * plan.steps_per_epoch * config.fit.epochs
    return (
        f"{plan.describe()}\n"
        f"estimate  {seconds:.3g} s a step, {seconds * plan.steps_per_epoch:.3g} s an epoch, "
        f"{total / 3600:.3g} h in all, without validation"
        f"{' and without communication' if choice.replicas > 1 else ''}; "
        f"{memory / 2**30:.2f} GiB of {'memory' if on_cpu else 'each GPU'}"
    )


def describe_run(plan: Plan) -> dict:
    """The contents of config.json."""
    network = plan.model.deployable
    return {
        "flags": plan.config.flags(),
        "class_names": plan.dataset.class_names,
        "image_shape": plan.dataset.image_shape,
        "splits": plan.dataset.describe(),
        "parameter_count": models.count_parameters(network),
        "multiply_adds": models.count_multiply_adds(network),
        "steps_per_epoch": plan.steps_per_epoch,
        "strategy": plan.devices.spec.name,
        "replicas": plan.devices.spec.replicas,
        "dtype_policy": plan.dtype_policy[0],
        "xla": plan.xla[0],
        "deterministic": plan.deterministic,
        "machine": environment.machine(),
        "versions": package_versions(),
        "git_revision": _git_revision(),
        "command": sys.argv,
    }


def package_versions() -> dict[str, str]:
    """Of Python and of what decides results."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {"python": platform.python_version()}


def _git_revision() -> str | None:
    """The commit of the checkout that this package runs from; None where it is installed."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
