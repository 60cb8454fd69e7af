"""Finds the image files that arguments name, and decodes them in batches ahead of their use."""

import collections
import concurrent.futures
import glob
import itertools
import os
import pathlib
from collections.abc import Iterator

from keras_cifar.core import environment
from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.core.errors import reason
from keras_cifar.core.image_size import STRETCH
from keras_cifar.data import images

AHEAD = 1  # batches that are decoded while one is classified
MAX_THREADS = 32  # that decode


def find(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yields (file, None) for each image, or (argument, error) where there is none.

    A folder stands for the images in it and below it, sorted; a glob for what it matches; a file is
    taken whatever its suffix.
    """
    for argument in arguments:
        matches = [argument]
        if not os.path.lexists(argument) and glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))
            if not matches:
                yield argument, "nothing matches this pattern"
        for match in matches:
            path = pathlib.Path(match)
            try:
                if not path.is_dir():
                    yield match, None if path.exists() else "no such file"
                    continue
            except OSError as error:
                yield match, reason(error)
                continue
            found = _in_folder(match)
            if not found:
                yield match, "the folder has no images"
            yield from found


def _in_folder(folder: str) -> list[tuple[str, str | None]]:
    """(file, None) of each image below a folder, (folder, error) of each unreadable folder."""
    errors: list[OSError] = []
    found = []
    for directory, folders, names in os.walk(folder, onerror=errors.append):  # follows no links
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (os.path.join(directory, name), None)
            for name in names
            if os.path.splitext(name)[1].lower() in images.SUFFIXES and not name.startswith(".")
        ]
    found += [(error.filename, reason(error)) for error in errors]
    return sorted(found, key=lambda item: item[0].split(os.sep))


def decode(
    files: Iterator[tuple[str, str | None]], size: tuple[int, int], rule: str = STRETCH
) -> Iterator[list[tuple]]:
    """Yields batches, lists of (file, pixels uint8 [*size, 3] or None, error or None), in order.

    `files` is as from `find`, `rule` that of `images.resize_images`. While the caller works on a batch
    the next AHEAD are decoded, and no more: a folder of any size takes the same memory.
    """
    started = collections.deque()  # (files to decode, decoded, tasks) of each batch
    threads = min(MAX_THREADS, environment.usable_cpus())
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while len(started) <= AHEAD:
                    batch = list(itertools.islice(files, BATCH_SIZE))
                    if not batch:
                        break
                    waiting, decoded = collections.deque(enumerate(batch)), [None] * len(batch)
                    # A task per thread, not per file: a task costs as much as decoding a small image.
                    tasks = [
                        pool.submit(_decode, waiting, decoded, size, rule) for _ in range(threads)
                    ]
                    started.append((waiting, decoded, tasks))
                if not started:
                    return
                _, decoded, tasks = started.popleft()
                for task in tasks:
                    task.result()
                yield decoded
        finally:
            for waiting, _, _ in started:
                waiting.clear()  # An interrupt need not wait for images that nobody wants.


def _decode(waiting: collections.deque, decoded: list, size: tuple[int, int], rule: str) -> None:
    """Decodes the (position, (file, error or None)) of `waiting`, which threads share, in `decoded`."""
    while waiting:
        try:
            position, (file, error) = waiting.popleft()
        except IndexError:  # Another thread was faster.
            return
        pixels = None
        if error is None:
            try:
                pixels = images.load_image(file, size, rule)
            except images.ImageError as problem:
                error = str(problem)
        decoded[position] = (file, pixels, error)
