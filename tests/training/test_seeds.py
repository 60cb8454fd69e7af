"""Several seeds: each is the run that it would be alone, and what is done stays."""

import dataclasses
import json
import os
import signal
import statistics
import time

import numpy as np
import pytest

from keras_cifar import models, train
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import StoppedError, UsageError
from keras_cifar.core.run_directory import Run
from keras_cifar.training import recorder, seeds, trainer


def config(folder, path, **flags) -> TrainConfig:
    defaults = {"model": "lenet5", "data": f"folder:{folder}", "epochs": 2, "batch_size": 16}
    flags = {"augment": "crop(2)|flip", "export": False, "run_dir": str(path), "seeds": 3} | flags
    return TrainConfig.from_flags(**defaults | flags)


@pytest.fixture(scope="module")
def done(tmp_path_factory, image_folder):
    """(the configuration, the directory) of seeds 1 and 2, trained."""
    path = tmp_path_factory.mktemp("seeds") / "three"
    flags = config(image_folder, path, seed=1, seeds=2)
    train.main(flags)
    return flags, Run(path)


def history(run: Run) -> list:
    """The rows of history.csv without times."""
    rows = [line.split(",") for line in run.history.read_text().splitlines()]
    times = [i for i, name in enumerate(rows[0]) if name in ("seconds", "images_per_second")]
    return [[x for i, x in enumerate(row) if i not in times] for row in rows]


def test_a_seed_is_to_the_bit_the_run_that_it_is_alone(done, image_folder, tmp_path):
    flags, several = done
    # The second of them: the first has left this process as it found it.
    assert [p.name for p in sorted(several.path.iterdir())] == ["seed_1", "seed_2", "seeds.json"]
    alone = Run(tmp_path / "alone")
    trainer.train(dataclasses.replace(flags, seed=2, seeds=0, run_dir=str(alone.path)), alone)
    among = several.of_seed(2)
    assert history(among) == history(alone)
    assert among.evaluation("test").read_bytes() == alone.evaluation("test").read_bytes()
    weights = [models.load(run.model).get_weights() for run in (among, alone)]
    assert all(np.array_equal(a, b) for a, b in zip(*weights, strict=True))
    other = models.load(several.of_seed(1).model).get_weights()
    assert any((a != b).any() for a, b in zip(other, weights[0], strict=True))


def test_mean_and_deviation_are_written_and_said(done, capsys):
    flags, several = done
    train.main(flags)
    values = [several.of_seed(seed).read_metrics("test", flags.data)["accuracy"] for seed in (1, 2)]
    mean, std = statistics.mean(values), statistics.stdev(values)
    assert json.loads(several.seeds.read_text()) == {
        "seeds": {"1": values[0], "2": values[1]},
        "mean": pytest.approx(mean),
        "std": pytest.approx(std),
    }
    out = capsys.readouterr().out
    assert f"mean test accuracy {mean:.4f} of 2 seeds, standard deviation {std:.4f}" in out
    assert str(several.seeds) in out


def test_what_is_done_is_not_done_again(done, monkeypatch):
    flags, several = done
    trained = []

    def note(flags, run):
        trained.append((flags.seed, run.path))
        return {"accuracy": 0.5}

    monkeypatch.setattr(trainer, "train", note)
    before, path = several.seeds.read_bytes(), several.of_seed(2).evaluation("test")
    seeds.train(flags, several)
    assert trained == []
    assert several.seeds.read_bytes() == before
    # Figures of other images are none of this run.
    mine = path.read_text()
    path.write_text(json.dumps(json.loads(mine) | {"data": "folder:elsewhere"}))
    assert seeds.train(flags, several)["seeds"]["2"] == 0.5
    path.write_text(mine)
    assert trained == [(2, several.of_seed(2).path)]
    # An export that is wanted later is made; one seed has no deviation.
    assert seeds.train(dataclasses.replace(flags, seeds=1, export=True), several)["std"] is None
    assert trained[1:] == [(1, several.of_seed(1).path)]
    several.seeds.write_bytes(before)


def test_stopped_run_says_how_all_go_on(tmp_path, image_folder, monkeypatch):
    original, calls = recorder.Recorder.on_train_batch_end, []

    def stop(self, *arguments, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # Python hears it
        return original(self, *arguments, **kwargs)

    monkeypatch.setattr(recorder.Recorder, "on_train_batch_end", stop)
    path = tmp_path / "several"
    flags = config(image_folder, path, seeds=1, epochs=1)
    with pytest.raises(StoppedError) as caught:
        train.main(flags)
    assert str(caught.value).endswith(
        f"is saved in {path}/seed_0/checkpoint; the same command with --run_dir={path} resumes"
    )
    train.main(flags)
    assert len(calls) == 5
    assert list(json.loads(Run(path).seeds.read_text())["seeds"]) == ["0"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workers": "a:1,b:2", "worker_index": 0}, "--seeds is for one worker"),
        ({"seed": 2**31 - 2}, "--seed=2147483648 must be below 2147483648"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path, image_folder, flags, message
):
    path = tmp_path / "run"
    with pytest.raises(UsageError, match=message):
        train.main(config(image_folder, path, **flags))
    assert not path.exists()


def test_directories_of_one_and_of_several_are_not_mixed(done, trained_run, image_folder):
    flags, _ = done
    with pytest.raises(UsageError, match="holds one run and not those of --seeds"):
        train.main(config(image_folder, trained_run.path))
    with pytest.raises(UsageError, match="exists and is not a run directory"):
        train.main(dataclasses.replace(flags, seeds=0))


def test_other_flags_are_refused_before_a_seed_that_is_new(done):
    flags, several = done
    with pytest.raises(UsageError, match="seed_1 has a run with other flags: --epochs was 2, is 3"):
        train.main(dataclasses.replace(flags, seed=0, epochs=3))
    assert not several.of_seed(0).path.exists()


def test_dry_run_says_that_there_are_several(done, capsys):
    flags, _ = done
    train.main(dataclasses.replace(flags, dry_run=True))
    assert "2 such runs, one after another\nnothing was trained" in capsys.readouterr().out
