"""The trials of a study as a table: order, states, flags, damage."""

import json

import pytest

from keras_cifar.core.errors import UserError
from keras_cifar.reporting import study
from tests.reporting import reports

DONE = {"epochs": 3, "seconds": 61.0}
TRIALS = {
    0: DONE | {"state": "complete", "val_accuracy": 0.5, "params": {"learning_rate": 0.12345678}},
    1: DONE | {"state": "failed", "val_accuracy": None, "error": "no memory", "epochs": 0},
    2: DONE | {"state": "complete", "val_accuracy": 0.75, "params": {"optimizer": "sgd"}},
    3: DONE | {"state": "pruned", "val_accuracy": 0.9, "epochs": 1},
    4: {},
}


@pytest.fixture
def path(tmp_path):
    directory = study.trials_dir(tmp_path)
    directory.mkdir()
    for number, trial in TRIALS.items():
        (directory / f"{number:04}.json").write_text(json.dumps(study.UNFINISHED | trial))
    return tmp_path


def test_the_best_that_was_trained_to_its_end_comes_first_and_all_states_are_shown(path):
    rows = [line.split() for line in study.table(study.load(path)).splitlines()]
    flags = ["--learning_rate", "--optimizer"]
    assert sorted(rows[0][-2:]) == flags
    assert [row[:3] for row in rows[1:3]] == [
        ["0002", "complete", "0.7500"],
        ["0000", "complete", "0.5000"],
    ]
    assert rows[3] == ["0003", "pruned", "0.9000", "1", "61.0", "s"]
    assert [row[:2] for row in rows[4:]] == [["0001", "failed"], ["0004", "unfinished"]]
    assert {"sgd"} <= set(rows[1])
    assert {"0.1235"} <= set(rows[2])


def test_summaries_say_what_was_reached_or_why_not(path):
    trials = {trial["number"]: study.summary(trial) for trial in study.load(path)}
    assert trials[3] == "pruned after 1 epochs, validation accuracy 0.9000"
    assert trials[1] == "failed after 0 epochs: no memory"


def test_runs_of_trials_are_those_that_are_here_and_have_an_epoch(path):
    for number in (2, 1):
        reports.write_run(study.trials_dir(path) / f"{number:04}", ["a", "b"])
    assert study.trained(path, study.load(path)) == [str(study.trials_dir(path) / "0002")]


def test_other_directories_are_no_study(tmp_path):
    assert study.load(tmp_path) == []
    assert study.load(tmp_path / "nothing") == []


@pytest.mark.parametrize("text", ["", "[]", '{"state": "lost"}', '{"val_accuracy": "high"}'])
def test_damaged_records_are_named(path, text):
    (study.trials_dir(path) / "0003.json").write_text(text)
    with pytest.raises(UserError, match=r"0003\.json is damaged: "):
        study.load(path)
