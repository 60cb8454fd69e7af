"""Folders of images: layouts, the split by hash, and every way a folder can be wrong."""

import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_cifar import data
from keras_cifar.core.errors import UserError
from keras_cifar.data import folder
from keras_cifar.data.images import load_image, resize_images
from tests.commands import hostile
from tests.conftest import colour_images, refuse_folder, write_folder


def load(root: pathlib.Path, **options):
    return data.load(f"folder:{root}", **options)


def refusal(root: pathlib.Path, **options) -> str:
    """The message of the UserError that loading `root` raises: always one line."""
    with pytest.raises(UserError) as caught:
        load(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def write_flat(root: pathlib.Path, count: int, start: int = 0) -> None:
    """`root/<class>/NNN.png`, each image of one colour that tells which it is."""
    for index in range(start, start + count):
        folder = root / f"class_{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (index, 0, 0)).save(folder / f"{index:03}.png")


def members(split) -> set[int]:
    """Which of the images of `write_flat` are in a split."""
    return {int(value) for value in split.images[:, 0, 0, 0]}


def write_image(path: pathlib.Path, sides: tuple[int, int] = (8, 8)) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*sides, 3), np.uint8)).save(path)
    return path


def test_train_and_test_come_back_exact(tmp_path):
    write_folder(tmp_path, {"train": 12, "test": 6})
    dataset = load(tmp_path, val_fraction=0)
    assert dataset.class_names == ("class_0", "class_1", "class_2")
    assert dataset.image_shape == (16, 16, 3)
    assert dataset.val is None
    for seed, (split, count) in enumerate([(dataset.train, 12), (dataset.test, 6)]):
        images, labels = colour_images(count, 16, 3, seed=seed)
        order = np.argsort(labels, kind="stable")
        np.testing.assert_array_equal(split.images, images[order])
        np.testing.assert_array_equal(split.labels, labels[order])


def test_sizes_of_the_files_are_known_where_they_are_resized(tmp_path, monkeypatch):
    for index in range(12):
        write_image(tmp_path / "train" / "a" / f"{index:02}.png", (9, 20) if index < 9 else (30, 8))
    write_image(tmp_path / "test" / "a" / "0.png", (50, 50))
    (tmp_path / "train" / "a" / "00.png").write_bytes(b"")
    skip = data.BadImages(skip=True, max_share=0.5)
    dataset = load(tmp_path, image_size=8, val_fraction=0.5, bad_images=skip)
    assert dataset.file_sizes == ((9, 20),) * 8 + ((30, 8),) * 3
    monkeypatch.setattr(folder, "SIZED", 3)  # of 12: the first is invalid
    dataset = load(tmp_path, image_size=8, bad_images=skip)
    assert dataset.file_sizes == ((9, 20), (30, 8))
    write_folder(tmp_path / "equal", {"train": 12, "test": 6})
    assert load(tmp_path / "equal", val_fraction=0).file_sizes == ()


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_validation_folder_is_the_validation_split(tmp_path, name):
    write_folder(tmp_path, {"train": 12, "test": 6, name: 9})
    dataset = load(tmp_path)
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [12, 9, 6]


def test_hidden_files_and_other_suffixes_are_no_images(tmp_path):
    write_folder(tmp_path, {"train": 12, "test": 6})
    for split in ("train", "test"):
        (tmp_path / split / "README.md").write_text("x")
        (tmp_path / split / ".cache").mkdir()
        (tmp_path / split / "class_0" / "notes.txt").write_text("x")
        (tmp_path / split / "class_0" / "._000.png").write_text("x")
        (tmp_path / split / "class_0" / ".DS_Store").write_text("x")
    dataset = load(tmp_path, val_fraction=0)
    assert dataset.class_names == ("class_0", "class_1", "class_2")
    assert [len(dataset.train), len(dataset.test)] == [12, 6]


def test_formats_are_read_and_classes_sorted_by_name(tmp_path):
    names = ["a.PNG", "a.Jpg", "a.jpeg", "a.bmp", "a.gif", "a.webp", "a.tif"]
    classes = ["zebra", "Ant", "ape", "été", "bee", "cat", "dog"]
    for split in ("train", "test"):
        for name, file in zip(classes, names, strict=True):
            write_image(tmp_path / split / name / file, (7, 5))
    dataset = load(tmp_path, val_fraction=0)
    assert dataset.class_names == tuple(sorted(classes))
    assert dataset.train.images.shape == (7, 7, 5, 3)
    assert load(tmp_path, val_fraction=0, image_size=4).test.images.shape == (7, 4, 4, 3)


