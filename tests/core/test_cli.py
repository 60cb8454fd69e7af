"""The command lines: --help, usage errors, exit status, flag files."""

import dataclasses
import os
import subprocess
import sys

import pytest
import tensorflow as tf

from keras_cifar.core import cli, environment, recipes
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.options import fields, option

COMMANDS = (
    "train",
    "evaluate",
    "export",
    "predict",
    "serve",
    "launch",
    "compare",
    "report",
    "tune",
)


@dataclasses.dataclass(frozen=True)
class Options:
    number: int = option(3, "a number", "Group")
    share: float | None = option(None, "a share", "Group")
    kind: str = option("a", "a kind", "Other", ("a", "b"))
    on: bool = option(True, "a switch", "Other")


def execute(main, argv, arguments=""):
    return cli._execute("test", main, Options, arguments, argv)


@pytest.mark.parametrize(
    ("command", "flag", "text"),
    [
        *((name, "--help", f"usage: python -m keras_cifar.{name} ") for name in COMMANDS),
        ("train", "--list_recipes", recipes.table()),
    ],
)
def test_help_and_lists_need_no_tensorflow(command, flag, text):
    code = (
        f"import runpy, sys; sys.argv = ['x', '{flag}']\n"
        f"try: runpy.run_module('keras_cifar.{command}', run_name='__main__')\n"
        "except SystemExit as e: print('status', e.code, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "status 0 False"
    assert done.stdout.startswith(text)


def test_help_shows_every_flag_with_its_default_and_group():
    text = cli.usage(TrainConfig, "What it does.", "python -m x")
    for field in fields(TrainConfig):
        assert f"--{field.name} " in text or f"--[no]{field.name}" in text
        assert field.metadata["help"].split()[0] in text
        assert not field.metadata["choices"] or field.default in field.metadata["choices"]
    assert "(default: resnet32)" in text
    assert "adam|adamw|sgd" in text
    assert text.index("Training:") < text.index("--epochs") < text.index("Output:")


def test_flags_become_the_dataclass():
    options, rest = cli.parse(Options, ["--number=5", "x", "--share", "0.5", "--noon", "--kind=b"])
    assert options == Options(5, 0.5, "b", False)
    assert rest == ["x"]
    assert cli.parse(Options, [])[0] == Options()


def test_flagfile_is_read_and_later_flags_win(tmp_path):
    file = tmp_path / "x.flags"
    file.write_text("# a comment\n--number=7\n--kind=b\n")
    assert cli.parse(Options, [f"--flagfile={file}", "--kind=a"])[0] == Options(7, None, "a")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--numbr=3"], "numbr"),
        (["--number=three"], "three"),
        (["--kind=c"], "--kind 'c'; choose one of: a, b"),
        (["--flagfile=/nowhere.flags"], "nowhere.flags"),
        (["stray"], "stray"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(argv, words, capsys):
    assert execute(lambda options: None, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("test: error: ")
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("the file x is empty"), 1, "the file x is empty"),
        (UsageError("bad"), 2, "bad"),
        (MemoryError(), 1, cli.OUT_OF_MEMORY),
        (tf.errors.ResourceExhaustedError(None, None, "OOM when ..."), 1, cli.OUT_OF_MEMORY),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "Permission denied: /a/b"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_an_error_becomes_a_line_and_a_status(error, status, words, capsys):
    def main(options):
        raise error

    assert execute(main, []) == status
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert words in printed


def test_a_bug_shows_its_traceback():
    def main(options):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        execute(main, [])


def test_main_gives_the_status_and_gets_the_arguments():
    seen = []
    assert execute(lambda options, rest: seen.extend(rest) or 1, ["a", "b"], "FILE ...") == 1
    assert seen == ["a", "b"]
    assert execute(lambda options: None, []) == 0


def test_tensorflow_starts_silently_unless_asked():
    code = "from keras_cifar.core import environment; environment.import_tensorflow()"

    def stderr(**changes):
        env = {k: v for k, v in os.environ.items() if k not in environment.DEFAULTS} | changes
        return subprocess.run([sys.executable, "-c", code], capture_output=True, env=env).stderr

    assert stderr() == b""
    assert b"oneDNN" in stderr(TF_CPP_MIN_LOG_LEVEL="0")
