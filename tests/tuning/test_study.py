"""Studies: each trial once, whoever trains it and whatever ends it; the flags of the search."""

import contextlib
import json
import os
import sys
import types

import optuna
import pytest
from optuna.trial import TrialState
from PIL import Image

from keras_cifar import compare, tune
from keras_cifar.core import cli
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import StoppedError, UsageError, UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.training import trainer
from keras_cifar.training.recorder import DivergedError, write_history
from keras_cifar.tuning import space, trial
from keras_cifar.tuning.study import Study
from tests.training.test_resume import signalled

SPACE = "learning_rate=log(1e-5,1); optimizer=adam|sgd"
EPOCHS = 4


def command(*argv) -> int:
    """The exit status of the command."""
    argv = [str(argument) for argument in argv]
    return cli._execute("tune", tune.main, tune.TuneOptions, "-- TRAIN_FLAGS", argv)


# ---- Real training


@pytest.fixture(scope="module")
def real(tmp_path_factory, image_folder):
    """(arguments, directory, output) of a study of three trials, one of which diverges."""
    path, output = tmp_path_factory.mktemp("studies") / "study", []
    argv = ["--space=learning_rate=0.05|1e38|0.02", "--sampler=grid", "--final_seeds=1", "--"]
    argv += ["--model=lenet5", f"--data=folder:{image_folder}", "--epochs=2", "--optimizer=sgd"]
    argv += ["--batch_size=16", "--steps_per_epoch=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: output.append(" ".join(map(str, text))))
        assert command(f"--study={path}", *argv) == 0
    return argv, path, "\n".join(output)


def records(path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((path / "trials").glob("*.json"))]


def results(path) -> list[dict]:
    """The records without times and names of files."""
    left_out = ("seconds", "error")
    return [{k: v for k, v in each.items() if k not in left_out} for each in records(path)]


def test_a_trial_is_a_run_that_is_neither_tested_nor_exported(real):
    _, path, _ = real
    found = records(path)
    assert [each["state"] for each in found] == ["complete", "failed", "complete"]
    assert [each["params"]["learning_rate"] for each in found] == [0.05, 1e38, 0.02]
    for number in (0, 2):
        run = Run(path / "trials" / f"{number:04}")
        history, names = run.read_history(), {file.name for file in run.path.iterdir()}
        assert {"config.json", "model.keras", "checkpoint"} <= names
        assert not {"eval", "export"} & names
        assert found[number]["val_accuracy"] == max(row["val_accuracy"] for row in history)
        assert found[number]["epochs"] == len(history) == 2
        assert (
            run.read_config()["flags"]["learning_rate"] == found[number]["params"]["learning_rate"]
        )
    assert "try a lower --learning_rate" in found[1]["error"]


def test_the_best_flags_are_a_flagfile_and_the_output_ends_with_it(real, image_folder):
    _, path, output = real
    best = max(records(path), key=lambda each: each["val_accuracy"] or 0)
    config, _ = cli.parse(TrainConfig, [f"--flagfile={path / 'best.flags'}"])
    given = cli.parse(TrainConfig, real[0][real[0].index("--") + 1 :])[0]
    assert config == given.replace(**best["params"], data=f"folder:{image_folder}")
    lines = output.splitlines()
    assert lines[-1] == f"train     python -m keras_cifar.train --flagfile {path / 'best.flags'}"
    assert f"validation accuracy {best['val_accuracy']:.4f}" in output
    assert f"picture   {path / 'study.png'}" in lines
    with Image.open(path / "study.png") as image:
        assert image.size == (1760, 1100)


def test_final_seeds_test_and_export_the_best_flags(real):
    _, path, output = real
    best = max(range(3), key=lambda number: records(path)[number]["val_accuracy"] or 0)
    final = path / f"best_{best:04}"
    mean = json.loads((final / "seeds.json").read_text())["mean"]
    assert f"final     {final}, mean test accuracy {mean:.4f} of 1 seeds" in output
    assert (final / "seed_0" / "export" / "1").is_dir()


def test_compare_shows_a_study_the_best_first(real, tmp_path, capsys):
    _, path, _ = real
    image = tmp_path / "x.png"
    argv = [str(path), str(path / "trials" / "0000"), f"--out={image}"]
    assert cli._execute("compare", compare.main, compare.CompareOptions, "RUN ...", argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == argv[1]  # a run, as before
    rows = [line.split() for line in lines[lines.index(str(path)) + 2 :]]
    found = sorted(
        (r for r in records(path) if r["val_accuracy"]), key=lambda r: -r["val_accuracy"]
    )
    assert [row[1:3] for row in rows[:2]] == [
        ["complete", f"{r['val_accuracy']:.4f}"] for r in found
    ]
    assert rows[2][:2] == ["0001", "failed"]
    assert image.exists()


def test_a_signal_stops_within_a_trial_which_resumes_to_the_same_results(
    real, tmp_path, monkeypatch, capsys
):
    argv, path, _ = real
    again = tmp_path / "study"
    argv = [f"--study={again}", *argv[:2], *argv[3:]]  # without --final_seeds
    status = []
    monkeypatch.setattr(os, "_exit", status.append)
    with signalled(monkeypatch, "on_train_batch_end", 5) as calls:
        command(*argv)
        assert status == [143]
        line = capsys.readouterr().err
        assert line.endswith(f"the same command with --study={again} resumes\n")
        assert not (again / "best.flags").exists()
        assert command(*argv) == 0
    # The steps of a trial, those of another before it diverges, and the steps of the third.
    assert len(calls) == 6 + 6 + calls_until_divergence(path)
    assert results(again) == results(path)
    assert "resuming from step 2 of 3 in epoch 2 of 2" in capsys.readouterr().out


def calls_until_divergence(path) -> int:
    return int(records(path)[1]["error"].split("at step ")[1].split()[0])


def test_more_trials_and_no_best_trial(real, tmp_path, capsys):
    argv, _, _ = real
    argv = [f"--study={tmp_path / 's'}", "--space=learning_rate=1e38|2e38", *argv[1:2], *argv[3:]]
    assert command("--trials=1", *argv) == 1
    assert f"no trial of {tmp_path / 's'} was completed: one failed" in capsys.readouterr().err
    assert command("--trials=2", *argv) == 1
    assert [each["state"] for each in records(tmp_path / "s")] == ["failed"] * 2


def test_hopeless_trial_ends_with_its_epoch_and_is_not_trained_further(tmp_path, image_folder):
    config = TrainConfig.from_flags(
        model="lenet5", data=f"folder:{image_folder}", epochs=3, batch_size=16, steps_per_epoch=2
    )
    run, reported = Run(tmp_path / "0000"), []
    for _ in range(2):  # the second resumes
        judge = trial.Judge(run, lambda *row: reported.append(row), lambda: True)
        found = trial.train(config, {"learning_rate": 0.01}, run, judge)
        assert found["state"] == "pruned"
        assert found["epochs"] == len(run.read_history()) == 1
    assert set(reported) == {(int(r["epoch"]), r["val_accuracy"]) for r in run.read_history()}
    assert run.model.exists()


def test_without_validation_images_the_search_stops_with_a_line(tmp_path, image_folder, capsys):
    argv = [f"--study={tmp_path / 's'}", "--space=ema=0|0.5", "--", f"--data=folder:{image_folder}"]
    argv += ["--model=lenet5", "--val_fraction=0", "--batch_size=16", "--steps_per_epoch=1"]
    assert command(*argv) == 1
    assert "needs validation images: --val_fraction must be above 0" in capsys.readouterr().err


# ---- Training that takes no time


@pytest.fixture
def instant(monkeypatch):
    """Trains without a model: accuracy is a function of the flags and the epoch. Counts the epochs."""
    epochs = []

    @contextlib.contextmanager
    def trained(config, run, callbacks):
        (judge,) = callbacks
        judge.set_model(types.SimpleNamespace(stop_training=False))
        history = run.read_history()
        if 0 < len(history) < EPOCHS:
            judge.on_train_begin()
        while len(history) < EPOCHS and not judge.model.stop_training:
            epoch, rate = len(history) + 1, config.optimizer.learning_rate
            accuracy = (1 - 0.5**epoch) / (1 + abs(rate - 0.01) ** 0.5)
            row = {"epoch": epoch, "accuracy": 0, "val_loss": 1.0, "val_accuracy": accuracy}
            history.append(row | {"seconds": 1.0, "images_per_second": 1.0})
            write_history(history, run.history)
            epochs.append(run.path.name)
            judge.model.stop_training = epoch == EPOCHS
            judge.on_epoch_end(epoch)
        yield

    monkeypatch.setattr(trainer, "trained", trained)
    monkeypatch.setattr(trainer, "free_memory", lambda: None)
    monkeypatch.setattr("keras_cifar.tuning.study.STARTUP", 2)
    return epochs


def study(path, text=SPACE, **options) -> Study:
    config = TrainConfig.from_flags(model="lenet5", data="digits", epochs=EPOCHS)
    return Study(str(path), config, space.parse(text, []), **{"trials": 6} | options)


def searched(path, *args, **options) -> list[dict]:
    """The records of a study in the order of their numbers."""
    found = study(path, *args, **options)
    found.search()
    return sorted(found.results(), key=lambda each: each["number"])


def params(found: list[dict]) -> list[dict]:
    return [each["params"] for each in found]


def test_the_same_seed_proposes_the_same_flags_and_another_seed_others(tmp_path, instant):
    one, two = searched(tmp_path / "a"), searched(tmp_path / "b")
    assert one == two
    assert len({each["params"]["learning_rate"] for each in one}) == 6
    assert params(searched(tmp_path / "c", seed=1)) != params(one)


def test_samplers(tmp_path, instant):
    tpe, chance = searched(tmp_path / "a"), searched(tmp_path / "b", sampler="random")
    assert params(tpe)[:2] == params(chance)[:2]  # before TPE has anything to learn from
    assert params(tpe)[2:] != params(chance)[2:]
    grid = searched(tmp_path / "c", "ema=0|0.5|0.9; optimizer=adam|sgd", sampler="grid", trials=50)
    assert params(grid) == [
        {"ema": ema, "optimizer": optimizer}
        for ema in (0, 0.5, 0.9)
        for optimizer in ("adam", "sgd")
    ]
    with pytest.raises(UsageError, match="--sampler=grid needs alternatives of --learning_rate"):
        study(tmp_path / "d", sampler="grid")


def test_pruners(tmp_path, instant):
    def epochs(**options):
        return [each["epochs"] for each in searched(tmp_path / str(options), **options)]

    assert epochs(pruner="none") == [EPOCHS] * 6
    by_median, by_hyperband = epochs(), epochs(pruner="hyperband")
    # The median needs trials to compare with, and judges after a quarter of the epochs.
    assert by_median[:2] == [EPOCHS] * 2
    assert min(by_median) == 1
    assert min(by_hyperband) < EPOCHS
    assert by_hyperband != by_median
    found = searched(tmp_path / "{}")
    assert {each["state"] for each in found if each["epochs"] < EPOCHS} == {"pruned"}
    state = study(tmp_path / "{}").study.trials
    assert {t.state for t in state} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_storage_elsewhere_is_shared(tmp_path, instant):
    options = {"storage": f"sqlite:///{tmp_path}/shared.db", "trials": 4, "pruner": "none"}
    first = study(tmp_path / "one" / "name", **options)
    claimed = contextlib.ExitStack()
    assert first._claim(claimed)[0] == 0  # by a machine that is training it
    others = searched(tmp_path / "two" / "name", **options)
    assert [each["state"] == "complete" for each in others] == [False, True, True, True]
    assert not (tmp_path / "two" / "name" / "study.db").exists()
    claimed.close()
    first.search()
    assert [each["state"] for each in first.results()] == ["complete"] * 4
    assert instant.count("0000") == EPOCHS
    with pytest.raises(UserError, match="the storage of the study: "):
        study(tmp_path / "s", storage="nonsense://x")
    with pytest.raises(UserError, match=r"the storage of the study: .*unable to open"):
        study(tmp_path / "s", storage=f"sqlite:///{tmp_path}/no/folder.db")


def test_more_trials_go_on(tmp_path, instant):
    first = searched(tmp_path / "a", trials=3)
    assert searched(tmp_path / "a") == searched(tmp_path / "b")
    assert searched(tmp_path / "a", trials=3) == first
    (tmp_path / "a").rename(tmp_path / "moved")
    assert searched(tmp_path / "moved", trials=3) == first
    assert len(instant) == 2 * sum(each["epochs"] for each in searched(tmp_path / "b"))


def test_trials_of_other_processes_are_left_to_them(tmp_path, instant, capsys):
    one, two = study(tmp_path / "a", trials=3), study(tmp_path / "a", trials=3)
    with contextlib.ExitStack() as stack:
        assert one._claim(stack)[0] == 0
        two.search()
        states = [each["state"] for each in two.results()]
        assert states == ["complete", "complete", "unfinished"]
        assert "final" not in dict(two.finish(1))  # left to the process that ends last
        assert "1 trials are not finished: other processes train them" in capsys.readouterr().out
    two.search()  # the other one is gone
    assert {each["state"] for each in two.results()} == {"complete"}
    assert sorted(set(instant)) == ["0000", "0001", "0002"]
    assert len(instant) == 3 * EPOCHS


class KilledError(BaseException):
    pass


def test_killed_at_any_write_and_started_again_it_is_the_same_study(tmp_path, instant, monkeypatch):
    whole = searched(tmp_path / "whole")
    instant.clear()
    storage, writes, kills = optuna.storages.RDBStorage, [], 0
    names = ("state_values", "param", "intermediate_value", "user_attr")
    for name in (f"set_trial_{name}" for name in names):
        original = getattr(storage, name)

        def write(self, *args, original=original, **options):
            writes.append(0)
            if len(writes) == limit and kills % 2:
                raise KilledError
            found = original(self, *args, **options)
            if len(writes) == limit:
                raise KilledError
            return found

        monkeypatch.setattr(storage, name, write)
    found = None
    while found is None:
        limit = kills // 2 % 7 + 1
        writes.clear()
        try:
            found = searched(tmp_path / "killed")
        except KilledError:
            kills += 1
    assert kills > 15
    assert found == whole
    assert len(study(tmp_path / "killed").study.trials) == 6
    assert len(instant) == sum(each["epochs"] for each in whole)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            DivergedError("the loss became nan", "try another rate"),
            "the loss became nan; try another",
        ),
        (UsageError("--batch_size=7 must be"), "--batch_size=7 must be"),
        (MemoryError(), cli.OUT_OF_MEMORY),
    ],
)
def test_training_that_fails_is_a_line_and_the_search_goes_on(
    tmp_path, instant, monkeypatch, capsys, error, text
):
    original = trainer.trained

    def trained(config, run, callbacks):
        if run.path.name == "0001":
            raise error
        return original(config, run, callbacks)

    monkeypatch.setattr(trainer, "trained", trained)
    found = searched(tmp_path / "s", trials=3)
    assert [each["state"] for each in found] == ["complete", "failed", "complete"]
    assert text in found[1]["error"]
    assert f"trial 0001 failed after 0 epochs: {found[1]['error']}\n" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UserError("no such images"), StoppedError(15, "stopped")])
