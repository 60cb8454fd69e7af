"""Training: config -> data -> pipeline -> model -> fit -> run directory -> test -> export."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import math
import pathlib
import platform
import resource
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf

from keras_cifar import (
    augmentation,
    checkpoint,
    data,
    distribution,
    environment,
    evaluation,
    finetuning,
    models,
    optimizers,
    pipeline,
    plots,
)
from keras_cifar.checkpoint import Position
from keras_cifar.classifier import Classifier
from keras_cifar.config import TrainConfig
from keras_cifar.distribution import Devices, Pieces, Share
from keras_cifar.errors import StoppedError, UsageError, UserError, check_utf8, reason, unknown
from keras_cifar.exporters import saved_model
from keras_cifar.interruption import Interruption
from keras_cifar.optimizers import Schedule
from keras_cifar.run import Run, replacing, versions, write_json
from keras_cifar.scalars import Scalars

# --on_nan=rollback: what the learning rate is multiplied by each time, and how often at most.
ROLLBACK_FACTOR = 0.5
ROLLBACKS = 3

PACKAGES = ("keras", "tensorflow", "numpy", "Pillow", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that is ready to start."""

    config: TrainConfig
    dataset: data.Dataset
    model: Classifier
    learning_rate: Schedule
    steps_per_epoch: int
    devices: Devices
    dtype_policy: tuple[str, str]
    xla: tuple[bool, str]
    deterministic: bool
    origin: str

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
                *([f"begins    with {self.origin}"] if self.origin else []),
                f"devices   strategy {choice.name} ({choice.reason}), {self._replica_batch()}, "
                f"{policy} ({why_policy}), XLA {'on' if xla else 'off'} ({why_xla})",
            ]
        )

    def place(self, position: Position) -> str:
        """A position in words."""
        done, epochs = len(position.history), self.config.epochs
        if not position.steps:
            return f"epoch {done} of {epochs}"
        return f"step {position.steps} of {self.steps_per_epoch} in epoch {done + 1} of {epochs}"

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
        UserError: the data is not to be had, the loss was not finite, another process trains in the
            directory, or another worker was lost.
        StoppedError: SIGTERM or SIGINT came.
    """
    check_names(config)
    choice = distribution.choose(config)
    interruption = Interruption()
    with contextlib.ExitStack() as stack, interruption.heard():
        with Devices(choice, config, config.common() | package_versions()) as devices:
            if devices.is_chief:
                previous_config(config, run)  # before anything is written
                stack.enter_context(run.locked())
            previous = previous_config(config, run) if devices.is_chief else None
            begins = devices.is_chief and not checkpoint.exists(run.checkpoint)
            plan = prepare(config, devices, begins)
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
            fit(plan, run, interruption)
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
    if not run.config.exists():
        if not run.is_empty():
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


def prepare(config: TrainConfig, devices: Devices | None = None, begins: bool = True) -> Plan:
    """Checks the flags, loads the data and builds the compiled model.

    Args:
        devices: where to; None chooses them.
        begins: whether the weights of --init_from are read, if they are asked for.

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
    deterministic = environment.make_deterministic(config.deterministic)
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
        origin = ""
        if config.init_from and begins:
            origin = finetuning.take_weights(model, config.init_from, dataset.class_names)
        if config.freeze:
            finetuning.freeze(model, config.freeze)
        rate = optimizers.compile_model(model, config, steps, jit_compile=xla[0])
    return Plan(
        config, dataset, model, rate, steps, devices, dtype_policy, xla, deterministic, origin
    )


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
        "deterministic": plan.deterministic,
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


