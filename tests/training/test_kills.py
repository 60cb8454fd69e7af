"""A run that is killed at any instant and started again ends as if nothing had happened.

`KILLS=200 scripts/test.sh -m slow tests/training/test_kills.py` is the long form.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import WITHOUT_THREADS
from tests.training.kills import CASES

KILLS = int(os.environ.get("KILLS", "20"))
QUICK = 2  # kills in the default run
EACH = [pytest.param(case, marks=() if case == "tiny" else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", EACH)
def test_run_that_was_killed_ends_with_the_very_same_bits(tmp_path, case):
    kills = QUICK if case == "tiny" else KILLS
    command = [sys.executable, "-m", "tests.training.kills", str(tmp_path), case, str(kills)]
    env = os.environ | WITHOUT_THREADS
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["kills"] == kills
    assert not found["different"]
    assert found["while writing"] > 0 or case == "tiny"
