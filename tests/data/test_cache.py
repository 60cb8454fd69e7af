"""Decoded images on disk: made once, keyed by content, whole or not there, and never in memory."""

import errno
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading

import numpy as np
import psutil
import pytest
from PIL import Image

from keras_cifar import data
from keras_cifar.core import environment
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.data import cache as cache_module
from keras_cifar.data import evaluation_batches, folder, splits, training_batches
from keras_cifar.data.cache import Cache
from keras_cifar.data.images import VERSION, load_image
from keras_cifar.data.splits import Split
from keras_cifar.evaluation import evaluator
from keras_cifar.training import trainer
from tests.conftest import write_folder

KEY = {"source": "test", "contents": "abc"}
SHAPE = (20, 4, 5, 3)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


def labels() -> np.ndarray:
    return np.arange(SHAPE[0]) % 3


def fill(write) -> np.ndarray:
    """Writes `pixels` in two blocks, the second first, as threads may."""
    write(12, pixels()[12:])
    write(0, pixels()[:12])
    return labels()


def must_not_fill(write):
    raise AssertionError("an existing entry is created again")


def make(directory: pathlib.Path, fill=fill, cache_key=KEY) -> Split:
    return Cache(str(directory)).make(cache_key, SHAPE, "my images", fill)


def assert_right(split: Split) -> None:
    np.testing.assert_array_equal(split.images, pixels())
    np.testing.assert_array_equal(split.labels, labels())
    assert split.images.dtype == np.uint8
    assert split.labels.dtype == np.int64


def entry(directory: pathlib.Path) -> pathlib.Path:
    """The only entry of a cache."""
    (only,) = directory.glob("*/entry.json")
    return only.parent


def left(directory: pathlib.Path) -> list[str]:
    """All that is in a cache but the locks."""
    return [p.name for p in directory.glob("*") if p.suffix != ".lock"]


def in_new_process(code: str, **options) -> subprocess.Popen:
    code = "from keras_cifar.core import environment\nenvironment.import_tensorflow()\n" + code
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **options)


needs_proc = pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="Linux says it in /proc"
)


# ---- Entries


