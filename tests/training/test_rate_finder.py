"""--find_learning_rate: the range test, what it proposes, and that it leaves the run as it is."""

import os
import pathlib
import re
import shlex
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from keras_cifar import train
from keras_cifar.core import cli
from keras_cifar.core.config import OPTIMIZERS, TrainConfig
from keras_cifar.core.errors import UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.models import batch_norm, lenet5
from keras_cifar.models.classifier import Classifier
from keras_cifar.training import rate_finder, trainer
from keras_cifar.training.rate_finder import FIFTH, SHARES, STEEPEST, TENTH, RangeTest, smooth
from tests.distributed.strategies import tiny


def config(folder, **flags) -> TrainConfig:
    defaults = {"model": "lenet5", "data": f"folder:{folder}", "batch_size": 16}
    return TrainConfig.from_flags(**defaults | flags)


def contents(root: pathlib.Path) -> dict:
    """The files below a directory: their sizes and when they were written."""
    found = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


@pytest.fixture
def fitted(monkeypatch) -> list:
    """The models that were trained."""
    models, fit = [], Classifier.fit

    def kept(self, *arguments, **kwargs):
        models.append(self)
        return fit(self, *arguments, **kwargs)

    monkeypatch.setattr(Classifier, "fit", kept)
    return models


# ---- What is made of the losses


def test_the_average_of_the_loss_has_no_bias_at_its_start():
    assert smooth(np.full(5, 3.0)) == pytest.approx(3.0)
    # By hand: (0.2 * 0.8 * 1 + 0.2 * 4) / (1 - 0.64)
    assert smooth(np.array([1.0, 4.0]))[1] == pytest.approx(0.96 / 0.36)


def test_the_candidates_are_known_for_a_known_loss():
    """A loss that falls along a logistic curve of log(rate), steepest at 0.01, and rises from 1 on."""
    rates = np.geomspace(1e-5, 10, 2001)
    losses = 2 / (1 + (rates / 0.01) ** 2) + np.maximum(np.log(rates), 0)
    found = RangeTest(rates, losses).candidates
    assert found[STEEPEST] == pytest.approx(0.01, rel=0.05)
    assert found[SHARES[TENTH]] == pytest.approx(0.1, rel=0.05)


def test_noise_does_not_move_the_candidates_far():
    """Steps as on CIFAR-10, with the noise of its batches."""
    rates, random = np.geomspace(1e-5, 10, 50), np.random.default_rng(0)
    losses = 2 / (1 + (rates / 0.01) ** 2) + 3 * np.maximum(np.log(rates), 0)
    for _ in range(20):
        found = RangeTest(rates, losses + random.normal(0, 0.15, 50)).candidates
        assert 0.004 < found[STEEPEST] < 0.025
        assert 0.01 < found[SHARES[TENTH]] < 0.2


@pytest.mark.parametrize("lowest", [1, 2, 48, 49])
def test_there_are_candidates_wherever_the_lowest_loss_is(lowest):
    rates, losses = np.geomspace(1e-5, 10, 50), np.full(50, 3.0)
    losses[lowest] = 1.0
    found = RangeTest(rates, losses).candidates
    assert found[SHARES[TENTH]] == float(f"{rates[lowest] / 10:.1e}")
    assert rates[0] <= found[STEEPEST] <= rates[-1]


@pytest.mark.parametrize("share", SHARES)
def test_sgd_gets_the_share_of_the_lowest_loss_and_adam_the_steepest_descent(share):
    test = RangeTest(np.geomspace(1e-3, 1, 5), np.array([2.0, 1.0, 0.5, 1.5, 3.0]), share)
    assert test.candidates[test.proposed("sgd")] == pytest.approx(share * test.rates[2], rel=0.05)
    assert test.proposed("adam") == STEEPEST


@pytest.mark.parametrize(
    ("optimizer", "norm_batch", "share"),
    [("sgd", "whole", FIFTH), ("sgd", "fixed", TENTH), ("muon", "whole", TENTH)],
)
def test_sgd_may_be_faster_with_batch_normalization(optimizer, norm_batch, share):
    """Where the moving averages normalize, it is without."""
    model = tiny()
    batch_norm.configure(model, norm_batch)
    assert rate_finder.choose_share(model, optimizer) == share
    assert rate_finder.choose_share(lenet5.lenet5((32, 32, 3), 10), optimizer) == TENTH