def test_folder_may_be_below_home(tmp_path, monkeypatch):
    write_folder(tmp_path / "a:b", {"train": 12, "test": 6})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(data.load("folder:~/a:b", val_fraction=0).train) == 12


def test_flat_folder_is_split_by_name_whatever_the_seed_the_place_and_other_files(tmp_path):
    write_flat(tmp_path / "a", 60)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before, other = load(tmp_path / "a", val_fraction=0), load(tmp_path / "b", seed=1)
    assert before.test.fingerprint == other.test.fingerprint
    write_flat(tmp_path / "a", 60, start=60)
    dataset = load(tmp_path / "a", val_fraction=0)
    train, test = members(dataset.train), members(dataset.test)
    assert not train & test
    assert train | test == set(range(120))
    assert len(test) == pytest.approx(12, abs=9)
    assert train & set(range(60)) == members(before.train)
    assert test & set(range(60)) == members(before.test)
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.labels, split.images[:, 0, 0, 0] % 2)


def test_one_image_is_too_few_in_one_line(tmp_path):
    # Whichever split the hash chooses, the other is empty.
    for index in range(20):
        write_image(tmp_path / str(index) / "x" / f"{index}.png")
        assert "has no" in refusal(tmp_path / str(index))


def test_images_of_different_sizes_need_image_size(tmp_path):
    write_folder(tmp_path, {"train": 12, "test": 6})
    odd = write_image(tmp_path / "train" / "class_1" / "odd.png", (20, 20))
    for skip in (False, True):  # It is not bad: the flags are.
        message = refusal(tmp_path, bad_images=data.BadImages(skip, 0.25))
        assert message == (
            f"{odd} has 20 x 20 pixels and others have 16 x 16: say which size with --image_size"
        )
    assert load(tmp_path, image_size=16, val_fraction=0).image_shape == (16, 16, 3)
    assert "--image_size" in refusal(tmp_path, image_size=10**6)


def truncated(path):
    write_image(path, (64, 64))
    path.write_bytes(path.read_bytes()[:-200])


def text(path):
    path.write_text("not an image")


def empty(path):
    path.write_bytes(b"")


