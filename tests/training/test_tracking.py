"""--track: what a tracker holds of a run; runs that were interrupted; trackers that do not answer."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from keras_cifar import train
from keras_cifar.core import cli
from keras_cifar.core.config import TRACKERS, TrainConfig
from keras_cifar.core.errors import StoppedError, UsageError, UserError
from keras_cifar.core.run_directory import Run, previous_config
from keras_cifar.reporting import record
from keras_cifar.training import recorder, seeds, tracking, trainer
from tests.distributed.test_rendezvous import free_addresses
from tests.training.trackers import mlflow_run, wandb_run

METRICS = {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "images_per_second"}
NOWHERE = "http://user:secret@127.0.0.1:9"  # the port of "discard", which nobody serves


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A tracker's own places are below this test's; the current directory is an empty one."""
    for settings in tracking.ENVIRONMENT.values():
        for setting in settings.split():
            monkeypatch.setenv(*setting.split("="))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    for name in ("MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    yield
    assert os.listdir(tmp_path / "current") == []
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """The URI of MLflow's SQLite, which takes seconds to create."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def sqlite(database, monkeypatch, request) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    return database


@pytest.fixture
def quick(monkeypatch):
    """Without the pictures and the report, which take longer than the training."""
    for name in ("write_samples", "write_report"):
        monkeypatch.setattr(trainer, name, lambda *_: None)


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupts the training before its nth epoch is recorded, once."""

    def interrupt(count: int, error: BaseException) -> None:
        original, calls = recorder.Recorder.on_epoch_end, []

        def on_epoch_end(self, epoch, logs=None):
            calls.append(epoch)
            if len(calls) == count:
                raise error
            original(self, epoch, logs)

        monkeypatch.setattr(recorder.Recorder, "on_epoch_end", on_epoch_end)

    return interrupt


def config(folder, **flags) -> TrainConfig:
    defaults = {"model": "lenet5", "data": f"folder:{folder}", "epochs": 3, "batch_size": 16}
    return TrainConfig.from_flags(**defaults | flags)


def train_to(path, folder, **flags) -> Run:
    trainer.train(config(folder, **flags), Run(path))
    return Run(path)


def expected(run: Run) -> dict:
    """{metric: [(epoch, value), ...]} of the run directory."""
    rows = run.read_history()
    history = {n: [(r["epoch"], r[n]) for r in rows] for n in rows[0] if n != "epoch"}
    test = run.read_metrics("test")
    return history | {f"test_{n}": [(len(rows), test[n])] for n in tracking.TEST_METRICS}


def flags_of(run: Run) -> dict:
    return run.read_config()["flags"]


# ---- MLflow


def test_mlflow_has_flags_versions_each_epoch_once_and_the_files(
    tmp_path, image_folder, sqlite, interrupted, monkeypatch, capsys, request
):
    (other, title) = (tmp_path / "run", request.node.name)
    interrupted(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train_to(other, image_folder, track="mlflow")
    stopped, history, files = mlflow_run(sqlite, title)
    assert (stopped.info.status, files) == ("KILLED", [])
    assert [step for step, _ in history["loss"]] == [1, 2]
    states, log = [], tracking.MLflow.log

    def logged(self, step, values):
        states.append(mlflow_run(sqlite, title)[0].info.status)
        log(self, step, values)

    monkeypatch.setattr(tracking.MLflow, "log", logged)
    run = train_to(other, image_folder, track="mlflow")
    found, history, files = mlflow_run(sqlite, title)
    assert set(states) == {"RUNNING"}
    assert (found.info.run_id, found.info.status) == (stopped.info.run_id, "FINISHED")
    assert found.info.run_name == "run"
    assert found.data.params == {name: str(value) for name, value in flags_of(run).items()}
    written, tags = run.read_config(), found.data.tags
    assert tags.get("mlflow.source.git.commit") == written["git_revision"]
    assert tags["version.keras"] == written["versions"]["keras"]
    assert set(history) > METRICS
    assert history == expected(run)
    assert {"report.html", "curves.png", "export/1/saved_model.pb"} <= set(files)
    output = capsys.readouterr()
    assert output.err == ""
    assert f"tracker   mlflow: {sqlite}, experiment {title}, run {found.info.run_id}" in output.out
    assert "View run" not in output.out


def test_a_complete_run_goes_to_another_database_by_the_same_command(
    tmp_path, trained_run, image_folder, sqlite, request
):
    shutil.copytree(trained_run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    flags = flags_of(run) | {"track": "mlflow", "run_dir": str(run.path)}
    for _ in range(2):
        trainer.train(TrainConfig.from_flags(**flags), run)
        found, history, _ = mlflow_run(sqlite, request.node.name)
        assert found.info.status == "FINISHED"
        assert history == expected(run)


def test_parameters_are_cut_to_what_mlflow_stores(trained_run, sqlite, request, monkeypatch):
    monkeypatch.setattr("mlflow.utils.validation.MAX_PARAM_VAL_LENGTH", 10)
    service = tracking.MLflow(importlib.import_module("mlflow"), trained_run)
    service.connect("cut", "run", trained_run.read_config())
    found, *_ = mlflow_run(sqlite, request.node.name)
    assert found.data.params["data"] == flags_of(trained_run)["data"][:10]


def test_a_run_that_fails_is_marked_failed(
    tmp_path, image_folder, sqlite, interrupted, quick, request
):
    interrupted(2, UserError("no more"))
    with pytest.raises(UserError):
        train_to(tmp_path / "run", image_folder, track="mlflow")
    assert mlflow_run(sqlite, request.node.name)[0].info.status == "FAILED"


def test_each_of_several_seeds_is_a_run(tmp_path, trained_run, monkeypatch):
    names = {}

    def train(config, run):
        shutil.copytree(trained_run.path, run.path)
        with tracking.following(config.output.track, run) as tracker:
            tracker.on_train_begin()
        return {"accuracy": 1.0}

    def connect(self, key, name, config):
        names[name] = key
        return ""

    monkeypatch.setattr(seeds.trainer, "train", train)
    for method, stub in (("connect", connect), ("log", print), ("close", lambda *_: None)):
        monkeypatch.setattr(tracking.MLflow, method, stub)
    seeds.train(config("unread", track="mlflow", seeds=2), Run(tmp_path / "both"))
    assert list(names) == ["both/seed_0", "both/seed_1"]
    assert len(set(names.values())) == 2


# ---- Weights & Biases


def test_an_offline_run_of_wandb_has_the_same(tmp_path, image_folder, interrupted, capsys):
    place = tmp_path / "run" / "wandb"
    interrupted(3, StoppedError(signal.SIGTERM, "stopped"))
    with pytest.raises(StoppedError):
        train_to(tmp_path / "run", image_folder, track="wandb")
    (first,) = place.glob("offline-run-*")
    stopped = wandb_run(first)
    assert stopped["exit"] == 143
    assert [step for step, _ in stopped["history"]] == [1, 2]
    time.sleep(1.1)  # The name of a directory has seconds.
    run = train_to(tmp_path / "run", image_folder, track="wandb")
    (last,) = place.glob("offline-run-*")
    assert last != first
    found, history = wandb_run(last), run.read_history()
    assert (found["id"], found["exit"]) == (stopped["id"], 0)
    assert (found["name"], found["project"]) == ("run", "keras_cifar")
    written, own = run.read_config(), found["config"]
    del own["_wandb"]
    assert own == flags_of(run) | {n: written[n] for n in ("git_revision", "versions")}
    assert [step for step, _ in found["history"]] == [1, 2, 3]
    for (_, values), row in zip(found["history"], history, strict=True):
        assert row.items() - {("epoch", row["epoch"])} <= values.items()
    test = run.read_metrics("test")
    for name in tracking.TEST_METRICS:
        assert found["summary"][f"test_{name}"] == test[name]
    assert {"report.html", "curves.png", "export/1/saved_model.pb"} <= set(found["files"])
    output = capsys.readouterr()
    assert f"tracker   wandb: offline; `wandb sync {last}` sends it\n" in output.out
    assert output.err == ""


def test_without_a_server_wandb_continues_offline(
    tmp_path, image_folder, monkeypatch, quick, capsys
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE.replace("user:secret@", ""))
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    run = train_to(tmp_path / "run", image_folder, track="wandb", export=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --track=wandb: ")
    assert "training continues" in line
    (directory,) = (run.path / "wandb").glob("offline-run-*")
    found = wandb_run(directory)
    assert [step for step, _ in found["history"]] == [1, 2, 3]
    assert found["exit"] == 0


# ---- Trackers that do not answer


class Unreliable:
    """A tracker that counts what it gets, and does not answer while `fails`."""

    later = "later"

    def __init__(self, fails: bool = False):
        self.fails, self.connected, self.steps, self.ends = fails, 0, [], []

    def connect(self, key, name, config):
        self.connected += 1
        self._answer()
        return NOWHERE

    def log(self, step, values):
        self._answer()
        if step not in self.steps:
            self.steps.append(step)

    def finish(self, step, values, run):
        self._answer()
        self.ends.append(step)

    def close(self, status):
        self._answer()
        self.ends.append(status)

    def _answer(self):
        if self.fails:
            raise ConnectionError(f"no answer from {NOWHERE}\nin time")


@pytest.fixture
def unreliable(monkeypatch) -> Unreliable:
    service = Unreliable()
    monkeypatch.setitem(tracking.SERVICES, "mlflow", lambda module, run: service)
    return service


def test_what_a_tracker_lacks_is_sent_when_it_answers_again(
    tmp_path, trained_run, unreliable, capsys
):
    run = Run(shutil.copytree(trained_run.path, tmp_path / "run"))
    with tracking.following("mlflow", run) as tracker:
        unreliable.fails = True
        tracker.on_train_begin()
        tracker.on_epoch_end(0)
        assert unreliable.steps == []
        unreliable.fails = False
        tracker.on_epoch_end(1)
        assert unreliable.steps == [1, 2, 3]
        unreliable.fails = True
        tracker.on_epoch_end(2)
        unreliable.fails = False
        tracker.finish(run.read_metrics("test"))
    assert (unreliable.connected, unreliable.ends) == (4, [3, 0])
    output = capsys.readouterr()
    warning = (
        "warning: --track=mlflow: no answer from http://127.0.0.1:9; training continues: later"
    )
    assert output.err.splitlines() == [warning]
    assert output.out.splitlines() == ["tracker   mlflow: http://127.0.0.1:9"]


def test_after_three_failures_only_the_end_tries_again(tmp_path, trained_run, unreliable):
    run, unreliable.fails = Run(shutil.copytree(trained_run.path, tmp_path / "run")), True
    with tracking.following("mlflow", run) as tracker:
        for epoch in range(9):
            tracker.on_epoch_end(epoch)
        assert unreliable.connected == 3
        tracker.finish(run.read_metrics("test"))
    assert (unreliable.connected, unreliable.ends) == (4, [])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (StoppedError(signal.SIGTERM, ""), 143),
        (StoppedError(signal.SIGINT, ""), 130),
        (KeyboardInterrupt(), 130),
        (UserError("bad"), 1),
        (MemoryError(), 1),
    ],
)
def test_the_trackers_run_ends_as_the_training_does(
    tmp_path, trained_run, unreliable, error, status
):
    run = Run(shutil.copytree(trained_run.path, tmp_path / "run"))
    expected = pytest.raises(type(error)) if error else pytest.MonkeyPatch.context()
    with expected, tracking.following("mlflow", run) as tracker:
        tracker.on_train_begin()
        if error:
            raise error
    assert unreliable.ends == [status]


def test_a_server_that_is_nowhere_costs_a_line_and_no_time(
    tmp_path, image_folder, monkeypatch, quick, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    waited, attempt = [], tracking.Tracker._attempt

    def timed(self, *action):
        began = time.monotonic()
        attempt(self, *action)
        waited.append(time.monotonic() - began)

    monkeypatch.setattr(tracking.Tracker, "_attempt", timed)
    run = train_to(tmp_path / "run", image_folder, track="mlflow", export=False)
    assert len(run.read_history()) == 3
    assert len(waited) == 4  # three failures, and the end
    assert sum(waited) < 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --track=mlflow: ")
    assert "training continues" in line
    assert "secret" not in line


# ---- The flag


def test_a_missing_package_is_one_line_before_anything_is_written(
    tmp_path, image_folder, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    argv = ["--model=lenet5", f"--data=folder:{image_folder}", "--track=mlflow"]
    argv.append(f"--run_dir={tmp_path / 'run'}")
    assert cli._execute("train", train.main, TrainConfig, "", argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--track=mlflow needs pip install 'keras_cifar[mlflow]'" in line
    assert not (tmp_path / "run").exists()


def test_none_imports_no_tracker_and_writes_nothing(trained_run):
    assert not trained_run.tracking.exists()
    with tracking.following("none", trained_run) as tracker:
        assert tracker is None


def test_the_flag_makes_no_other_run(trained_run, image_folder):
    flags = flags_of(trained_run)
    assert flags["track"] == "none"
    config = TrainConfig.from_flags(**flags | {"track": "wandb"})
    assert previous_config(config, trained_run)["flags"] == flags
    del flags["track"]  # as in a run of an earlier revision
    assert config.differences(flags) == []
    assert "track" not in record.load(trained_run).flags()
    assert ("none", *tracking.SERVICES) == TRACKERS
    with pytest.raises(UsageError, match="mlflow"):
        cli.parse(TrainConfig, ["--track=tensorboard"])


def test_variables_of_the_user_stay(monkeypatch, trained_run, unreliable):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    tracking.Tracker("mlflow", trained_run)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


# ---- A real server, and processes that are killed

# Kills itself, or the process SERVER, before or after the tracker gets the metrics of an epoch.
KILLED = """
import os
from keras_cifar.core import environment; environment.import_tensorflow()
from keras_cifar import train
from keras_cifar.core import cli
from keras_cifar.core.config import TrainConfig
from keras_cifar.training import tracking
before, epoch = os.environ["WHEN"] == "before", int(os.environ["EPOCH"])
service = tracking.SERVICES[os.environ["TRACKER"]]
log, finish = service.log, service.finish
def kill(here, step):
    if here == before and step == epoch:
        os.kill(int(os.environ.get("SERVER", os.getpid())), 9)
def killed(self, step, values):
    kill(True, step)
    log(self, step, values)
    kill(False, step)
def finished(self, step, values, run):
    kill(True, 0)
    finish(self, step, values, run)
    kill(False, 0)
service.log, service.finish = killed, finished
cli.run("train", train.main, TrainConfig, "", tensorflow=False)
"""
FLAGS = ("--model=lenet5", "--data=digits", "--epochs=5", "--steps_per_epoch=3")


def killed(tracker: str, run: Run, when: str, epoch: int, **variables: str):
    """Trains in a process that is killed at this epoch, 0 being the end; see KILLED."""
    argv = [sys.executable, "-c", KILLED, *FLAGS, f"--track={tracker}", f"--run_dir={run.path}"]
    environment = {"WHEN": when, "EPOCH": str(epoch), "TRACKER": tracker} | variables
    return subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True)


INSTANTS = (("before", 2), ("after", 3), ("before", 4), ("before", 0), ("after", 0))
NEVER = ("before", -1)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Starts `mlflow server` on one SQLite; (the function that starts it again, the first process)."""
    (port,) = (address.rpartition(":")[2] for address in free_addresses(1))
    place, uri, started = tmp_path / "server", f"http://127.0.0.1:{port}", []
    place.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    def start() -> subprocess.Popen:
        argv = [sys.executable, "-m", "mlflow", "server", "--port", port, "--workers", "1"]
        argv += ["--backend-store-uri", f"sqlite:///{place}/mlflow.db"]
        argv += ["--artifacts-destination", str(place / "files")]
        with open(place / "log", "a") as log:
            process = subprocess.Popen(
                argv, cwd=place, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        deadline = time.monotonic() + 60
        while subprocess.run(["curl", "-sf", f"{uri}/health"], capture_output=True).returncode:
            assert process.poll() is None, (place / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return process

    yield start, uri
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_holds_a_run_whose_training_is_killed_at_five_instants(tmp_path, server):
    start, uri = server
    start()
    run = Run(tmp_path / "run")
    for when, epoch in INSTANTS:
        done = killed("mlflow", run, when, epoch)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert killed("mlflow", run, *NEVER).returncode == 0
    found, history, files = mlflow_run(uri)
    assert found.info.status == "FINISHED"
    assert found.data.params == {name: str(value) for name, value in flags_of(run).items()}
    assert history == expected(run)
    assert {"report.html", "curves.png", "export/1/saved_model.pb"} <= set(files)


@pytest.mark.slow
def test_training_ends_well_without_the_server_and_the_same_command_sends_the_rest(
    tmp_path, server
):
    start, uri = server
    process, run = start(), Run(tmp_path / "run")
    done = killed("mlflow", run, "before", 3, SERVER=str(-process.pid))
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: --track=mlflow: ")
    start()
    _, history, _ = mlflow_run(uri)
    assert [step for step, _ in history["loss"]] == [1, 2]
    assert killed("mlflow", run, *NEVER).returncode == 0
    found, history, _ = mlflow_run(uri)
    assert found.info.status == "FINISHED"
    assert history == expected(run)


@pytest.mark.slow
def test_offline_files_of_wandb_hold_a_run_whose_training_is_killed_at_five_instants(tmp_path):
    run = Run(tmp_path / "run")
    for when, epoch in INSTANTS:
        done = killed("wandb", run, when, epoch)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert killed("wandb", run, *NEVER).returncode == 0
    (directory,) = (run.path / "wandb").glob("offline-run-*")
    found = wandb_run(directory)
    assert [step for step, _ in found["history"]] == [1, 2, 3, 4, 5]
    for (_, values), row in zip(found["history"], run.read_history(), strict=True):
        assert values["val_loss"] == row["val_loss"]
    assert {"report.html", "curves.png", "export/1/saved_model.pb"} <= set(found["files"])
    assert found["exit"] == 0


@pytest.mark.slow
def test_the_chief_alone_logs(tmp_path, sqlite, request):
    run = Run(tmp_path / "run")
    argv = [sys.executable, "-m", "keras_cifar.launch", "--workers=2", "--", *FLAGS]
    argv += ["--track=mlflow", f"--run_dir={run.path}"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tracker   mlflow") == 1
    found, history, _ = mlflow_run(sqlite, request.node.name)
    assert found.info.status == "FINISHED"
    assert history == expected(run)
