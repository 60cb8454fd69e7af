"""Whole runs: what is written, which model is selected, resuming, and how a run fails."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_cifar import data, evaluate, export, models, train
from keras_cifar.core import cli
from keras_cifar.core.config import FLAGS, TrainConfig
from keras_cifar.core.errors import StoppedError, UsageError, UserError
from keras_cifar.core.files import versions
from keras_cifar.core.run_directory import Run, default_run_dir, previous_config
from keras_cifar.distributed.sharding import ReplicaRange
from keras_cifar.evaluation import evaluator, plots
from keras_cifar.exporters import verification
from keras_cifar.models import applications
from keras_cifar.reporting import gallery, record
from keras_cifar.training import checkpoint, recorder, trainer
from keras_cifar.training.plan import Plan, describe_run, prepare
from tests.conftest import write_folder
from tests.evaluation.test_plots import place
from tests.training.kills import scalars, trained


def config(folder, **flags) -> TrainConfig:
    defaults = {"model": "lenet5", "data": f"folder:{folder}", "epochs": 2, "batch_size": 16}
    return TrainConfig.from_flags(**defaults | flags)


def train_to(path, folder, **flags) -> Run:
    run = Run(path)
    trainer.train(config(folder, export=False, **flags), run)
    return run


def fit_to(path, folder, **flags) -> Run:
    """Trains, without the test and the report of `train_to`."""
    trainer.fit(prepare(config(folder, **flags)), Run(path))
    return Run(path)


@pytest.fixture
def copied_run(trained_run, tmp_path) -> Run:
    shutil.copytree(trained_run.path, tmp_path / "run")
    return Run(tmp_path / "run")


# ---- What a run leaves


def test_the_run_directory_is_the_contract(trained_run):
    written = json.loads(trained_run.config.read_text())
    assert written["flags"]["augment"] == "crop(2)|flip"
    assert set(written["flags"]) == set(FLAGS)
    assert written["class_names"] == ["class_0", "class_1", "class_2"]
    assert written["strategy"] == "none"
    assert written["versions"]["tensorflow"] == tf.__version__
    assert written["parameter_count"] == models.count_parameters(models.load(trained_run.model))
    assert "git_revision" in written
    counts = {name: split["count"] for name, split in written["splits"].items()}
    assert counts == {"train": 87, "val": 9, "test": 30}
    rows = trained_run.read_history()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"} <= set(rows[0])
    for path in (trained_run.curves, trained_run.samples):
        with Image.open(path) as image:
            assert image.format == "PNG"
    assert (trained_run.export / "1" / "saved_model.pb").exists()
    logged = {(folder, tag, step): value for folder, tag, step, value in scalars(trained_run)}
    for step, row in enumerate(rows):
        assert logged["train", "epoch_loss", step] == pytest.approx(row["loss"])
        assert logged["validation", "epoch_accuracy", step] == pytest.approx(row["val_accuracy"])


def test_the_test_metrics_are_those_of_the_selected_model(trained_run, image_folder):
    metrics = json.loads(trained_run.evaluation("test").read_text())
    test = data.load(f"folder:{image_folder}").test
    probabilities = models.load(trained_run.model)(test.images, training=False).numpy()
    assert metrics["split"] == "test"
    assert metrics["count"] == 30
    assert metrics["accuracy"] == (probabilities.argmax(1) == test.labels).mean()
    assert np.trace(metrics["confusion"]) == round(30 * metrics["accuracy"])
    assert set(metrics) >= {"loss", "top5_accuracy", "per_class"}


def test_the_averaged_weights_of_the_best_epoch_are_validated_and_saved(tmp_path, image_folder):
    flags = {"epochs": 4, "learning_rate": 0.01, "val_fraction": 0.5, "ema": 0.9}
    run = fit_to(tmp_path / "run", image_folder, **flags)
    best = max(run.read_history(), key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    val = data.load(f"folder:{image_folder}", val_fraction=0.5).val
    probabilities = evaluator.predict(models.load(run.model), val)
    loss = -np.log(probabilities[np.arange(len(val)), val.labels]).mean()
    assert loss == pytest.approx(best["val_loss"], rel=1e-4)


# ---- The picture of the first batch


def test_the_picture_shows_the_first_batch_and_training_is_the_same_without_it(
    tmp_path, image_folder, monkeypatch, capsys
):
    flags = {"augment": "crop(4)|flip|mixup(1.0)", "batch_size": 32, "epochs": 1}
    run = train_to(tmp_path / "run", image_folder, **flags)
    assert f"\nsamples   {run.samples}: the first batch" in capsys.readouterr().out
    with Image.open(run.samples) as image:
        picture = np.asarray(image.convert("RGB"))
    batch, _ = next(iter(prepare(config(image_folder, **flags)).batches(0)))
    places = [place(picture, pixels.repeat(8, 0).repeat(8, 1)) for pixels in batch.numpy()[:24]]
    assert places == sorted(set(places))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "samples", fail)
    without = train_to(tmp_path / "without", image_folder, **flags)
    expected = f"warning: {without.samples} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == expected
    assert not without.samples.exists()
    assert trained(without) == trained(run)


@pytest.mark.parametrize("count", [5, 24, 99])
def test_the_picture_is_of_the_whole_batch(image_folder, count):
    plan = prepare(config(image_folder, batch_size=48, accumulate_steps=12, augment="mixup(1.0)"))
    shards = itertools.islice(plan.shards(ReplicaRange(0, 2, 2), 0), 24)
    for part, found in zip(zip(*shards, strict=True), plan.first_examples(count), strict=True):
        np.testing.assert_array_equal(found, np.concatenate(part)[:count])


def test_a_signal_while_the_picture_is_made_stops_the_run(tmp_path, image_folder, monkeypatch):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # Python hears it

    monkeypatch.setattr(plots, "samples", signalled)
    with pytest.raises(StoppedError, match="stopped by SIGTERM"):
        train_to(tmp_path / "run", image_folder)


# ---- Each flag does something


def test_flags_reach_the_step_and_the_optimizer(image_folder):
    options = {"label_smoothing": 0.2, "weight_decay": 0.1, "ema": 0.9, "class_weight": "balanced"}
    sgd = {"momentum": 0.5, "nesterov": True, "global_clipnorm": 2.0}
    rate = {"learning_rate": 0.01, "lr_schedule": "cosine", "warmup_epochs": 0.5}
    plan = prepare(
        config(image_folder, optimizer="sgd", steps_per_epoch=4, **options, **sgd, **rate)
    )
    step, optimizer = plan.model._step, plan.model.optimizer
    assert (step.label_smoothing, step.weight_decay, step.averages.decay) == (0.2, 0.1, 0.9)
    assert step.class_weight == [1.0, 1.0, 1.0]  # as many images of each
    found = optimizer.get_config()
    assert {name: found[name] for name in sgd} == sgd
    schedule = ("cosine", 0.01, 8, 2, ())
    assert tuple(plan.learning_rate.get_config().values()) == schedule


@pytest.mark.parametrize(
    "flags",
    [{"seed": 1}, {"augment": "flip"}, {"batch_size": 8}, {"sampling": "balanced"}],
    ids=str,
)
def test_a_flag_changes_the_batches(image_folder, flags):
    found = [prepare(config(image_folder, **other)).batches(0) for other in ({}, flags)]
    plain, changed = (next(iter(batches))[0].numpy() for batches in found)
    assert not np.array_equal(plain, changed)


def test_image_size_and_dtype_policy_decide_the_model(image_folder):
    model = prepare(config(image_folder, image_size=24, dtype_policy="float64")).model
    assert model.input_shape == (None, 24, 24, 3)
    assert model.get_layer("logits").kernel.dtype == "float64"


def test_precise_bn_batches_recompute_the_statistics(tmp_path, image_folder, small_network):
    flags = {"model": small_network, "epochs": 1, "batch_size": 32}
    runs = [fit_to(tmp_path / str(n), image_folder, precise_bn_batches=n, **flags) for n in (0, 10)]
    moving, precise = (models.load(run.model) for run in runs)
    for a, b in zip(moving.trainable_variables, precise.trainable_variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-5)
    moving, precise = (m.get_layer("conv_bn").moving_variance.numpy() for m in (moving, precise))
    # After two steps the moving average is still near its first value.
    assert np.abs(moving - 1).mean() < np.abs(precise - 1).mean()


@pytest.mark.parametrize("normalized", [False, True])
def test_only_batch_normalization_has_batches_made_for_its_statistics(
    tmp_path, image_folder, small_network, monkeypatch, normalized
):
    original, starts = Plan.batches, []

    def batches(plan, start_step):
        starts.append(start_step)
        return original(plan, start_step)

    monkeypatch.setattr(Plan, "batches", batches)
    fit_to(tmp_path, image_folder, model=small_network if normalized else "lenet5", epochs=1)
    assert starts == [0] * (1 + normalized)


def test_early_stopping_ends_the_run(tmp_path, image_folder):
    # No learning: the first epoch stays the best.
    flags = {"epochs": 9, "learning_rate": 1e-12, "early_stopping": 2}
    run = fit_to(tmp_path / "run", image_folder, **flags)
    assert len(run.read_history()) == 3


# ---- Again on the same directory


def test_a_finished_run_is_not_trained_again(copied_run, image_folder, capsys):
    before, picture = copied_run.model.read_bytes(), copied_run.samples.stat().st_mtime_ns
    trainer.train(config(image_folder, epochs=3, augment="crop(2)|flip"), copied_run)
    assert copied_run.model.read_bytes() == before
    assert copied_run.samples.stat().st_mtime_ns == picture
    assert versions(copied_run.export) == [1]
    assert "resuming from epoch 3 of 3" in capsys.readouterr().out


def test_a_run_that_was_exported_before_its_end_is_exported_again(copied_run, image_folder, capsys):
    assert run_command(export, export.ExportOptions, f"--run={copied_run.path}") == 0
    path = copied_run.export / "2" / verification.FILE
    stored = json.loads(path.read_text())
    of_model = hashlib.sha256(copied_run.model.read_bytes()).hexdigest()
    assert stored["model_sha256"] == of_model
    first = json.loads((copied_run.export / "1" / verification.FILE).read_text())
    assert first["model_sha256"] == of_model
    flags = config(image_folder, epochs=3, augment="crop(2)|flip")
    # An earlier revision's export does not say which model it is of.
    for other, versions_then in ((None, [1, 2]), ("another", [1, 2, 3])):
        path.write_text(json.dumps(stored | {"model_sha256": other}))
        trainer.train(flags, copied_run)
        assert versions(copied_run.export) == versions_then
    assert json.loads((copied_run.export / "3" / verification.FILE).read_text()) == first
    assert verification.is_exported(copied_run.path / "deleted.keras", copied_run.export)


def test_statistics_that_were_given_are_not_left_to_the_machine(copied_run, image_folder):
    flags = config(image_folder, epochs=3, augment="crop(2)|flip")
    assert previous_config(flags, copied_run)
    written = json.loads(copied_run.config.read_text())
    given = {"flags": written["flags"] | {"norm_batch": "8"}, "norm_batch": "8"}
    copied_run.config.write_text(json.dumps(written | given))
    with pytest.raises(UsageError, match="--norm_batch was '8', is 'auto'"):
        previous_config(flags, copied_run)
    assert previous_config(flags.replace(norm_batch="8"), copied_run)


def test_other_flags_on_the_same_directory_are_named(trained_run, image_folder):
    other = config(image_folder, epochs=4, augment="flip", batch_size=16)
    with pytest.raises(UsageError) as caught:
        trainer.train(other, trained_run)
    message = str(caught.value)
    assert "--epochs was 3, is 4" in message
    assert "--augment was 'crop(2)|flip', is 'flip'" in message
    assert "--model" not in message


def test_changed_images_are_noticed(tmp_path):
    folder = tmp_path / "images"
    write_folder(folder, {"train": 48, "test": 12})
    run = train_to(tmp_path / "run", folder, epochs=1)
    (folder / "train" / "class_0" / "000.png").unlink()
    with pytest.raises(UserError, match="has other images than"):
        trainer.train(config(folder, epochs=1, export=False), run)
    assert evaluator.evaluate_run(run, "test")["count"] == 12
    with pytest.raises(UserError, match="have changed"):
        evaluator.evaluate_run(run, "train")


def test_a_directory_with_other_files_is_not_touched(tmp_path, image_folder):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a run directory"):
        trainer.train(config(image_folder), Run(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# ---- Failure


def test_a_non_finite_loss_stops_with_the_step_and_keeps_the_last_good_model(
    tmp_path, image_folder, monkeypatch
):
    # Two good epochs of 5 steps, then weights that are not numbers.
    original = recorder.Recorder.on_epoch_end

    def poison(self, epoch, logs=None):
        original(self, epoch, logs)
        if epoch == 1:
            self.model.get_layer("logits").bias.assign(np.full(3, np.nan))

    monkeypatch.setattr(recorder.Recorder, "on_epoch_end", poison)
    with pytest.raises(UserError) as caught:
        fit_to(tmp_path / "run", image_folder, epochs=4, val_fraction=0)
    message = str(caught.value)
    assert "loss became nan at step 13 (epoch 3, learning rate 0.001, gradient norm na" in message
    assert re.search(r", \d+\.?\d* one step before", message)
    run = Run(tmp_path / "run")
    assert f"last good checkpoint is {checkpoint.read(run.checkpoint)[0]}" in message
    assert "model.keras (epoch 2)" in message
    assert all(np.isfinite(w).all() for w in models.load(run.model).get_weights())
    assert len(run.read_history()) == 2


def run_command(module, options, *argv) -> int:
    return cli._execute(module.__name__.rpartition(".")[2], module.main, options, "", list(argv))


def train_command(path, folder, *argv) -> int:
    flags = (f"--data=folder:{folder}", "--batch_size=16", f"--run_dir={path}")
    return run_command(train, TrainConfig, *flags, *argv)


def test_divergence_in_the_first_epoch_is_one_line(tmp_path, image_folder, small_network, capsys):
    argv = (f"--model={small_network}", "--optimizer=sgd", "--learning_rate=1e30")
    assert train_command(tmp_path / "run", image_folder, *argv) == 1
    error = capsys.readouterr().err
    assert re.match("train: error: the (loss|gradient) became (nan|inf) ", error)
    assert "last good checkpoint is " in error
    assert "model.keras" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model": "resnet33"}, "resnet32"),
        ({"augment": "flop"}, "randaugment"),
        ({"lr_schedule": "exponential"}, "onecycle"),
        ({"strategy": "multiworker"}, "multiworker"),
        ({"replicas": 2, "batch_size": 1}, "fewer images than there are replicas"),
        ({"early_stopping": 3, "val_fraction": 0}, "--val_fraction"),
        ({"class_weight": "balanced", "sampling": "balanced"}, "give one of them"),
    ],
    ids=str,
)
def test_wrong_flags_are_refused_before_the_data_is_read(tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        train_to(tmp_path / "run", "/nowhere", **flags)
    assert not (tmp_path / "run").exists()


# ---- Commands


def test_train_ends_with_the_paths_of_its_results(tmp_path, image_folder, capsys):
    path = tmp_path / "run"
    assert train_command(path, image_folder, "--model=lenet5", "--epochs=1") == 0
    output = capsys.readouterr().out
    epochs = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 1
    accuracy = json.loads((path / "eval" / "test.json").read_text())["accuracy"]
    assert f"test accuracy {accuracy:.4f}" in output
    for name in ("model.keras", "history.csv", "curves.png", "eval/test.json", "export"):
        assert str(path / name) in output


def test_dry_run_describes_the_run_and_writes_nothing(tmp_path, image_folder, capsys):
    assert train_command(tmp_path / "run", image_folder, "--model=lenet5", "--dry_run") == 0
    output = capsys.readouterr().out
    parameters = models.count_parameters(models.build("lenet5", (16, 16, 3), 3))
    assert f"lenet5: {parameters:,} parameters" in output
    assert "10 epochs of 5 steps of 16 images (7 are left out of each pass)" in output
    assert "classes   29 images of each" in output
    assert "\nimages " not in output  # all have one size
    assert "strategy none" in output
    assert not (tmp_path / "run").exists()


def test_first_lines_tell_the_sizes_of_the_files(tmp_path, capsys):
    write_folder(tmp_path / "images", {"train": 40, "test": 8}, side=90)
    write_folder(tmp_path / "images", {"train": 20}, side=300)
    argv = ("--model=lenet5", "--image_size=80", "--dry_run")
    assert train_command(tmp_path / "run", tmp_path / "images", *argv) == 0
    line = "images    90 x 90 to 300 x 300 pixels (of 40 sampled), crop: the short side becomes 91 "
    assert f"\n{line}and the middle 80 x 80 stays\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--model=lenet5",), ""),
        (("--model=resnet20",), "norm      by the statistics of the whole batch (one replica)"),
        (
            ("--model=resnet20", "--norm_batch=4"),
            "norm      by the statistics of groups of 4 images",
        ),
    ],
)
def test_first_lines_say_whose_statistics_normalize(tmp_path, image_folder, capsys, flags, line):
    assert train_command(tmp_path / "run", image_folder, *flags, "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if x.startswith("norm")] == [line] * bool(line)


def test_list_models_has_a_line_a_network(capsys, monkeypatch):
    few = {name: models.variants()[name] for name in ("lenet5", "vgg16")}
    monkeypatch.setattr(models, "variants", lambda: few)
    assert run_command(train, TrainConfig, "--list_models") == 0
    _, lenet5, vgg16, *theirs = capsys.readouterr().out.splitlines()
    assert lenet5.split()[:4] == ["lenet5", "32", "62,006", "651,720"]
    assert vgg16.split()[:4] == ["vgg16", "224", "138,357,544", "15,470,264,320"]
    assert vgg16.endswith("arXiv:1409.1556")
    names = " ".join(theirs).removeprefix("and those of keras.applications: ").split(", ")
    assert names == sorted(applications.VARIANTS)


def test_default_run_directories_are_below_runs():
    for spec, name in (("folder:/a/My Photos/", "My-Photos"), ("digits", "digits")):
        path = default_run_dir(TrainConfig.from_flags(data=spec))
        assert path.startswith(f"runs/resnet32-{name}-")


def files_of(run, *data) -> list:
    kinds = (run.evaluation, run.predictions, run.confusion, run.disturbances, run.gallery)
    return [kind("test", *data) for kind in kinds]


def test_evaluate_on_other_data_keeps_the_files_of_the_runs_own(
    trained_run, tmp_path, monkeypatch, capsys
):
    run = Run(shutil.copytree(trained_run.path, tmp_path / "run"))
    run.disturbances("test").write_text("{}")
    run.gallery("test").touch()
    before = [path.read_bytes() for path in files_of(run)]
    write_folder(tmp_path / "other one", {"train": 9, "test": 6}, side=20)
    monkeypatch.chdir(tmp_path)
    argv = f"--run={run.path}", "--data=folder:other one"
    assert run_command(evaluate, evaluate.EvaluateOptions, *argv) == 0
    assert run_command(evaluate, evaluate.EvaluateOptions, *argv, "--disturb") == 0
    assert [path.read_bytes() for path in files_of(run)] == before
    spec, output = f"folder:{tmp_path / 'other one'}", capsys.readouterr().out
    for path in files_of(run, spec):
        assert re.fullmatch(r"test-other-one-[0-9a-f]{8}[a-z_]*\.(json|npz|png)", path.name)
        assert path.exists()
        assert f" {path}\n" in output
    for path in (run.evaluation("test", spec), run.disturbances("test", spec)):
        found = json.loads(path.read_text())
        assert (found["count"], found["data"]) == (6, spec)
    assert run.read_metrics("test") == json.loads(before[0])
    assert run.evaluation("test", "folder:other one") == run.evaluation("test", spec)
    assert run.evaluation("test", "folder:else/other one") != run.evaluation("test", spec)


def test_evaluate_on_the_same_images_elsewhere_is_of_the_runs_own(trained_run, tmp_path):
    run = Run(shutil.copytree(trained_run.path, tmp_path / "run"))
    own = pathlib.Path(run.read_config()["flags"]["data"].partition(":")[2])
    spec = f"folder:{shutil.copytree(own, tmp_path / 'moved')}"
    run.evaluation("test").unlink()
    argv = f"--run={run.path}", f"--data={spec}"
    assert run_command(evaluate, evaluate.EvaluateOptions, *argv) == 0
    assert run.read_metrics("test")["data"] == spec
    # Changed images are others, also at the run's own place.
    next((tmp_path / "moved/test/class_0").iterdir()).unlink()
    before = run.evaluation("test").read_bytes()
    assert run_command(evaluate, evaluate.EvaluateOptions, *argv) == 0
    assert run.evaluation("test").read_bytes() == before
    assert run.evaluation("test", spec).exists()


@pytest.mark.parametrize("paths", [True, False], ids=["", "earlier revision"])
def test_a_run_of_a_relative_path_is_read_from_other_directories(
    trained_run, image_folder, tmp_path, monkeypatch, capsys, paths
):
    run, here = Run(shutil.copytree(trained_run.path, tmp_path / "run")), image_folder.parent
    config = json.loads(run.config.read_text())
    flags = TrainConfig.from_json(config["flags"]).replace(data=f"folder:{image_folder.name}")
    monkeypatch.chdir(here)
    described = describe_run(prepare(flags))
    config |= {name: described[name] for name in ("flags", "paths")}
    assert config["flags"]["data"] == f"folder:{image_folder.name}"
    if not paths:
        del config["paths"]
    run.config.write_text(json.dumps(config))
    for spec in (flags.data.data, f"folder:{image_folder}"):
        assert previous_config(flags.replace(data=spec), run)
    monkeypatch.chdir(tmp_path)
    argv = ["--split=val", f"--run={run.path}"]
    assert run_command(evaluate, evaluate.EvaluateOptions, *argv) == (0 if paths else 1)
    if paths:
        assert previous_config(flags.replace(data=f"folder:{image_folder}"), run)
        assert run_command(export, export.ExportOptions, f"--run={run.path}") == 0
        assert gallery.load(run, record.load(run)).missing == ""
        assert "cannot be loaded" not in capsys.readouterr().err
    monkeypatch.chdir(here)
    assert run_command(evaluate, evaluate.EvaluateOptions, *argv) == 0


def test_evaluate_refuses_other_classes(trained_run, tmp_path):
    write_folder(tmp_path / "other", {"train": 30, "test": 6}, classes=2)
    with pytest.raises(UserError, match="class_0, class_1 and the run was trained on"):
        other = evaluator.DataSource(f"folder:{tmp_path / 'other'}")
        evaluator.evaluate_run(trained_run, "test", other)


def test_a_run_without_validation_split(tmp_path, image_folder):
    run = train_to(tmp_path / "run", image_folder, epochs=1, val_fraction=0)
    assert not run.export.exists()
    assert "val_loss" not in run.read_history()[0]
    assert set(json.loads(run.config.read_text())["splits"]) == {"train", "test"}
    with pytest.raises(UserError, match="--val_fraction=0"):
        evaluator.evaluate_run(run, "val")


def test_export_makes_the_next_version_from_the_run_alone(copied_run, tmp_path, capsys):
    argv = (f"--run={copied_run.path}", f"--out={tmp_path / 'served'}", "--version=4")
    assert run_command(export, export.ExportOptions, *argv) == 0
    assert (tmp_path / "served" / "4" / "saved_model.pb").exists()
    assert str(tmp_path / "served" / "4") in capsys.readouterr().out
    assert run_command(export, export.ExportOptions, f"--run={copied_run.path}") == 0
    assert (copied_run.export / "2").is_dir()


@pytest.mark.parametrize("module", [evaluate, export])
def test_a_missing_run_is_one_line(module, capsys, tmp_path):
    options = evaluate.EvaluateOptions if module is evaluate else export.ExportOptions
    assert run_command(module, options, f"--run={tmp_path / 'no'}") == 1
    assert run_command(module, options) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "does not exist" in errors[0]
    assert "--run=RUN" in errors[1]


def test_the_command_line_end_to_end_in_processes(tmp_path, image_folder):
    pty = pytest.importorskip("pty")
    python = (sys.executable, "-m")
    options = {"stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    argv = (
        "keras_cifar.train", "--model=lenet5", f"--data=folder:{image_folder}", "--epochs=1",
        "--batch_size=16", "--run_dir=run", "--replicas=2",
    )  # fmt: skip
    terminal, end = pty.openpty()
    with subprocess.Popen([*python, *argv], stdout=end, **options) as process:
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(terminal, 4096):
                shown += part
        os.close(terminal)
        assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert b"mirrored (2 virtual CPU devices)" in shown
    # A progress bar in place of the line of a log file.
    assert b"5/5" in shown
    assert b"val_accuracy" in shown
    assert b"epoch 1/1  loss" not in shown
    assert json.loads((tmp_path / "run" / "config.json").read_text())["strategy"] == "mirrored"
    # The same as on one device: lenet5 has no batch normalization.
    plan = prepare(config(image_folder))
    plan.model.fit(plan.batches(0), epochs=1, verbose=0)
    replicated = models.load(tmp_path / "run" / "model.keras")
    for mine, other in zip(replicated.weights, plan.model.weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), atol=1e-4)

    image = next((image_folder / "test").rglob("*.png"))
    argv = ("keras_cifar.predict", "--model=run", str(image), "--format=json", "--top_k=1")
    done = subprocess.run([*python, *argv], stdout=subprocess.PIPE, **options)
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(done.stdout)
    assert row["file"] == str(image)
    assert row["top"][0]["label"].startswith("class_")


def test_missing_data_is_one_line(tmp_path, capsys):
    assert train_command(tmp_path / "run", "nowhere") == 1
    assert capsys.readouterr().err == "train: error: folder nowhere does not exist\n"