def test_what_no_flag_changes_stops_the_search_and_the_trial_resumes(
    tmp_path, instant, monkeypatch, error
):
    def trained(config, run, callbacks):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(trainer, "trained", trained)
        searched(tmp_path / "s", trials=3)
    assert searched(tmp_path / "s", trials=3) == searched(tmp_path / "t", trials=3)


def test_other_flags_and_other_directories_are_refused(tmp_path, instant):
    searched(tmp_path / "s", trials=1)
    message = "is a study with other flags: --{}.*; choose another --study or the same flags"
    with pytest.raises(UsageError, match=message.format("seed was 0, is 1")):
        study(tmp_path / "s", seed=1)
    with pytest.raises(UsageError, match=message.format("sampler was tpe, is random")):
        study(tmp_path / "s", sampler="random")
    with pytest.raises(UsageError, match=message.format("space: learning_rate was ")):
        study(tmp_path / "s", "learning_rate=log(1e-5,0.5); optimizer=adam|sgd")
    config = TrainConfig.from_flags(model="lenet5", data="digits", epochs=5)
    with pytest.raises(UsageError, match=message.format("epochs was 4, is 5")):
        Study(str(tmp_path / "s"), config, space.parse(SPACE, []))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="exists and is not a study"):
        study(tmp_path)
    config = config.replace(workers="a:1,b:2", worker_index=0)
    with pytest.raises(UsageError, match="a trial has a single worker"):
        Study(str(tmp_path / "t"), config, space.parse(SPACE, []))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([f"--space={SPACE}"], "--study=DIR is missing"),
        (["--study=s", "word"], "unexpected argument 'word'; flags of train follow --"),
        (
            ["--study=s", "--space=ema=0|1", "--", "--run_dir=x"],
            "--run_dir cannot be used in a search",
        ),
        (["--study=s", "--", "--seeds=3"], "--seeds cannot be used in a search"),
        (["--study=s", "--space=data=digits|cifar10"], "cannot be searched in --space: 'data'"),
        (["--study=s", "--trials=0"], "--trials=0 must be greater than 0"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert command(*argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_optuna_a_line_names_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("keras_cifar.tuning.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("space", "study"):
        monkeypatch.delattr(f"keras_cifar.tuning.{name}")
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert command("--study=s", f"--space={SPACE}") == 1
    error = capsys.readouterr().err
    assert "tune needs pip install 'keras_cifar[tune]' (" in error
    assert error.count("\n") == 1