def test_entry_is_found_again_and_mapped_read_only(tmp_path):
    assert Cache(str(tmp_path)).find(KEY) is None
    assert_right(make(tmp_path))
    found = Cache(str(tmp_path)).find(KEY)
    assert_right(found)
    assert_right(make(tmp_path, must_not_fill))
    assert found.fingerprint == Split(pixels(), labels()).fingerprint
    assert isinstance(found.stored.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.stored[0] = 0


@pytest.mark.parametrize(
    "other", [{"contents": "abd"}, {"source": "other"}, {"image_size": [4, 5]}, None]
)
def test_another_key_or_decoder_is_another_entry(tmp_path, monkeypatch, other):
    assert {VERSION, Image.__version__} <= set(cache_module.DECODER)
    make(tmp_path)
    if other is None:
        monkeypatch.setattr(cache_module, "DECODER", [*cache_module.DECODER[:-1], "another"])
    assert Cache(str(tmp_path)).find(KEY | (other or {})) is None


def test_empty_split_needs_no_entry(tmp_path):
    split = Cache(str(tmp_path)).make(KEY, (0, 4, 5, 3), "x", must_not_fill)
    assert split.images.shape == (0, 4, 5, 3)
    assert left(tmp_path) == []


def test_more_than_the_memory_holds_is_mapped_and_read(tmp_path):
    small = make(tmp_path, lambda write: write(0, np.zeros(SHAPE, np.uint8)) or labels())
    assert len(small) == SHAPE[0]
    shape = (2 * psutil.virtual_memory().total // (3 * 2**20), 1024, 1024, 3)
    path, about = entry(tmp_path), json.loads((entry(tmp_path) / "entry.json").read_text())
    with open(path / "images.npy", "wb") as file:  # a file of holes, which read as zeros
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        size = file.tell() + int(np.prod(shape))
        file.truncate(size)
    digests = np.tile(splits.pixel_digests(np.zeros((1, *shape[1:]), np.uint8)), (shape[0], 1))
    numbers = np.arange(shape[0]) % 3
    np.save(path / "labels.npy", numbers)
    np.save(path / "digests.npy", digests)
    # Of the shape and the digests, without the pixels.
    fingerprint = Split(np.empty((0, *shape[1:]), np.uint8), numbers, None, digests).fingerprint
    about |= {"shape": shape, "bytes": size, "fingerprint": fingerprint}
    (path / "entry.json").write_text(json.dumps(about))
    split = Cache(str(tmp_path)).find(KEY)
    assert len(split) == shape[0]
    for batches in (
        training_batches(split, 3, 4, "flip", seed=0),
        evaluation_batches(split.take(np.arange(shape[0])[::-1]), 3, 4),
    ):
        images, _ = next(iter(batches))
        assert images.shape == (4, 1024, 1024, 3)
        assert not np.any(images)


DAMAGES = {
    "shorter": lambda contents: contents[:-1],
    "longer": lambda contents: contents + b"x",
    "other beginning": lambda contents: b"garbage" + contents[7:],
    "other end": lambda contents: contents[:-3] + bytes(255 - b for b in contents[-3:]),
    "zeros": lambda contents: bytes(len(contents)),
    "missing": None,
    "directory": None,
}
# Bytes after the end of an array, or of JSON's last line, mean nothing.
HARMLESS = {("labels.npy", "longer"), ("digests.npy", "longer"), ("entry.json", "shorter")}


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "digests.npy", "entry.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_recreated(tmp_path, name, damage):
    make(tmp_path)
    path = entry(tmp_path) / name
    contents = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(DAMAGES[damage](contents))
    found = Cache(str(tmp_path)).find(KEY)
    assert (found is not None) == ((name, damage) in HARMLESS)
    if found is not None:
        assert_right(found)
    assert_right(make(tmp_path))
    assert_right(Cache(str(tmp_path)).find(KEY))
    assert len(left(tmp_path)) == 1


def test_entry_of_another_size_or_a_file_in_its_place_is_replaced(tmp_path):
    make(tmp_path)
    path = entry(tmp_path)
    about = json.loads((path / "entry.json").read_text())
    (path / "entry.json").write_text(json.dumps(about | {"shape": [20, 5, 4, 3]}))
    assert Cache(str(tmp_path)).find(KEY) is None
    shutil.rmtree(path)
    path.write_text("x")
    assert_right(make(tmp_path))


def test_deleted_entry_stays_mapped(tmp_path):
    split = make(tmp_path)
    shutil.rmtree(tmp_path)
    assert_right(split)
    assert_right(make(tmp_path))


# ---- Nothing half-written


@pytest.mark.parametrize("error", [UserError("a bad image"), KeyboardInterrupt()])
def test_failure_leaves_nothing(tmp_path, error):
    def stop(write):
        write(0, pixels()[:12])
        raise error

    with pytest.raises(type(error)):
        make(tmp_path, stop)
    assert left(tmp_path) == []
    assert Cache(str(tmp_path)).find(KEY) is None
    assert_right(make(tmp_path))


def test_labels_of_another_number_are_not_accepted(tmp_path):
    def forget(write):
        write(0, pixels())
        return labels()[:-1]

    with pytest.raises(UserError, match=r"my images: .* damaged"):
        make(tmp_path, forget)
    assert Cache(str(tmp_path)).find(KEY) is None


def test_disk_that_gets_full_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda file, contents, offset: len(contents) - 1)
    with pytest.raises(UserError, match=r"No space left on device.*--cache_dir") as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == []


@needs_proc
def test_all_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def record_sync(descriptor):
        events.append(("sync", pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(old, new):
        if pathlib.Path(old).exists():
            events.append(("rename", pathlib.Path(new).name))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    make(tmp_path)
    names = [name for _, name in events]
    assert {"images.npy", "labels.npy", "digests.npy", "entry.json"} <= set(names[:5])
    assert events[5:] == [("rename", entry(tmp_path).name), ("sync", tmp_path.name)]


HALF = """
    import sys, time
    import numpy as np
    from keras_cifar.data.cache import Cache

    def fill(write):
        write(0, np.zeros((12, 4, 5, 3), np.uint8))
        print("half", flush=True)
        time.sleep(60)

    Cache(sys.argv[1]).make({cache_key}, {shape}, "my images", fill)
"""


def test_kill_in_the_middle_leaves_nothing_that_is_used(tmp_path):
    code = textwrap.dedent(HALF).format(cache_key=KEY, shape=SHAPE)
    code = code.replace("sys.argv[1]", repr(str(tmp_path)))
    with in_new_process(code) as process:
        assert process.stdout.readline() == "half\n"
        assert len(left(tmp_path)) == 1
        # Another entry is made meanwhile, and leaves what the living process writes alone.
        other = KEY | {"contents": "other"}
        make(tmp_path, cache_key=other)
        assert len(left(tmp_path)) == 2
        process.send_signal(signal.SIGKILL)
    assert Cache(str(tmp_path)).find(KEY) is None
    shutil.copytree(tmp_path, tmp_path / "copy")
    # Whoever makes the same entry next, or another, removes the half.
    assert_right(make(tmp_path))
    assert len([name for name in left(tmp_path) if name != "copy"]) == 2
    make(tmp_path / "copy", cache_key=KEY | {"contents": "third"})
    assert not list((tmp_path / "copy").glob("*.building-*"))


# ---- Several at once


@pytest.mark.parametrize("locks", [True, False])
def test_two_at_once_both_get_the_entry(tmp_path, monkeypatch, locks, capsys):
    if not locks:  # as on some network file systems

        def refuse(*arguments):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(cache_module.fcntl, "flock", refuse)
    begun, go_on, results, filled = threading.Event(), threading.Event(), [], []

    def slow(write):
        filled.append(1)
        begun.set()
        assert go_on.wait(20)
        return fill(write)

    threads = [
        threading.Thread(target=lambda: results.append(make(tmp_path, slow))) for _ in range(2)
    ]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    while len(filled) < 2 and "waiting for another process" not in capsys.readouterr().err:
        threads[1].join(0.01)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(results) == 2
    for split in results:
        assert_right(split)
    assert len(filled) == (1 if locks else 2)  # With locks, the second waits for the first.
    assert len(left(tmp_path)) == 1


# ---- Where


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("value", "given", "place"),
    [
        (None, None, "home/.cache/keras_cifar"),
        ("", None, "home/.cache/keras_cifar"),
        ("relative", None, "home/.cache/keras_cifar"),
        ("TMP/xdg", None, "xdg/keras_cifar"),
        ("TMP/xdg", "~/here", "home/here"),
    ],
)
def test_where_entries_are(home, tmp_path, monkeypatch, value, given, place, capsys):
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value.replace("TMP", str(tmp_path)))
    Cache(given).make(KEY, SHAPE, "my images", fill)
    assert len(left(tmp_path / place)) == 1
    assert home.exists() == place.startswith("home")
    assert capsys.readouterr().err == ""


def test_unwritable_default_is_replaced_by_temporary_files_and_one_line_says_so(
    home, tmp_path, capsys
):
    home.write_text("a file")
    Cache().make(KEY, SHAPE, "my images", fill)
    (line,) = capsys.readouterr().err.splitlines()
    place = tmp_path / "temporary" / f"keras_cifar-{os.getuid()}"
    assert f"{home / '.cache' / 'keras_cifar'} cannot be used" in line
    assert f"using {place}" in line
    assert len(left(place)) == 1
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert_right(Cache().find(KEY))
    shutil.rmtree(tmp_path / "temporary")
    (tmp_path / "temporary").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be used.*choose another --cache_dir") as caught:
        Cache().make(KEY, SHAPE, "my images", fill)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda place: place.chmod(0o770), "other users can write to it"),
        (lambda place: place.chmod(0o707), "other users can write to it"),
        (lambda place: place.symlink_to(place.rename(f"{place}.d")), "it is not a directory"),
        (None, "it belongs to another user"),
    ],
)
def test_what_others_can_write_among_temporary_files_is_not_trusted(
    home, tmp_path, monkeypatch, change, why
):
    home.write_text("a file")
    Cache().make(KEY, SHAPE, "my images", fill)
    assert_right(Cache().find(KEY))
    place = cache_module.temporary_place()
    if change:
        change(place)
    else:
        monkeypatch.setattr(cache_module, "temporary_place", lambda: place)
        monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    assert Cache().find(KEY) is None
    with pytest.raises(UserError, match=f"{place} cannot be used .{why}.; choose") as caught:
        Cache().make(KEY, SHAPE, "my images", must_not_fill)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_directory_that_is_given_and_cannot_be_written_is_refused(tmp_path, below, image_folder):
    (tmp_path / "file").write_text("x")
    place = tmp_path / below
    with pytest.raises(UserError, match=f"--cache_dir={place}: .*cannot be used") as caught:
        data.load(f"folder:{image_folder}", cache_dir=str(place))
    assert "\n" not in str(caught.value)