def fit(
    plan: Plan,
    run: Run,
    interruption: Interruption | None = None,
    callbacks: tuple[keras.callbacks.Callback, ...] = (),
) -> None:
    """Trains from the last checkpoint to the end; `RUN/model.keras` is the selected model then.

    Raises:
        StoppedError: a signal came; what was done is in a checkpoint.
        UserError: the loss was not finite, or no checkpoint is whole.
    """
    config, devices, model = plan.config, plan.devices, plan.model
    interruption = interruption or Interruption()
    if devices.is_chief and not checkpoint.exists(run.checkpoint):
        if run.history.exists():
            raise UserError(
                f"{run.path} has a history and no checkpoint in {run.checkpoint}; choose another "
                "--run_dir, where --init_from takes the weights of this one's model.keras"
            )
        # At once, so that a directory that cannot be written shows before hours of training.
        checkpoint.save(run.checkpoint, model, Position(), step=0)
    position = _restore(plan, run)
    if devices.choice.cluster:  # alone, nobody reads the whole state for nothing
        step = position.step(plan.steps_per_epoch)
        devices.agree({"the step": step, "the model's state": checkpoint.digest(model)})
    devices.meet()
    if devices.is_chief and position != Position():
        print(f"going on after {plan.place(position)}", flush=True)
    recorder = Recorder(plan, run, position, interruption)
    while not recorder.is_finished():
        try:
            with interruption.deferred():
                model.fit(
                    plan.batches(start_step=position.step(plan.steps_per_epoch)),
                    epochs=config.epochs,
                    initial_epoch=len(position.history),
                    initial_step=position.steps,
                    initial_totals=position.totals,
                    callbacks=[recorder, *callbacks],
                    verbose=1 if sys.stdout.isatty() and devices.is_chief else 0,
                )
            return
        except DivergedError as error:
            count = recorder.rollbacks + 1
            if config.on_nan == "stop" or count > ROLLBACKS:
                raise
            position = dataclasses.replace(_restore(plan, run), rollbacks=count)
            recorder = Recorder(plan, run, position, interruption)
            if devices.is_chief:
                print(
                    f"{error.what}; back to {plan.place(position)} with {ROLLBACK_FACTOR**count:g} of "
                    f"the learning rate ({count} of at most {ROLLBACKS} times)",
                    flush=True,
                )


def _restore(plan: Plan, run: Run) -> Position:
    """Gives all workers the state of the chief's last checkpoint."""
    path, data = checkpoint.read(run.checkpoint) if plan.devices.is_chief else (None, b"")
    return checkpoint.assign(plan.model, plan.devices.broadcast(data), path or "of worker 0")


class DivergedError(UserError):
    """The loss or the gradient is not finite.

    Attributes:
        what: became so, and when.
    """

    def __init__(self, what: str, advice: str):
        super().__init__(f"{what}; {advice}")
        self.what = what


