"""What tests of servers share."""

import pytest

from tests.inference.test_predict import command


@pytest.fixture
def failure(capsys):
    """Runs the command, which must fail before any output: the line on stderr."""

    def run(*argv, status=1) -> str:
        assert command(*argv) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    return run


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("class_0\nclass_1\nclass_2\n")
    return path