def test_what_is_there_is_read_where_nothing_can_be_written(tmp_path, image_folder, monkeypatch):
    first = data.load(f"folder:{image_folder}", cache_dir=str(tmp_path))

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache_module.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    second = data.load(f"folder:{image_folder}", cache_dir=str(tmp_path))
    assert second.describe() == first.describe()


def test_disk_with_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(UserError) as caught:
        Cache(str(tmp_path)).make(KEY, (10**5, 224, 224, 3), "my images", must_not_fill)
    assert str(caught.value) == (
        "my images: 100000 images of 224 x 224 pixels need 15.1 GB of disk and 1.0 GB are free in "
        f"{tmp_path}; choose another --cache_dir or a smaller --image_size"
    )
    assert left(tmp_path) == []


# ---- Folders


def load(root: pathlib.Path, cache: pathlib.Path, **options):
    return data.load(f"folder:{root}", cache_dir=str(cache), **options)


@pytest.fixture
def image_root(tmp_path) -> pathlib.Path:
    root = tmp_path / "images"
    write_folder(root, {"train": 30, "test": 6})
    return root


@pytest.fixture
def decoded(monkeypatch) -> list:
    """What `load_image` was called with since the list was emptied."""
    calls, real = [], load_image

    def count(contents, *args, **kwargs):
        calls.append(contents)
        return real(contents, *args, **kwargs)

    monkeypatch.setattr("keras_cifar.data.folder.load_image", count)
    return calls


