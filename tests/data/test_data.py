"""What every data source has in common: specs, held-out splits, checks, memory."""

import dataclasses
import types

import numpy as np
import pytest

from keras_cifar import data
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.data import splits
from keras_cifar.data.splits import Split, Splits, finish, hold_out

NAMES = ("cat", "dog", "frog")


def split_of(labels, side: int = 4) -> Split:
    labels = np.asarray(labels, np.int64)
    images = np.zeros((len(labels), side, side, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))  # tells them apart
    return Split(images, labels)


def splits_of(train, test, val=None) -> Splits:
    val = None if val is None else split_of(val)
    return Splits(split_of(train), val, split_of(test), NAMES, where="the place")


@pytest.mark.parametrize(
    "spec", ["", ":", "zip:x.zip", "folders:x", "splits:x", "cache:x", "tfds:cifar10"]
)
def test_unknown_source_lists_the_choices(spec):
    with pytest.raises(UsageError) as caught:
        data.load(spec)
    message = str(caught.value)
    assert repr(spec) in message
    assert all(choice in message for choice in ("archive:PATH", "digits", "folder:PATH", "TFDS"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        *((spec, "folder:PATH") for spec in ("folder", "folder:")),
        *((spec, "archive:PATH") for spec in ("archive", "archive:")),
        *((spec, "digits") for spec in ("digits:", "digits:3")),
    ],
)
def test_source_that_is_written_wrong_says_how_to_write_it(spec, form, image_folder, monkeypatch):
    monkeypatch.chdir(image_folder)  # An empty path must not mean the current directory.
    with pytest.raises(UsageError, match=f"write {form}"):
        data.load(spec)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_1797_colour_images_of_32_pixels(digits):
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert digits.image_shape == (32, 32, 3)
    assert digits.class_names == tuple("0123456789")
    for split in (digits.train, digits.val, digits.test):
        assert split.images.shape == (len(split), 32, 32, 3)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert set(split.labels) == set(range(10))
        assert split.images.min() == 0
        assert split.images.max() > 240


def test_digits_hold_a_fifth_out_for_test_whatever_the_seed(digits):
    assert len(digits.test) == pytest.approx(1797 / 5, abs=10)
    other = data.load("digits", seed=1)
    assert other.test.fingerprint == digits.test.fingerprint
    assert other.val.fingerprint != digits.val.fingerprint
    assert data.load("digits", image_size=8).train.images.shape[1:] == (8, 8, 3)
    assert data.load("digits", image_size="8x12").image_shape == (8, 12, 3)
    cropped = data.load("digits", image_size=8, resize="crop").train.images
    assert (cropped != data.load("digits", image_size=8).train.images).any()
    with pytest.raises(UsageError, match="--resize=crop needs --image_size"):
        data.load("digits", resize="crop")


LABELS = np.repeat([0, 1, 2], [100, 40, 10])


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_hold_out_takes_the_share_of_each_class_by_the_seed(seed):
    held_out = hold_out(LABELS, 0.2, seed)
    assert np.bincount(LABELS[held_out]).tolist() == [20, 8, 2]
    np.testing.assert_array_equal(held_out, hold_out(LABELS, 0.2, seed))
    assert (held_out != hold_out(LABELS, 0.2, seed + 1)).any()


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.999])
def test_hold_out_leaves_one_of_each_class(fraction):
    labels = np.array([0, 1, 1, 2, 2, 2])
    held_out = hold_out(labels, fraction, seed=0)
    assert set(labels[~held_out]) == {0, 1, 2}


def test_validation_and_train_are_disjoint_and_complete():
    dataset = finish(splits_of(LABELS, [0, 1]), 0.2, seed=0)
    train, val = (set(s.images[:, 0, 0, 0]) for s in (dataset.train, dataset.val))
    assert not train & val
    assert train | val == set(range(150))
    assert len(val) == 30
    for split in (dataset.train, dataset.val):
        np.testing.assert_array_equal(split.labels, LABELS[split.images[:, 0, 0, 0]])


