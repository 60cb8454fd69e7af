"""Training: config -> data -> pipeline -> model -> fit -> run directory -> test -> export."""

import csv
import dataclasses
import importlib.metadata
import math
import pathlib
import platform
import resource
import subprocess
import sys
import time

import keras
import tensorflow as tf

from keras_cifar import (
    augmentation,
    checkpoint,
    data,
    distribution,
    environment,
    evaluation,
    models,
    optimizers,
    pipeline,
    plots,
)
from keras_cifar.classifier import Classifier
from keras_cifar.config import TrainConfig
from keras_cifar.distribution import Devices, Pieces, Share
from keras_cifar.errors import UsageError, UserError, check_utf8, unknown
from keras_cifar.exporters import saved_model
from keras_cifar.run import Run, replacing, versions, write_json

PACKAGES = ("keras", "tensorflow", "numpy", "Pillow", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that is ready to start."""

    config: TrainConfig
    dataset: data.Dataset
    model: Classifier
    steps_per_epoch: int
    devices: Devices
    dtype_policy: tuple[str, str]
    xla: tuple[bool, str]

    def pieces_of(self, share: Share, start_step: int) -> tf.data.Dataset:
        """What the replicas of a share train on, from a step of the run on."""
        config = self.config
        return pipeline.training(
            self.dataset.train,
            len(self.dataset.class_names),
            config.batch_size,
            config.augment,
            config.seed,
            start_step,
            share,
            config.accumulate_steps,
        )

    def batches(self, start_step: int) -> Pieces:
        """Training batches from a step of the run on, cut for the replicas."""
        return distribution.pieces(
            self.devices.strategy,
            lambda share: self.pieces_of(share, start_step),
            self.steps_per_epoch,
        )

    def validation(self) -> Pieces | None:
        """Validation batches, cut for the replicas; None where nothing is held out."""
        val, classes, size = self.dataset.val, len(self.dataset.class_names), self.config.batch_size
        if val is None:
            return None
        return distribution.pieces(
            self.devices.strategy,
            lambda share: pipeline.evaluation(val, classes, size, share),
            pipeline.evaluation_steps(val, size),
        )

    def describe(self) -> str:
        """What will be done, in a few lines."""
        config, dataset = self.config, self.dataset
        network = self.model.deployable
        height, width, _ = dataset.image_shape
        counts = ", ".join(f"{v['count']:,} {k}" for k, v in dataset.describe().items())
        left_out = len(dataset.train) % config.batch_size
        choice, (policy, why_policy), (xla, why_xla) = (
            self.devices.choice,
            self.dtype_policy,
            self.xla,
        )
        return "\n".join(
            [
                f"model     {config.model}: {models.count_parameters(network):,} parameters, "
                f"{models.count_multiply_adds(network) / 1e6:,.1f} million multiply-adds an image",
                f"data      {config.data}: {counts} images of {width} x {height}, "
                f"{len(dataset.class_names)} classes",
                f"training  {config.epochs} epochs of {self.steps_per_epoch} steps of "
                f"{config.batch_size} images ({left_out} others are left out each pass), "
                f"{config.optimizer}, learning rate {config.learning_rate:g} {config.lr_schedule}",
                f"devices   strategy {choice.name} ({choice.reason}), {self._replica_batch()}, "
                f"{policy} ({why_policy}), XLA {'on' if xla else 'off'} ({why_xla})",
            ]
        )

    def _replica_batch(self) -> str:
        """How a batch is shared, in words."""
        config, replicas = self.config, self.devices.choice.replicas
        size, larger = divmod(config.batch_size // config.accumulate_steps, replicas)
        text = f"{size} or {size + 1}" if larger else f"{size}"
        text += " images a replica"
        if config.accumulate_steps > 1:
            text += f" in each of {config.accumulate_steps} parts"
        return text


def train(config: TrainConfig, run: Run) -> dict | None:
    """Trains, selects, tests and exports; goes on where an earlier call on the same run stopped.

    Returns:
        The figures of the test split, as in `RUN/eval/test.json`; None at workers other than the
        chief, which alone reads and writes the run directory.

    Raises:
        UsageError: a wrong flag, or a run directory that holds another configuration.
        UserError: the data is not to be had, the loss was not finite, or another worker was lost.
    """
    check_names(config)
    choice = distribution.choose(config)
    with Devices(choice, config, config.common() | package_versions()) as devices:
        previous = previous_config(config, run) if devices.is_chief else None
        plan = prepare(config, devices)
        if devices.is_chief:
            if previous is None:
                write_json(run.config, describe_run(plan))
            elif previous["splits"] != plan.dataset.describe():
                raise UserError(
                    f"the images of --data={config.data} are not those that {run.path} began with"
                )
            if plan.dataset.skipped:
                write_skipped(plan.dataset, run.skipped)
            print(f"run       {run.path}\n{plan.describe()}", flush=True)
        fit(plan, run)
    if not devices.is_chief:
        return None

    model = models.load(run.model)
    dataset = plan.dataset
    figures = evaluation.evaluate(
        model, "test", dataset.test, dataset.class_names, config.data, run
    )
    if config.export and not versions(run.export):
        saved_model.export(model, run.export, dataset.class_names)
    return figures


def previous_config(config: TrainConfig, run: Run) -> dict | None:
    """config.json of an earlier call on this run directory, None where there was none.

    Raises:
        UsageError: its flags were others, or the directory holds something else.
    """
    check_utf8("run_dir", run.path)
    if not run.path.exists():
        return None
    if not run.config.exists():
        if not run.path.is_dir() or any(run.path.iterdir()):
            raise UsageError(f"--run_dir={run.path} exists and is no run directory; choose another")
        return None
    previous = run.read_config()
    differences = config.differences(previous["flags"])
    if differences:
        raise UsageError(
            f"{run.path} holds a run with other flags: {'; '.join(differences)}; "
            "choose another --run_dir or the same flags"
        )
    return previous


def check_names(config: TrainConfig) -> None:
    """Refuses what no machine can do, before anything is started.

    Raises:
        UsageError: an unknown model or schedule, or flags that contradict each other.
    """
    optimizers.parse_schedule(config.lr_schedule)
    if config.model not in models.variants():
        raise unknown("model", config.model, models.variants())
    if config.early_stopping and not config.val_fraction:
        raise UsageError("--early_stopping needs validation: --val_fraction must be above 0")


def prepare(config: TrainConfig, devices: Devices | None = None) -> Plan:
    """Checks the flags, loads the data and builds the compiled model.

    Args:
        devices: where to; None chooses them.

    Raises:
        UsageError, UserError: as `train`.
    """
    check_names(config)
    # Devices can be chosen only before TensorFlow computes anything.
    devices = devices or Devices(distribution.choose(config), config)
    # All flags before the data: a wrong one shows before a long download.
    augmentation.parse(config.augment)
    replicas = devices.choice.replicas
    if config.batch_size // config.accumulate_steps < replicas:
        raise UsageError(
            f"--batch_size={config.batch_size} is less than an image for each of {replicas} replicas"
            + f" in each of --accumulate_steps={config.accumulate_steps}"
            * (config.accumulate_steps > 1)
        )

    keras.utils.set_random_seed(config.seed)
    dtype_policy = environment.dtype_policy(config.dtype_policy)
    keras.config.set_dtype_policy(dtype_policy[0])
    dataset = data.load(
        config.data,
        config.data_dir,
        config.image_size,
        config.val_fraction,
        config.seed,
        config.cache_dir,
        data.BadImages(config.on_bad_image == "skip", config.max_bad_share),
    )
    # Before TensorFlow's workers wait for each other, who could not say why one of them does not come.
    splits = dataset.describe()
    devices.agree(
        {f"the {name} images": f"{s['count']} ({s['fingerprint']})" for name, s in splits.items()}
    )
    one_pass = pipeline.steps_in(dataset.train, config.batch_size)
    steps = config.steps_per_epoch or one_pass
    xla = environment.use_xla(devices.choice.name)
    with devices.strategy.scope():
        model = models.build(config.model, dataset.image_shape, len(dataset.class_names))
        optimizers.compile_model(model, config, steps, jit_compile=xla[0])
    return Plan(config, dataset, model, steps, devices, dtype_policy, xla)


def estimate(config: TrainConfig) -> str:
    """What a run would do and take, in words: time and memory of three steps, nothing is kept.

    The steps are those of one replica on its part of a batch. Nobody is waited for.

    Raises:
        UsageError, UserError: as `train`.
    """
    choice = distribution.choose(config)
    plan = prepare(config, Devices(choice, config, start=False))
    share = Share(0, 1, choice.replicas)
    ends = [time.perf_counter()]

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            ends.append(time.perf_counter())

    # The first call traces and is not timed.
    steps = 3 * config.steps_per_execution
    plan.model.fit(
        Pieces(plan.pieces_of(share, start_step=0), steps), verbose=0, callbacks=[Clock()]
    )
    seconds = (ends[-1] - ends[1]) / (steps - config.steps_per_execution)
    on_cpu = choice.devices[0].startswith("CPU")
    if on_cpu:
        seconds *= len(choice.devices)  # They share it.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        memory = tf.config.experimental.get_memory_info(choice.devices[0])["peak"]
    total = seconds * plan.steps_per_epoch * config.epochs
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
        "flags": dataclasses.asdict(plan.config),
        "class_names": plan.dataset.class_names,
        "image_shape": plan.dataset.image_shape,
        "splits": plan.dataset.describe(),
        "parameter_count": models.count_parameters(network),
        "multiply_adds": models.count_multiply_adds(network),
        "steps_per_epoch": plan.steps_per_epoch,
        "strategy": plan.devices.choice.name,
        "replicas": plan.devices.choice.replicas,
        "dtype_policy": plan.dtype_policy[0],
        "xla": plan.xla[0],
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
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def fit(plan: Plan, run: Run, callbacks: tuple[keras.callbacks.Callback, ...] = ()) -> None:
    """Trains from the last checkpoint to the end; `RUN/model.keras` is the selected model then."""
    config, devices = plan.config, plan.devices
    state = checkpoint.restore(run.checkpoint, plan.model, devices)
    recorder = Recorder(plan, run, state.get("history", []))
    if devices.choice.cluster:  # alone, nobody reads the whole state for nothing
        devices.agree(
            {"the step": recorder.epochs_done, "the model's state": checkpoint.digest(plan.model)}
        )
    devices.meet()
    if state and devices.is_chief:
        print(f"going on after epoch {recorder.epochs_done} of {config.epochs}", flush=True)
    if recorder.is_finished():
        return
    watchers = [recorder]
    if devices.is_chief:
        watchers += [keras.callbacks.TensorBoard(run.tensorboard, write_graph=False)]
    plan.model.fit(
        plan.batches(start_step=recorder.epochs_done * plan.steps_per_epoch),
        epochs=config.epochs,
        initial_epoch=recorder.epochs_done,
        callbacks=[*watchers, *callbacks],
        verbose=1 if sys.stdout.isatty() and devices.is_chief else 0,
    )


class Recorder(keras.callbacks.Callback):
    """Writes the run directory after each epoch, selects the model, and watches the loss.

    All workers compute the same, and the chief alone writes.
    """

    def __init__(self, plan: Plan, run: Run, history: list[dict]):
        super().__init__()
        self.plan, self.run, self.history = plan, run, history
        batches = plan.batches(start_step=len(history) * plan.config.calibration_batches)
        self._calibration = iter(batches.dataset)
        self._validation = plan.validation()

    @property
    def epochs_done(self) -> int:
        return len(self.history)

    def best_epoch(self) -> int:
        """The epoch, from 1, of the selected model: best on validation, else the last."""
        if not self.history or "val_loss" not in self.history[0]:
            return len(self.history)
        return max(self.history, key=_quality)["epoch"]

    def is_finished(self) -> bool:
        """Whether all epochs are done, or patience is at its end."""
        config = self.plan.config
        waited = self.epochs_done - self.best_epoch()
        return self.epochs_done >= config.epochs or 0 < config.early_stopping <= waited

    def on_epoch_begin(self, epoch, logs=None):
        self._started = self._trained = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._trained = time.perf_counter()
        loss = float(logs["loss"])
        if math.isfinite(loss):
            return
        optimizer = self.model.optimizer
        kept = "nothing was saved, as no epoch was complete"
        if self.history:
            kept = f"the last good model is {self.run.model} (epoch {self.best_epoch()})"
        raise UserError(
            f"the loss became {loss} at step {int(optimizer.iterations.numpy())} "
            f"(epoch {self.epochs_done + 1}, learning rate {float(optimizer.learning_rate):g}); "
            f"{kept}; try a lower --learning_rate or --warmup_epochs"
        )

    def on_epoch_end(self, epoch, logs=None):
        config = self.plan.config
        images = self.plan.steps_per_epoch * config.batch_size
        row = {"epoch": epoch + 1} | {name: float(value) for name, value in logs.items()}
        # Validation is here and not in `fit`, so that it sees the very network that is saved: with
        # averaged weights, and statistics that belong to them.
        with self.model.averaged():
            self.model.recalibrate(self._calibration, config.calibration_batches)
            if self._validation:
                figures = self.model.evaluate(self._validation, verbose=0, return_dict=True)
                figures = {f"val_{name}": float(value) for name, value in figures.items()}
                row |= figures
                logs.update(figures)  # for TensorBoard and the progress bar, which come after
            row |= {
                "learning_rate": float(self.model.optimizer.learning_rate),
                "seconds": round(time.perf_counter() - self._started, 3),
                "images_per_second": round(images / (self._trained - self._started), 1),
            }
            self.history.append(row)
            # Before the checkpoint that counts it, so that a kill between them loses nothing.
            if self.best_epoch() == epoch + 1 and self.plan.devices.is_chief:
                with replacing(self.run.model) as temporary:
                    self.model.deployable.save(temporary)
        if self.is_finished():
            self.model.stop_training = True
        if not self.plan.devices.is_chief:
            return
        checkpoint.save(self.run.checkpoint, self.model, {"history": self.history})
        write_history(self.history, self.run.history)
        plots.curves(self.history, self.run.curves)
        if not sys.stdout.isatty():
            print(_line(row, config.epochs), flush=True)


def _quality(row: dict) -> tuple[float, float]:
    """Validation accuracy, and the loss between equals; what is not finite is worst."""
    loss = row["val_loss"]
    return (row["val_accuracy"], -loss) if math.isfinite(loss) else (-1.0, -math.inf)


def _line(row: dict, epochs: int) -> str:
    figures = [
        f"{name} {row[name]:.4f}"
        for name in ("loss", "accuracy", "val_loss", "val_accuracy")
        if name in row
    ]
    return (
        f"epoch {row['epoch']}/{epochs}  {'  '.join(figures)}  {row['images_per_second']:.0f} images/s"
        f"  {row['seconds']:.0f} s"
    )


def write_history(history: list[dict], path: pathlib.Path) -> None:
    """Writes history.csv: a row an epoch."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def write_skipped(dataset: data.Dataset, path: pathlib.Path) -> None:
    """Writes skipped.csv: a row a picture that was left out."""
    with (
        replacing(path) as temporary,
        # Names of files are bytes that need not be text.
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "file", "reason"])
        writer.writerows((s.split, s.file, s.reason) for s in dataset.skipped)