class Recorder(keras.callbacks.Callback):
    """Writes the run directory, selects the model, watches the loss, and stops when it is told to.

    All workers compute the same, and the chief alone writes.
    """

    def __init__(self, plan: Plan, run: Run, position: Position, interruption: Interruption):
        super().__init__()
        self.plan, self.run, self.interruption = plan, run, interruption
        self.history, self.rollbacks = list(position.history), position.rollbacks
        self._resumed, self._steps = position, position.steps
        self._norm = math.nan
        plan.learning_rate.factor.assign(ROLLBACK_FACTOR**position.rollbacks)
        batches = plan.batches(start_step=len(self.history) * plan.config.calibration_batches)
        self._calibration = iter(batches.dataset)
        self._validation = plan.validation()
        self._saved_at = time.perf_counter()
        self._scalars = None
        if plan.devices.is_chief:
            self._scalars = Scalars(run.tensorboard, self.history)
            self._write_figures()

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

    @property
    def position(self) -> Position:
        """Where the run is."""
        seconds = time.perf_counter() - self._began
        totals = tuple(self.model.totals.tolist())
        return Position(self.history, self._steps, totals, seconds, self.rollbacks)

    def on_epoch_begin(self, epoch, logs=None):
        resumed, self._resumed = self._resumed, Position()
        self._began = time.perf_counter() - resumed.seconds
        self._trained = time.perf_counter()
        self._steps, self._totals = resumed.steps, np.array(resumed.totals or 0.0)

    def on_train_batch_end(self, batch, logs=None):
        self._trained = time.perf_counter()
        totals, before = self.model.totals, self._steps
        self._steps = batch + 1
        loss, *_, norm, calls = (totals - self._totals) / (self._steps - before)
        self._totals = totals
        if not np.isfinite(totals).all():
            raise self._diverged(loss / self.plan.config.batch_size, norm)
        self._norm = norm
        if self._is_to_stop(calls):
            self._save()
            raise self._stopped()
        if self._is_due(before):
            self._save(needed=False)

    def on_test_batch_end(self, batch, logs=None):
        # Workers stop together, after a training step.
        if self.interruption.requested and not self.plan.devices.choice.cluster:
            raise self._stopped()

    def on_epoch_end(self, epoch, logs=None):
        try:
            row = self._figures(epoch, logs)
        except StoppedError:
            self._save()  # The trained weights are back in their place; the rest is done anew.
            raise
        if self.is_finished():
            self.model.stop_training = True
        if not self.plan.devices.is_chief:
            return
        self._save(Position(self.history, rollbacks=self.rollbacks))
        self._scalars.add(row)
        self._write_figures()
        if not sys.stdout.isatty():
            print(_line(row, self.plan.config.epochs), flush=True)

    def _figures(self, epoch: int, logs: dict) -> dict:
        """Validates and selects the model; the row of the history, which has it then."""
        config = self.plan.config
        images = self.plan.steps_per_epoch * config.batch_size
        row = {"epoch": epoch + 1} | {name: float(value) for name, value in logs.items()}
        # Validation is here and not in `fit`, so that it sees the very network that is saved: with
        # averaged weights, and statistics that belong to them.
        with self.model.averaged():
            self.model.recalibrate(self._calibration, config.calibration_batches)
            if self._validation:
                figures = self.model.evaluate(
                    self._validation, verbose=0, return_dict=True, callbacks=[self]
                )
                figures = {f"val_{name}": float(value) for name, value in figures.items()}
                row |= figures
                logs.update(figures)  # for the progress bar, which comes after
            row |= {
                "gradient_norm": float(self._totals[3] / self.plan.steps_per_epoch),
                "learning_rate": float(self.model.optimizer.learning_rate),
                "seconds": round(time.perf_counter() - self._began, 3),
                "images_per_second": round(images / (self._trained - self._began), 1),
            }
            self.history.append(row)
            # Before the checkpoint that counts it, so that a kill between them loses nothing.
            if self.best_epoch() == epoch + 1 and self.plan.devices.is_chief:
                with replacing(self.run.model) as temporary:
                    self.model.deployable.save(temporary)
        return row

    def _is_to_stop(self, calls: float) -> bool:
        """Whether to stop after this step.

        Args:
            calls: of the step's replicas, to stop.
        """
        if not self.plan.devices.choice.cluster:
            return self.interruption.requested is not None
        if self.interruption.requested:
            self.model.call_to_stop()
        return calls > 0

    def _is_due(self, before: int) -> bool:
        """Whether a checkpoint is, as so many steps of the epoch were done before these."""
        every, seconds = self.plan.config.checkpoint_every, self.plan.config.checkpoint_seconds
        epochs = self.epochs_done * self.plan.steps_per_epoch
        by_steps = every and (epochs + self._steps) // every > (epochs + before) // every
        return by_steps or 0 < seconds <= time.perf_counter() - self._saved_at

    def _save(self, position: Position | None = None, needed: bool = True) -> None:
        """Writes a checkpoint; one that is not needed may fail, as the last one is still there."""
        self._saved_at = time.perf_counter()
        if not self.plan.devices.is_chief:
            return
        position = position or self.position
        step = position.step(self.plan.steps_per_epoch)
        try:
            checkpoint.save(self.run.checkpoint, self.model, position, step)
        except OSError as error:
            if needed:
                raise
            print(
                f"no checkpoint at step {step} ({reason(error)}: {error.filename}); training goes on",
                file=sys.stderr,
                flush=True,
            )

    def _write_figures(self) -> None:
        if self.history:
            write_history(self.history, self.run.history)
            plots.curves(self.history, self.run.curves)

    def _stopped(self) -> StoppedError:
        number = self.interruption.requested
        why = number.name if number else "another worker, which was told to"
        saved = f"{self.plan.place(self.position)} is saved"
        if self.plan.devices.is_chief:
            saved += f" in {self.run.checkpoint}"
        return StoppedError(
            number or signal.SIGTERM,
            f"stopped by {why}; {saved}; the same command with --run_dir={self.run.path} goes on",
        )

    def _diverged(self, loss: float, norm: float) -> DivergedError:
        optimizer = self.model.optimizer
        what = (
            f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient became {norm}"
        )
        kept = ""
        if self.plan.devices.is_chief:
            path, _ = checkpoint.read(self.run.checkpoint)
            kept = f"the last good checkpoint is {path}"
            if self.history:
                kept += f" and the best model {self.run.model} (epoch {self.best_epoch()})"
            kept += "; "
        return DivergedError(
            f"{what} at step {int(optimizer.iterations.numpy())} (epoch {self.epochs_done + 1}, "
            f"learning rate {float(optimizer.learning_rate):g}, norm of the gradient {norm:.3g} and "
            f"{self._norm:.3g} before it)",
            f"{kept}try a lower --learning_rate, --warmup_epochs, --global_clipnorm or "
            "--on_nan=rollback",
        )


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
