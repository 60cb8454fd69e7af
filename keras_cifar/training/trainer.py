"""Training: plan -> fit -> run directory -> test -> export."""

import contextlib
import csv
import dataclasses
import gc
import pathlib
import sys
from collections.abc import Iterator

import keras

from keras_cifar import data, models
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import replacing, write_json
from keras_cifar.core.run_directory import Run, previous_config, with_its_rule
from keras_cifar.core.signals import STOP
from keras_cifar.distributed import strategy
from keras_cifar.distributed.strategy import DistributedContext
from keras_cifar.evaluation import evaluator, plots
from keras_cifar.exporters import saved_model, verification
from keras_cifar.reporting import gallery, page, record
from keras_cifar.training import checkpoint, tracking
from keras_cifar.training.checkpoint import TrainingProgress
from keras_cifar.training.plan import Plan, check_names, describe_run, package_versions, prepare
from keras_cifar.training.recorder import ROLLBACK_FACTOR, DivergedError, Recorder

MAX_ROLLBACKS = 3  # with --on_nan=rollback


def train(config: TrainConfig, run: Run) -> dict | None:
    """Trains, selects, tests and exports; resumes if the run directory has a checkpoint.

    Returns:
        The metrics of the test split, as in `RUN/eval/test.json`; None at workers other than the
        chief, which alone reads and writes the run directory.

    Raises:
        UsageError: a wrong flag, or a run directory with another configuration.
        UserError: invalid data, a loss that is not finite, a directory in use, a lost worker.
        StoppedError: SIGTERM or SIGINT arrived.
    """
    with trained(config, run) as (plan, tracker):
        metrics = _finish(plan, run) if plan.context.is_chief else None
        if tracker:
            tracker.finish(metrics)
        return metrics


@contextlib.contextmanager
def trained(
    config: TrainConfig, run: Run, callbacks: tuple[keras.callbacks.Callback, ...] = ()
) -> Iterator[tuple[Plan, tracking.Tracker | None]]:
    """Trains and selects as `train`, without test and export; in the body the run is still locked.

    `callbacks` come after the one that writes the run directory. Yields the plan and the tracker.
    """
    check_names(config)
    spec = strategy.choose(config.devices)
    # As they were given: other workers may not see the run.
    facts = config.shared_flags() | package_versions()
    config, tracker = with_its_rule(config, run), None
    with contextlib.ExitStack() as stack, STOP.handled():
        with DistributedContext(spec, config.devices, facts) as context:
            previous = None
            if context.is_chief:
                previous = previous_config(config, run)  # before anything is written
                stack.enter_context(run.locked())
                tracker = stack.enter_context(tracking.following(config.output.track, run))
            is_new = context.is_chief and not checkpoint.exists(run.checkpoint)
            began_with = previous.get("dtype_policy", "float32") if previous else None
            plan = prepare(config, context, is_new, began_with)
            if context.is_chief:
                _write_config(plan, run)
                print(f"run       {run.path}\n{plan.summary()}", flush=True)
                if not run.samples.exists():
                    write_samples(plan, run)
            fit(plan, run, (*callbacks, *([tracker] if tracker else [])))
            _write_skipped(plan, run)  # also what was found in training
        yield plan, tracker


def free_memory() -> None:
    """Frees the memory of the models that were trained in this process."""
    keras.utils.clear_session()
    gc.collect()  # A model and its functions refer to each other: only a collection frees them.


def _write_config(plan: Plan, run: Run) -> None:
    """Writes config.json and skipped.csv of a new run; checks that another has the same images."""
    previous = previous_config(plan.config, run)
    if previous is None:
        write_json(run.config, describe_run(plan))
    elif previous["splits"] != plan.dataset.describe():
        spec = plan.config.data.data
        raise UserError(f"--data={spec} has other images than {run.path} was trained on")
    _write_skipped(plan, run)


def _finish(plan: Plan, run: Run) -> dict:
    """Tests, exports and reports the selected model; the test metrics."""
    config, dataset, model = plan.config, plan.dataset, models.load(run.model)
    names, spec = dataset.class_names, config.data.data
    metrics = evaluator.evaluate(model, "test", dataset.test, names, spec, run)
    if config.output.export and not verification.is_exported(run.model, run.export):
        samples, record = verification.of_dataset(dataset, spec), verification.origin(run.model)
        path = saved_model.export(
            model, run.export, names, None, samples, config.data.rule, **record
        )
        print(verification.summary(path), flush=True)
    write_report(run, model, dataset)
    return metrics


