"""The training step: loss, gradients, all-reduce over the replicas, clipping, update."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from keras_cifar.distributed.exchange import all_reduce
from keras_cifar.distributed.sharding import replicas
from keras_cifar.models import batch_norm, resizing
from keras_cifar.models.weight_averaging import WeightAverages

# The weight of each auxiliary classifier's loss: Szegedy et al. 2014, arXiv:1409.4842, section 5.
AUXILIARY_WEIGHT = 0.3

# Divides the losses before the weight of the whole batch is known, which then corrects it. Any
# constant is right. A usual batch size keeps gradients in the range of half precision, and a power of
# two keeps them exact.
NOMINAL_BATCH = 128.0

# The sums over a batch that a training step returns. Evaluation returns the first three. The weight
# is the examples'.
METRICS = ("loss", "correct predictions", "weight", "gradient norm", "stop requests")
EVALUATION_METRICS = METRICS[:3]

# The arguments of a Keras optimizer that clip gradients; at most one is set.
CLIPPING = ("clipnorm", "global_clipnorm", "clipvalue")


@dataclasses.dataclass(eq=False)
class TrainingStep:
    """Computes the gradients of a batch and updates the variables.

    Each replica calls it on its shard of the batch, or on one microbatch of the shard after another.
    Loss, gradients and metrics are those of the whole batch, however unequal the shards are.

    Attributes:
        network: computes logits from images, or [logits, *auxiliary logits].
        variables: the trainable ones.
        optimizer: a built one.
        dtype: of losses and metrics.
        label_smoothing, weight_decay, accumulate_steps, class_weight, bias_decay: as in
            `Classifier.compile`.
        statistics: moving averages that differ between replicas after the forward pass; the step
            averages them.
        image_size: to which images are resized; None keeps theirs.
    """

    network: keras.Model
    variables: Sequence
    optimizer: keras.optimizers.Optimizer
    averages: WeightAverages
    dtype: str = "float32"
    label_smoothing: float = 0.0
    weight_decay: float = 0.0
    accumulate_steps: int = 1
    statistics: Sequence = ()
    class_weight: Sequence[float] | None = None
    bias_decay: float = 0.0
    image_size: resizing.Size | None = None

    def __post_init__(self):
        weights, classes = self.class_weight, self.network.outputs[0].shape[-1]
        if weights is not None and not (
            len(weights) == classes and all(0 < weight < math.inf for weight in weights)
        ):
            numbers = f"{classes} finite numbers above 0, one a class"
            raise ValueError(f"class_weight must be {numbers}, not {weights}")
        # A LossScaleOptimizer has the one that clips inside.
        self._inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        self._clipping = {name: getattr(self._inner, name) for name in CLIPPING}
        # Each replica reads and writes these for itself.
        self._stop = tf.Variable(tf.zeros([], self.dtype), trainable=False)
        self._sums = []
        if self.accumulate_steps > 1:
            zeros = [*(tf.zeros(v.shape, v.dtype) for v in self.variables), tf.zeros(5, self.dtype)]
            self._sums = [tf.Variable(value, trainable=False) for value in zeros]

    def request_stop(self) -> None:
        """Counts this process's replicas as stop requests in the metrics of each further step."""
        self._stop.assign(tf.ones_like(self._stop))

    def run(
        self,
        strategy: tf.distribute.Strategy,
        iterator,
        train_step: Callable,
        compiled: Callable[[Callable], Callable],
    ) -> tf.Tensor:
        """Runs one step on all replicas; returns METRICS, float [5].

        Args:
            iterator: yields (images, labels) of each replica's shard, or of each microbatch of it.
            train_step: what to run on the shard where there are no microbatches.
            compiled: compiles what a replica computes, or returns it as it is.
        """
        if self.accumulate_steps == 1:
            metrics = strategy.run(compiled(train_step), args=(next(iterator),))
        else:
            microbatches, accumulate = tf.constant(self.accumulate_steps), compiled(self.accumulate)
            _repeat(microbatches, lambda: strategy.run(accumulate, args=(next(iterator),)))
            metrics = strategy.run(compiled(self.update_from_sums))
        copies = strategy.experimental_local_results(metrics)
        # All replicas' copies are computed, though they are equal: where one replica's graph lacks
        # what only they use, TensorFlow simplifies it otherwise, and its weights differ in the last
        # bit.
        with tf.control_dependencies(copies[1:]):
            return tf.identity(copies[0])

    def __call__(self, images, labels) -> tf.Tensor:
        """Trains one replica on its shard; returns METRICS of the whole batch.

        The gradient's norm is that before clipping.
        """
        alone = replicas() == 1
        gradients, metrics = self.gradients(images, labels, divide=alone)
        return self.update(gradients, metrics, divided=alone)

    def accumulate(self, data: tuple) -> None:
        """Adds the gradients and metrics of one microbatch (images, labels) to the sums."""
        gradients, metrics = self.gradients(*data)
        for total, value in zip(self._sums, [*gradients, metrics], strict=True):
            total.assign_add(value)

    def update_from_sums(self) -> tf.Tensor:
        """Updates the variables by what was accumulated; returns METRICS."""
        *gradients, metrics = [tf.identity(total) for total in self._sums]
        metrics = self.update(gradients, metrics)
        for total in self._sums:
            total.assign(tf.zeros_like(total))
        return metrics

    def gradients(self, images, labels, divide: bool = False) -> tuple[list, tf.Tensor]:
        """Computes the gradients of the sum of this replica's weighted losses, and sums for `update`.

        The gradients are divided by the sum of the losses' weights (`divide`) or by NOMINAL_BATCH. The
        sums are METRICS without the norm, and that sum of weights.
        """
        labels, smooth = tf.cast(labels, self.dtype), self.label_smoothing
        # The sum of a label is its example's weight, 0 for padding. TensorFlow's gradient of the
        # cross-entropy is right for labels of sum 1 alone.
        weights = tf.reduce_sum(labels, axis=1)
        targets = tf.math.divide_no_nan(labels, weights[:, None])
        targets = targets * (1 - smooth) + smooth / labels.shape[-1] if smooth else targets
        if self.class_weight is not None:
            weights = tf.reduce_sum(labels * tf.constant(self.class_weight, self.dtype), axis=1)
        weight, images = tf.reduce_sum(weights), resizing.resize(images, self.image_size)
        with tf.GradientTape() as tape:
            logits, *auxiliary = compute_logits(self.network, images, training=True)
            losses = cross_entropy(targets, logits)
            for other in auxiliary:
                losses += AUXILIARY_WEIGHT * cross_entropy(targets, other)
            total = tf.reduce_sum(losses * tf.cast(weights, losses.dtype))
            total /= tf.cast(weight, total.dtype) if divide else NOMINAL_BATCH
            scaled = self.optimizer.scale_loss(total)
        gradients = tape.gradient(
            scaled,
            [v.value for v in self.variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,  # that of layers.ConvBeforeNorm
        )
        return gradients, tf.concat([evaluation_metrics(labels, logits), [self._stop, weight]], 0)

    def update(self, gradients: list, metrics, divided: bool = False) -> tf.Tensor:
        """Sums over the replicas what `gradients` returns, updates the variables; returns METRICS."""
        variables, optimizer = self.variables, self.optimizer
        if replicas() > 1:
            # TensorFlow reduces the last ones first, and the statistics are ready first.
            values = [*gradients, metrics, *(tf.identity(v.value) for v in self.statistics)]
            values = all_reduce(values)
            count = len(gradients)
            gradients, metrics, sums = values[:count], values[count], values[count + 1 :]
            batch_norm.assign_means(self.statistics, sums)
        if not divided:
            factor = NOMINAL_BATCH / metrics[4]
            gradients = [g * tf.cast(factor, g.dtype) for g in gradients]
        decays = [self.weight_decay if is_kernel(v) else self.bias_decay for v in variables]
        scaled = {d: optimizer.scale_loss(tf.constant(d, self.dtype)) for d in set(decays) - {0}}
        gradients = [
            g + tf.cast(scaled[d], g.dtype) * v.value if d else g
            for g, v, d in zip(gradients, variables, decays, strict=True)
        ]
        norm = self._norm(gradients)
        if replicas() == 1:
            optimizer.apply(gradients, variables)
        elif hasattr(optimizer, "apply_reduced"):
            optimizer.apply_reduced(self._clip(gradients), variables)
        else:
            # Keras sums the gradients of the replicas once more.
            optimizer.apply([g / replicas() for g in self._clip(gradients)], variables)
        self.averages.update(optimizer.iterations.value)
        return tf.stack([*tf.unstack(metrics[:3]), norm, metrics[3]])

    def _norm(self, gradients: list) -> tf.Tensor:
        squares = [tf.cast(tf.nn.l2_loss(g), self.dtype) for g in gradients]
        scale = self.optimizer.scale_loss(tf.constant(1.0, self.dtype))
        norm = tf.sqrt(2 * tf.add_n(squares)) / scale
        if self._inner is self.optimizer:
            return norm
        # Loss scaling expects overflows in half precision and skips such a step.
        return tf.where(tf.math.is_finite(norm), norm, 0)

    def _clip(self, gradients: list) -> list:
        # Under loss scaling the gradients are scaled, and so is the limit.
        scale = self.optimizer.scale_loss(tf.constant(1.0, self.dtype))
        each, together, value = (self._clipping[name] for name in CLIPPING)
        dtypes = [g.dtype for g in gradients]
        if together:
            return tf.clip_by_global_norm(gradients, tf.cast(scale * together, dtypes[0]))[0]
        limits = [tf.cast(scale * (each or value or 0.0), dtype) for dtype in dtypes]
        if each:
            return [tf.clip_by_norm(*pair) for pair in zip(gradients, limits, strict=True)]
        if value:
            return [tf.clip_by_value(g, -v, v) for g, v in zip(gradients, limits, strict=True)]
        return gradients

    @contextlib.contextmanager
    def clipping_all_reduced(self, strategy: tf.distribute.Strategy) -> Iterator[None]:
        """While the body traces, keeps the optimizer from clipping before the all-reduce.

        Wrap it around all replicas and not inside them: they are threads.
        """
        if strategy.num_replicas_in_sync > 1:
            for name in CLIPPING:
                setattr(self._inner, name, None)
        try:
            yield
        finally:
            for name, limit in self._clipping.items():
                setattr(self._inner, name, limit)


def check_optimizer(optimizer, strategy: tf.distribute.Strategy) -> None:
    """Raises ValueError for an optimizer whose options a TrainingStep cannot use."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if inner.gradient_accumulation_steps:
        raise ValueError("give accumulate_steps to compile, not to the optimizer")
    if inner.use_ema:
        raise ValueError("give ema to compile, not use_ema to the optimizer")
    created_here = strategy.extended.variable_created_in_scope
    if strategy.num_replicas_in_sync > 1 and not created_here(inner.iterations.value):
        raise ValueError("the optimizer was made outside of the strategy's scope")


def compute_logits(network: keras.Model, images, training: bool) -> list:
    """The main logits and those of each auxiliary classifier, each [B, K]."""
    logits = batch_norm.call(network, images, training)
    return logits if isinstance(logits, list) else [logits]


def cross_entropy(targets, logits) -> tf.Tensor:
    """float [B]: the cross-entropy of each example, in float32 or more under a mixed policy too."""
    if logits.dtype in (tf.float16, tf.bfloat16):
        logits = tf.cast(logits, tf.float32)
    return tf.nn.softmax_cross_entropy_with_logits(tf.cast(targets, logits.dtype), logits)


def evaluation_metrics(labels, logits) -> tf.Tensor:
    """float [3]: EVALUATION_METRICS of a batch, in the labels' type."""
    weights = tf.reduce_sum(labels, axis=1)
    correct = tf.cast(tf.equal(tf.argmax(labels, 1), tf.argmax(logits, 1)), weights.dtype)
    losses = tf.cast(cross_entropy(labels, logits), weights.dtype)
    return tf.stack([tf.reduce_sum(x) for x in (losses, correct * weights, weights)])


def is_kernel(variable) -> bool:
    """Whether weight decay applies: to a matrix or a filter, not to a bias or a scale."""
    return len(variable.shape) > 1


def _repeat(count: tf.Tensor, body: Callable) -> None:
    """Calls `body`, which is traced once, `count` times."""

    def once(done):
        body()
        return (done + 1,)

    tf.while_loop(lambda done: done < count, once, (0,), parallel_iterations=1)
