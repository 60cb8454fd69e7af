"""Several seeds: each is the run that it would be alone, and finished runs stay."""

import json
import statistics

import pytest

from keras_cifar import train
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import StoppedError, UsageError
from keras_cifar.core.run_directory import Run
from keras_cifar.training import seeds, trainer
from tests.training.kills import trained
from tests.training.test_resume import signalled


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


def test_a_seed_is_to_the_bit_the_run_that_it_is_alone(done, tmp_path):
    flags, several = done
    # The second of them: the first has left this process as it found it.
    assert [p.name for p in sorted(several.path.iterdir())] == ["seed_1", "seed_2", "seeds.json"]
    alone, among = Run(tmp_path / "alone"), several.of_seed(2)
    trainer.train(flags.replace(seed=2, seeds=0, run_dir=str(alone.path)), alone)
    assert among.evaluation("test").read_bytes() == alone.evaluation("test").read_bytes()
    assert trained(among) == trained(alone)
    assert trained(alone)["model.keras"] != trained(several.of_seed(1))["model.keras"]


def test_mean_and_deviation_are_written_and_printed(done, capsys):
    flags, several = done
    train.main(flags)
    values = [several.of_seed(seed).read_metrics("test")["accuracy"] for seed in (1, 2)]
    mean, std = statistics.mean(values), statistics.stdev(values)
    assert json.loads(several.seeds.read_text()) == {
        "seeds": {"1": values[0], "2": values[1]},
        "mean": pytest.approx(mean),
        "std": pytest.approx(std),
    }
    out = capsys.readouterr().out
    assert f"mean test accuracy {mean:.4f} of 2 seeds, standard deviation {std:.4f}" in out
    assert str(several.seeds) in out


def test_finished_seeds_are_not_trained_again(done, monkeypatch):
    flags, several = done
    called = []

    def note(flags, run):
        called.append((flags.fit.seed, run.path))
        return {"accuracy": 0.5}

    monkeypatch.setattr(trainer, "train", note)
    before, path = several.seeds.read_bytes(), several.of_seed(2).evaluation("test")
    seeds.train(flags, several)
    assert called == []
    assert several.seeds.read_bytes() == before
    # Metrics of other images do not count.
    mine = path.read_text()
    path.write_text(json.dumps(json.loads(mine) | {"fingerprint": "another"}))
    assert seeds.train(flags, several)["seeds"]["2"] == 0.5
    path.write_text(mine)
    assert called == [(2, several.of_seed(2).path)]
    # An export that is asked for later is made; one seed has no deviation.
    assert seeds.train(flags.replace(seeds=1, export=True), several)["std"] is None
    assert called[1:] == [(1, several.of_seed(1).path)]
    several.seeds.write_bytes(before)


def test_a_seed_that_was_tested_before_its_end_is_trained(done, monkeypatch):
    flags, several = done
    called = []

    def note(flags, run):
        called.append(flags.fit.seed)
        return {"accuracy": 0.5}

    monkeypatch.setattr(trainer, "train", note)
    history, before = several.of_seed(2).history, several.seeds.read_bytes()
    rows = history.read_text()
    history.write_text("".join(rows.splitlines(keepends=True)[:-1]))
    try:
        assert seeds.train(flags, several)["seeds"]["2"] == 0.5
    finally:
        history.write_text(rows)
        several.seeds.write_bytes(before)
    assert called == [2]


def test_stopped_run_says_how_all_seeds_resume(tmp_path, image_folder, monkeypatch):
    path = tmp_path / "several"
    flags = config(image_folder, path, seeds=1, epochs=1)
    with signalled(monkeypatch, "on_train_batch_end", 2) as calls:
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
        ({"workers": "a:1,b:2", "worker_index": 0}, "--seeds needs a single worker"),
        ({"seed": 2**31 - 2}, "--seed=2147483648 must be at least 0 and below 2147483648"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(tmp_path, image_folder, flags, message):
    path = tmp_path / "run"
    with pytest.raises(UsageError, match=message):
        train.main(config(image_folder, path, **flags))
    assert not path.exists()


def test_directories_and_flags_of_other_runs_are_refused(done, trained_run, image_folder):
    flags, several = done
    with pytest.raises(UsageError, match="holds a single run, not runs of --seeds"):
        train.main(config(image_folder, trained_run.path))
    with pytest.raises(UsageError, match="exists and is not a run directory"):
        train.main(flags.replace(seeds=0))
    with pytest.raises(UsageError, match="seed_1 has a run with other flags: --epochs was 2, is 3"):
        train.main(flags.replace(seed=0, epochs=3))
    assert not several.of_seed(0).path.exists()


def test_dry_run_says_that_there_are_several(done, capsys):
    train.main(done[0].replace(dry_run=True))
    assert "2 runs like this, one after another\nnothing was trained" in capsys.readouterr().out
