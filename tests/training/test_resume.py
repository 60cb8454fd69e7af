"""Stopping, resuming, rolling back, starting from other weights; one writer; full disks."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_cifar import models
from keras_cifar.core import files
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import StoppedError, UsageError, UserError
from keras_cifar.core.files import versions
from keras_cifar.core.run_directory import Run
from keras_cifar.core.signals import STOP
from keras_cifar.models.training_step import TrainingStep
from keras_cifar.pretrained import weights
from keras_cifar.training import checkpoint, recorder, trainer, transfer
from keras_cifar.training.plan import prepare
from tests.conftest import write_folder
from tests.data.test_crops import write_photos
from tests.training.kills import digest, saved_state, trained

# 96 images less a tenth: 5 steps an epoch.
FLAGS = {
    "model": "lenet5",
    "epochs": 3,
    "batch_size": 16,
    "augment": "crop(2)|flip|mixup(0.3)",
    "ema": 0.9,
    "lr_schedule": "cosine",
    "precise_bn_batches": 2,
    "export": False,
}


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch):
    """Plots take as long to draw as an epoch takes to train."""
    monkeypatch.setattr(trainer, "write_samples", lambda plan, run: None)
    monkeypatch.setattr(recorder.plots, "curves", lambda histories: None)
    monkeypatch.setattr(recorder.plots, "save", lambda figure, path: path.write_bytes(b""))


def config(folder, **flags) -> TrainConfig:
    return TrainConfig.from_flags(data=f"folder:{folder}", **FLAGS | flags)


def train_to(path, folder, **flags) -> Run:
    trainer.train(config(folder, **flags), Run(path))
    return Run(path)


def fit_to(path, folder, **flags) -> Run:
    """Trains, without the test, the export and the report of `train_to`."""
    run = Run(path)
    plan = prepare(config(folder, **flags), is_new=not checkpoint.exists(run.checkpoint))
    with STOP.handled():
        trainer.fit(plan, run)
    return run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, image_folder) -> Run:
    """A run that nothing happened to."""
    return fit_to(tmp_path_factory.mktemp("whole") / "run", image_folder)


@pytest.fixture(scope="module")
def whole(whole_run) -> dict:
    """The results of `whole_run`."""
    return trained(whole_run)


@pytest.fixture
def copied_run(whole_run, tmp_path) -> Run:
    """A copy of `whole_run`."""
    return Run(shutil.copytree(whole_run.path, tmp_path / "run"))


@contextlib.contextmanager
def signalled(monkeypatch, method: str, count: int, number: int = signal.SIGTERM):
    """Sends this process a signal in the nth call of a method of the Recorder.

    The value is a list that grows by one with each call.
    """
    original, calls = getattr(recorder.Recorder, method), []

    def send(self, *arguments, **kwargs):
        calls.append(0)
        if len(calls) == count:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # Python hears it
        return original(self, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, method, send)
        yield calls


# ---- Signals


@pytest.mark.parametrize(
    ("method", "count", "number", "place"),
    [
        ("on_train_batch_end", 8, signal.SIGINT, "step 3 of 5 in epoch 2 of 3"),
        ("on_train_batch_end", 10, signal.SIGTERM, "step 5 of 5 in epoch 2 of 3"),
        ("on_test_batch_end", 1, signal.SIGTERM, "step 5 of 5 in epoch 1 of 3"),
        ("_write_history", 3, signal.SIGTERM, "step 1 of 5 in epoch 3 of 3"),
    ],
)
def test_signal_saves_after_the_step_and_the_run_resumes_to_the_same_end(
    tmp_path, image_folder, monkeypatch, capsys, whole, method, count, number, place
):
    path = tmp_path / "run"
    with signalled(monkeypatch, method, count, number), pytest.raises(StoppedError) as caught:
        fit_to(path, image_folder)
    assert caught.value.status == 128 + number
    assert str(caught.value) == (
        f"stopped by {number.name}; {place} is saved in {path / 'checkpoint'}; the same command with "
        f"--run_dir={path} resumes"
    )
    run = fit_to(path, image_folder)
    assert f"resuming from {place}\n" in capsys.readouterr().out
    assert trained(run) == whole


def test_crops_of_files_resume_to_the_same_end(tmp_path, monkeypatch):
    folder = write_photos(tmp_path / "photos")
    flags = {"image_size": "16", "batch_size": 8, "augment": "resized_crop|flip"}
    whole = fit_to(tmp_path / "whole", folder, **flags)
    with signalled(monkeypatch, "on_train_batch_end", 5), pytest.raises(StoppedError):
        fit_to(tmp_path / "run", folder, **flags)
    assert trained(fit_to(tmp_path / "run", folder, **flags)) == trained(whole)
    other = fit_to(tmp_path / "other", folder, **flags | {"augment": "resized_crop(0.5)|flip"})
    assert trained(other)["model.keras"] != trained(whole)["model.keras"]


@pytest.mark.slow
def test_crops_of_files_train_replicas_and_workers_as_one_device(tmp_path):
    folder = write_photos(tmp_path / "photos")
    flags = [f"--data=folder:{folder}", "--image_size=32", "--model=resnet20", "--batch_size=8"]
    flags += [
        "--epochs=2",
        "--norm_batch=whole",
        "--optimizer=sgd",
        "--learning_rate=0.01",
        "--noexport",
    ]
    flags += ["--augment=resized_crop|flip|mixup(0.2)", "--dtype_policy=float64"]
    train, launch = ([sys.executable, "-m", f"keras_cifar.{name}"] for name in ("train", "launch"))
    found = []
    for number, command in enumerate(
        ([*train], [*train, "--replicas=2"], [*launch, "--workers=2", "--"])
    ):
        run = tmp_path / str(number)
        subprocess.run([*command, *flags, f"--run_dir={run}"], check=True, capture_output=True)
        found.append(models.load(run / "model.keras").get_weights())
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("skip", [False, True])
def test_a_damaged_file_stops_the_run_in_one_line_or_is_skipped_and_listed(tmp_path, capsys, skip):
    folder, run = write_photos(tmp_path / "photos"), Run(tmp_path / "run")
    flags = {"image_size": "16", "batch_size": 8, "augment": "resized_crop", "val_fraction": 0.0}
    flags |= {"on_bad_image": "skip" if skip else "error", "max_bad_share": 0.5, "epochs": 4}
    bad = folder / "train" / "a" / "02.jpg"
    os.truncate(bad, 300)
    if skip:
        trainer.train(config(folder, **flags), run)
        assert run.skipped.read_text().splitlines()[1].startswith(f"train,{bad},")
        assert f"skipped   {bad}: " in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match=f"^{bad} cannot be read: .*--on_bad_image=skip$"):
            trainer.train(config(folder, **flags), run)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [(1, 2), (2, 1)])
@pytest.mark.parametrize("own", [[], ["--freeze=stage1_block0_add", "--unfreeze_epoch=1"]])
def test_a_run_in_groups_resumes_on_other_devices_to_the_same_end(
    tmp_path, image_folder, replicas, own
):
    """The replicas' 8 images are two groups of 4. A process can have one MirroredStrategy only."""
    flags = [
        "--model=resnet20",
        "--image_size=8",
        "--batch_size=16",
        "--epochs=2",
        "--norm_batch=4",
    ]
    flags += ["--optimizer=sgd", "--learning_rate=0.01", "--dtype_policy=float64", "--noexport"]
    command = [
        sys.executable,
        "-u",
        "-m",
        "keras_cifar.train",
        f"--data=folder:{image_folder}",
        *flags,
        *own,
    ]

    def start(name: str, count: int) -> subprocess.Popen:
        where = [f"--run_dir={tmp_path / name}", f"--replicas={count}"]
        return subprocess.Popen([*command, *where], stdout=subprocess.PIPE, text=True)

    with start("whole", 1) as whole:
        whole.communicate()
    with start("run", replicas[0]) as stopped:
        while not stopped.stdout.readline().startswith("epoch 1/2"):
            assert stopped.poll() is None
        stopped.terminate()
    with start("run", replicas[1]) as resumed:
        assert "resuming from" in resumed.communicate()[0]
    assert (whole.returncode, stopped.returncode, resumed.returncode) == (0, 143, 0)
    found, expected = (
        models.load(tmp_path / x / "model.keras").get_weights() for x in ("run", "whole")
    )
    for value, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-8)


