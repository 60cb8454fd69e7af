"""Batches: what a pass holds, in which order, at which step a run resumes, and what evaluation sees."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.data import (
    Split,
    evaluation_batches,
    evaluation_steps,
    steps_per_epoch,
    training_batches,
)
from keras_cifar.distributed import sharding
from keras_cifar.distributed.sharding import ReplicaRange, bounds
from keras_cifar.models import loop

AUGMENT = "crop(2)|flip|mixup(0.2)"


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here leaves anything in Keras."""


def numbered(count: int, side: int = 4) -> Split:
    """A split whose first pixel says which example it is; its label is that modulo 3."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return Split(images, np.arange(count) % 3)


def take(batches: tf.data.Dataset, count: int) -> list:
    return [(x.numpy(), y.numpy()) for x, y in itertools.islice(batches, count)]


def order(split: Split, steps: int, batch_size: int, **kwargs) -> list[int]:
    arguments = {"augment": "", "seed": 0} | kwargs
    batches = take(training_batches(split, 3, batch_size, **arguments), steps)
    return [int(number) for images, _ in batches for number in images[:, 0, 0, 0]]


def assert_same_batches(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    for mine, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine[0], other[0])
        np.testing.assert_array_equal(mine[1], other[1])


@pytest.mark.parametrize(
    ("count", "batch_size"), [(12, 4), (14, 4), (15, 4), (7, 7), (13, 7), (5, 1)]
)
def test_pass_holds_each_example_at_most_once_and_drops_another_remainder(count, batch_size):
    split = numbered(count)
    steps = steps_per_epoch(split, batch_size)
    assert steps == count // batch_size
    seen = np.reshape(order(split, 20 * steps, batch_size), (20, steps * batch_size))
    assert all(len(set(one_pass)) == steps * batch_size for one_pass in seen)
    assert set(seen.ravel()) == set(range(count))


def test_order_differs_between_passes_and_seeds_and_is_the_same_for_the_same_seed():
    split = numbered(32)
    first = order(split, 8, 8, seed=3)
    assert first == order(split, 8, 8, seed=3)
    assert first[:32] != first[32:]
    assert first != order(split, 8, 8, seed=4)
    assert first[:32] != sorted(first[:32])


def test_order_without_balanced_sampling_is_that_of_earlier_revisions():
    """A run that began then resumes with the batches that it would have had."""
    split, shuffle = numbered(14), tf.random.experimental.stateless_shuffle
    for seed in (0, 7):
        expected = []
        for number in range(3):
            drawn = tf.random.experimental.stateless_fold_in(tf.constant((seed, 0)), number)
            expected += shuffle(tf.range(14), drawn).numpy()[:12].tolist()
        assert order(split, 9, 4, seed=seed) == expected
        assert order(split, 9, 4, seed=seed, balanced=False) == expected


def test_balanced_sampling_draws_each_class_equally_often_in_as_many_steps():
    split = Split(numbered(120).images, np.repeat([0, 1, 2], [4, 16, 100]))
    batches = take(training_batches(split, 3, 12, "", 0, balanced=True), 40)
    counts = np.stack([labels.sum(axis=0) for _, labels in batches])
    np.testing.assert_array_equal(counts.reshape(4, 10, 3).sum(axis=1), 40)
    assert counts.std() > 0.5  # a batch by itself is random
    for images, labels in batches:
        np.testing.assert_array_equal(labels, np.eye(3)[split.labels[images[:, 0, 0, 0]]])
    seen = [images[:, 0, 0, 0] for images, _ in batches[:10]]
    assert len(np.unique(seen)) == 4 + 16 + 40


def test_augmentation_differs_between_steps_and_seeds_and_is_the_same_for_the_same_seed():
    black = Split(np.full((8, 8, 8, 3), 255, np.uint8), np.zeros(8, np.int64))

    def run(seed):
        return take(training_batches(black, 3, 8, "cutout(2)", seed), 3)

    first, again, other = run(0), run(0), run(1)
    assert_same_batches(first, again)
    assert not np.array_equal(first[0][0], other[0][0])
    assert not np.array_equal(first[0][0], first[1][0])


@pytest.mark.parametrize("start_step", [1, 2, 3, 4, 7, 9, 1000])
@pytest.mark.parametrize(("augment", "balanced"), [("", False), (AUGMENT, False), (AUGMENT, True)])
def test_start_step_gives_the_batches_of_a_run_from_the_beginning(augment, balanced, start_step):
    split = numbered(14)  # three steps a pass
    options = {"seed": 5, "balanced": balanced}
    whole = training_batches(split, 3, 4, augment, **options).skip(start_step)
    later = training_batches(split, 3, 4, augment, **options, start_step=start_step)
    assert_same_batches(take(later, 7), take(whole, 7))


def test_augmentation_is_applied_and_changes_nothing_else():
    split = numbered(14)
    flipped = take(training_batches(split, 3, 4, "flip", seed=0), 6)
    plain = take(training_batches(split, 3, 4, "", seed=0), 6)
    kinds = set()
    for (mine, labels), (original, expected) in zip(flipped, plain, strict=True):
        np.testing.assert_array_equal(labels, expected)
        same = (mine == original).all(axis=(1, 2, 3))
        mirrored = (mine == original[:, :, ::-1]).all(axis=(1, 2, 3))
        assert (same | mirrored).all()
        kinds |= set(mirrored)
    assert kinds == {True, False}


def test_altflip_mirrors_each_example_in_every_second_pass():
    split = numbered(40)
    split.images[:, 0, 3, 0] = split.images[:, 0, 0, 0]  # a number that both forms have
    batches = take(training_batches(split, 3, 8, "altflip", seed=0), 4 * 5)
    mirrored = np.zeros((4, 40), bool)
    for step, (images, _) in enumerate(batches):
        rows = images[:, 0, 0, 0]
        mirrored[step // 5, rows] = (images != split.images[rows]).any(axis=(1, 2, 3))
    assert 10 <= mirrored[0].sum() <= 30
    assert [(mirrored[i] == mirrored[0]).mean() for i in range(4)] == [1, 0, 1, 0]


def test_batches_are_full_pixels_and_one_hot_labels():
    split = numbered(14)
    batches = training_batches(split, 5, 4, "", seed=0)
    assert batches.element_spec == (
        tf.TensorSpec((4, 4, 4, 3), tf.uint8),
        tf.TensorSpec((4, 5), tf.float32),
    )
    for images, labels in take(batches, 6):
        numbers = images[:, 0, 0, 0]
        np.testing.assert_array_equal(images, split.images[numbers])
        np.testing.assert_array_equal(labels, np.eye(5)[numbers % 3])


def test_batch_larger_than_the_split_and_wrong_augmentation_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"--batch_size=8 .* 7 training images") as error:
        training_batches(numbered(7), 3, 8, "", seed=0)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="unknown augmentation 'crap'"):
        training_batches(numbered(8), 3, 4, "crap(4)", seed=0)


@pytest.mark.parametrize(
    ("count", "batch_size"), [(10, 4), (8, 4), (1, 4), (5, 1), (9, 8), (130, 128)]
)
def test_evaluation_holds_every_example_once_in_order_and_pads_with_labels_of_zero(
    count, batch_size
):
    split = numbered(count)
    dataset = evaluation_batches(split, 3, batch_size)
    assert dataset.element_spec == (
        tf.TensorSpec((batch_size, 4, 4, 3), tf.uint8),
        tf.TensorSpec((batch_size, 3), tf.float32),
    )
    batches = take(dataset, 1000)
    assert len(batches) == len(dataset) == -(-count // batch_size)
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(images[:count], split.images)
    np.testing.assert_array_equal(labels[:count], np.eye(3)[split.labels])
    np.testing.assert_array_equal(labels[count:], 0)
    assert_same_batches(take(dataset, 1000), batches)


# (replicas in all, replicas of each process, microbatches) of a batch of 16.
LAYOUTS = [(2, 1, 1), (3, 1, 1), (3, 3, 1), (4, 2, 1), (2, 1, 2), (3, 1, 2), (4, 2, 2), (16, 8, 1)]


def ranges(total: int, count: int) -> list[ReplicaRange]:
    return [ReplicaRange(first, count, total) for first in range(0, total, count)]


def joined(streams: list, sizes: list[int], steps: int) -> list:
    """The batches whose shards the processes read; `sizes` are those of all shards of a microbatch."""
    count, parts = len(sizes) // len(streams), []
    for number in range(steps):
        rounds = (stream[number * count : (number + 1) * count] for stream in streams)
        shards = [shard for one_round in rounds for shard in one_round]
        assert [len(images) for images, _ in shards] == sizes
        parts.append([np.concatenate(arrays) for arrays in zip(*shards, strict=True)])
    return parts


def halves(batches: list) -> list:
    return [(x[half], y[half]) for x, y in batches for half in (slice(8), slice(8, 16))]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("total", "count", "microbatches"), LAYOUTS)
def test_training_shards_are_the_batches_of_one_process(total, count, microbatches, balanced):
    split, steps = numbered(50), 5  # three steps a pass
    split = Split(split.images, split.labels // 2)  # 34 and 16
    arguments = (split, 3, 16, "flip|mixup(0.2)|crop(2)", 5, 7)
    expected = take(training_batches(*arguments, balanced=balanced), steps)
    streams = [
        take(
            training_batches(*arguments, replicas, microbatches, balanced),
            steps * microbatches * count,
        )
        for replicas in ranges(total, count)
    ]
    got = joined(streams, np.diff(bounds(16 // microbatches, total)).tolist(), steps * microbatches)
    assert_same_batches(got, expected if microbatches == 1 else halves(expected))


@pytest.mark.parametrize(("total", "count"), [t[:2] for t in LAYOUTS if t[2] == 1])
def test_evaluation_shards_are_the_batches_of_one_process_and_repeat(total, count):
    split = numbered(37)
    expected = take(evaluation_batches(split, 3, 16), 9)
    assert evaluation_steps(split, 16) == len(expected) == 3
    streams = [
        take(evaluation_batches(split, 3, 16, replicas), 2 * 3 * count)
        for replicas in ranges(total, count)
    ]
    got = joined(streams, np.diff(bounds(16, total)).tolist(), 6)
    assert_same_batches(got, expected * 2)


@pytest.mark.parametrize(
    ("replicas", "microbatches", "size"),
    [
        (ReplicaRange(0, 1, 1), 1, 16),
        (ReplicaRange(1, 1, 2), 1, 8),
        (ReplicaRange(2, 2, 4), 2, 2),
        (ReplicaRange(0, 3, 3), 1, None),
        (ReplicaRange(0, 2, 3), 2, None),
    ],
)
def test_equal_shards_have_static_shapes_and_are_endless(replicas, microbatches, size):
    spec = tf.TensorSpec((size, 4, 4, 3), tf.uint8), tf.TensorSpec((size, 3), tf.float32)
    batches = training_batches(
        numbered(20), 3, 16, AUGMENT, 0, replicas=replicas, microbatches=microbatches
    )
    for dataset in (batches, evaluation_batches(numbered(20), 3, 16, replicas)):
        assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
        if dataset is batches or microbatches == 1:
            assert dataset.element_spec == spec


def test_process_reads_only_its_own_examples():
    split, replicas, steps = numbered(48), ReplicaRange(1, 1, 2), 3
    own = order(split, 2 * steps, 16, replicas=replicas, microbatches=2)
    theirs = set(order(split, steps, 16)) - set(own)
    assert len(theirs) == 24
    rows = np.arange(48)
    rows[list(theirs)] = 10**6  # A gather of it is an error.
    spoilt = Split(split.stored, split.labels, rows)
    streams = [
        take(
            training_batches(s, 3, 16, "crop(2)|flip", 0, replicas=replicas, microbatches=2),
            2 * steps,
        )
        for s in (spoilt, split)
    ]
    assert_same_batches(*streams)
    with pytest.raises(tf.errors.OpError):
        take(training_batches(spoilt, 3, 16, "", 0), steps)

    rows = np.where(np.arange(48) % 16 < 8, 10**6, np.arange(48))
    spoilt = Split(split.stored, split.labels, rows)
    streams = [take(evaluation_batches(s, 3, 16, replicas), 4) for s in (spoilt, split)]
    assert_same_batches(*streams)
    with pytest.raises(tf.errors.OpError):
        take(evaluation_batches(spoilt, 3, 16), 1)


def test_replicas_of_a_strategy_get_their_shards():
    split, strategy = numbered(11), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    arguments = (split, 3, 5, AUGMENT, 0)
    batches = iter(
        sharding.shard_batches(
            strategy, lambda replicas: training_batches(*arguments, replicas=replicas), steps=None
        )
    )
    for images, labels in take(training_batches(*arguments), 4):
        got = [strategy.experimental_local_results(part) for part in next(batches)]
        assert [len(part) for part in got[0]] == [2, 3]
        assert_same_batches([[np.concatenate(part) for part in got]], [(images, labels)])


@pytest.mark.parametrize(
    ("batch_size", "microbatches", "total"), [(16, 3, 1), (16, 4, 5), (2, 1, 3)]
)
def test_batch_too_small_to_split_is_refused_in_one_line(batch_size, microbatches, total):
    replicas = ReplicaRange(0, 1, total)
    with pytest.raises(UsageError, match=f"--batch_size={batch_size} .* {total} replicas") as error:
        training_batches(
            numbered(20), 3, batch_size, "", 0, replicas=replicas, microbatches=microbatches
        )
    assert "\n" not in str(error.value)
    if microbatches == 1:
        with pytest.raises(UsageError, match="--batch_size"):
            evaluation_batches(numbered(20), 3, batch_size, replicas)


def test_images_are_read_when_a_batch_is_computed():
    """There is no copy of all of them: a memory-mapped file stays on the disk."""
    split = Split(numbered(9).images, np.zeros(9, np.int64))
    batches = evaluation_batches(split, 3, 9)
    split.stored[4] = 77
    np.testing.assert_array_equal(take(batches, 2)[0][0], split.images)


def test_memory_lives_as_long_as_its_batches():
    split = Split(numbered(9).images, np.zeros(9, np.int64))
    reference, expected = weakref.ref(split.stored), split.images.copy()
    batches = evaluation_batches(split, 3, 9)
    del split
    gc.collect()
    np.testing.assert_array_equal(take(batches, 2)[0][0], expected)
    del batches
    gc.collect()
    assert reference() is None


def test_rows_of_a_split_and_any_strides_give_the_batches_of_a_copy():
    whole = numbered(20)
    rows = np.array([17, 3, 4, 11, 0, 9, 2])
    copy = Split(whole.images[rows], whole.labels[rows])
    strided = np.concatenate([copy.images] * 2, axis=2)[:, :, :4]
    strided.flags.writeable = False
    for build in (
        lambda split: training_batches(split, 3, 3, AUGMENT, seed=0),
        lambda split: evaluation_batches(split, 3, 3),
    ):
        for split in (whole.take(rows), Split(strided, copy.labels)):
            assert_same_batches(take(build(split), 5), take(build(copy), 5))


def test_every_data_set_can_be_freed_at_once():
    """With autotune, TensorFlow waits for up to a minute when an iterator is deleted."""
    split, strategy = numbered(8), tf.distribute.get_strategy()
    made = [
        training_batches(split, 3, 4, "", 0),
        evaluation_batches(split, 3, 4),
        loop.as_batches(strategy, split.images, np.eye(8), 4, None).dataset,
    ]
    assert [dataset.options().autotune.enabled for dataset in made] == [False] * 3