# ---- The steps


def test_the_rates_rise_exponentially_and_each_step_has_its_own(image_folder, fitted, monkeypatch):
    monkeypatch.setattr(rate_finder, "DIVERGED", np.inf)
    used = []

    class Rising(rate_finder._Rising):
        def on_train_batch_begin(self, batch, logs=None):
            super().on_train_batch_begin(batch, logs)
            used.append(float(self.model.optimizer.learning_rate))

    monkeypatch.setattr(rate_finder, "_Rising", Rising)
    flags = {"lr_schedule": "cosine", "warmup_epochs": 1.0, "steps_per_execution": 4}
    found = rate_finder.measure(config(image_folder, **flags))
    assert len(found.rates) == len(found.losses) == rate_finder.MIN_STEPS
    assert used == pytest.approx(found.rates)
    assert np.diff(np.log(found.rates)) == pytest.approx(np.log(1e6) / 44)
    assert found.rates[[0, -1]] == pytest.approx(rate_finder.RANGES["adam"])
    assert fitted[0].optimizer.iterations == rate_finder.MIN_STEPS


def test_the_losses_are_those_of_single_steps(image_folder, monkeypatch):
    """With rates of almost 0 the weights stay, and the losses are those of the first network."""
    monkeypatch.setitem(rate_finder.RANGES, "sgd", (1e-12, 1e-11))
    flags = config(image_folder, optimizer="sgd", batch_size=80)
    found = rate_finder.measure(flags)
    plan = rate_finder.prepare(flags)
    losses = [
        plan.model.evaluate(*batch, verbose=0)[0]
        for _, batch in zip(range(3), plan.batches(0).dataset, strict=False)
    ]
    assert found.losses[:3] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("loss", [np.nan, np.inf, 3.1])
def test_it_ends_where_the_loss_diverges(loss):
    class Model:
        stop_training, totals = False, np.zeros(5)

    model, rising = Model(), rate_finder._Rising.__new__(rate_finder._Rising)
    rising._model, rising._before, rising.losses = model, 0.0, []
    type(rising).model = property(lambda self: self._model)
    try:
        for step, value in enumerate([2.0, 2.0, 1.0, 20 * loss]):
            assert not model.stop_training
            model.totals = model.totals + np.array([value * 4, 0, 4, 0, 0])
            rising.on_train_batch_end(step)
    finally:
        del type(rising).model
    assert model.stop_training
    assert rising.losses == [2, 2, 1]


@pytest.mark.parametrize(
    ("images", "steps"), [(1_000, 45), (45_000, 45), (102_400, 100), (10**7, 150)]
)
def test_the_steps_are_an_eighth_of_a_pass_within_limits(images, steps):
    assert rate_finder.count_steps(images, 128) == steps


def test_each_optimizer_has_a_range():
    assert set(rate_finder.RANGES) == set(OPTIMIZERS)


def test_fine_tuning_on_two_replicas_works(image_folder, trained_run, fitted):
    flags = {"init_from": str(trained_run.path), "freeze": "conv1", "layer_decay": 0.75}
    flags |= {"optimizer": "adamw", "unfreeze_epoch": 1, "replicas": 2, "ema": 0.9}
    found = rate_finder.measure(config(image_folder, **flags))
    assert found.losses[0] < 0.7  # log(3) without --init_from
    first, last = (fitted[0].get_layer(name).kernel for name in ("conv1", "logits"))
    written = trainer.models.load(trained_run.model)
    assert np.array_equal(first, written.get_layer("conv1").kernel)
    assert not np.array_equal(last, written.get_layer("logits").kernel)


# ---- The command


def command(*argv: str) -> int:
    return cli._execute("train", train.main, TrainConfig, "", [*argv, "--find_learning_rate"])


