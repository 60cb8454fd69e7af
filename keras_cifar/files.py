"""Reading files that somebody else wrote. Standard library only."""

import errno
import os
import pathlib
import stat
from typing import BinaryIO


def open_file(path: str | pathlib.Path) -> BinaryIO:
    """Opens a file for reading, unbuffered, and never waits for one that is a pipe.

    Raises:
        OSError: as `open`, and for what is no file but a folder, a pipe, a socket or a device.
    """
    # A pipe is opened at once then, whether or not somebody writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device instead of a file", str(path))
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read(path: str | pathlib.Path, limit: int) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: as `open_file`, and for a file of more bytes than the limit.
    """
    with open_file(path) as file:
        if size_of(file) > limit:
            raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
        return file.read(limit)


def size_of(file: BinaryIO) -> int:
    """The bytes of an open file."""
    return os.fstat(file.fileno()).st_size
