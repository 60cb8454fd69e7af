"""A run that is killed at any instant and started again ends as if nothing had happened.

`KILLS=200 scripts/test.sh -m slow tests/test_kills.py` is the long form.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.training.kills import CASES

KILLS = int(os.environ.get("KILLS", "20"))
USUAL = {"tiny": 5}  # kills in the default run


def killed(directory, case: str, kills: int) -> dict:
    command = [sys.executable, "-m", "tests.training.kills", str(directory), case, str(kills)]
    # The processes are forked, so nothing may start threads before.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, kills: int) -> None:
    print(found)
    assert found["kills"] == kills
    assert not found["different"]


@pytest.mark.parametrize("case", USUAL)
def test_run_that_was_killed_ends_with_the_very_same_bits(tmp_path, case):
    check(killed(tmp_path, case, USUAL[case]), USUAL[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in USUAL])
def test_run_that_was_killed_often_ends_with_the_very_same_bits(tmp_path, case):
    found = killed(tmp_path, case, KILLS)
    check(found, KILLS)
    assert found["while writing"] > 0
