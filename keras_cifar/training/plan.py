"""A run that is ready to start: configuration -> devices -> data -> model -> compile."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from keras_cifar import data, models
from keras_cifar.core import environment, places
from keras_cifar.core.config import BALANCED, FitConfig, TrainConfig, canonical
from keras_cifar.core.errors import UsageError
from keras_cifar.data import augmentation
from keras_cifar.distributed import sharding, strategy
from keras_cifar.distributed.sharding import ReplicaRange, ShardedBatches
from keras_cifar.distributed.strategy import DistributedContext
from keras_cifar.models.batch_norm import FIXED, REPLICA, WHOLE, norms
from keras_cifar.models.classifier import Classifier
from keras_cifar.pretrained import weights
from keras_cifar.training import first_lines, optimizers, resizing, transfer
from keras_cifar.training.checkpoint import TrainingProgress
from keras_cifar.training.optimizers import Schedule
from keras_cifar.training.transfer import FrozenLayers

# From so many images on, a replica's own statistics train as well as those of larger batches: Goyal et
# al. 2017, arXiv:1706.02677, section 2.3.
MIN_NORM_IMAGES = 32

PACKAGES = ("keras", "tensorflow", "numpy", "Pillow", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that is ready to start.

    Attributes:
        dtype_policy: (Keras's dtype policy, why).
        xla: (whether XLA compiles the step, why).
        norm_batch: (that of `Classifier.compile`, what it means).
        origin: what the weights of --init_from are, as text; empty without.
        frozen: the layers of --freeze; None without.
        stages: those of --progressive_resizing.
    """

    config: TrainConfig
    dataset: data.Dataset
    model: Classifier
    learning_rate: Schedule
    steps_per_epoch: int
    context: DistributedContext
    dtype_policy: tuple[str, str]
    xla: tuple[bool, str]
    norm_batch: tuple[str | int, str]
    deterministic: bool
    origin: str
    frozen: FrozenLayers | None
    stages: list[resizing.Stage]

    def shards(
        self, replicas: ReplicaRange, start_step: int, microbatches: int | None = None
    ) -> tf.data.Dataset:
        """The training data of some replicas from a step of the run on."""
        fit, flags = self.config.fit, self.config.data
        return data.training_batches(
            self.dataset.train,
            len(self.dataset.class_names),
            fit.batch_size,
            flags.augment,
            fit.seed,
            start_step,
            replicas,
            microbatches or fit.accumulate_steps,
            balanced=flags.sampling == BALANCED,
        )

    def batches(self, start_step: int) -> ShardedBatches:
        """Training batches from a step of the run on, split for the replicas."""
        shards = functools.partial(self.shards, start_step=start_step)
        return sharding.shard_batches(self.context.strategy, shards, self.steps_per_epoch)

    def precise_bn_batches(self, epoch: int) -> Iterator:
        """Those from which batch normalization is recomputed after an epoch, from 0, and the next."""
        # Lazily: a network without it reads none.
        yield from self.batches(epoch * self.config.fit.precise_bn_batches)

    def begin_epoch(self, epoch: int) -> bool:
        """Sets the size of images and what is frozen for an epoch, from 0.

        Returns whether other layers are trained than before.
        """
        self.model.set_training_size(resizing.size_of(self.stages, epoch))
        epochs = self.config.model.unfreeze_epoch
        if not (self.frozen and epochs and self.frozen.set_trainable(epoch >= epochs)):
            return False
        self.model.update_trainable()
        return True

    def first_examples(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `count` examples of the first batch: (uint8 [n, H, W, 3], float32 [n, K])."""
        # A shard, which is the same for any number of replicas: the batches that the pipeline reads
        # ahead would take many times as long.
        total = max(1, self.config.fit.batch_size // count)
        images, labels = next(iter(self.shards(ReplicaRange(0, 1, total), 0, microbatches=1)))
        return images.numpy()[:count], labels.numpy()[:count]

    def validation(self) -> ShardedBatches | None:
        """Validation batches, split for the replicas; None without a validation split."""
        val, size = self.dataset.val, self.config.fit.batch_size
        if val is None:
            return None
        classes, steps = len(self.dataset.class_names), data.evaluation_steps(val, size)
        shards = functools.partial(data.evaluation_batches, val, classes, size)
        return sharding.shard_batches(self.context.strategy, shards, steps)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Raises, in place of TensorFlow's error, the UserError of a training image that it hides."""
        try:
            yield
        except tf.errors.OpError:
            files = self.dataset.train.files
            if files is not None and files.failure is not None:
                raise files.failure from None
            raise

    def summary(self) -> str:
        """The first lines of a run: model, data, training, devices."""
        config, dataset, optimizer = self.config, self.dataset, self.config.optimizer
        network, spec = self.model.deployable, self.context.spec
        normalized = next(norms(network), None) is not None
        shards = _describe_shards(config.fit, spec.replicas)
        height, width, _ = dataset.image_shape
        counts = ", ".join(f"{v['count']:,} {k}" for k, v in dataset.describe().items())
        resized = f" ({config.data.rule})" if config.data.image_size else ""
        left_out = len(dataset.train) % config.fit.batch_size
        (policy, why_policy), (xla, why_xla) = self.dtype_policy, self.xla
        return "\n".join(
            [
                f"model     {config.model.model}: {models.count_parameters(network):,} parameters, "
                f"{models.count_multiply_adds(network) / 1e6:,.1f} million multiply-adds an image",
                f"data      {config.data.data}: {counts} images of {width} x {height}{resized}, "
                f"{len(dataset.class_names)} classes",
                *first_lines.describe_sizes(dataset, config.data.rule),
                *first_lines.describe_classes(dataset.train.labels, dataset.class_names, config),
                f"training  {config.fit.epochs} epochs of {self.steps_per_epoch} steps of "
                f"{config.fit.batch_size} images ({left_out} are left out of each pass), "
                f"{optimizer.optimizer}, learning rate {optimizer.learning_rate:g} "
                f"{optimizer.lr_schedule}",
                *([f"norm      by the statistics of {self.norm_batch[1]}"] if normalized else []),
                *([f"weights   {self.origin}"] if self.origin else []),
                *first_lines.describe_frozen(config),
                *first_lines.describe_resizing(self.stages, (height, width), config),
                f"devices   strategy {spec.name} ({spec.reason}), {shards}, "
                f"{policy} ({why_policy}), XLA {'on' if xla else 'off'} ({why_xla})",
            ]
        )

    def place(self, progress: TrainingProgress) -> str:
        """Training progress as text."""
        done, epochs = len(progress.history), self.config.fit.epochs
        if not progress.steps:
            return f"epoch {done} of {epochs}"
        return f"step {progress.steps} of {self.steps_per_epoch} in epoch {done + 1} of {epochs}"


def _shard_sizes(fit: FitConfig, replicas: int) -> tuple[list[int], str]:
    """(how many images a replica computes at a time, one or two numbers; the same as text)."""
    size, larger = divmod(fit.batch_size // fit.accumulate_steps, replicas)
    sizes = [size, size + 1] if larger else [size]
    return sizes, f"{' or '.join(map(str, sizes))} images"


def _describe_shards(fit: FitConfig, replicas: int) -> str:
    microbatches = fit.accumulate_steps
    each = f" in each of {microbatches} microbatches" if microbatches > 1 else ""
    return f"{_shard_sizes(fit, replicas)[1]} per replica{each}"


def choose_norm_batch(fit: FitConfig, replicas: int) -> tuple[str | int, str]:
    """(norm_batch of `Classifier.compile`, what it means and why) for --norm_batch.

    Raises:
        UsageError: the images of a replica are not groups of so many.
    """
    sizes, images = _shard_sizes(fit, replicas)
    batch = "each microbatch" if fit.accumulate_steps > 1 else "the whole batch"
    if fit.norm_batch.isdecimal():
        number, common = int(fit.norm_batch), math.gcd(*sizes)
        if common % number:
            choices = [str(n) for n in range(common, 1, -1) if common % n == 0]
            raise UsageError(
                f"--norm_batch={number} does not divide the {images} of each replica; use "
                f"{', '.join([*choices, 'whole'])}"
            )
        return number, f"groups of {number} images"
    if fit.norm_batch == "fixed":
        return FIXED, "the data that the first weights were trained on (--norm_batch)"
    if fit.norm_batch == "whole":
        return WHOLE, f"{batch} (--norm_batch)"
    if replicas == 1:
        return WHOLE, f"{batch} (one replica)"
    if sizes[0] < MIN_NORM_IMAGES:
        return WHOLE, f"{batch} (a replica has fewer than {MIN_NORM_IMAGES} images)"
    own = sizes[0] if len(sizes) == 1 else REPLICA
    return own, f"each replica's {images} (a replica has {MIN_NORM_IMAGES} or more)"


def check_names(config: TrainConfig) -> None:
    """Checks what needs neither devices nor data.

    Raises:
        UsageError: an unknown model or schedule, or flags that contradict each other.
    """
    optimizers.parse_schedule(config.optimizer.lr_schedule)
    models.find(config.model.model)
    if config.fit.early_stopping and not config.data.val_fraction:
        raise UsageError("--early_stopping needs validation: --val_fraction must be above 0")
    if config.fit.norm_batch == "fixed" and not config.model.init_from:
        raise UsageError(
            "--norm_batch=fixed keeps the averages of trained weights: it needs --init_from"
        )
    if config.fit.norm_batch == "fixed" and config.optimizer.optimizer == "muon":
        raise UsageError(
            "--optimizer=muon sets the norm of filters, for which the averages of --norm_batch=fixed "
            "are wrong; use another optimizer or normalization"
        )
    freeze, frozen_epochs = config.model.freeze, config.model.unfreeze_epoch
    if frozen_epochs and not freeze:
        raise UsageError(
            f"--unfreeze_epoch={frozen_epochs} needs --freeze=LAYER, up to which layers are frozen "
            "before"
        )
    if frozen_epochs and frozen_epochs >= config.fit.epochs:
        raise UsageError(
            f"--unfreeze_epoch={frozen_epochs} must be below --epochs={config.fit.epochs}; without it "
            f"--freeze={freeze} applies to all epochs"
        )
    if config.optimizer.class_weight == config.data.sampling == BALANCED:
        raise UsageError(
            "--class_weight balanced and --sampling balanced each even out the classes; both together "
            "favour the small ones: give one of them"
        )


def prepare(
    config: TrainConfig,
    context: DistributedContext | None = None,
    is_new: bool = True,
    began_with: str | None = None,
) -> Plan:
    """Checks the flags, loads the data and builds the compiled model.

    Args:
        context: the devices; None chooses them.
        is_new: whether the run starts, so that the weights of --init_from are read.
        began_with: the dtype policy of the run that is resumed; the chief's counts.
    """
    check_names(config)
    # Devices can be configured only before TensorFlow computes anything.
    context = context or DistributedContext(strategy.choose(config.devices), config.devices)
    # All flags are checked before the data is loaded, which may be a long download.
    augmentation.parse(config.data.augment)
    fit, replicas = config.fit, context.spec.replicas
    if fit.batch_size // fit.accumulate_steps < replicas:
        raise UsageError(
            f"--batch_size={fit.batch_size} has fewer images than there are replicas "
            f"({replicas}) times --accumulate_steps={fit.accumulate_steps}"
        )

    norm_batch = choose_norm_batch(fit, replicas)
    if norm_batch[0] == WHOLE:
        context.connect_sums()
    xla = environment.use_xla(config.devices.xla, context.spec.name)

    deterministic = environment.make_deterministic(config.devices.deterministic)
    began_with = context.all_gather(began_with)[0]
    dtype_policy = _choose_dtype_policy(config.devices.dtype_policy, began_with, context)
    on_cpu = context.spec.devices[0].startswith("CPU")
    is_chosen = on_cpu and config.devices.dtype_policy == "auto" and not began_with
    dataset = _load_data(config)
    # Before TensorFlow's workers wait for each other: they could not say why one of them is missing.
    splits = dataset.describe().items()
    context.check_equal(
        {f"the {name} images": f"{x['count']} ({x['fingerprint']})" for name, x in splits}
    )
    one_pass = data.steps_per_epoch(dataset.train, fit.batch_size)  # there is a whole batch
    steps = fit.steps_per_epoch or one_pass
    options = {"accumulate_steps": fit.accumulate_steps, "jit_compile": xla[0]}
    options["norm_batch"] = norm_batch[0]
    options["steps_per_execution"] = config.devices.steps_per_execution
    if config.optimizer.class_weight == BALANCED:
        labels, classes = dataset.train.labels, len(dataset.class_names)
        options["class_weight"] = data.class_weights(labels, classes)
    with context.strategy.scope():
        model, dtype_policy = _build_network(config, dataset, dtype_policy, is_chosen)
        origin, frozen = _initialize(model, config, dataset, is_new)
        if frozen and config.model.unfreeze_epoch:
            # The optimizer and the checkpoints have the state of all variables from the start.
            frozen.set_trainable(True)
            options |= {"late": frozen.layers, "start": config.model.unfreeze_epoch * steps}
        rate = optimizers.schedule(config.optimizer, fit.epochs, steps)
        optimizers.compile_model(model, config.optimizer, rate, **options)
    how = dtype_policy, xla, norm_batch, deterministic, origin, frozen
    return Plan(config, dataset, model, rate, steps, context, *how, resizing.stages(config, model))


def _load_data(config: TrainConfig) -> data.Dataset:
    flags = config.data
    return data.load(
        flags.data,
        flags.data_dir,
        flags.image_size,
        flags.val_fraction,
        config.fit.seed,
        flags.cache_dir,
        data.BadImages(flags.on_bad_image == "skip", flags.max_bad_share),
        flags.resize,
        flags.augment,
    )


def _choose_dtype_policy(
    name: str, began_with: str | None, context: DistributedContext
) -> tuple[str, str]:
    """(the dtype policy of --dtype_policy, why), the same in all workers: one that is fast on each."""
    everyone = context.all_gather(environment.dtype_policy(name, began_with))
    policy, why = min(everyone, key=lambda choice: choice[0])  # float32 is before mixed_bfloat16
    return policy, why


def _build_network(
    config: TrainConfig, dataset: data.Dataset, policy: tuple[str, str], is_chosen: bool
) -> tuple[Classifier, tuple[str, str]]:
    """(the model with random weights, its dtype policy and why).

    A policy that `is_chosen` for a CPU gives way to DEPTHWISE_POLICY.
    """
    keras.utils.set_random_seed(config.fit.seed)
    keras.config.set_dtype_policy(policy[0])
    model = models.build(config.model.model, dataset.image_shape, len(dataset.class_names))
    if is_chosen and policy[0] != "float32" and models.has_depthwise(model):
        return _build_network(config, dataset, environment.DEPTHWISE_POLICY, is_chosen)
    return model, policy


def _initialize(
    model: Classifier, config: TrainConfig, dataset: data.Dataset, is_new: bool
) -> tuple:
    """Gives the model its first weights; (what they are as text, the frozen layers)."""
    origin = ""
    if is_new and config.model.init_from:
        origin = weights.take(model, config.model.init_from, dataset.class_names)
    elif is_new:
        models.adapt(model, dataset.train)
    return origin, transfer.freeze(model, config.model.freeze) if config.model.freeze else None


def estimate(config: TrainConfig) -> str:
    """Measures three steps and says what the run would do and take; writes nothing.

    The steps are those of one replica on its shard of a batch. No other worker is needed.
    """
    spec = strategy.choose(config.devices)
    plan = prepare(config, DistributedContext(spec, config.devices, start=False))
    ends = [time.perf_counter()]

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            ends.append(time.perf_counter())

    # The first call traces and is not timed.
    steps_per_call = config.devices.steps_per_execution
    steps = 3 * steps_per_call
    shards = plan.shards(ReplicaRange(0, 1, spec.replicas), start_step=0)
    with plan.reading():
        plan.model.fit(ShardedBatches(shards, steps), verbose=0, callbacks=[Clock()])
    seconds = (ends[-1] - ends[1]) / (steps - steps_per_call)
    on_cpu = spec.devices[0].startswith("CPU")
    if on_cpu:
        seconds *= len(spec.devices)  # The virtual devices share the CPU.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        memory = tf.config.experimental.get_memory_info(spec.devices[0])["peak"]
    total = seconds * plan.steps_per_epoch * config.fit.epochs
    # Frozen epochs and those of smaller images are faster.
    at_most = "at most " if config.model.unfreeze_epoch or plan.stages else ""
    return (
        f"{plan.summary()}\n"
        f"estimate  {seconds:.3g} s a step, {seconds * plan.steps_per_epoch:.3g} s an epoch, "
        f"{at_most}{total / 3600:.3g} h in all, without validation"
        f"{' and without communication' if spec.replicas > 1 else ''}; "
        f"{memory / 2**30:.2f} GiB of {'memory' if on_cpu else 'each GPU'}"
    )


def describe_run(plan: Plan) -> dict:
    """The contents of config.json."""
    network = plan.model.deployable
    flags = canonical(plan.config.flags())
    return {
        "flags": flags,
        "paths": places.recorded(flags),
        "class_names": plan.dataset.class_names,
        "image_shape": plan.dataset.image_shape,
        "splits": plan.dataset.describe(),
        "parameter_count": models.count_parameters(network),
        "multiply_adds": models.count_multiply_adds(network),
        "steps_per_epoch": plan.steps_per_epoch,
        "strategy": plan.context.spec.name,
        "replicas": plan.context.spec.replicas,
        "dtype_policy": plan.dtype_policy[0],
        "xla": plan.xla[0],
        "norm_batch": str(plan.norm_batch[0]),
        "deterministic": plan.deterministic,
        "machine": environment.machine(),
        "versions": package_versions(),
        "git_revision": _git_revision(),
        "command": sys.argv,
    }


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide results."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {"python": platform.python_version()}


def _git_revision() -> str | None:
    """The commit of the checkout that this package runs from; None if it is installed."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
