"""What is done after each step and each epoch of a run."""

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
from keras_cifar.evaluation import plots
from keras_cifar.training import checkpoint
from keras_cifar.training.checkpoint import TrainingProgress
from keras_cifar.training.plan import Plan
from keras_cifar.training.signals import Interruption
from keras_cifar.training.tensorboard import Scalars

# What the learning rate is multiplied by when the run goes back to a checkpoint.
ROLLBACK_FACTOR = 0.5


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

    def __init__(
        self, plan: Plan, run: Run, position: TrainingProgress, interruption: Interruption
    ):
        super().__init__()
        self.plan, self.run, self.interruption = plan, run, interruption
        self.history, self.rollbacks = list(position.history), position.rollbacks
        self._resumed, self._steps = position, position.steps
        self._norm = math.nan
        plan.learning_rate.factor.assign(ROLLBACK_FACTOR**position.rollbacks)
        batches = plan.batches(start_step=len(self.history) * plan.config.fit.precise_bn_batches)
        self._calibration = iter(batches)
        self._validation = plan.validation()
        self._saved_at = time.perf_counter()
        self._scalars = None
        if plan.devices.is_chief:
            self._scalars = Scalars(run.tensorboard, self.history)
            self._write_history()

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
        return self.epochs_done >= config.fit.epochs or 0 < config.fit.early_stopping <= waited

    @property
    def position(self) -> TrainingProgress:
        """Where the run is."""
        seconds = time.perf_counter() - self._began
        totals = tuple(self.model.totals.tolist())
        return TrainingProgress(self.history, self._steps, totals, seconds, self.rollbacks)

    def on_epoch_begin(self, epoch, logs=None):
        resumed, self._resumed = self._resumed, TrainingProgress()
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
            raise self._diverged(loss / self.plan.config.fit.batch_size, norm)
        self._norm = norm
        if self._is_to_stop(calls):
            self._save()
            raise self._stopped()
        if self._is_due(before):
            self._save(needed=False)

    def on_test_batch_end(self, batch, logs=None):
        # Workers stop together, after a training step.
        if self.interruption.requested and not self.plan.devices.spec.cluster:
            raise self._stopped()

    def on_epoch_end(self, epoch, logs=None):
        try:
            row = self._epoch_metrics(epoch, logs)
        except StoppedError:
            self._save()  # The trained weights are back in their place; the rest is done anew.
            raise
        if self.is_finished():
            self.model.stop_training = True
        if not self.plan.devices.is_chief:
            return
        self._save(TrainingProgress(self.history, rollbacks=self.rollbacks))
        self._scalars.add(row)
        self._write_history()
        if not sys.stdout.isatty():
            print(_line(row, self.plan.config.fit.epochs), flush=True)

    def _epoch_metrics(self, epoch: int, logs: dict) -> dict:
        """Validates and selects the model; the row of the history, which has it then."""
        config = self.plan.config
        images = self.plan.steps_per_epoch * config.fit.batch_size
        row = {"epoch": epoch + 1} | {name: float(value) for name, value in logs.items()}
        # Validation is here and not in `fit`, so that it sees the very network that is saved: with
        # averaged weights, and statistics that belong to them.
        with self.model.averaged():
            self.model.recompute_statistics(self._calibration, config.fit.precise_bn_batches)
            if self._validation:
                metrics = self.model.evaluate(
                    self._validation, verbose=0, return_dict=True, callbacks=[self]
                )
                metrics = {f"val_{name}": float(value) for name, value in metrics.items()}
                row |= metrics
                logs.update(metrics)  # for the progress bar, which comes after
            row |= {
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
        if not self.plan.devices.spec.cluster:
            return self.interruption.requested is not None
        if self.interruption.requested:
            self.model.request_stop()
        return calls > 0

    def _is_due(self, before: int) -> bool:
        """Whether a checkpoint is, as so many steps of the epoch were done before these."""
        output = self.plan.config.output
        every, seconds = output.checkpoint_every, output.checkpoint_seconds
        epochs = self.epochs_done * self.plan.steps_per_epoch
        by_steps = every and (epochs + self._steps) // every > (epochs + before) // every
        return by_steps or 0 < seconds <= time.perf_counter() - self._saved_at

    def _save(self, position: TrainingProgress | None = None, needed: bool = True) -> None:
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

    def _write_history(self) -> None:
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
            f"stopped by {why}; {saved}; the same command with --run_dir={self.run.restart} goes on",
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
    metrics = [
        f"{name} {row[name]:.4f}"
        for name in ("loss", "accuracy", "val_loss", "val_accuracy")
        if name in row
    ]
    return (
        f"epoch {row['epoch']}/{epochs}  {'  '.join(metrics)}  {row['images_per_second']:.0f} images/s"
        f"  {row['seconds']:.0f} s"
    )


def write_history(history: list[dict], path: pathlib.Path) -> None:
    """Writes history.csv: a row an epoch."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)