def test_second_load_decodes_nothing_and_another_cache_dir_everything(
    tmp_path, image_root, decoded
):
    first = load(image_root, tmp_path / "cache")
    assert len(decoded) == 36 + 1  # The first is looked at for the size of all.
    assert len(left(tmp_path / "cache")) == 2
    decoded.clear()
    second = load(image_root, tmp_path / "cache")
    assert decoded == []
    assert second.describe() == first.describe()
    for name in ("train", "val", "test"):
        np.testing.assert_array_equal(second.split(name).images, first.split(name).images)
        np.testing.assert_array_equal(second.split(name).labels, first.split(name).labels)
    assert second.train.stored is second.val.stored  # What is held out is not copied.
    assert isinstance(second.train.stored.base, np.memmap)
    load(image_root, tmp_path / "other")
    assert len(decoded) == 37


def test_same_images_elsewhere_are_not_decoded_again(tmp_path, image_root, decoded):
    first = load(image_root, tmp_path / "cache")
    shutil.copytree(image_root, tmp_path / "copy")
    decoded.clear()
    assert load(tmp_path / "copy", tmp_path / "cache").describe() == first.describe()
    assert decoded == []
    # With other times they are, and are the same data to a run that resumes.
    shutil.copytree(image_root, tmp_path / "later", copy_function=shutil.copyfile)
    assert load(tmp_path / "later", tmp_path / "cache").describe() == first.describe()
    assert len(decoded) == 37


