"""Errors that a user can mend. Commands print them as one line and exit with their status."""

import pathlib


class UserError(Exception):
    """Something outside the program is wrong: a file, a data set, a diverging run.

    Its text is one line, whatever the names in it are.
    """

    status = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class LostWorkerError(UserError):
    """Another worker of the run is gone. TensorFlow's threads may still wait for it: the process must
    not wait for them.
    """


class StoppedError(UserError):
    """SIGTERM or SIGINT came. The process ends at once: other threads may still wait for something."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 128 + number  # as a shell reports the signal


class UsageError(UserError):
    """The command line is wrong."""

    status = 2


def unknown(what: str, given: str, choices) -> UsageError:
    """The error for a name that is not among the `choices`."""
    return UsageError(f"unknown {what} {given!r}; choose one of: {', '.join(sorted(choices))}")


def one_line(text: str) -> str:
    r"""The text with all that cannot be printed written as Python does: "\n", "\x1b", "\udcff".

    A file's name can have line ends, commands to the terminal and bytes that are no text.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def reason(error: BaseException) -> str:
    """What an exception says, as one line without its class where that is readable."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":") if lines else type(error).__name__


def unwritten(path: pathlib.Path, error: BaseException) -> UserError:
    """The error for what TensorFlow could not write."""
    # It begins with the node and the file, and says at the end what the system did.
    lines = str(getattr(error, "message", error)).splitlines()
    why = lines[0].rpartition("; ")[2] if lines else type(error).__name__
    return UserError(f"{path} cannot be written: {why}; what was saved before stays")


def check_utf8(flag: str, path: str | pathlib.Path) -> None:
    """Raises UsageError for a path with bytes that are no UTF-8, where TensorFlow cannot write."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"--{flag}={path}: TensorFlow writes only where names are UTF-8") from None


def check_directory(path: str | pathlib.Path, what: str) -> pathlib.Path:
    """`path` as a pathlib.Path, or a UserError that says why it is no readable directory."""
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    if not path.is_dir():
        raise UserError(f"{what} {path} is not a directory")
    return path
