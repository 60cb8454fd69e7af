"""Errors that a user can fix. Commands print them as one line and exit with their status."""

import contextlib
import pathlib
from collections.abc import Iterator


class UserError(Exception):
    """Something outside the program is wrong: a file, a data set, a diverging run.

    The text is always one line, even if a file name in it has line ends.
    """

    status = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class LostWorkerError(UserError):
    """A worker was lost, another or this one. The process exits without waiting for blocked threads."""


class StoppedError(BaseException):
    """SIGTERM or SIGINT arrived. The process exits at once, as other threads may be blocked.

    It is no Exception: `except Exception`, here and in libraries, means that something went wrong.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 128 + number  # as a shell reports the signal


class UsageError(UserError):
    """The command line is wrong."""

    status = 2


def unknown(what: str, given: str, choices) -> UsageError:
    """The error for a name that is not among the `choices`."""
    return UsageError(f"unknown {what} {given!r}; choose one of: {', '.join(sorted(choices))}")


@contextlib.contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Makes one line of imports that fail: `what` needs the packages of an extra of this package."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} needs pip install 'keras_cifar[{extra}]' ({error})") from None


def one_line(text: str) -> str:
    r"""The text with unprintable characters escaped as in Python: "\n", "\x1b", "\udcff".

    The name of a file can have line ends, terminal commands and bytes that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def reason(error: BaseException) -> str:
    """The message of an exception as one line; its class if it has no message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or TensorFlow had no memory left."""
    # TensorFlow's by name, so that this module does not import it.
    return type(error).__name__ in ("MemoryError", "ResourceExhaustedError")


def unwritten(path: pathlib.Path, error: BaseException) -> UserError:
    """The error for a file that TensorFlow could not write."""
    # The message starts with the node and the file and ends with the system's reason.
    why = reason(error).rpartition("; ")[2]
    return UserError(f"{path} cannot be written: {why}; files that were saved before are intact")


def check_utf8(flag: str, path: str | pathlib.Path) -> None:
    """Raises UsageError for a path that is not UTF-8: TensorFlow cannot write there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"--{flag}={path}: TensorFlow can write to UTF-8 paths only") from None


def check_directory(path: str | pathlib.Path, what: str) -> pathlib.Path:
    """`path` as a pathlib.Path; raises UserError unless it is a directory."""
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    if not path.is_dir():
        raise UserError(f"{what} {path} is not a directory")
    return path