def test_a_run_stays_as_it_is_and_the_picture_is_beside_it(
    trained_run, image_folder, tmp_path, capsys
):
    run = Run(shutil.copytree(trained_run.path, tmp_path / "run"))
    before = contents(run.path)
    argv = ["--model=lenet5", f"--data=folder:{image_folder}", "--batch_size=16", "--augment=flip"]
    assert command(*argv, f"--run_dir={run.path}") == 0
    assert contents(run.path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-learning_rate.png"}
    with Image.open(tmp_path / "run-learning_rate.png") as image:
        assert image.format == "PNG"
    output = capsys.readouterr()
    assert output.err == ""
    assert f"picture   {tmp_path}/run-learning_rate.png\n" in output.out
    # The command at the end is the one that was given, with the rate.
    proposed = float(re.search(r"^proposed  (\S+), the steepest descent$", output.out, re.M)[1])
    _, _, text = output.out.partition("\n\n")
    words = shlex.split(text.replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "keras_cifar.train"]
    given, _ = cli.parse(TrainConfig, [*argv, f"--run_dir={run.path}"])
    assert cli.parse(TrainConfig, words[3:])[0] == given.replace(learning_rate=proposed)


FOUND = RangeTest(np.geomspace(1e-3, 1, 5), np.array([2.0, 1.0, 0.5, 1.5, 3.0]))


def test_without_a_run_dir_the_picture_has_the_name_of_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rate_finder, "measure", lambda config: FOUND)
    assert command("--model=lenet5", "--data=folder:images/flowers") == 0
    (picture,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"lenet5-flowers-\d{8}-\d{6}-learning_rate\.png", picture.name)


def test_flags_of_a_recipe_are_in_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rate_finder, "measure", lambda config: FOUND)
    argv = ["--recipe=he_resnet20", "--weight_decay=0", f"--run_dir={tmp_path / 'run'}"]
    assert command(*argv) == 0
    words = shlex.split(capsys.readouterr().out.partition("\n\n")[2].replace("\\\n", ""))
    given, _ = cli.parse(TrainConfig, argv)
    again = given.replace(learning_rate=FOUND.candidates[SHARES[TENTH]], recipe=None)
    assert cli.parse(TrainConfig, words[3:])[0] == again


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0, 4.0], [1.0, 0.5]])
def test_a_loss_that_never_falls_is_one_line(losses, monkeypatch, tmp_path):
    found = RangeTest(np.geomspace(1e-3, 1, len(losses)), np.array(losses))
    monkeypatch.setattr(rate_finder, "measure", lambda config: found)
    with pytest.raises(UserError, match="the loss fell at no learning rate"):
        rate_finder.find(TrainConfig.from_flags(run_dir=str(tmp_path / "run")))
    assert os.listdir(tmp_path) == []


def test_several_workers_are_refused(image_folder, capsys):
    workers = ["--workers=localhost:1,localhost:2", "--worker_index=0"]
    assert command(*workers, f"--data=folder:{image_folder}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--find_learning_rate needs a single worker" in line


# ---- CIFAR-10


@pytest.mark.cifar
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_proposal_is_within_a_point_of_the_best_of_five_rates(tmp_path, optimizer):
    """ResNet-20, 3 epochs; and the search takes under 2 % of the time of ten epochs."""
    flags = {"data": f"folder:{os.environ['CIFAR10_FOLDER']}", "model": "resnet20", "epochs": 3}
    flags |= {"optimizer": optimizer, "augment": "crop(4)|flip", "export": False}
    given = TrainConfig.from_flags(**flags)
    rate_finder.prepare(given)  # caches the images
    began = time.perf_counter()
    test = rate_finder.measure(given)
    proposed = test.candidates[test.proposed(optimizer)]
    took, accuracy, seconds = time.perf_counter() - began, {}, []
    for factor in (1 / 9, 1 / 3, 1, 3, 9):
        run = Run(tmp_path / f"{factor:.2g}")
        trainer.train(given.replace(learning_rate=factor * proposed), run)
        history = run.read_history()
        accuracy[factor] = max(row["val_accuracy"] for row in history)
        seconds += [row["seconds"] for row in history]
        print(f"{optimizer}, {factor * proposed:.2g}: validation accuracy {accuracy[factor]:.4f}")
    share = took / (10 * np.mean(seconds))
    print(f"{optimizer}: {proposed:g} in {took:.0f} s, {share:.2%} of the time of ten epochs")
    assert accuracy[1] >= max(accuracy.values()) - 0.01
    assert share < 0.02
