"""A cache of decoded images on disk, which are memory-mapped.

An entry is one split of a source at one size: a directory named by a hash of all that decides its
pixels. It is written under another name, synced and renamed, so it is either complete or not there.
Entries never change: a process that has mapped one keeps it, even when it is replaced or deleted.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import stat
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import PIL
import tensorflow as tf
import tqdm

from keras_cifar.core.errors import UserError, reason
from keras_cifar.core.files import sync
from keras_cifar.data.images import VERSION
from keras_cifar.data.splits import Split, pixel_digests

# Part of an entry's name, so that other versions decode again. The first is that of an entry's files.
DECODER = [2, VERSION, PIL.__version__, tf.__version__]

SAMPLE = 16  # images whose digests are checked when an entry is opened
BLOCK = 2**23  # bytes of pixels that are decoded before they are written

# write(start, images) puts uint8 [n, H, W, 3] into rows start ... start + n; threads may call it.
Write = Callable[[int, np.ndarray], None]


class Cache:
    """A directory of entries.

    Args:
        directory: None is `$XDG_CACHE_HOME/keras_cifar` or `~/.cache/keras_cifar`, or a directory
            for temporary files where that is not writable, if nobody else can write there.
    """

    def __init__(self, directory: str | None = None):
        self._given = directory
        self._places = [pathlib.Path(directory).expanduser()] if directory else default_places()
        # Anybody may have created it, for us to train on their images.
        self._private = None if directory else temporary_place()

    def find(self, cache_key: dict) -> Split | None:
        """The entry with this key; None if it is missing or damaged."""
        for place in self._places:
            with contextlib.suppress(OSError):
                self._check(place)
                split = _open(place / _name(cache_key))
                if split is not None:
                    return split
        return None

    def make(
        self,
        cache_key: dict,
        shape: tuple[int, int, int, int],
        what: str,
        fill: Callable[[Write], np.ndarray],
        unreadable: Mapping[int, str] = types.MappingProxyType({}),
    ) -> Split:
        """Creates an entry and opens it, or waits for another process that creates it.

        Args:
            cache_key: all that decides the pixels and labels, for JSON; "source" names the kind.
            shape: (N, H, W, 3).
            what: the split, for messages.
            fill: writes all images and returns the labels, int64 [N].
            unreadable: row -> why, of images that `fill` could not decode; read after `fill`.

        Raises:
            UserError: the directory is not writable or the disk full; it leaves no files behind.
        """
        if not shape[0]:
            return Split(np.empty(shape, np.uint8), np.empty(0, np.int64))
        name, place = _name(cache_key), self._writable
        with _lock(place / f"{name}.lock", what) as locked:
            if locked:
                split = _open(place / name)
                if split is not None:
                    return split
                _clean(place, name)
            _check_space(place, shape, what)
            temporary = place / f"{name}.building-{secrets.token_hex(8)}"
            try:
                temporary.mkdir()
                _write(temporary, cache_key, shape, what, fill, unreadable)
                _install(temporary, place / name)
            except OSError as error:
                raise UserError(
                    f"{what}: the cache {place} cannot be written: {reason(error)}; "
                    "choose another --cache_dir"
                ) from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            split = _open(place / name)
        if split is None:
            raise UserError(f"{what}: {place / name} was damaged while it was written; try again")
        return split

    @functools.cached_property
    def _writable(self) -> pathlib.Path:
        errors = []
        for place in self._places:
            try:
                mode = 0o700 if place == self._private else 0o777
                place.mkdir(mode, parents=True, exist_ok=True)
                self._check(place)
                tempfile.TemporaryFile(dir=place).close()
            except OSError as error:
                errors.append(f"{place} cannot be used ({reason(error)})")
            else:
                if errors:
                    print(f"cache     {errors[0]}; using {place}", file=sys.stderr, flush=True)
                return place
        flag = f"--cache_dir={self._given}: " if self._given else ""
        raise UserError(f"{flag}the cache {' and '.join(errors)}; choose another --cache_dir")

    def _check(self, place: pathlib.Path) -> None:
        if place == self._private:
            check_private(place)


def in_block(image_shape: tuple[int, int, int]) -> int:
    """How many images of (H, W, 3) are decoded before they are written."""
    return min(64, max(1, BLOCK // int(np.prod(image_shape))))


def default_places() -> list[pathlib.Path]:
    """Where entries are without --cache_dir, the preferred place first."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # The standard says to ignore it.
        base = pathlib.Path(os.path.expanduser("~"), ".cache")
    # "~" stays where the user has no home.
    return [*([base / "keras_cifar"] if base.is_absolute() else []), temporary_place()]


