"""The loops over epochs and batches, with a model that only counts."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_cifar.distributed.sharding import ShardedBatches
from keras_cifar.models import loop
from tests.models.small import examples


class Log(keras.callbacks.CallbackList):
    """What is called, in order."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def call(*arguments):
            self.calls.append((name.removeprefix("on_"), *(x for x in arguments if x is not None)))

        return call


def counting(iterator, count):
    """Sums a weight of 2 and a loss of twice the batch's number over `count` batches."""
    numbers = [float(next(iterator)[0]) for _ in range(int(count))]
    return tf.constant([2 * sum(numbers), 0.0, 2.0 * len(numbers), 0.0, 0.0])


def model(steps_per_execution: int = 1):
    made = types.SimpleNamespace(steps_per_execution=steps_per_execution, stop_training=False)
    made.make_train_function = lambda: counting
    made.test_function = lambda iterator, count: counting(iterator, count)[:3]
    made.evaluate = lambda *args, **kwargs: {"loss": 7.0}
    return made


def batches(numbers, steps: int | None) -> ShardedBatches:
    return ShardedBatches(tf.data.Dataset.from_tensor_slices((list(numbers), list(numbers))), steps)


def losses(calls, name: str) -> list[tuple]:
    """(batch or epoch, mean loss so far) of each call."""
    return [(call[1], call[2]["loss"]) for call in calls if call[0] == name]


def test_epochs_continue_in_an_endless_data_set_and_report_means():
    log, counter = Log(), model(steps_per_execution=2)
    loop.fit(counter, batches(range(6), 3), None, log, epochs=2)
    assert losses(log.calls, "train_batch_end") == [(1, 0.5), (2, 1), (1, 3.5), (2, 4)]
    assert losses(log.calls, "epoch_end") == [(0, 1), (1, 4)]
    np.testing.assert_array_equal(counter.totals, [24, 0, 6, 0, 0])
    begun = [call[0] for call in log.calls[:3]]
    assert begun == ["train_begin", "epoch_begin", "train_batch_begin"]
    assert log.calls[-1][0] == "train_end"


def test_finite_data_set_starts_again_in_each_epoch():
    log = Log()
    loop.fit(model(), batches(range(3), None), None, log, epochs=2)
    assert losses(log.calls, "epoch_end") == [(0, 1), (1, 1)]


def test_resumed_epoch_starts_at_its_step_with_its_totals():
    log, totals = Log(), (20.0, 4.0, 4.0, 0.0, 0.0)
    arguments = {"initial_epoch": 1, "initial_step": 2, "initial_totals": totals}
    loop.fit(model(), batches(range(4), 3), None, log, epochs=3, **arguments)
    assert losses(log.calls, "train_batch_end") == [(2, 20 / 6), (0, 1), (1, 1.5), (2, 2)]
    assert losses(log.calls, "epoch_end") == [(1, 20 / 6), (2, 2)]


def test_an_epoch_whose_steps_were_all_done_keeps_its_totals():
    log, counter, totals = Log(), model(), (20.0, 4.0, 4.0, 0.0, 0.0)
    data, arguments = batches(range(4), 3), {"initial_step": 3, "initial_totals": totals}
    loop.fit(counter, data, None, log, epochs=1, **arguments)
    assert losses(log.calls, "epoch_end") == [(0, 5)]
    np.testing.assert_array_equal(counter.totals, totals)


def test_validation_is_in_the_logs_of_each_so_many_epochs():
    log, data = Log(), batches(range(1), None)
    loop.fit(model(), data, data, log, epochs=4, validation_freq=2)
    found = ["val_loss" in call[2] for call in log.calls if call[0] == "epoch_end"]
    assert found == [False, True, False, True]


def test_stop_training_ends_the_epoch_and_the_fit():
    counter, log, done = model(), Log(), []

    def function(iterator, count):
        done.append(1)
        counter.stop_training = len(done) == 2
        return counting(iterator, count)

    counter.make_train_function = lambda: function
    loop.fit(counter, batches(range(9), 3), None, log, epochs=3)
    assert len(done) == 2
    assert [call[0] for call in log.calls[-2:]] == ["epoch_end", "train_end"]


def test_data_set_that_ends_too_soon_is_an_error():
    with pytest.raises(ValueError, match="ended after 2 batches of 3"):
        loop.fit(model(), batches(range(2), 3), None, Log(), epochs=1)
    with pytest.raises(ValueError, match="ended after 0 batches"):
        loop.evaluate(model(), batches([], None), Log())


@pytest.mark.parametrize("steps", [None, 3])
def test_evaluation_is_the_mean_over_a_pass(steps):
    log = Log()
    assert loop.evaluate(model(2), batches([1, 2, 6], steps), log)["loss"] == 3
    assert losses(log.calls, "test_batch_end")[-1] == (2, 3)
    assert (log.calls[0][0], log.calls[-1][0]) == ("test_begin", "test_end")


def split(x, y=None, batch_size=None, **arguments) -> ShardedBatches:
    strategy = tf.distribute.get_strategy()
    return loop.as_batches(strategy, x, y, batch_size, arguments.pop("steps", None), 1, **arguments)


def test_arrays_are_shuffled_by_a_seed_and_again_in_each_pass():
    images, labels = examples(20)
    labels[:, 0] = np.arange(20)

    def passes(seed):
        data = split(images, labels, 8, shuffle_seed=seed)
        assert data.steps == 3
        rows = [batch[:, 0] for _, batch in data.dataset.take(6).as_numpy_iterator()]
        return np.concatenate(rows).reshape(2, 20).astype(int).tolist()

    assert passes(None) == [list(range(20))] * 2
    one, two = passes(1)
    assert sorted(one) == sorted(two) == list(range(20))
    assert one != two
    assert passes(1) == [one, two] != passes(2)


def test_sharded_batches_stay_but_for_their_steps():
    data = batches(range(3), 3)
    assert split(data) is data
    assert split(data, steps=2).steps == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((examples()[0],), "give images and labels"),
        ((tf.data.Dataset.from_tensors(examples()), None, 4), "its own labels and batches"),
        ((tf.data.Dataset.from_tensors(examples()[0]),), "must be .images, labels."),
        ((examples()[0], np.arange(10)), "one-hot or mixed labels"),
    ],
)
def test_data_of_another_form_is_refused(arguments, why):
    with pytest.raises(ValueError, match=why):
        split(*arguments)
