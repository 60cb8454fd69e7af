"""Reading untrusted files, writing files atomically. Standard library only."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import stat
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

READ_BLOCK = 2**16  # bytes, at least, that `read` asks for at a time


def open_file(path: str | pathlib.Path) -> BinaryIO:
    """Opens a file for reading, unbuffered, without blocking on a pipe.

    Raises:
        OSError: as `open`, and for a folder, a pipe, a socket or a device.
    """
    # O_NONBLOCK opens a pipe that has no writer without waiting for one.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read(path: str | pathlib.Path, limit: int) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: as `open_file`, and for a file larger than `limit` bytes.
    """
    with open_file(path) as file:
        size, length = size_of(file), 0
        pieces: list[bytes] = []
        # A raw read allocates all that it is asked for, and may return less, as on a network file
        # system. It returns nothing at the end, which moves while somebody writes.
        while max(size, length) <= limit:
            piece = file.read(max(size - length, READ_BLOCK))
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            length += len(piece)
    raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))


def size_of(file: BinaryIO) -> int:
    """The size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


# What is being written is in directories whose names begin so; a killed process leaves them.
TEMPORARY = ".writing-"


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a JSON file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(value) + "\n", "utf-8")


def to_json(value: object) -> str:
    """JSON in UTF-8; bytes of file names that are not UTF-8 are escaped, as \\udcff."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path with the same name, which replaces `path` when the body succeeds.

    The file at `path` stays intact until then, even if the machine stops in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as directory:
            temporary = pathlib.Path(directory) / path.name
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except OSError as error:
        # If the disk is full, Python does not say which file it was writing.
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def new_version(base: pathlib.Path, version: int | None = None) -> Iterator[tuple]:
    """(a directory to create and fill, `base/<version>`); it is renamed when the body succeeds.

    `version` is an integer, or None for the one after the highest.

    Raises:
        FileExistsError: the version exists already.
    """
    target = base / str(version or max(versions(base), default=0) + 1)
    if target.exists():
        raise FileExistsError(17, "this version exists already", str(target))
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=base) as temporary:
        written = pathlib.Path(temporary) / "model"
        yield written, target
        for path in written.rglob("*"):
            sync(path)
        os.rename(written, target)
    sync(base)


def sync(path: pathlib.Path) -> None:
    """Flushes a file or a directory to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions(base: pathlib.Path) -> list[int]:
    """The versions below a TensorFlow Serving model base path, ascending."""
    if not base.is_dir():
        return []
    return sorted(int(p.name) for p in base.iterdir() if p.name.isdecimal() and p.is_dir())