def test_without_val_fraction_nothing_is_held_out():
    dataset = finish(splits_of(LABELS, [0]), 0.0, seed=0)
    assert dataset.val is None
    assert len(dataset.train) == 150
    assert set(dataset.describe()) == {"train", "test"}
    with pytest.raises(UserError, match="--val_fraction=0"):
        dataset.split("val")


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_validation_split_of_the_source_is_kept(fraction):
    dataset = finish(splits_of([0, 1, 2], [0], val=[1, 1]), fraction, seed=0)
    assert len(dataset.val) == 2
    assert len(dataset.train) == 3


def test_share_that_holds_out_nothing_is_refused():
    with pytest.raises(UserError, match=r"--val_fraction=0\.01 .* holds out no image"):
        finish(splits_of([0, 1, 2], [0]), 0.01, seed=0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_that_cannot_be_learnt_is_named(split):
    labels = {"val": [0], "test": [0], split: [0, 2]}
    with pytest.raises(UserError, match=f"'frog' .* is in {split} but not in train"):
        finish(splits_of([0, 1], labels["test"], val=labels["val"]), 0.1, seed=0)


@pytest.mark.parametrize(("train", "test", "word"), [([], [0], "training"), ([0], [], "test")])
def test_empty_split_is_refused(train, test, word):
    with pytest.raises(UserError, match=f"the place has no {word} images"):
        finish(splits_of(train, test), 0.1, seed=0)


def test_fingerprint_changes_with_pixels_labels_order_and_shape_but_not_the_memory_layout():
    split = split_of([0, 1, 2])
    pixels, labels = split.images.copy(), split.labels.copy()
    pixels[-1, -1, -1, -1] += 1
    labels[-1] = 0
    for other in (
        Split(pixels, split.labels),
        Split(split.images, labels),
        split.take(np.arange(3)[::-1]),
        Split(split.images.reshape(3, 2, 8, 3), split.labels),
    ):
        assert other.fingerprint != split.fingerprint
    same = Split(np.asfortranarray(split.images), split.labels)
    assert same.fingerprint == split_of([0, 1, 2]).fingerprint == split.fingerprint


def test_fingerprint_of_a_part_is_that_of_its_images():
    split = split_of(np.arange(10) % 3)
    known = dataclasses.replace(split, digests=splits.pixel_digests(split.stored))
    rows = np.array([7, 2, 2, 9])
    expected = Split(split.images[rows], split.labels[rows]).fingerprint
    for whole in (split, known):
        assert whole.take(rows).fingerprint == expected
        assert whole.take(rows[::-1]).fingerprint != expected
        assert whole.take(np.arange(10)).fingerprint == split.fingerprint


def test_parts_of_parts_are_the_same_rows_and_share_their_images():
    split = split_of(np.arange(10) % 3)
    part = split.take(np.array([9, 1, 5, 3])).take(np.array([2, 0]))
    assert part.stored is split.stored
    assert part.images[:, 0, 0, 0].tolist() == [5, 9]
    assert part.labels.tolist() == [2, 0]
    assert len(part) == 2
    assert part.image_shape == (4, 4, 3)


def test_what_does_not_fit_in_memory_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"my images: .* 300000000\.0 GB .* --image_size") as caught:
        splits.allocate(10**9, (10_000, 10_000, 3), "my images")
    assert "\n" not in str(caught.value)
    free = types.SimpleNamespace(available=8 * 8 * 3)
    monkeypatch.setattr(splits.psutil, "virtual_memory", lambda: free)
    images = splits.allocate(1, (8, 8, 3), "x")
    assert images.shape == (1, 8, 8, 3)
    assert images.dtype == np.uint8
    with pytest.raises(UserError, match="x: 2 images"):
        splits.allocate(2, (8, 8, 3), "x")