def corrupt(path):
    contents = write_image(path, (64, 64)).read_bytes()
    path.write_bytes(contents[: len(contents) // 2].ljust(len(contents), b"\0"))


def dangling_link(path):
    path.symlink_to("nowhere.png")


def circle(path):
    path.symlink_to(path.name)


def bomb(path):
    path.write_bytes(hostile.png(40_000, 40_000))


@pytest.mark.parametrize(
    ("damage", "name", "why"),
    [
        (truncated, "bad.jpg", "truncated"),
        (truncated, "bad.png", "truncated"),
        (text, "bad.jpg", "not an image"),
        (empty, "bad.jpg", "empty"),
        (corrupt, "bad.png", "broken"),
        (pathlib.Path.mkdir, "bad.png", "directory"),
        (dangling_link, "bad.png", "No such file"),
        (circle, "bad.png", "symbolic links"),
        (os.mkfifo, "bad.png", "pipe or a device"),
        (bomb, "bad.png", "more than"),
    ],
)
@pytest.mark.parametrize("image_size", [None, 8])
def test_bad_image_is_refused_with_its_name(tmp_path, damage, name, why, image_size):
    write_folder(tmp_path, {"train": 12, "test": 6})
    bad = tmp_path / "train" / "class_2" / name
    damage(bad)
    message = refusal(tmp_path, image_size=image_size)
    assert message.startswith(f"{bad} cannot be read: ")
    assert why in message.removeprefix(f"{bad} cannot be read: ").partition(";")[0]


SKIP = data.BadImages(skip=True, max_share=0.25)


def damaged_folder(root: pathlib.Path) -> dict[str, str]:
    """A folder of 48 and 12 images of which five are bad: file -> the words of the reason."""
    write_folder(root, {"train": 48, "test": 12})
    reasons = {
        # The first of all files decides the size, so it must be another one's.
        root / "train" / "class_0" / "000.png": (text, "not an image"),
        root / "train" / "class_1" / "bad.png": (os.mkfifo, "pipe or a device"),
        root / "train" / "class_2" / "047.png": (empty, "the file is empty"),
        root / "train" / "class_2" / "zzz.png": (circle, "symbolic links"),
        root / "test" / "class_1" / "link.png": (dangling_link, "No such file"),
    }
    for path, (damage, _) in reasons.items():
        path.unlink(missing_ok=True)
        damage(path)
    return {str(path): why for path, (_, why) in reasons.items()}


def skipped(dataset) -> dict[str, str]:
    return {s.file: s.reason for s in dataset.skipped}


@pytest.mark.parametrize("image_size", [None, 8])
def test_skip_leaves_out_invalid_images_and_says_why(tmp_path, image_size, capsys, monkeypatch):
    reasons = damaged_folder(tmp_path)
    dataset = load(tmp_path, image_size=image_size, bad_images=SKIP, val_fraction=0.2)
    assert list(skipped(dataset)) == list(reasons)
    for path, why in skipped(dataset).items():
        assert reasons[path] in why
    assert [s.split for s in dataset.skipped] == ["train"] * 4 + ["test"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"skipped   5 images that cannot be read: {dataset.skipped[0].file}: ")
    assert line.endswith("; ...")
    with monkeypatch.context() as patch:  # A second start decodes nothing.
        patch.setattr("keras_cifar.data.folder.load_image", None)
        again = load(tmp_path, image_size=image_size, bad_images=SKIP, val_fraction=0.2)
    assert again.skipped == dataset.skipped
    assert again.describe() == dataset.describe()
    # The same as without these files.
    for path in reasons:
        os.unlink(path)
    without = load(tmp_path, image_size=image_size, val_fraction=0.2)
    assert not without.skipped
    assert without.describe() == dataset.describe()
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(dataset.split(split).images, without.split(split).images)
        np.testing.assert_array_equal(dataset.split(split).labels, without.split(split).labels)


def test_skipped_image_is_an_error_without_skip(tmp_path):
    reasons = damaged_folder(tmp_path)
    bad = next(iter(reasons))
    for path in list(reasons)[1:]:
        os.unlink(path)
    before = refusal(tmp_path)
    assert before.startswith(f"{bad} cannot be read: not an image")
    assert "--on_bad_image=skip" in before
    assert len(load(tmp_path, bad_images=SKIP).skipped) == 1
    assert refusal(tmp_path) == before


def test_repaired_images_are_read(tmp_path):
    reasons = damaged_folder(tmp_path)
    assert len(load(tmp_path, bad_images=SKIP).skipped) == 5
    for path in reasons:
        os.unlink(path)
        empty(pathlib.Path(path))
    assert set(skipped(load(tmp_path, bad_images=SKIP)).values()) == {"the file is empty"}
    for path in reasons:
        os.unlink(path)
        write_image(pathlib.Path(path), (16, 16))
    dataset = load(tmp_path, bad_images=SKIP, val_fraction=0)
    assert not dataset.skipped
    assert [len(dataset.train), len(dataset.test)] == [50, 13]


@pytest.mark.parametrize("image_size", [None, 8])
def test_more_than_the_share_stops_nevertheless(tmp_path, image_size):
    write_folder(tmp_path, {"train": 30, "test": 6})
    for index in range(3):
        empty(tmp_path / "train" / "class_1" / f"bad{index}.png")
    enough, less = data.BadImages(True, 0.1), data.BadImages(True, 0.09)
    for _ in range(2):  # Decoded, and found in the cache.
        message = refusal(tmp_path, bad_images=less, image_size=image_size)
        assert "more than --max_bad_share=0.09 of its 33 images" in message
        assert f"{tmp_path / 'train/class_1/bad'}" in message
        assert "the file is empty" in message
        assert len(load(tmp_path, bad_images=enough, image_size=image_size).skipped) == 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_without_an_image_left_is_an_error(tmp_path, split):
    write_folder(tmp_path, {"train": 30, "test": 30})
    for path in (tmp_path / split / "class_1").iterdir():
        empty(path)
    message = refusal(tmp_path, bad_images=data.BadImages(True, 0.5))
    assert f"class 'class_1' of {tmp_path} {split} has no image" in message


def test_names_that_are_no_line_of_text_are_read_and_named(tmp_path):
    """Each file's name is one line in a message and itself in the list."""
    write_folder(tmp_path, {"train": 30, "test": 6})
    names = ["two\nlines", "\x1b[31m", "a 'b' \"c\"", "日本語", os.fsdecode(b"caf\xe9")]
    for name in names:
        write_image(tmp_path / "train" / "class_1" / f"{name} good.png", (16, 16))
        empty(tmp_path / "train" / "class_1" / f"{name} bad.png")
    dataset = load(tmp_path, bad_images=SKIP, val_fraction=0)
    assert len(dataset.train) == 35
    assert sorted(os.path.basename(path) for path in skipped(dataset)) == sorted(
        f"{name} bad.png" for name in names
    )
    assert "empty" in refusal(tmp_path)  # which is one line that can be printed


def test_folder_that_is_missing_a_file_or_without_class_folders_is_named(tmp_path):
    file = write_image(tmp_path / "a.png")
    assert f"{tmp_path / 'none'} does not exist" in refusal(tmp_path / "none")
    assert f"{file} is not a directory" in refusal(file)
    message = refusal(tmp_path)
    assert f"{tmp_path} has no class folders" in message
    assert "train/<class>/*" in message


@pytest.mark.parametrize("contents", [[], ["notes.txt", ".hidden.png"]])
def test_class_folder_without_images_is_named(tmp_path, contents):
    write_folder(tmp_path, {"train": 12, "test": 6})
    folder = tmp_path / "train" / "class_9"
    folder.mkdir()
    for name in contents:
        (folder / name).write_text("x")
    assert f"{folder} has no images" in refusal(tmp_path)


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_that_train_lacks_and_missing_train_are_named(tmp_path, split):
    write_folder(tmp_path, {"train": 12, "test": 6, "val": 6})
    write_image(tmp_path / split / "wolf" / "a.png", (16, 16))
    message = refusal(tmp_path)
    assert "'wolf'" in message
    assert str(tmp_path / split) in message
    shutil.rmtree(tmp_path / "train")
    assert "no train folder" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["two\nlines", "tab\t", "nul\x7f"])
def test_class_name_that_is_not_printable_is_refused(tmp_path, name):
    for split in ("train", "test"):
        write_image(tmp_path / split / name / "a.png")
    assert "printable" in refusal(tmp_path)


@pytest.mark.parametrize("which", [".", "train", "train/class_1"])
def test_folder_that_the_system_refuses_is_named(tmp_path, which, monkeypatch):
    write_folder(tmp_path, {"train": 12, "test": 6})
    locked = tmp_path / which
    refuse_folder(monkeypatch, locked)
    message = refusal(tmp_path)
    assert str(locked) in message
    assert "Permission denied" in message


@pytest.mark.parametrize("rule", ["stretch", "crop"])
def test_images_of_many_sizes_are_resized_as_each_alone(tmp_path, monkeypatch, rule):
    """Together where they have one size, in their own order, a few megabytes at a time."""
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 2)):
        (tmp_path / split / "a").mkdir(parents=True)
        for index in range(count):
            height, width = ((20, 30), (16, 16), (30, 20), (100, 90))[index % 4]
            pixels = random.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "a" / f"{index:03}.png")
    monkeypatch.setattr(folder, "BLOCK", 60_000)
    sizes, resize = [], resize_images

    def count(images, size, rule):
        sizes.append(len(images))
        return resize(images, size, rule)

    monkeypatch.setattr("keras_cifar.data.images.resize_images", count)
    split = data.load(f"folder:{tmp_path}", image_size="16x20", resize=rule, val_fraction=0).train
    assert max(sizes) > 1
    # Two of 27 KB are in a group with the smaller ones, a third is not.
    assert len(sizes) >= 40 / 4 / 2
    files = sorted((tmp_path / "train/a").iterdir())
    one_by_one = [load_image(path, (16, 20), rule) for path in files]
    np.testing.assert_array_equal(split.images, one_by_one)
