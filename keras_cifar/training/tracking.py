"""Logs a run to MLflow or Weights & Biases: flags, metrics by epoch, the results as files.

The run directory stays the record: a tracker gets of history.csv what it lacks, whenever it answers.
"""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import keras

from keras_cifar.core.errors import needing, reason
from keras_cifar.core.files import read, write_json
from keras_cifar.core.run_directory import Run

PROJECT = "keras_cifar"  # unless MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT says another
MAX_FAILURES = 3  # in a row, after which only the end of the run tries again
PASSWORD = re.compile(r"//[^/@\s]+@")  # of a URL, with the user
MAX_TRACKING = 2**10  # bytes of tracking.json
TEST_METRICS = ("loss", "accuracy", "top5_accuracy")

# Environment variables that a user may set otherwise: short waits (seconds), no lines of their own, and
# nothing sent to the makers of the tracker.
ENVIRONMENT = {
    "mlflow": "MLFLOW_HTTP_REQUEST_TIMEOUT=10 MLFLOW_HTTP_REQUEST_MAX_RETRIES=0 "
    "MLFLOW_LOGGING_LEVEL=ERROR MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT=true "
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false MLFLOW_DISABLE_TELEMETRY=true",
    "wandb": "WANDB_INIT_TIMEOUT=10 WANDB_LOGIN_TIMEOUT=10 WANDB_FINISH_TIMEOUT=30 "
    "WANDB_FINISH_TIMEOUT_RAISES=true WANDB_SILENT=true WANDB_CONSOLE=off "
    "WANDB_DISABLE_CODE=true WANDB_ERROR_REPORTING=false",
}


class MLflow:
    """A run of MLflow, found by a tag. Methods raise any Exception if the server does not answer."""

    later = "what it lacks is sent when it answers again, at the latest by the same command"

    def __init__(self, mlflow, run: Run):
        self._mlflow = mlflow

    def connect(self, key: str, name: str, config: dict) -> str:
        """Finds or creates the run of this key and logs its parameters; where it is, as text."""
        self._client = client = self._mlflow.MlflowClient()
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(title)
        location = _beside_database(client.tracking_uri)
        experiment = found.experiment_id if found else client.create_experiment(title, location)
        runs = client.search_runs([experiment], f"tags.`{PROJECT}.id` = '{key}'", max_results=1)
        run = runs[0] if runs else client.create_run(experiment, None, {f"{PROJECT}.id": key}, name)
        self._id = run.info.run_id
        client.update_run(self._id, "RUNNING")
        history = functools.partial(client.get_metric_history, self._id)
        self._steps = functools.cache(lambda name: {metric.step for metric in history(name)})
        limit = self._mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
        entities, versions = self._mlflow.entities, config.get("versions", {}).items()
        flags = [entities.Param(k, str(v)[:limit]) for k, v in config["flags"].items()]
        known = {f"version.{package}": number for package, number in versions}
        known["mlflow.source.git.commit"] = config.get("git_revision")
        tags = [entities.RunTag(name, value) for name, value in known.items() if value]
        client.log_batch(self._id, params=flags, tags=tags)
        return f"{client.tracking_uri}, experiment {title}, run {self._id}"

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs those metrics of a step that the run lacks."""
        lacking = [name for name in values if step not in self._steps(name)]
        if lacking:
            now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
            metrics = [metric(name, values[name], now, step) for name in lacking]
            self._client.log_batch(self._id, metrics=metrics)
        for name in lacking:
            self._steps(name).add(step)

    def finish(self, step: int, values: dict[str, float], run: Run) -> None:
        """Logs the test metrics and the files."""
        self.log(step, values)
        for path in filter(os.path.exists, (run.report, run.curves)):
            self._client.log_artifact(self._id, str(path))
        if run.export.exists():
            self._client.log_artifacts(self._id, str(run.export), run.export.name)

    def close(self, status: int) -> None:
        """Ends the run with an exit status."""
        name = "KILLED" if status > 128 else "FAILED" if status else "FINISHED"
        self._client.set_terminated(self._id, name)


def _beside_database(uri: str) -> str | None:
    """Where the files of runs are stored: with a SQLite beside it, not in the current directory."""
    database = pathlib.Path(uri.removeprefix("sqlite:///")).resolve()
    return str(database.parent / "mlruns") if uri.startswith("sqlite:///") else None


class WandB:
    """A run of Weights & Biases, whose id is the key; offline where the server does not answer.

    A file of an offline run has all epochs, from the first. So it does not matter which of them a
    killed process had written or the user has synchronized, and files of earlier processes are
    removed at the end.
    """

    def __init__(self, wandb, run: Run):
        self._wandb, self._directory = wandb, os.environ.get("WANDB_DIR") or run.path
        self._tried = False
        self.later = f"the run is kept below {self._directory}; `wandb sync` sends it"

    def connect(self, key: str, name: str, config: dict) -> str:
        """Starts or continues the run; where it is, as text."""
        if self._tried:
            self._wandb.teardown()  # After a failure the id is in use.
        mode = "offline" if self._tried else self._wandb.setup().settings.mode
        self._tried = True
        kept = {name: config.get(name) for name in ("versions", "git_revision")}
        where = {"dir": self._directory, "project": os.environ.get("WANDB_PROJECT", PROJECT)}
        where |= {"mode": mode, "resume": "allow" if mode == "online" else None}
        self._run = self._wandb.init(id=key, name=name, config=config["flags"] | kept, **where)
        self._next = self._run.starting_step
        if self._run.offline:
            return f"offline; `wandb sync {self._run.settings.sync_dir}` sends it"
        return self._run.url or mode

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs the metrics of a step if the run lacks it."""
        if step >= self._next:
            self._run.log(values, step=step, commit=True)
            self._next = step + 1

    def finish(self, step: int, values: dict[str, float], run: Run) -> None:
        """Logs the test metrics and the files."""
        self._run.summary.update(values)
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="run")
        # Without copies: `wandb sync` reads the files, perhaps from another current directory.
        for path in filter(os.path.exists, (run.report, run.curves)):
            artifact.add_file(str(path.resolve()), policy="immutable")
        if run.export.exists():
            export, name = str(run.export.resolve()), run.export.name
            artifact.add_dir(export, name=name, policy="immutable")
        self._run.log_artifact(artifact)

    def close(self, status: int) -> None:
        """Ends the run with an exit status."""
        self._run.finish(exit_code=status)
        own = pathlib.Path(self._run.settings.sync_dir)
        others = set(own.parent.glob(f"offline-run-*-{self._run.id}")) - {own}
        for other in others if status == 0 else ():
            shutil.rmtree(other, ignore_errors=True)


