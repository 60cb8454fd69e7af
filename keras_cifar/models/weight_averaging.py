"""Exponential moving averages of a model's weights."""

import contextlib
from collections.abc import Iterator, Sequence

import tensorflow as tf


class WeightAverages:
    """One average for each Keras variable in `weights`.

    Args:
        decay: of the averages in each step, such as 0.999; 0 keeps none.

    Attributes:
        variables: the averages, in the order of the weights.
    """

    def __init__(self, weights: Sequence, decay: float):
        self.weights, self.decay = list(weights) if decay else [], decay
        # Each replica reads and writes these for itself.
        self.variables = [tf.Variable(w.value, trainable=False) for w in self.weights]

    def update(self, iterations: tf.Tensor) -> None:
        """Moves the averages towards the weights.

        The decay grows with the optimizer's iterations, this step included, so that the initial
        weights do not count for long.
        """
        if not self.variables:
            return
        step = tf.cast(iterations, tf.float32)
        decay = tf.minimum(self.decay, (1.0 + step) / (10.0 + step))
        for average, weight in zip(self.variables, self.weights, strict=True):
            change = weight.value - average
            average.assign_add(change * tf.cast(1.0 - decay, change.dtype))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Replaces the weights by their averages while the body runs."""
        trained = [weight.numpy() for weight in self.weights]
        for weight, average in zip(self.weights, self.variables, strict=True):
            weight.assign(average.numpy())
        try:
            yield
        finally:
            for weight, value in zip(self.weights, trained, strict=True):
                weight.assign(value)
