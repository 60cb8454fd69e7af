"""The callback that follows a run: after each step and each epoch."""

import csv
import math
import pathlib
import signal
import sys
import time

import keras
import numpy as np

from keras_cifar.core.errors import StoppedError, UserError, reason
from keras_cifar.core.files import replacing
from keras_cifar.core.run_directory import Run
from keras_cifar.core.signals import STOP
from keras_cifar.evaluation import plots
from keras_cifar.reporting.comparison import duration
from keras_cifar.training import checkpoint, resizing
from keras_cifar.training.checkpoint import TrainingProgress
from keras_cifar.training.plan import Plan
from keras_cifar.training.tensorboard import Scalars

# Factor of the learning rate after each rollback to a checkpoint.
ROLLBACK_FACTOR = 0.5


class DivergedError(UserError):
    """The loss or the gradient is not finite: `what` says which, and in which step."""

    def __init__(self, what: str, advice: str):
        super().__init__(f"{what}; {advice}")
        self.what = what


class Recorder(keras.callbacks.Callback):
    """Writes the run directory, selects the model, watches the loss, and stops on a signal.

    All workers compute the same; only the chief writes.
    """

    def __init__(self, plan: Plan, run: Run, progress: TrainingProgress):
        super().__init__()
        self.plan, self.run = plan, run
        self.history, self.rollbacks = list(progress.history), progress.rollbacks
        self._resumed, self._steps = progress, progress.steps
        self._first = len(self.history)  # the index of the first epoch of this process
        self._gradient_norm = math.nan
        plan.learning_rate.factor.assign(ROLLBACK_FACTOR**progress.rollbacks)
        self._precise_bn_batches = plan.precise_bn_batches(len(self.history))
        self._validation = plan.validation()
        self._saved_at = time.perf_counter()
        self._scalars = None
        if plan.context.is_chief:
            self._scalars = Scalars(run.tensorboard, self.history)
            self._write_history()

    @property
    def epochs_done(self) -> int:
        return len(self.history)

    def best_epoch(self) -> int:
        """The epoch, from 1, of the selected model."""
        return best_epoch(self.history)

    def is_finished(self) -> bool:
        """Whether all epochs are done, or early stopping applies: not before all is trained, and on
        images of full size.
        """
        fit, changes = self.plan.config.fit, [self.plan.config.model.unfreeze_epoch or 0]
        changes += [end for _, end in self.plan.stages]
        waited = self.epochs_done - max(self.best_epoch(), *changes)
        return self.epochs_done >= fit.epochs or 0 < fit.early_stopping <= waited

    @property
    def progress(self) -> TrainingProgress:
        seconds = time.perf_counter() - self._began
        totals = tuple(self.model.totals.tolist())
        return TrainingProgress(self.history, self._steps, totals, seconds, self.rollbacks)

    def on_epoch_begin(self, epoch, logs=None):
        if self.plan.begin_epoch(epoch):
            # Where normalization was frozen, no batches were read.
            self._precise_bn_batches = self.plan.precise_bn_batches(epoch)
        resumed, self._resumed = self._resumed, TrainingProgress()
        self._began = time.perf_counter() - resumed.seconds
        self._trained = time.perf_counter()
        self._steps, self._totals = resumed.steps, np.array(resumed.totals or 0.0)

    def on_train_batch_end(self, batch, logs=None):
        self._trained = time.perf_counter()
        totals, before = self.model.totals, self._steps
        self._steps = batch + 1
        loss, *_, norm, stop_requests = (totals - self._totals) / (self._steps - before)
        self._totals = totals
        if not np.isfinite(totals).all():
            raise self._diverged(loss / self.plan.config.fit.batch_size, norm)
        self._gradient_norm = norm
        if self._must_stop(stop_requests):
            self._save()
            raise self._stopped()
        if self._checkpoint_is_due(before):
            self._save(required=False)

    def on_test_batch_end(self, batch, logs=None):
        # Several workers stop together, after a training step.
        if STOP.received and not self.plan.context.spec.cluster:
            raise self._stopped()

    def on_epoch_end(self, epoch, logs=None):
        try:
            row = self._validate(epoch, logs)
        except StoppedError:
            self._save()  # with the trained weights; resuming repeats the validation
            raise
        if self.is_finished():
            self.model.stop_training = True
        if not self.plan.context.is_chief:
            return
        self._save(TrainingProgress(self.history, rollbacks=self.rollbacks))
        self._scalars.add(row)
        self._write_history()
        if not sys.stdout.isatty():
            print(_summary(row, self.plan.config.fit.epochs) + self._time_left(), flush=True)

    def _time_left(self) -> str:
        """The estimated time of the epochs that remain as text; empty after the last."""
        if self.is_finished():
            return ""
        plan, first, done = self.plan, self._first, self.epochs_done
        sides, epochs = plan.dataset.image_shape[:2], range(plan.config.fit.epochs)
        costs = [resizing.pixels_of(plan.stages, epoch, sides) for epoch in epochs]
        seconds = sum(row["seconds"] for row in self.history[first:]) / sum(costs[first:done])
        return f", {duration(seconds * sum(costs[done:]))} left"

    def _validate(self, epoch: int, logs: dict) -> dict:
        """Validates and selects the model; appends a row to the history and returns it."""
        fit = self.plan.config.fit
        images = self.plan.steps_per_epoch * fit.batch_size
        row = {"epoch": epoch + 1} | {name: float(value) for name, value in logs.items()}
        # Validation is here and not in `fit`, so that it evaluates the network that is saved: with
        # averaged weights, and batch normalization statistics that belong to them.
        with self.model.averaged():
            self.model.recompute_statistics(self._precise_bn_batches, fit.precise_bn_batches)
            if self._validation:
                options = {"verbose": 0, "return_dict": True, "callbacks": [self]}
                found = self.model.evaluate(self._validation, **options)
                metrics = {f"val_{name}": float(value) for name, value in found.items()}
                row |= metrics
                logs.update(metrics)  # for the progress bar, whose callback runs later
            row |= {
                "learning_rate": float(self.model.optimizer.learning_rate),
                "seconds": round(time.perf_counter() - self._began, 3),
                "images_per_second": round(images / (self._trained - self._began), 1),
            }
            self.history.append(row)
            # Before the checkpoint that has this row, so that a kill between them loses nothing.
            if self.best_epoch() == epoch + 1 and self.plan.context.is_chief:
                with replacing(self.run.model) as temporary:
                    self.model.deployable.save(temporary)
        return row

    def _must_stop(self, stop_requests: float) -> bool:
        """Whether to stop; `stop_requests` counts the replicas that were signalled before the step."""
        if not self.plan.context.spec.cluster:
            return STOP.received is not None
        if STOP.received:
            self.model.request_stop()
        return stop_requests > 0

    def _checkpoint_is_due(self, before: int) -> bool:
        """Whether to write a checkpoint; `before` is the value of `_steps` before this call."""
        output = self.plan.config.output
        every, seconds = output.checkpoint_every, output.checkpoint_seconds
        earlier = self.epochs_done * self.plan.steps_per_epoch
        by_steps = every and (earlier + self._steps) // every > (earlier + before) // every
        return by_steps or 0 < seconds <= time.perf_counter() - self._saved_at

    def _save(self, progress: TrainingProgress | None = None, required: bool = True) -> None:
        """Writes a checkpoint; a failure is a warning if it is not `required`."""
        self._saved_at = time.perf_counter()
        if not self.plan.context.is_chief:
            return
        progress = progress or self.progress
        step = progress.step(self.plan.steps_per_epoch)
        try:
            checkpoint.save(self.run.checkpoint, self.model, progress, step)
        except OSError as error:
            if required:
                raise
            why = f"{reason(error)}: {error.filename}"
            text = f"warning: no checkpoint at step {step} ({why}); training continues"
            print(text, file=sys.stderr, flush=True)

    def _write_history(self) -> None:
        if self.history:
            write_history(self.history, self.run.history)
            plots.save(plots.curves([self.history]), self.run.curves)

    def _stopped(self) -> StoppedError:
        number, place = STOP.received, self.plan.place(self.progress)
        source = number.name if number else "a signal to another worker"
        where = f" in {self.run.checkpoint}" if self.plan.context.is_chief else ""
        text = f"stopped by {source}; {place} is saved{where}; the same command with"
        return StoppedError(number or signal.SIGTERM, f"{text} {self.run.restart} resumes")

    def _diverged(self, loss: float, norm: float) -> DivergedError:
        optimizer, epoch = self.model.optimizer, self.epochs_done + 1
        name, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        saved = ""
        if self.plan.context.is_chief:
            path, _ = checkpoint.read(self.run.checkpoint)
            best = f" and the best model {self.run.model} (epoch {self.best_epoch()})"
            saved = f"the last good checkpoint is {path}{best if self.history else ''}; "
        return DivergedError(
            f"the {name} became {value} at step {int(optimizer.iterations.numpy())} (epoch {epoch}, "
            f"learning rate {float(optimizer.learning_rate):g}, gradient norm {norm:.3g}, "
            f"{self._gradient_norm:.3g} one step before)",
            f"{saved}try a lower --learning_rate, --warmup_epochs, --global_clipnorm or "
            "--on_nan=rollback",
        )


def best_epoch(history: list[dict]) -> int:
    """The epoch, from 1, to select: the best on validation, the last without; 0 of an empty history."""
    if not history or "val_loss" not in history[0]:
        return len(history)
    return int(max(history, key=_quality)["epoch"])


def _quality(row: dict) -> tuple[float, float]:
    """Validation accuracy, and the loss for equal accuracies; a loss that is not finite is worst."""
    loss = row["val_loss"]
    return (row["val_accuracy"], -loss) if math.isfinite(loss) else (-1.0, -math.inf)


def _summary(row: dict, epochs: int) -> str:
    """A row of the history as a line of text."""
    names = ("loss", "accuracy", "val_loss", "val_accuracy")
    metrics = [f"{name} {row[name]:.4f}" for name in names if name in row]
    return (
        f"epoch {row['epoch']}/{epochs}  {'  '.join(metrics)}  {row['images_per_second']:.0f} images/s"
        f"  {row['seconds']:.0f} s"
    )


def write_history(history: list[dict], path: pathlib.Path) -> None:
    """Writes history.csv: a row for each epoch."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)