def write_samples(plan: Plan, run: Run) -> None:
    """Writes samples.png, a picture of the first training batch as the network sees it."""
    with optional(run.samples):
        images, labels = plan.first_examples(plots.MAX_SAMPLES)
        plots.save(plots.samples(images, labels, plan.dataset.class_names), run.samples)
        print(f"samples   {run.samples}: the first batch as the network sees it", flush=True)


def write_report(run: Run, model: keras.Model, dataset: data.Dataset) -> None:
    """Writes the report of a run."""
    with optional(run.report):
        found = record.load(run)
        examples = gallery.from_model(found, model, dataset.split(found.split))
        page.write(run.report, [found], [examples])


@contextlib.contextmanager
def optional(path: pathlib.Path) -> Iterator[None]:
    """Prints a failure to write a file, without which the run is complete, as a warning."""
    try:
        yield
    except Exception as error:
        print(f"warning: {path} cannot be written: {reason(error)}", file=sys.stderr, flush=True)


def fit(plan: Plan, run: Run, callbacks: tuple[keras.callbacks.Callback, ...] = ()) -> None:
    """Trains from the last checkpoint to the end and writes the selected model to `RUN/model.keras`.

    Raises:
        StoppedError: a signal arrived; a checkpoint has the progress.
        UserError: the loss was not finite, or no checkpoint is intact.
    """
    config, context = plan.config, plan.context
    progress = _start(plan, run)
    if context.is_chief and progress != TrainingProgress():
        print(f"resuming from {plan.place(progress)}", flush=True)
    recorder = Recorder(plan, run, progress)
    while not recorder.is_finished():
        try:
            with STOP.deferred(), plan.reading():
                plan.model.fit(
                    plan.batches(start_step=progress.step(plan.steps_per_epoch)),
                    epochs=config.fit.epochs,
                    initial_epoch=len(progress.history),
                    initial_step=progress.steps,
                    initial_totals=progress.totals,
                    callbacks=[recorder, *callbacks],
                    verbose=1 if sys.stdout.isatty() and context.is_chief else 0,
                )
            return
        except DivergedError as error:
            count = recorder.rollbacks + 1
            if config.fit.on_nan == "stop" or count > MAX_ROLLBACKS:
                raise
            progress = dataclasses.replace(_restore(plan, run), rollbacks=count)
            recorder = Recorder(plan, run, progress)
            if context.is_chief:
                text = f"rolled back to {plan.place(progress)} with {ROLLBACK_FACTOR**count:g} of"
                text += f" the learning rate ({count} of at most {MAX_ROLLBACKS} rollbacks)"
                print(f"{error.what}; {text}", flush=True)


def _start(plan: Plan, run: Run) -> TrainingProgress:
    """Writes the first checkpoint if there is none, and gives all workers the state of the last."""
    context = plan.context
    if context.is_chief and not checkpoint.exists(run.checkpoint):
        if run.history.exists():
            raise UserError(
                f"{run.path} has a history but no checkpoint in {run.checkpoint}; choose another "
                f"--run_dir, and start from these weights with --init_from={run.model}"
            )
        # At once, so that an unwritable directory shows before hours of training.
        checkpoint.save(run.checkpoint, plan.model, TrainingProgress(), step=0)
    progress = _restore(plan, run)
    if context.spec.cluster:  # The digest reads the whole state.
        step = progress.step(plan.steps_per_epoch)
        context.check_equal({"the step": step, "the model's state": checkpoint.digest(plan.model)})
    context.begin_training()
    return progress


def _restore(plan: Plan, run: Run) -> TrainingProgress:
    """Gives all workers the state of the chief's last checkpoint."""
    path, contents = checkpoint.read(run.checkpoint) if plan.context.is_chief else (None, b"")
    return checkpoint.assign(plan.model, plan.context.broadcast(contents), path or "of worker 0")


def _write_skipped(plan: Plan, run: Run) -> None:
    """Writes skipped.csv if images were left out: a row for each."""
    left_out = plan.dataset.left_out()
    if not left_out or not plan.context.is_chief:
        return
    with (
        replacing(run.skipped) as temporary,
        # File names are bytes, which need not be UTF-8.
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "file", "reason"])
        writer.writerows((s.split, s.file, s.reason) for s in left_out)