SERVICES = {"mlflow": MLflow, "wandb": WandB}


class Tracker(keras.callbacks.Callback):
    """Sends a tracker what it lacks, after each epoch; the first of its failures is a warning."""

    def __init__(self, name: str, run: Run):
        super().__init__()
        for setting in ENVIRONMENT[name].split():
            os.environ.setdefault(*setting.split("="))
        with needing(name, f"--track={name}"):
            module = importlib.import_module(name)
        self._name, self._run, self._service = name, run, SERVICES[name](module, run)
        self._connected, self._place, self._failures, self._warned = False, "", 0, False

    def on_train_begin(self, logs=None):
        self._attempt()

    def on_epoch_end(self, epoch, logs=None):
        if self._failures < MAX_FAILURES:
            self._attempt()

    def finish(self, metrics: dict) -> None:
        """Sends the metrics of the test split and the files of the run."""
        epochs = len(self._run.read_history())
        values = {f"test_{name}": metrics[name] for name in TEST_METRICS}
        self._attempt(lambda: self._service.finish(epochs, values, self._run))

    def close(self, status: int) -> None:
        """Ends the tracker's run, if it can be reached, with an exit status."""
        if self._connected:
            self._attempt(lambda: self._service.close(status))

    def _attempt(self, action: Callable = lambda: None) -> None:
        place = self._place
        try:
            if not self._connected:
                self._connect()
            for row in self._run.read_history():
                self._service.log(int(row.pop("epoch")), row)
            action()
            self._failures = 0
        except Exception as error:  # Trackers raise almost anything.
            self._connected, self._failures = False, self._failures + 1
            if not self._warned:
                why = f"{reason(error)}; training continues: {self._service.later}"
                text = f"warning: --track={self._name}: {PASSWORD.sub('//', why)}"
                print(text, file=sys.stderr, flush=True)
            self._warned = True
        if self._place != place:
            print(f"tracker   {self._name}: {PASSWORD.sub('//', self._place)}", flush=True)

    def _connect(self) -> None:
        run = self._run
        if not run.tracking.exists():
            write_json(run.tracking, {"id": uuid.uuid4().hex})
        key = json.loads(read(run.tracking, MAX_TRACKING))["id"]
        # One of several runs is named by their directory, too.
        several = run.restart != Run(run.path).restart
        name = "/".join(run.path.resolve().parts[-2 if several else -1 :])
        self._place = self._service.connect(key, name, run.read_config())
        self._connected = True


@contextlib.contextmanager
def following(name: str, run: Run) -> Iterator[Tracker | None]:
    """A tracker of --track=name for the body, whose end is that of the tracker's run; None for none.

    Raises:
        UserError: its package is not installed.
    """
    if name == "none":
        yield None
        return
    tracker, status = Tracker(name, run), 0
    try:
        yield tracker
    except BaseException as error:
        stopped = 130 if isinstance(error, KeyboardInterrupt) else 1
        status = getattr(error, "status", stopped)
        raise
    finally:
        tracker.close(status)
