"""Precise batch normalization: moving statistics recomputed for the weights as they are.

The moving statistics lag behind the weights. With a constant learning rate that costs some points of
accuracy, and the statistics of averaged weights belong to no network at all. Wu and Johnson 2021,
arXiv:2105.07576.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from keras_cifar.distributed.exchange import all_reduce
from keras_cifar.models import batch_norm


@dataclasses.dataclass(eq=False)
class PreciseBatchNorm:
    """Recomputes the moving statistics of the trainable normalizations of `network`.

    The replicas of the strategy compute them together.

    Attributes:
        statistics: those that differ between replicas after the forward pass; they are averaged.
    """

    network: keras.Model
    strategy: tf.distribute.Strategy
    statistics: Sequence = ()
    run_eagerly: bool = False

    def __post_init__(self):
        self._forward = self._on_replicas
        if not self.run_eagerly:
            self._forward = tf.function(self._on_replicas, autograph=False)

    def recompute(self, batches: Iterator, count: int) -> None:
        """Replaces the statistics by those of `count` of the batches (images, labels).

        Dropout is off meanwhile, as it is in the network that is deployed: with it the variances
        would be too large (Li et al. 2018, arXiv:1801.05134).
        """
        norms = list(filter(batch_norm.uses_batches, batch_norm.norms(self.network)))
        if not norms or not count:
            return
        statistics = [(x, v) for x in norms for v in (x.moving_mean, x.moving_variance)]
        for _, variable in statistics:
            variable.assign(tf.zeros(variable.shape, variable.dtype))
        with without_dropout(self.network):
            for _ in range(count):
                self._forward(next(batches)[0])
        for layer, variable in statistics:
            # From zeros, a moving average of n values weighs 1 - momentum^n in all.
            variable.assign(variable / (1 - layer.momentum**count))

    def _on_replicas(self, images) -> None:
        def forward(images):
            self.network(images, training=True)
            if self.statistics:
                sums = all_reduce([tf.identity(v.value) for v in self.statistics])
                batch_norm.assign_means(self.statistics, sums)

        self.strategy.run(forward, args=(images,))


@contextlib.contextmanager
def without_dropout(network: keras.Model) -> Iterator[None]:
    """Sets the rate of each dropout layer to 0 for what the body traces."""
    dropouts = [x for x in network.layers if isinstance(x, keras.layers.Dropout)]
    rates = [x.rate for x in dropouts]
    for layer in dropouts:
        layer.rate = 0.0
    try:
        yield
    finally:
        for layer, rate in zip(dropouts, rates, strict=True):
            layer.rate = rate