def test_signal_before_training_ends_at_once(tmp_path, image_folder, monkeypatch):
    def build(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(models, "build", build)
    with pytest.raises(StoppedError, match="stopped by SIGTERM; saved files are intact"):
        train_to(tmp_path / "run", image_folder)
    assert not (tmp_path / "run").exists()


def test_command_exits_with_the_signals_status_and_one_line(tmp_path, image_folder):
    command = [
        *(sys.executable, "-m", "keras_cifar.train", "--model=lenet5", "--epochs=5000"),
        *(f"--data=folder:{image_folder}", "--batch_size=16", f"--run_dir={tmp_path / 'run'}"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not process.stdout.readline().startswith("epoch 2/"):
            assert process.poll() is None
        process.terminate()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error.startswith("train: error: stopped by SIGTERM; ")
    assert error.count("\n") == 1
    assert len(saved_state(tmp_path / "run" / "checkpoint")[1]["history"]) >= 2


# ---- When checkpoints are written


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"epochs": 2, "checkpoint_every": 3, "steps_per_execution": 2}, [0, 4, 5, 7, 9, 10]),
        ({"epochs": 1, "checkpoint_seconds": 1e-9}, [0, 1, 2, 3, 4, 5, 5]),
    ],
)
def test_checkpoints_are_written_when_they_are_due(
    tmp_path, image_folder, monkeypatch, flags, steps
):
    found, original = [], checkpoint.save

    def save(directory, model, progress, step):
        found.append(step)
        return original(directory, model, progress, step)

    monkeypatch.setattr(checkpoint, "save", save)
    fit_to(tmp_path / "run", image_folder, **flags)
    assert found == steps


