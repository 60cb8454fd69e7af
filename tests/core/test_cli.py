"""The command lines: --help, usage errors, exit status, flag files."""

import dataclasses
import subprocess
import sys
import time

import pytest

from keras_cifar.core import cli, environment
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.options import fields, option

COMMANDS = ("train", "evaluate", "export", "predict", "serve", "launch", "compare", "report")


@dataclasses.dataclass(frozen=True)
class Options:
    number: int = option(3, "a number", "Group")
    share: float | None = option(None, "a share", "Group")
    kind: str = option("a", "a kind", "Other", ("a", "b"))
    on: bool = option(True, "a switch", "Other")


def execute(main, argv, arguments=""):
    return cli._execute("test", main, Options, arguments, argv)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once_and_without_tensorflow(command):
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('keras_cifar.{command}', run_name='__main__')\n"
        "except SystemExit as e: print('status', e.code, 'tensorflow' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
    assert done.stdout.splitlines()[-1] == "status 0 False"
    assert f"usage: python -m keras_cifar.{command}" in done.stdout
    assert min(seconds) < 0.5


def test_help_shows_every_flag_with_its_default_and_group():
    text = cli.usage(TrainConfig, "What it does.", "python -m x")
    for field in fields(TrainConfig):
        assert f"--{field.name} " in text or f"--[no]{field.name}" in text
        assert field.metadata["help"].split()[0] in text
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
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "--batch_size"),
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


def test_running_out_of_device_memory_is_said_in_words(capsys):
    import tensorflow as tf

    def main(options):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating ...")

    assert execute(main, []) == 1
    assert capsys.readouterr().err == (
        "test: error: out of memory; a smaller --batch_size or --image_size needs less\n"
    )


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
        names = environment.DEFAULTS
        import os

        env = {k: v for k, v in os.environ.items() if k not in names} | changes
        return subprocess.run([sys.executable, "-c", code], capture_output=True, env=env).stderr

    assert stderr() == b""
    assert b"oneDNN" in stderr(TF_CPP_MIN_LOG_LEVEL="0")


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    environment.configure()
    import os

    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"
    assert os.environ["KERAS_BACKEND"] == "tensorflow"
