"""The shards of batches that each replica reads."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.distributed import sharding
from keras_cifar.distributed.sharding import ReplicaRange


def split(dataset, replicas: ReplicaRange, microbatches: int | None) -> list[tuple]:
    """The (image numbers, weights) of each shard of a pass that a range of replicas gets."""

    class Strategy:
        num_replicas_in_sync = replicas.total

        def distribute_datasets_from_function(self, make):
            processes, index = replicas.total // replicas.count, replicas.first // replicas.count
            return make(tf.distribute.InputContext(processes, index, replicas.total))

    found = sharding.split_batches(Strategy(), dataset, None, microbatches)
    number = found.steps * replicas.count * (microbatches or 1)
    return [
        (images.numpy()[:, 0].tolist(), labels.numpy().sum(axis=1).tolist())
        for images, labels in found.dataset.take(number)
    ]


def numbered(count: int) -> tf.data.Dataset:
    """Image i is [i + 1]; its label is of weight 1."""
    images = np.arange(1, count + 1)[:, None]
    return tf.data.Dataset.from_tensor_slices((images, np.eye(3)[images[:, 0] % 3]))


@pytest.mark.parametrize(
    ("size", "total", "microbatches"), [(12, 1, 2), (12, 3, 1), (7, 2, 1), (7, 2, 2)]
)
def test_shards_of_a_batch_are_the_batch(size, total, microbatches):
    dataset, shards = numbered(12 + size).batch(size), total * microbatches
    # One process with all replicas gets all shards, one after another.
    alone = split(dataset, ReplicaRange(0, total, total), microbatches)
    for step, (images, _) in enumerate(dataset):
        batch = [numbers for numbers, _ in alone[step * shards : (step + 1) * shards]]
        if len(images) >= shards:
            assert [n for shard in batch for n in shard] == images[:, 0].numpy().tolist()
            assert max(map(len, batch)) - min(map(len, batch)) <= 1
    if total > 1:
        last = split(dataset, ReplicaRange(total - 1, 1, total), microbatches)
        assert last == alone[total - 1 :: total]


def test_each_shard_gets_all_of_fewer_examples_than_shards():
    found = split(numbered(2).batch(5), ReplicaRange(0, 3, 3), 1)
    assert [numbers for numbers, _ in found] == [[1, 2]] * 3
    assert np.sum([weights for _, weights in found]) == pytest.approx(2)
    # Microbatches do not depend on the number of replicas.
    found = split(numbered(2).batch(5), ReplicaRange(0, 3, 3), 2)
    assert [numbers for numbers, _ in found] == [[1]] * 3 + [[2]] * 3
    assert np.sum([weights for _, weights in found]) == pytest.approx(2)


@pytest.mark.parametrize("count", [1, 5])
def test_evaluation_counts_each_example_once_and_leaves_no_shard_empty(count):
    found = split(numbered(count).batch(5), ReplicaRange(0, 3, 3), None)
    assert all(numbers for numbers, _ in found)
    counted = [n for shard in found for n, weight in zip(*shard, strict=True) if weight]
    assert counted == list(range(1, count + 1))


@pytest.mark.parametrize(
    ("dataset", "replicas", "message"),
    [
        (numbered(4).take(0), 1, "the data set is empty"),
        (numbered(4).batch(2).repeat(), 1, "the data set is endless"),
        (numbered(4).batch(2).filter(lambda *_: True), 2, "does not know its length"),
    ],
)
def test_a_data_set_without_a_known_number_of_steps_is_refused(dataset, replicas, message):
    with pytest.raises(ValueError, match=message):
        split(dataset, ReplicaRange(0, 1, replicas), 1)


FREED = """
import time
from keras_cifar.core import environment
environment.import_tensorflow()
import tensorflow as tf
from keras_cifar.distributed import sharding

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
computed = []


def slow(index):
    time.sleep(0.01)
    computed.append(index)
    return index


def numbers(replicas):
    dataset = tf.data.Dataset.range(1_000_000)
    dataset = dataset.map(lambda index: tf.numpy_function(slow, [index], tf.int64))
    return sharding.without_autotune(sharding.endless(dataset).prefetch(tf.data.AUTOTUNE))


batches = sharding.shard_batches(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), numbers, None)
for _ in range(20):
    iterator = iter(batches)
    next(iterator)
    del iterator
    count = len(computed)
    time.sleep(0.03)
    assert len(computed) == count, "the thread still reads"
iterator = iter(batches)
next(iterator)
print("done")  # This iterator is freed when Python ends.
"""


def test_an_iterator_can_be_freed_while_a_batch_is_computed():
    """TensorFlow's thread must not read freed memory, which would end the process with SIGSEGV."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