def test_the_run_resumes_from_the_checkpoint_before_a_damaged_one(
    tmp_path, image_folder, monkeypatch, capsys, whole
):
    path = tmp_path / "run"
    with signalled(monkeypatch, "on_train_batch_end", 8), pytest.raises(StoppedError):
        fit_to(path, image_folder)
    newest = checkpoint._files(path / "checkpoint")[0]
    newest.write_bytes(b"")
    run = fit_to(path, image_folder)
    said = capsys.readouterr().out
    assert f"checkpoint {newest.name} is damaged" in said
    assert "resuming from epoch 1 of 3\n" in said
    assert trained(run) == whole


def test_a_history_without_checkpoints_is_not_overwritten(copied_run, image_folder):
    run = copied_run
    before = run.model.read_bytes()
    for path in run.checkpoint.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="has a history but no checkpoint"):
        fit_to(run.path, image_folder)
    assert run.model.read_bytes() == before


def test_files_derived_from_the_history_are_rewritten_on_resuming(copied_run, image_folder, whole):
    run = copied_run
    run.history.write_text("epoch\n1\n")
    for path in run.tensorboard.rglob("events.*"):
        path.unlink()
    run.curves.unlink()
    fit_to(run.path, image_folder)
    assert trained(run) == whole
    assert run.curves.exists()


# ---- One writer


