"""The loops of `fit` and `evaluate`: epochs, batches, callbacks, totals."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.distributed import sharding
from keras_cifar.distributed.sharding import ShardedBatches
from keras_cifar.models.training_step import EVALUATION_METRICS, METRICS


def fit(
    model: keras.Model,
    batches: ShardedBatches,
    validation: ShardedBatches | None,
    callbacks: keras.callbacks.CallbackList,
    *,
    epochs: int,
    initial_epoch: int = 0,
    initial_step: int = 0,
    initial_totals: Sequence[float] = (),
    validation_freq: int = 1,
) -> None:
    """Trains `model`, whose `train_function` returns METRICS, as `Classifier.fit` describes."""

    def on_end(batch, totals):
        model.totals = totals
        callbacks.on_train_batch_end(batch, means(totals))
        return model.stop_training

    model.stop_training = False
    iterator = logs = None
    callbacks.on_train_begin()
    for epoch in range(initial_epoch, epochs):
        if model.stop_training:
            break
        callbacks.on_epoch_begin(epoch)
        # The same as before, unless the callbacks changed what is trained.
        function = model.make_train_function()
        # An endless data set continues in the next epoch; a finite one starts again.
        if iterator is None or batches.steps is None:
            iterator = iter(batches)
        resumed = epoch == initial_epoch
        totals = initial_totals if resumed and len(initial_totals) else np.zeros(len(METRICS))
        model.totals = np.array(totals)  # also where all steps were done before
        logs = run_batches(
            function,
            iterator,
            batches.steps,
            model.steps_per_execution,
            callbacks.on_train_batch_begin,
            on_end,
            totals,
            initial_step if resumed else 0,
        )
        if validation is not None and (epoch + 1) % validation_freq == 0:
            found = model.evaluate(validation, verbose=0, callbacks=callbacks, return_dict=True)
            logs |= {f"val_{name}": value for name, value in found.items()}
        callbacks.on_epoch_end(epoch, logs)
    callbacks.on_train_end(logs)


def evaluate(
    model: keras.Model, batches: ShardedBatches, callbacks: keras.callbacks.CallbackList
) -> dict[str, float]:
    """Returns the mean loss and accuracy of all examples."""
    callbacks.on_test_begin()
    logs = run_batches(
        model.test_function,
        iter(batches),
        batches.steps,
        model.steps_per_execution,
        callbacks.on_test_batch_begin,
        lambda batch, totals: callbacks.on_test_batch_end(batch, means(totals)),
        np.zeros(len(EVALUATION_METRICS)),
    )
    callbacks.on_test_end(logs)
    return logs


def run_batches(
    function: Callable,
    batches: Iterator,
    steps: int | None,
    steps_per_execution: int,
    on_begin: Callable,
    on_end: Callable,
    totals: Sequence[float],
    done: int = 0,
) -> dict[str, float]:
    """Calls `function` until `steps` batches are done or the batches end; returns the means.

    Args:
        function: (batches, count) -> tensor of the sums of METRICS, or of EVALUATION_METRICS, over
            `count` batches.
        on_begin: called with the index of the next batch.
        on_end: called with the index of the last batch and the totals. Returns whether to stop.
        done: batches that were done before, with these `totals`.
    """
    totals = np.array(totals)
    while steps is None or done < steps:
        count = min(steps_per_execution, steps - done) if steps else 1
        on_begin(done)
        try:
            totals = totals + function(batches, tf.constant(count)).numpy()
        except (tf.errors.OutOfRangeError, StopIteration):
            if steps is None and done:
                break
            raise ValueError(f"the data set ended after {done} batches of {steps}") from None
        done += count
        if on_end(done - 1, totals):
            break
    return means(totals)


def means(totals: np.ndarray) -> dict[str, float]:
    """Keras's logs of an epoch, from the sums of METRICS."""
    return {"loss": float(totals[0] / totals[2]), "accuracy": float(totals[1] / totals[2])}


def sum_steps(
    step: Callable, count: tf.Tensor, steps_per_execution: int, size: int, dtype: str
) -> tf.Tensor:
    """Sums what `count` calls of `step` return, dtype [size], in one TensorFlow function."""
    # TensorFlow optimizes a graph less inside a loop.
    if steps_per_execution == 1:
        return step()
    return tf.while_loop(
        lambda done, _: done < count,
        lambda done, total: (done + 1, total + step()),
        (0, tf.zeros(size, dtype)),
        parallel_iterations=1,
    )[1]


def callback_list(
    model: keras.Model, callbacks, verbose, steps: int | None, epochs: int = 1, add_history=False
) -> keras.callbacks.CallbackList:
    """Makes Keras's list of callbacks, with a progress bar where `verbose` asks for one."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    verbose = 1 if verbose == "auto" else verbose
    options = {"verbose": verbose, "epochs": epochs, "steps": steps}
    return keras.callbacks.CallbackList(callbacks, add_history, verbose != 0, model, **options)


def as_batches(
    strategy: tf.distribute.Strategy,
    x,
    y,
    batch_size: int | None,
    steps: int | None,
    microbatches: int | None = None,
    shuffle_seed: int | None = None,
) -> ShardedBatches:
    """Splits arrays or a data set into per-replica shards of batches.

    Args:
        x, y, batch_size: as in `Classifier.fit`.
        steps, microbatches: as in `sharding.split_batches`.
        shuffle_seed: shuffles arrays, again in each pass; the same order in every process.

    Raises:
        ValueError: the data has another form.
    """
    if isinstance(x, ShardedBatches):
        return x if steps is None else dataclasses.replace(x, steps=steps)
    if not isinstance(x, tf.data.Dataset):
        if y is None:
            raise ValueError("give images and labels, or a tf.data.Dataset of both")
        dataset = tf.data.Dataset.from_tensor_slices((x, y))
        if shuffle_seed is not None:
            dataset = dataset.shuffle(len(x), shuffle_seed, reshuffle_each_iteration=True)
        x = sharding.without_autotune(dataset.batch(batch_size or 32))
    elif y is not None or batch_size is not None:
        raise ValueError("a tf.data.Dataset has its own labels and batches: y, batch_size")
    spec = x.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2 or spec[1].shape.rank != 2:
        raise ValueError(
            "the data must be (images, labels) with one-hot or mixed labels [B, K]; for weights, "
            f"scale the labels; got {spec}"
        )
    return sharding.split_batches(strategy, x, steps, microbatches)
