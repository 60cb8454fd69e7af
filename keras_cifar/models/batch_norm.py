"""Batch normalization by the statistics of the whole batch, of each replica's part, or of groups."""

import contextvars
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from keras_cifar.distributed.exchange import all_reduce_small
from keras_cifar.distributed.sharding import replicas

# The defaults of PaddlePaddle and of PyTorch (whose momentum 0.1 is 1 - ours). With Keras's own, 0.99
# and 1e-3, the moving statistics lag in short runs: after one pass over CIFAR-10, ResNet-32 had a
# test accuracy of 0.354 instead of 0.564.
BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5

# The types of FusedBatchNormV3. For half precision it computes in float32, as Keras does.
FUSED_DTYPES = ("float32", "float16", "bfloat16")

WHOLE, REPLICA, FIXED = "whole", "replica", "fixed"

# The number of the part of a batch that is being computed by itself, and how many parts there are.
_part = contextvars.ContextVar("part", default=(0, 1))


@keras.saving.register_keras_serializable("keras_cifar")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's BatchNormalization by fewer kernels (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Arguments, weights and results are those of Keras's layer, but for defaults. Keras 3 computes
    moments and scaling by a dozen elementwise kernels. This layer uses one where it exists: for 4-D
    input with channels last, in FUSED_DTYPES, where one replica has all that is normalized together.

    Attributes:
        norm_batch: the examples whose statistics normalize an example in training.
            WHOLE: the batch, however unequal the shards of the replicas are; none may be empty.
            REPLICA: the shard of its replica.
            N: groups of N consecutive examples, of which each shard has a whole number ("ghost"
            batch normalization, Hoffer et al. 2017, arXiv:1705.08741).
            FIXED: none of them; the moving averages normalize, and stay as they are.
            The moving averages take the mean over groups. With REPLICA and N, each replica has
            those of its own shard until `assign_means`.
    """

    norm_batch: str | int = WHOLE

    def __init__(self, momentum=BATCH_NORM_MOMENTUM, epsilon=BATCH_NORM_EPSILON, **kwargs):
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, inputs, training=None, mask=None):
        training = bool(training and uses_batches(self))
        usual = mask is None and self.axis in (-1, len(inputs.shape) - 1) and not self.renorm
        fusible = usual and len(inputs.shape) == 4 and inputs.dtype.name in FUSED_DTYPES
        if training and self.norm_batch not in (WHOLE, REPLICA):
            if not usual:
                raise ValueError(f"{self.name}: groups need channels last, no mask and no renorm")
            return self._normalize_groups(inputs, fusible)
        synchronized = training and self._is_synchronized()
        if not fusible:
            return super().call(inputs, training=training, mask=mask)
        if synchronized:
            weights = self._weights("float32")
            outputs, *statistics = normalize_synchronized(inputs, *weights, self.epsilon)
        else:
            outputs, *statistics = self._normalize_fused(inputs, training)
        if training:
            self._update_averages(*statistics)
        return outputs

    def _normalize_groups(self, inputs, fusible: bool) -> tf.Tensor:
        size, number = inputs.shape[0], self.norm_batch
        message = f"{self.name}: norm_batch={number} does not divide a batch of {size or 'images'}"
        if size and size % number:
            raise ValueError(message)
        if size and fusible:
            # One kernel a group, on slices that are not copied.
            groups = [self._normalize_fused(x, True) for x in tf.split(inputs, size // number)]
            outputs, means, variances = zip(*groups, strict=True)
            outputs = outputs[0] if len(groups) == 1 else tf.concat(outputs, 0)
        else:
            shape = tf.shape(inputs)
            divides = tf.debugging.Assert(shape[0] % number == 0, [message])
            with tf.control_dependencies([divides] if divides is not None else []):
                groups = tf.reshape(inputs, tf.concat([[-1, number], shape[1:]], 0))
            gamma, beta = self._weights(keras.backend.result_type(inputs.dtype, "float32"))
            groups = tf.cast(groups, gamma.dtype)
            axes = list(range(1, len(inputs.shape)))
            means, variances = tf.nn.moments(groups, axes, keepdims=True)
            statistics = means, variances, beta, gamma, self.epsilon
            outputs = tf.reshape(tf.nn.batch_normalization(groups, *statistics), shape)
            outputs = tf.ensure_shape(tf.cast(outputs, inputs.dtype), inputs.shape)
            means, variances = (tf.reshape(x, (-1, inputs.shape[-1])) for x in (means, variances))
        self._update_averages(tf.reduce_mean(means, 0), tf.reduce_mean(variances, 0))
        return outputs

    def _normalize_fused(self, inputs, training: bool) -> tuple:
        """(outputs, mean, biased variance) by one kernel; without `training`, the averages'."""
        gamma, beta = self._weights("float32")
        # The kernel makes its own in training.
        averages = [] if training else [self.moving_mean, self.moving_variance]
        given = [tf.cast(v, tf.float32) for v in averages] or [[], []]
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=gamma,
            offset=beta,
            mean=given[0],
            variance=given[1],
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            # The kernel's variance is the unbiased one: N - 1 is its divisor, and 1 where N is 1.
            count = tf.cast(tf.size(inputs) // tf.shape(inputs)[-1], tf.float32)
            variance *= tf.maximum(count - 1.0, 1.0) / count
        return outputs, mean, variance

    def _weights(self, dtype) -> tuple[tf.Tensor, tf.Tensor]:
        """(gamma, beta), each [C]."""
        size = self.moving_mean.shape
        gamma = tf.cast(self.gamma, dtype) if self.scale else tf.ones(size, dtype)
        return gamma, tf.cast(self.beta, dtype) if self.center else tf.zeros(size, dtype)

    def _update_averages(self, mean, variance) -> None:
        part, parts = _part.get()
        kept = 1.0 if part else self.momentum
        for average, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = tf.cast(average, new.dtype)
            average.assign(old * kept + new * ((1 - self.momentum) / parts))

    def _is_synchronized(self) -> bool:
        """Whether this is called on a replica that normalizes with others."""
        together = self.norm_batch == WHOLE and replicas() > 1
        return together and tf.distribute.get_replica_context() is not None

    def _moments(self, inputs, mask):
        """Keras's hook: (mean, variance) over all replicas, each float [C]."""
        mean, variance = super()._moments(inputs, mask)
        if mask is not None or not self._is_synchronized():
            return mean, variance
        count = tf.size(inputs) // tf.shape(inputs)[self.axis]
        return combine_moments(count, mean, variance)[1:]


def combine_moments(count, mean, variance) -> tuple:
    """(count, mean, variance) over all replicas from those of each, in one all-reduce.

    Chan et al. 1983. In float64, since in float32 the square of a large mean would drown the variance.
    """
    dtype, size = mean.dtype, mean.shape[0]
    count, mean, variance = (tf.cast(x, tf.float64) for x in (count, mean, variance))
    own = tf.concat([count * mean, count * (variance + mean**2), [count]], 0)
    mean, square, total = tf.split(all_reduce_small(own), [size, size, 1])
    total = tf.squeeze(total)
    mean, square = mean / total, square / total
    variance = tf.maximum(square - mean**2, 0.0)
    return tuple(tf.cast(x, dtype) for x in (total, mean, variance))


def normalize_synchronized(inputs, gamma, beta, epsilon: float) -> tuple:
    """Normalizes by the statistics over all replicas: two collectives, one for the gradient.

    Args:
        inputs: [B, H, W, C] in one of FUSED_DTYPES.
        gamma, beta: float32 [C].

    Returns:
        The outputs, like the inputs, and the mean and the biased variance, float32 [C]. Only the
        outputs have a gradient.
    """
    width, channels = inputs.shape[2] or 1, inputs.shape[3]
    axes = [0, 1, 2]

    # Broadcasting to rows of pixels is up to four times as fast as to few channels.
    def by_row(operation, x, *vectors):
        rows = tf.reshape(x, (-1, width * channels))
        return tf.reshape(operation(rows, *(tf.tile(v, [width]) for v in vectors)), tf.shape(x))

    def affine(x, scale, offset):
        return by_row(lambda rows, a, b: rows * a + b, x, scale, offset)

    @tf.custom_gradient
    def forward(inputs, gamma, beta):
        x = tf.cast(inputs, tf.float32)
        count = tf.cast(tf.size(x) // channels, tf.float32)
        mean = tf.reduce_sum(x, axes) / count
        squares = by_row(tf.math.squared_difference, x, mean)
        variance = tf.reduce_sum(squares, axes) / count
        total, mean, variance = combine_moments(count, mean, variance)
        inverse = tf.math.rsqrt(variance + epsilon)
        scale = gamma * inverse

        def gradient(upstream, *_):
            # With given statistics the kernel takes them for constants. What their dependence on
            # the inputs adds is an affine function of the inputs.
            to_inputs, to_gamma, to_beta, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream,
                x=inputs,
                scale=gamma,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=variance,
                epsilon=epsilon,
                is_training=False,
            )
            sums = all_reduce_small(tf.concat([to_gamma, to_beta], 0))
            slope, shift = (x * scale / total for x in tf.split(sums, 2))
            slope *= inverse
            correction = affine(tf.cast(inputs, tf.float32), slope, shift - slope * mean)
            return to_inputs - tf.cast(correction, to_inputs.dtype), to_gamma, to_beta

        outputs = tf.cast(affine(x, scale, beta - mean * scale), inputs.dtype)
        return (tf.ensure_shape(outputs, inputs.shape), mean, variance), gradient

    return forward(inputs, gamma, beta)


def call(network: keras.Model, images, training: bool):
    """The outputs of a network for a batch.

    In training on a CPU each half of the batch is computed by itself if it is whole groups. That is 8 %
    (ResNet-32) and 6 % (vgg_bn_drop) faster than to normalize two groups of a whole batch, which takes
    two kernels and a copy, and excludes the ReLU (2 cores, AVX-512).
    """
    trained = (layer for layer in norms(network) if training and uses_batches(layer))
    found = {getattr(layer, "norm_batch", WHOLE) for layer in trained}
    group = found.pop() if len(found) == 1 else WHOLE
    halves = isinstance(group, int) and images.shape[0] and images.shape[0] % (2 * group) == 0
    if not halves or tf.config.list_physical_devices("GPU"):
        return network(images, training=training)
    outputs = []
    for number, half in enumerate(tf.split(images, 2)):
        token = _part.set((number, 2))
        try:
            outputs.append(network(half, training=True))
        finally:
            _part.reset(token)
    return tf.nest.map_structure(lambda *both: tf.concat(both, 0), *outputs)


def norms(model: keras.Model) -> Iterator[keras.layers.BatchNormalization]:
    """The batch normalization layers of a model and of the models in it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from norms(layer)
        elif isinstance(layer, keras.layers.BatchNormalization):
            yield layer


def uses_batches(layer: keras.layers.BatchNormalization) -> bool:
    """Whether the statistics of batches normalize in training, and change the moving averages."""
    return layer.trainable and getattr(layer, "norm_batch", WHOLE) != FIXED


def configure(model: keras.Model, norm_batch: str | int) -> list:
    """Sets `norm_batch` of all layers of a model; call it in the scope of the strategy.

    Returns:
        The moving averages that differ between replicas after a step, until `assign_means`.

    Raises:
        ValueError: a value of another kind, or groups in a layer of Keras.
    """
    number = isinstance(norm_batch, int) and not isinstance(norm_batch, bool) and norm_batch > 0
    if norm_batch not in (WHOLE, REPLICA, FIXED) and not number:
        names = ", ".join(map(repr, (WHOLE, REPLICA, FIXED)))
        raise ValueError(f"norm_batch={norm_batch!r} is not {names} or a number")
    found = list(norms(model))
    for layer in found:
        if isinstance(layer, BatchNormalization):
            layer.norm_batch = norm_batch
        elif number or norm_batch == FIXED:
            raise ValueError(f"layer {layer.name!r} of Keras knows no norm_batch={norm_batch!r}")
    if norm_batch == WHOLE or replicas() == 1:
        return []
    trained = [layer for layer in found if uses_batches(layer)]
    return [v for layer in trained for v in (layer.moving_mean, layer.moving_variance)]


def assign_means(averages: Sequence, sums: Sequence[tf.Tensor]) -> None:
    """Assigns to moving averages the means over the replicas of what they sum to."""
    for average, total in zip(averages, sums, strict=True):
        average.assign(total / replicas())
