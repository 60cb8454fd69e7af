"""A search on the digits: as good as a grid in less time, after kills, and by two processes.

`scripts/test.sh -m slow tests/tuning/test_search.py -s` prints what it measures.
"""

import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

TRAIN = ("--", "--data=digits", "--model=lenet5", "--epochs=12", "--val_fraction=0.3")
SPACE = "--space=learning_rate=log(1e-5,1); optimizer=adam|sgd"
RATES = "|".join(f"{10 ** (exponent / 14 * 5 - 5):.3g}" for exponent in range(15))
TRIALS, KILLS = 12, 5


def start(path: pathlib.Path, *flags: str) -> subprocess.Popen:
    argv = [sys.executable, "-m", "keras_cifar.tune", f"--study={path}", *flags]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def search(path: pathlib.Path, *flags: str) -> str:
    process = start(path, *flags)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def records(path: pathlib.Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((path / "trials").glob("*.json"))]


def results(path: pathlib.Path) -> list[dict]:
    return [{k: v for k, v in each.items() if k != "seconds"} for each in records(path)]


def best(path: pathlib.Path) -> float:
    return max(each["val_accuracy"] for each in records(path) if each["state"] == "complete")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[pathlib.Path, float]:
    """(the directory, the seconds) of a search that nothing disturbed."""
    path, began = tmp_path_factory.mktemp("studies") / "whole", time.monotonic()
    search(path, f"--trials={TRIALS}", SPACE, *TRAIN)
    return path, time.monotonic() - began


def test_twelve_trials_are_as_good_as_a_grid_of_thirty_in_less_than_half_of_its_time(
    whole, tmp_path
):
    path, seconds = whole
    grid, began = tmp_path / "grid", time.monotonic()
    space = f"--space=learning_rate={RATES}; optimizer=adam|sgd"
    search(grid, "--trials=30", "--sampler=grid", "--pruner=none", space, *TRAIN)
    of_grid = time.monotonic() - began
    states = [each["state"] for each in records(path)]
    epochs = [sum(each["epochs"] for each in records(each)) for each in (path, grid)]
    print(
        f"\nsearch: {best(path):.4f} in {seconds:.0f} s, {epochs[0]} epochs, {states.count('pruned')} "
        f"of {TRIALS} pruned; grid of 30: {best(grid):.4f} in {of_grid:.0f} s, {epochs[1]} epochs"
    )
    assert (len(records(path)), len(records(grid))) == (TRIALS, 30)
    assert "pruned" in states
    assert best(path) >= best(grid) - 0.01
    assert seconds < of_grid / 2


def test_killed_at_random_instants_it_is_the_same_study(whole, tmp_path):
    path, chance = tmp_path / "killed", random.Random(0)
    flags = (f"--trials={TRIALS}", SPACE, *TRAIN)
    for _ in range(KILLS):
        process = start(path, *flags)
        for _ in range(chance.randint(1, 30)):
            assert process.stdout.readline()
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None
        process.kill()
        process.communicate()
        print(
            f"\nkilled; {sum(each['state'] != 'unfinished' for each in records(path))} trials done"
        )
    search(path, *flags)
    assert results(path) == results(whole[0])
    assert len(records(path)) == TRIALS


def test_two_processes_share_the_trials(tmp_path):
    path = tmp_path / "shared"
    processes = [start(path, f"--trials={TRIALS}", SPACE, *TRAIN) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    counts = [output.count(f" of {TRIALS}: ") for output in outputs]
    print(f"\ntrials of each process: {counts}")
    assert sum(counts) == TRIALS  # none was trained twice
    assert min(counts) > 0
    assert len(records(path)) == TRIALS
    assert {each["state"] for each in records(path)} <= {"complete", "pruned"}