def test_a_second_process_is_refused_while_the_first_lives(tmp_path, image_folder):
    run = Run(tmp_path / "run")
    program = (
        "import sys; from keras_cifar.core.run_directory import Run\n"
        "with Run(sys.argv[1]).locked(): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as caught:
            train_to(run.path, image_folder)
        assert f"{run.path} is in use: process {first.pid} on " in str(caught.value)
        assert not run.config.exists()
        first.kill()
    # What it left does not matter.
    left = [folder / f"{files.TEMPORARY}x" for folder in (run.path, run.path / "onnx")]
    for path in left:
        path.mkdir(parents=True)
    with run.locked():
        assert not any(path.exists() for path in left)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, image_folder):
    (tmp_path / "file").write_text("")
    with pytest.raises((UsageError, OSError)) as caught:
        train_to(tmp_path / "file" / "run", image_folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is not a run directory"):
        train_to(tmp_path / "file", image_folder)


def test_the_time_left_is_estimated_by_the_epochs_of_this_process(
    tmp_path, image_folder, monkeypatch, capsys
):
    monkeypatch.setattr(recorder, "duration", lambda seconds: f"{seconds:.4f} s")
    with signalled(monkeypatch, "on_train_batch_end", 8), pytest.raises(StoppedError):
        fit_to(tmp_path / "run", image_folder, epochs=4)
    run = fit_to(tmp_path / "run", image_folder, epochs=4)
    ends = re.findall(r"^epoch \d.* images/s  \d+ s(.*)$", capsys.readouterr().out, re.M)
    first, second, third, _ = (row["seconds"] for row in run.read_history())
    left = (3 * first, 2 * second, (second + third) / 2)
    assert ends == [*(f", {seconds:.4f} s left" for seconds in left), ""]


# ---- Full disks


@contextlib.contextmanager
def full_while(monkeypatch, full_disk, owner, name: str):
    """The disk is full in each call of a function."""
    original = getattr(owner, name)

    def on_full_disk(*arguments, **kwargs):
        with full_disk(200):
            return original(*arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, on_full_disk)
        yield


def test_full_disk_between_epochs_is_a_warning_and_training_continues(
    tmp_path, image_folder, monkeypatch, full_disk, capsys, whole
):
    with full_while(monkeypatch, full_disk, recorder.Recorder, "on_train_batch_end"):
        run = fit_to(tmp_path / "run", image_folder, checkpoint_every=2)
    error = capsys.readouterr().err.splitlines()
    assert error[0].startswith("warning: no checkpoint at step 2 (File too large: ")
    assert len(error) == 7  # steps 2, 4, ... 14
    assert trained(run) == whole


@pytest.mark.parametrize(
    ("train", "owner", "name"),
    [
        (fit_to, checkpoint, "save"),
        (fit_to, recorder.Recorder, "_validate"),
        (train_to, trainer.saved_model, "export"),
        pytest.param(fit_to, recorder.Scalars, "add", marks=pytest.mark.slow),
        pytest.param(fit_to, recorder, "write_history", marks=pytest.mark.slow),
        pytest.param(train_to, trainer.evaluator, "evaluate", marks=pytest.mark.slow),
    ],
)
def test_full_disk_stops_the_run_and_saved_files_still_load(
    tmp_path, image_folder, monkeypatch, full_disk, whole, train, owner, name
):
    path = tmp_path / "run"
    with signalled(monkeypatch, "on_train_batch_end", 7), pytest.raises(StoppedError):
        train(path, image_folder, export=True)
    before = saved_state(path / "checkpoint")[1]
    full = full_while(monkeypatch, full_disk, owner, name)
    with full, pytest.raises((OSError, UserError)) as caught:
        train(path, image_folder, export=True)
    message = str(caught.value)
    assert str(path) in message
    assert re.search("File too large|written: Could not flush|written: .*/export/", message)
    after = saved_state(path / "checkpoint")[1]
    assert after == before or len(after["history"]) > len(before["history"])
    assert models.load(path / "model.keras")
    run = train(path, image_folder, export=True)
    assert trained(run) == whole
    assert versions(run.export) == [1] * (train is train_to)


def test_a_small_disk_that_fills_up_and_is_made_read_only(tmp_path, image_folder, whole):
    """A checkpoint takes 245 kB, and three are there while one is written."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(mount)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting needs rights")
    try:
        with pytest.raises(OSError, match="No space left on device") as caught:
            train_to(mount / "run", image_folder, checkpoint_every=2)
        assert str(mount) in str(caught.value.filename)
        assert saved_state(mount / "run" / "checkpoint")[1]["steps"] >= 0
        subprocess.run(["mount", "-o", "remount,size=30m", str(mount)], check=True)
        assert trained(train_to(mount / "run", image_folder)) == whole
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        for name in ("run", "new"):
            with pytest.raises(OSError, match="Read-only file system") as caught:
                train_to(mount / name, image_folder)
            assert str(mount / name) in str(caught.value)
        assert trained(Run(mount / "run")) == whole
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# ---- Losses that are not finite


ROLLBACK = {"on_nan": "rollback", "lr_schedule": "constant"}


def poisoned(monkeypatch, times: int):
    """Makes weights not finite after the second step of the second epoch, so many times."""
    original, done = recorder.Recorder.on_train_batch_end, []

    def poison(self, batch, logs=None):
        original(self, batch, logs)
        if self.epochs_done == 1 and batch == 1 and len(done) < times:
            done.append(float(self.model.optimizer.learning_rate))
            self.model.get_layer("logits").bias.assign(np.full(3, np.nan))

    monkeypatch.setattr(recorder.Recorder, "on_train_batch_end", poison)
    return done


@pytest.mark.parametrize("flags", [{}, pytest.param({"replicas": 2}, marks=pytest.mark.slow)])
def test_rollback_resumes_from_the_last_checkpoint_with_half_the_rate(
    tmp_path, image_folder, monkeypatch, capsys, flags
):
    rates = poisoned(monkeypatch, 2)
    run = fit_to(tmp_path / "run", image_folder, **flags | ROLLBACK)
    assert rates == pytest.approx([1e-3, 5e-4])
    said = capsys.readouterr().out
    assert "the loss became nan at step 8 (epoch 2, learning rate 0.001, " in said
    assert "; rolled back to epoch 1 of 3 with 0.5 of the learning rate (1 of at most 3" in said
    assert "with 0.25 of the learning rate (2 of at most 3 rollbacks)" in said
    _, position = saved_state(run.checkpoint)
    assert [row["epoch"] for row in position["history"]] == [1, 2, 3]
    rates = [row["learning_rate"] for row in position["history"]]
    assert rates == pytest.approx([1e-3, 2.5e-4, 2.5e-4])
    assert position["rollbacks"] == 2
    assert all(np.isfinite(w).all() for w in models.load(run.model).get_weights())


def test_rollback_survives_an_interruption(tmp_path, image_folder, monkeypatch):
    poisoned(monkeypatch, 1)
    with signalled(monkeypatch, "_validate", 3), pytest.raises(StoppedError):
        fit_to(tmp_path / "run", image_folder, **ROLLBACK)
    run = fit_to(tmp_path / "run", image_folder, **ROLLBACK)
    rates = [row["learning_rate"] for row in saved_state(run.checkpoint)[1]["history"]]
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4])


def test_rollback_ends_after_three_times(tmp_path, image_folder, monkeypatch):
    rates = poisoned(monkeypatch, 9)
    with pytest.raises(UserError, match="the loss became nan"):
        fit_to(tmp_path / "run", image_folder, **ROLLBACK)
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_gradient_that_is_not_finite_is_noticed_before_it_is_saved(
    tmp_path, image_folder, monkeypatch
):
    original = TrainingStep.gradients

    def broken(self, *arguments, **kwargs):
        gradients, metrics = original(self, *arguments, **kwargs)
        return [gradients[0] * np.inf, *gradients[1:]], metrics

    monkeypatch.setattr(TrainingStep, "gradients", broken)
    with pytest.raises(UserError, match=r"the gradient became (nan|inf) at step 1 "):
        fit_to(tmp_path / "run", image_folder, checkpoint_every=1)
    assert saved_state(tmp_path / "run" / "checkpoint")[1]["steps"] == 0


# ---- Starting from other weights


def layer_weights(model, name) -> bytes:
    return digest(model.get_layer(name).get_weights())


def begun(folder, **flags):
    """The model that a run starts with, and its plan."""
    plan = prepare(config(folder, **{"ema": 0.0} | flags))
    return plan.model, plan


@pytest.mark.parametrize("form", ["run", "file"])
def test_init_from_takes_all_weights_of_the_same_classes(image_folder, trained_run, form):
    source = trained_run.path if form == "run" else trained_run.model
    model, plan = begun(image_folder, init_from=str(source), ema=0.9)
    old = models.load(trained_run.model)
    assert digest(model.get_weights()) == digest(old.get_weights())
    assert digest(x.numpy() for x in model.averages) == digest(old.get_weights())
    assert f"weights   the weights of {trained_run.model}" in plan.summary()
    assert "new" not in plan.origin


@pytest.mark.parametrize("classes", [4, 3])
def test_init_from_has_a_new_head_for_other_classes(tmp_path, trained_run, classes):
    folder = tmp_path / "other"
    write_folder(folder, {"train": 60, "test": 12}, classes=classes)
    if classes == 3:  # as many, but others
        for split in ("train", "test"):
            (folder / split / "class_0").rename(folder / split / "zebra")
    model, plan = begun(folder, init_from=str(trained_run.path))
    old = models.load(trained_run.model)
    names = [layer.name for layer in old.layers if layer.weights and layer.name != "logits"]
    assert all(layer_weights(model, name) == layer_weights(old, name) for name in names)
    assert layer_weights(model, "logits") != layer_weights(old, "logits")
    assert plan.origin.endswith("; new layers: logits")


def test_init_from_another_network_is_refused(tmp_path, image_folder, trained_run):
    source, text = str(trained_run.path), "is another network: only one of it and nin has the layer"
    with pytest.raises(UserError, match=text):
        begun(image_folder, model="nin", init_from=source)
    with pytest.raises(UserError, match=r"does not fit: layer .* use the same --model and"):
        begun(image_folder, image_size=24, init_from=source)
    with pytest.raises(UserError, match="does not exist"):
        begun(image_folder, init_from=str(tmp_path / "none"))


def test_init_from_is_read_once_alone(tmp_path, image_folder, trained_run, monkeypatch):
    """A resumed run does not read the weights of --init_from again."""
    old = tmp_path / "old.keras"
    old.write_bytes(trained_run.model.read_bytes())
    flags = {"init_from": str(old), "epochs": 1}
    with signalled(monkeypatch, "on_train_batch_end", 4), pytest.raises(StoppedError):
        train_to(tmp_path / "run", image_folder, **flags)
    old.unlink()
    assert train_to(tmp_path / "run", image_folder, **flags).model.exists()


def test_freeze_takes_all_branches_below_a_layer():
    model = models.build("resnet20", (16, 16, 3), 3)
    transfer.freeze(model, "stage0_block1_add")
    frozen = [layer.name for layer in model.layers if layer.weights and not layer.trainable]
    blocks = ("stage0_block0_1", "stage0_block0_2", "stage0_block1_1", "stage0_block1_2")
    assert {name.rpartition("_")[0] for name in frozen} == {"stem", *blocks}


def test_frozen_layers_stay_and_the_others_learn(tmp_path, image_folder, small_network):
    """With normalization and averages."""
    flags = {"model": small_network, "freeze": "conv_relu", "epochs": 1, "ema": 0.9}
    model, _ = begun(image_folder, **flags)
    names = ("conv_conv", "conv_bn", "logits")
    before = {name: layer_weights(model, name) for name in names}
    after = models.load(fit_to(tmp_path / "run", image_folder, **flags).model)
    assert [name for name in names if layer_weights(after, name) != before[name]] == ["logits"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("none", "unknown layer in --freeze"), ("logits", "leaves nothing to train")],
)
def test_freeze_of_an_unknown_layer_or_of_all(image_folder, name, words):
    with pytest.raises(UsageError, match=words):
        begun(image_folder, freeze=name)


def test_auxiliary_classifiers_are_new(tmp_path):
    source, model = (models.build("googlenet", (16, 16, 3), 3) for _ in range(2))
    source.deployable.save(tmp_path / "g.keras")
    line = weights.take(model, str(tmp_path / "g.keras"), ("a", "b", "c"))
    assert digest(model.deployable.get_weights()) == digest(source.deployable.get_weights())
    weighted = {layer.name for layer in model.logits_model.layers if layer.weights}
    heads = weighted - {layer.name for layer in model.layers}
    assert heads
    assert set(line.partition("; new layers: ")[2].split(", ")) == heads