def temporary_place() -> pathlib.Path:
    """Where entries are if the user's own cache is not writable: a directory for each user."""
    return pathlib.Path(tempfile.gettempdir(), f"keras_cifar-{os.getuid()}")


def check_private(path: pathlib.Path) -> None:
    """Raises OSError unless `path` is a directory, no link, to which this user alone can write."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", str(path))
    if found.st_uid != os.getuid():
        raise PermissionError(errno.EACCES, "it belongs to another user", str(path))
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EACCES, "other users can write to it", str(path))


def _name(cache_key: dict) -> str:
    text = json.dumps({"cache_key": cache_key, "decoder": DECODER}, sort_keys=True)
    return f"{cache_key['source']}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _open(path: pathlib.Path) -> Split | None:
    """The entry at `path`, its images mapped; None if it is missing or damaged."""
    try:
        about = json.loads((path / "entry.json").read_text("utf-8"))
        if (path / "images.npy").stat().st_size != about["bytes"]:
            return None
        # Read-only: Linux refuses a writable mapping, even a private one, larger than the memory.
        images = np.load(path / "images.npy", mmap_mode="r").view(np.ndarray)
        digests = np.load(path / "digests.npy")
        split = Split(
            images,
            np.load(path / "labels.npy"),
            digests=digests,
            unreadable=tuple((range(len(images))[row], str(why)) for row, why in about["unusable"]),
        )
        # The fingerprint covers labels and digests. Of the pixels, a sample is compared with the
        # digests: all of them may be more than the memory holds.
        sample = np.linspace(0, len(images) - 1, SAMPLE).astype(np.int64)
        intact = (
            list(images.shape) == about["shape"]
            and images.dtype == np.uint8
            and len(images) == len(split)
            and split.fingerprint == about["fingerprint"]
            and np.array_equal(pixel_digests(images, sample), digests[sample])
        )
        return split if intact else None
    except Exception:  # A damaged file can raise almost anything.
        return None


def _write(path: pathlib.Path, cache_key, shape, what, fill, unreadable) -> None:
    """Writes and syncs the files of an entry in the directory `path`."""
    digests = np.empty((shape[0], 16), np.uint8)
    stride = int(np.prod(shape[1:]))
    with (
        open(path / "images.npy", "wb", buffering=0) as file,
        tqdm.tqdm(total=shape[0], desc=f"reading {what}", leave=False, disable=None) as bar,
    ):
        form = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, form)
        header = file.tell()

        def write(start, images):
            images = np.ascontiguousarray(images)
            digests[start : start + len(images)] = pixel_digests(images)
            # Not through a mapping, where a full disk kills the process.
            if os.pwrite(file.fileno(), images, header + start * stride) != images.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            bar.update(len(images))

        labels = fill(write)
        os.fsync(file.fileno())
    np.save(path / "labels.npy", labels)
    np.save(path / "digests.npy", digests)
    empty = np.empty((0, *shape[1:]), np.uint8)
    about = {
        "what": what,
        "cache_key": cache_key,
        "decoder": DECODER,
        "shape": shape,
        "unusable": sorted(unreadable.items()),
        "bytes": header + shape[0] * stride,
        "fingerprint": Split(empty, labels, None, digests).fingerprint,
    }
    (path / "entry.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    for name in ("labels.npy", "digests.npy", "entry.json", "."):
        sync(path / name)


def _install(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a complete entry to its place, where a damaged or an equal one may be."""
    # Only what was there before `_open`: a later entry comes from a faster process without locks.
    if os.path.lexists(path) and _open(path) is None:
        _remove(path)
    try:
        os.rename(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: pathlib.Path, what: str) -> Iterator[bool]:
    """Holds the lock of an entry, which the system releases when the process ends.

    It saves two processes from doing the same work; the entry is safe without it. Yields whether
    there is a lock: not all file systems have them.
    """
    with contextlib.ExitStack() as stack:
        locked = False
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(path, "ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that reads {what}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        yield locked


def _clean(place: pathlib.Path, mine: str) -> None:
    """Removes half-written entries whose lock nobody holds: killed processes left them."""
    for path in place.glob("*.building-*"):
        name = path.name.partition(".building-")[0]
        with contextlib.suppress(OSError), open(place / f"{name}.lock", "rb+") as file:
            if name != mine:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)


def _check_space(place: pathlib.Path, shape: tuple, what: str) -> None:
    needed = int(np.prod(shape, dtype=object)) + shape[0] * 24  # labels and digests
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{what}: {shape[0]} images of {shape[1]} x {shape[2]} pixels need {needed / 1e9:.1f} GB "
            f"of disk and {free / 1e9:.1f} GB are free in {place}; choose another --cache_dir or a "
            "smaller --image_size"
        )
