"""Training: a plan -> fit -> run directory -> test -> export."""

import contextlib
import csv
import dataclasses
import pathlib
import sys

import keras

from keras_cifar import data, models
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import replacing, versions, write_json
from keras_cifar.core.run_directory import Run, previous_config
from keras_cifar.distributed import strategy
from keras_cifar.distributed.strategy import DistributedContext
from keras_cifar.evaluation import evaluator
from keras_cifar.exporters import saved_model, verification
from keras_cifar.reporting import gallery, page, record
from keras_cifar.training import checkpoint
from keras_cifar.training.checkpoint import TrainingProgress
from keras_cifar.training.plan import Plan, check_names, describe_run, package_versions, prepare
from keras_cifar.training.recorder import ROLLBACK_FACTOR, DivergedError, Recorder
from keras_cifar.training.signals import Interruption

ROLLBACKS = 3  # at most, with --on_nan=rollback


def train(config: TrainConfig, run: Run) -> dict | None:
    """Trains, selects, tests and exports; goes on where an earlier call on the same run stopped.

    Returns:
        The metrics of the test split, as in `RUN/eval/test.json`; None at workers other than the
        chief, which alone reads and writes the run directory.

    Raises:
        UsageError: a wrong flag, or a run directory that holds another configuration.
        UserError: the data is not to be had, the loss was not finite, another process trains in the
            directory, or another worker was lost.
        StoppedError: SIGTERM or SIGINT came.
    """
    check_names(config)
    choice = strategy.choose(config.devices)
    interruption = Interruption()
    with contextlib.ExitStack() as stack, interruption.heard():
        with DistributedContext(
            choice, config.devices, config.shared_flags() | package_versions()
        ) as devices:
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
                        f"--data={config.data.data} has other images than {run.path} was trained on"
                    )
                if plan.dataset.skipped:
                    write_skipped(plan.dataset, run.skipped)
                print(f"run       {run.path}\n{plan.describe()}", flush=True)
            fit(plan, run, interruption)
        if not devices.is_chief:
            return None

        model = models.load(run.model)
        dataset = plan.dataset
        metrics = evaluator.evaluate(
            model, "test", dataset.test, dataset.class_names, config.data.data, run
        )
        if config.output.export and not versions(run.export):
            samples = verification.of_dataset(dataset, config.data.data)
            path = saved_model.export(model, run.export, dataset.class_names, samples=samples)
            print(verification.summary(path), flush=True)
        report(run, model, dataset)
        return metrics


def report(run: Run, model: keras.Model, dataset: data.Dataset) -> None:
    """Writes the run's report. A run is whole without it: what fails here is a line of warning."""
    try:
        found = record.load(run)
        page.write(run.report, [found], [gallery.of(found, model, dataset.split(found.split))])
    except Exception as error:
        print(f"no report: {run.report} cannot be written: {reason(error)}", file=sys.stderr)


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
        checkpoint.save(run.checkpoint, model, TrainingProgress(), step=0)
    position = _restore(plan, run)
    if devices.spec.cluster:  # alone, nobody reads the whole state for nothing
        step = position.step(plan.steps_per_epoch)
        devices.check_equal({"the step": step, "the model's state": checkpoint.digest(model)})
    devices.begin_training()
    if devices.is_chief and position != TrainingProgress():
        print(f"going on after {plan.place(position)}", flush=True)
    recorder = Recorder(plan, run, position, interruption)
    while not recorder.is_finished():
        try:
            with interruption.deferred():
                model.fit(
                    plan.batches(start_step=position.step(plan.steps_per_epoch)),
                    epochs=config.fit.epochs,
                    initial_epoch=len(position.history),
                    initial_step=position.steps,
                    initial_totals=position.totals,
                    callbacks=[recorder, *callbacks],
                    verbose=1 if sys.stdout.isatty() and devices.is_chief else 0,
                )
            return
        except DivergedError as error:
            count = recorder.rollbacks + 1
            if config.fit.on_nan == "stop" or count > ROLLBACKS:
                raise
            position = dataclasses.replace(_restore(plan, run), rollbacks=count)
            recorder = Recorder(plan, run, position, interruption)
            if devices.is_chief:
                print(
                    f"{error.what}; back to {plan.place(position)} with {ROLLBACK_FACTOR**count:g} of "
                    f"the learning rate ({count} of at most {ROLLBACKS} times)",
                    flush=True,
                )


def _restore(plan: Plan, run: Run) -> TrainingProgress:
    """Gives all workers the state of the chief's last checkpoint."""
    path, data = checkpoint.read(run.checkpoint) if plan.devices.is_chief else (None, b"")
    return checkpoint.assign(plan.model, plan.devices.broadcast(data), path or "of worker 0")


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
