"""Finding the image files that arguments name, and decoding them ahead of their use."""

import concurrent.futures
import itertools
import os
import pathlib
import threading
import time

import numpy as np
import pytest
from PIL import Image

from keras_cifar.core import environment
from keras_cifar.data.images import ImageError
from keras_cifar.inference import image_files
from tests.commands import hostile
from tests.conftest import refuse_folder

# ---- Finding


def touch(root: pathlib.Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(*arguments) -> list[str]:
    files = list(image_files.find([str(argument) for argument in arguments]))
    assert all(error is None for _, error in files)
    return [file for file, _ in files]


def test_a_folder_stands_for_its_images_sorted(tmp_path):
    images = ["a.PNG", "b.png", "sub/a.bmp", "sub/deep/c.jpg"]
    # macOS writes ._ files.
    touch(tmp_path, *images, "notes.txt", "sub/x.csv", "._b.png", ".hidden/d.png")
    (tmp_path / "album.jpg").mkdir()
    (tmp_path / "sub" / "up").symlink_to("..")  # Links are not followed.
    assert found(tmp_path) == [str(tmp_path / name) for name in images]


def test_a_pattern_stands_for_what_it_matches_sorted(tmp_path):
    touch(tmp_path, "1_b.png", "2_b.png", "0_a.png", "sub/3_b.png", "x[1]*.png")

    def names(*arguments):
        return [os.path.relpath(file, tmp_path) for file in found(*arguments)]

    assert names(tmp_path / "*_b.png", tmp_path / "[0]*.png") == ["1_b.png", "2_b.png", "0_a.png"]
    assert len(names(tmp_path / "**" / "*_b.png")) == 3
    # A file whose name looks like a pattern is a file.
    assert names(tmp_path / "x[1]*.png") == ["x[1]*.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")
    locked = tmp_path / "locked"
    refuse_folder(monkeypatch, locked)
    files = list(image_files.find([str(tmp_path)]))
    assert files == [(str(tmp_path / "a.png"), None), (str(locked), "Permission denied")]


# ---- Reasons


def truncated(path):
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def nothing(path):
    pass


INVALID = {
    "none.png": (nothing, "no such file"),
    "empty": (pathlib.Path.mkdir, "the folder has no images"),
    "none*.png": (nothing, "nothing matches this pattern"),
    "link.png": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "circle.png": (lambda path: path.symlink_to("circle.png"), "no such file"),
    "text.png": (lambda path: path.write_text("x"), "not an image in a format that can be read"),
    "empty.jpg": (pathlib.Path.touch, "the file is empty"),
    "cut.jpg": (truncated, "truncated"),
    "x" * 300 + ".png": (nothing, "name too long"),
    "pipe.png": (os.mkfifo, "it is a pipe or a device"),
    "/dev/zero": (nothing, "it is a pipe or a device"),
    "bomb.png": (lambda path: path.write_bytes(hostile.png(40_000, 40_000)), "178,956,970 pixels"),
    "a.png": (postscript, "not an image in a format that can be read"),
}


def test_each_invalid_file_has_its_reason_and_the_others_are_decoded(tmp_path):
    Image.new("RGB", (5, 5), "red").save(tmp_path / "good.dat", "PNG")  # whatever its suffix
    arguments, good = [], str(tmp_path / "good.dat")
    for name, (write, _) in INVALID.items():
        write(tmp_path / name)
        arguments += [str(tmp_path / name), good]
    batches = image_files.decode(image_files.find(arguments), (2, 2))
    decoded = list(itertools.chain.from_iterable(batches))
    assert [file for file, _, _ in decoded] == arguments
    for (_, reason), (_, pixels, error) in zip(INVALID.values(), decoded[::2], strict=True):
        assert reason in error.lower()
        assert pixels is None
    for _, pixels, error in decoded[1::2]:
        assert pixels.tolist() == [[[255, 0, 0]] * 2] * 2
        assert error is None


# ---- Decoding ahead

PATIENCE = 30  # seconds until what should happen counts as not happening


class Watch:
    """Stands in for `load_image`: images are their numbers, and each read is recorded."""

    def __init__(self, monkeypatch, threads: int = 2):
        self.lock, self.read, self.released = threading.Lock(), [], threading.Event()
        self.released.set()
        self.broken = {}
        monkeypatch.setattr("keras_cifar.data.images.load_image", self.load)
        monkeypatch.setattr(image_files, "BATCH_SIZE", 4)
        monkeypatch.setattr(environment, "usable_cpus", lambda: threads)

    def load(self, name, size, rule):
        assert self.released.wait(PATIENCE)
        with self.lock:
            self.read.append(int(name))
        if name in self.broken:
            raise self.broken[name]
        return np.full((*size, 3), int(name) % 256, np.uint8)

    def until(self, count: int) -> bool:
        """Waits until `count` images were read; whether that happened."""
        end = time.monotonic() + PATIENCE
        while len(self.read) < count and time.monotonic() < end:
            time.sleep(0.001)
        return len(self.read) >= count


def decode(count: int):
    return image_files.decode(((str(i), None) for i in range(count)), (2, 2))


@pytest.fixture(params=[1, 5])
def watch(request, monkeypatch) -> Watch:
    return Watch(monkeypatch, request.param)


def test_the_next_batch_is_decoded_while_one_is_classified(watch):
    batches = decode(12)
    next(batches)
    # The caller is classifying the first four now: it asks for nothing.
    assert watch.until(8)
    watch.released.clear()
    # The second batch does not wait for the third.
    assert [name for name, _, _ in next(batches)] == ["4", "5", "6", "7"]
    watch.released.set()
    assert watch.until(12)


def test_images_and_errors_keep_their_order_whichever_thread_reads_them(watch):
    watch.broken = {"5": ImageError("torn")}
    files = ((str(i), "no such file" if i == 1 else None) for i in range(1001))
    batches = list(image_files.decode(files, (2, 2)))
    assert [len(batch) for batch in batches] == [4] * 250 + [1]
    decoded = [item for batch in batches for item in batch]
    assert [name for name, _, _ in decoded] == [str(i) for i in range(1001)]
    errors = {"1": "no such file", "5": "torn"}
    for name, pixels, error in decoded:
        assert error == errors.get(name)
        assert pixels is None if error else (pixels == int(name) % 256).all()
    assert sorted(watch.read) == [i for i in range(1001) if i != 1]
    assert list(decode(0)) == []


def test_only_the_current_batch_and_those_ahead_are_held(watch):
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield str(i), None

    batches = image_files.decode(endless(), (2, 2))
    for number in range(1, 51):
        next(batches)
        expected = image_files.BATCH_SIZE * (number + image_files.AHEAD)
        assert watch.until(expected)
        assert len(watch.read) == len(taken) == expected
    batches.close()


def test_a_bug_in_decoding_is_not_hidden(watch):
    watch.broken = {"6": ZeroDivisionError("bug")}
    batches = decode(100)
    next(batches)
    with pytest.raises(ZeroDivisionError, match="bug"):
        list(batches)
    assert len(watch.read) < 100


def test_a_caller_that_stops_waits_only_for_images_being_read(monkeypatch):
    watch = Watch(monkeypatch, threads=2)
    shutdown = concurrent.futures.ThreadPoolExecutor.shutdown

    def release(pool, *args, **kwargs):
        watch.released.set()
        shutdown(pool, *args, **kwargs)

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "shutdown", release)
    batches = decode(100)
    next(batches)
    assert watch.until(8)
    watch.released.clear()
    next(batches)  # Two of the next four are being read, or soon will be.
    batches.close()
    assert len(watch.read) <= 10