def change_pixels(path):
    """Another image in a file of the same length and the same time."""
    before, times = path.read_bytes(), path.stat()
    Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path)
    path.write_bytes(path.read_bytes().ljust(len(before), b"\0"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def rename_class(path):
    for split in ("train", "test"):
        (path.parents[2] / split / "class_1").rename(path.parents[2] / split / "class_1b")


CHANGES = {
    "pixels": change_pixels,
    "name": lambda path: path.rename(path.with_name("001a.png")),
    "order": lambda path: path.rename(path.with_name("zzz.png")),
    "class name": rename_class,
    "class": lambda path: path.rename(path.parents[1] / "class_2" / path.name),
    "file more": lambda path: shutil.copy(path, path.with_name("new.png")),
    "file less": pathlib.Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folder_is_decoded_again(tmp_path, image_root, decoded, change):
    before = load(image_root, tmp_path / "cache", val_fraction=0)
    CHANGES[change](image_root / "train" / "class_1" / "001.png")
    decoded.clear()
    dataset = load(image_root, tmp_path / "cache", val_fraction=0)
    assert len(decoded) >= 29
    assert_decoded(dataset.train, image_root / "train", dataset.class_names)
    changed = dataset.train.fingerprint != before.train.fingerprint
    assert changed == (change not in ("name", "class name"))


def test_change_outside_of_the_sample_is_noticed_by_its_time(tmp_path, image_root, monkeypatch):
    monkeypatch.setattr(folder, "SAMPLE", 1)
    before = load(image_root, tmp_path / "cache")
    path = image_root / "train" / "class_1" / "001.png"
    change_pixels(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert load(image_root, tmp_path / "cache").describe() != before.describe()


def assert_decoded(split: Split, root: pathlib.Path, names: tuple) -> None:
    """A split is what decoding a folder's files into memory gives."""
    files = [path for name in names for path in sorted((root / name).iterdir())]
    expected = Split(
        np.stack([load_image(path) for path in files]),
        np.array([names.index(path.parent.name) for path in files]),
    )
    np.testing.assert_array_equal(split.images, expected.images)
    np.testing.assert_array_equal(split.labels, expected.labels)
    assert split.fingerprint == expected.fingerprint


def test_another_image_size_is_another_entry(tmp_path, image_root, decoded):
    for image_size, side in ((None, 16), (8, 8), (16, 16)):
        decoded.clear()
        dataset = load(image_root, tmp_path / "cache", image_size=image_size)
        assert len(decoded) >= 36
        assert dataset.image_shape == (side, side, 3)
    assert len(left(tmp_path / "cache")) == 6


def test_a_rule_is_another_entry_and_the_keys_of_stretched_images_stay(
    tmp_path, image_root, decoded
):
    for resize, rule in (("stretch", {}), ("crop", {"resize": "crop"})):
        decoded.clear()
        load(image_root, tmp_path / resize, image_size=8, resize=resize)
        assert len(decoded) >= 36
        for found in (tmp_path / resize).glob("*/entry.json"):
            key = json.loads(found.read_text())["cache_key"]
            del key["files"]
            assert key == {"source": "folder", "image_size": [8, 8]} | rule
        decoded.clear()
        load(image_root, tmp_path / resize, image_size=8, resize=resize)
        assert decoded == []
    load(image_root, tmp_path / "own", resize="stretch")
    (key,) = {
        tuple(json.loads(found.read_text())["cache_key"])
        for found in (tmp_path / "own").glob("*/entry.json")
    }
    assert key == ("source", "files", "image_size")


def test_resized_images_do_not_hide_that_sizes_differ(tmp_path, image_root):
    Image.new("RGB", (20, 20)).save(image_root / "train" / "class_1" / "odd.png")
    load(image_root, tmp_path / "cache", image_size=16)
    with pytest.raises(UserError, match=r"odd\.png has 20 x 20 pixels and others have 16 x 16"):
        load(image_root, tmp_path / "cache")


def test_test_split_of_another_size_is_refused_when_it_is_in_the_cache(tmp_path):
    for side in (16, 20):
        write_folder(tmp_path / str(side), {"train": 6, "test": 6}, side=side)
        load(tmp_path / str(side), tmp_path / "cache", val_fraction=0)
    shutil.rmtree(tmp_path / "16" / "test")
    shutil.copytree(tmp_path / "20" / "test", tmp_path / "16" / "test")
    with pytest.raises(UserError, match=r"20 x 20 pixels and others have 16 x 16.*--image_size"):
        load(tmp_path / "16", tmp_path / "cache", val_fraction=0)


def test_image_that_changes_while_it_is_read_is_named(tmp_path, image_root, monkeypatch):
    path = image_root / "train" / "class_2" / "002.png"
    real = folder._Files.key

    def change_afterwards(files):
        key = real(files)
        Image.new("RGB", (16, 16)).save(path)
        return key

    monkeypatch.setattr(folder._Files, "key", change_afterwards)
    with pytest.raises(UserError, match=f"{path} was changed"):
        load(image_root, tmp_path / "cache")
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize(("side", "workers"), [(16, 1), (64, 3)])
def test_large_files_are_decoded_by_several_threads(tmp_path, monkeypatch, side, workers):
    write_folder(tmp_path / "images", {"train": 9, "test": 6}, side=side)
    used, real = [], folder.concurrent.futures.ThreadPoolExecutor

    def count(workers):
        used.append(workers)
        return real(workers)

    monkeypatch.setattr(folder.concurrent.futures, "ThreadPoolExecutor", count)
    monkeypatch.setattr(environment, "usable_cpus", lambda: 3)
    dataset = load(tmp_path / "images", tmp_path / "cache", val_fraction=0)
    assert used == [workers, workers]
    assert_decoded(dataset.train, tmp_path / "images" / "train", dataset.class_names)


def test_blocks_are_as_small_as_their_limit(tmp_path, image_root, monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK", 5 * 16 * 16 * 3 + 1)
    written, real = [], os.pwrite

    def count(file, contents, offset):
        written.append(len(contents))
        return real(file, contents, offset)

    monkeypatch.setattr(os, "pwrite", count)
    dataset = load(image_root, tmp_path / "cache", val_fraction=0)
    assert written == [5] * 6 + [5, 1]
    assert_decoded(dataset.train, image_root / "train", dataset.class_names)


# ---- Commands


def test_training_and_evaluation_use_the_cache_of_the_run(tmp_path, image_root, decoded):
    run = Run(tmp_path / "run")
    config = TrainConfig.from_flags(
        model="lenet5",
        data=f"folder:{image_root}",
        image_size=32,
        batch_size=8,
        epochs=1,
        cache_dir=str(tmp_path / "cache"),
        export=False,
    )
    trainer.train(config, run)
    assert len(left(tmp_path / "cache")) == 2
    decoded.clear()
    evaluator.evaluate_run(run, "val")
    assert decoded == []
    other = evaluator.DataSource(cache_dir=str(tmp_path / "other"))
    evaluator.evaluate_run(run, "val", other)
    assert len(decoded) == 36
    assert len(left(tmp_path / "other")) == 2
    # Resuming with another --cache_dir is the same run.
    moved = config.replace(cache_dir=str(tmp_path / "other"))
    assert trainer.previous_config(moved, run)["flags"]["cache_dir"] == str(tmp_path / "cache")


def test_run_of_the_first_version_is_evaluated(trained_run, tmp_path):
    shutil.copytree(trained_run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    config = run.read_config()
    del config["flags"]["cache_dir"]
    run.config.write_text(json.dumps(config))
    assert evaluator.evaluate_run(run, "test")["count"] == 30


# ---- Memory

PEAK = """
    import threading, time

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1e3

    class Peak:
        # The most anonymous memory (MB) above that at the beginning, looked at every 5 ms.
        def __enter__(self):
            self.start, self.most, self.done = anonymous(), 0, threading.Event()
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
            return self
        def watch(self):
            while not self.done.wait(0.005):
                self.most = max(self.most, anonymous() - self.start)
        def __exit__(self, *error):
            self.done.set()
            self.thread.join()
"""


def peaks(code: str) -> dict[str, float]:
    """What a program prints as JSON in a process of its own."""
    process = in_new_process(textwrap.dedent(PEAK) + textwrap.dedent(code))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


@needs_proc
def test_training_on_what_is_on_disk_takes_no_memory_for_it(tmp_path):
    result = peaks(f"""
        import json
        import numpy as np
        import tensorflow as tf
        import keras
        from keras_cifar.data import evaluation_batches, training_batches
        from keras_cifar.data.cache import Cache

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        block = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), np.uint8)

        def fill(write):
            for start in range(0, 14_000, 100):
                write(start, block)
            return np.arange(14_000) % 10

        result = {{}}
        with Peak() as peak:
            split = Cache({str(tmp_path)!r}).make({{"source": "x"}}, (14_000, 64, 64, 3), "x", fill)
        result["make"] = peak.most
        train, val = split.take(np.arange(13_000)), split.take(np.arange(13_000, 14_000))
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            model = keras.Sequential([keras.Input((64, 64, 3)), keras.layers.Lambda(
                lambda x: tf.reduce_mean(tf.cast(x, tf.float32), (1, 2)), output_shape=(3,)
            ), keras.layers.Dense(10, "softmax")])
            model.compile("sgd", "categorical_crossentropy")
        with Peak() as peak:
            batches = training_batches(train, 10, 128, augment="flip", seed=0)
            model.fit(batches, steps_per_epoch=101, verbose=0, shuffle=False)
            model.evaluate(evaluation_batches(val, 10, 128), verbose=0)
        result["fit"] = peak.most
        print(json.dumps(result))
    """)
    shutil.rmtree(tmp_path)  # 172 MB
    assert max(result.values()) < 100, result


@needs_proc
def test_reading_a_folder_takes_no_memory_for_all_of_it(tmp_path):
    root = tmp_path / "images"
    for split, count in (("train", 560), ("test", 4)):
        (root / split / "a").mkdir(parents=True)
        for index in range(count):
            image = Image.new("RGB", (2, 2), (index % 256, 0, 0))
            image.save(root / split / "a" / f"{index:04}.bmp")
    result = peaks(f"""
        import json
        from keras_cifar import data

        data.load("digits")  # what TensorFlow needs for anything
        arguments = dict(image_size=288, cache_dir={str(tmp_path / "cache")!r})
        result = {{}}
        for name in ("first", "second"):
            with Peak() as peak:
                dataset = data.load("folder:{root}", **arguments)
                dataset.describe()
            result[name] = peak.most
        print(json.dumps(result))
    """)
    shutil.rmtree(tmp_path)  # 139 MB
    assert result["first"] < 100, result
    assert result["second"] < 30, result
