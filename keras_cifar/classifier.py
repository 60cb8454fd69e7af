"""The keras.Model that every builder returns: pixels in, probabilities out, its own training step."""

import contextlib
import sys
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

# Keras walks a functional model recursively, some levels a layer: 1,202 layers pass Python's 1,000.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))

# The weight of each auxiliary classifier's loss: Szegedy et al. 2014, arXiv:1409.4842, section 5.
AUXILIARY_WEIGHT = 0.3


@keras.saving.register_keras_serializable("keras_cifar")
class Classifier(keras.Model):
    """A functional model from uint8 images [B, H, W, 3] to probabilities float [B, K].

    `compile` takes an optimizer and what belongs to the loss; `fit`, `evaluate` and `predict` are
    Keras's. Labels are float32 [B, K]: one-hot, or mixed by augmentation. The loss that is reported
    is the cross-entropy of the main classifier alone, against the labels before smoothing, so that
    training and validation compare.

    Make one with `build`, which also takes auxiliary classifiers: they are trained with the model
    and are no part of its output, of what it saves, or of `deployable`.
    """

    @classmethod
    def build_from(cls, images, logits, name: str, auxiliary: Sequence = ()) -> "Classifier":
        """Builds the model.

        Args:
            images: the keras.Input that `pixels` made.
            logits: KerasTensor [B, K] of unnormalised log-probabilities.
            auxiliary: further logits, each trained with AUXILIARY_WEIGHT.
        """
        # Probabilities in the variables' type: float32 under a mixed policy.
        dtype = keras.config.dtype_policy().variable_dtype
        output = keras.layers.Activation("softmax", dtype=dtype, name="probabilities")(logits)
        model = cls(images, output, name=name)
        # The loss is computed from logits: exact where a probability rounds to 0 or 1.
        model.trained = keras.Model(images, [logits, *auxiliary], name=f"{name}_logits")
        return model

    @property
    def deployable(self) -> keras.Model:
        """The network without its training step: a plain functional model on the same weights."""
        return keras.Model(self.inputs[0], self.outputs[0], name=self.name)

    def compile(
        self,
        optimizer="adam",
        *,
        label_smoothing: float = 0.0,
        weight_decay: float = 0.0,
        ema: float = 0.0,
        **kwargs,
    ):
        """Configures training.

        Args:
            optimizer: a Keras optimizer or its name.
            label_smoothing: share of each label that is spread over all classes, in training only.
            weight_decay: factor of the L2 penalty, half the sum of the squared kernels; not on
                biases and normalization. (Decoupled decay is the optimizer's matter.)
            ema: decay a step of averaged weights; 0 keeps none. `averaged` puts them in place.
            **kwargs: of keras.Model.compile, but for losses and metrics, which are fixed.
        """
        super().compile(optimizer=optimizer, **kwargs)
        self.label_smoothing, self.weight_decay, self.ema = label_smoothing, weight_decay, ema
        self.loss_metric = keras.metrics.Mean("loss")
        self.accuracy_metric = keras.metrics.Mean("accuracy")
        self.averages = [
            tf.Variable(
                weight.value, trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA
            )
            for weight in (self.weights if ema else ())
        ]

    @property
    def metrics(self) -> list:
        return [self.loss_metric, self.accuracy_metric] if self.compiled else []

    def train_step(self, data):
        """One step on (images, labels) of one replica."""
        images, labels = _unpack(data)
        smooth = self.label_smoothing
        targets = labels * (1 - smooth) + smooth / labels.shape[-1] if smooth else labels
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        with tf.GradientTape() as tape:
            logits, *auxiliary = self._logits(images, training=True)
            total = tf.reduce_mean(_cross_entropy(targets, logits))
            for other in auxiliary:
                total += AUXILIARY_WEIGHT * tf.reduce_mean(_cross_entropy(targets, other))
            if self.weight_decay:
                squares = [tf.reduce_sum(tf.square(w)) for w in self._kernels()]
                total += self.weight_decay / 2 * tf.cast(tf.add_n(squares), total.dtype)
            # Keras adds the replicas' gradients; each has an equal part of the batch.
            scaled = self.optimizer.scale_loss(total / replicas)
        variables = self.trainable_variables
        gradients = tape.gradient(
            scaled,
            [v.value for v in variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,  # layers.ConvBeforeNorm's bias
        )
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self._update_averages()
        return self._update_metrics(labels, logits)

    def test_step(self, data):
        """Loss and accuracy on (images, labels) of one replica."""
        images, labels = _unpack(data)
        logits = self._logits(images, training=False)[0]
        return self._update_metrics(labels, logits)

    def _logits(self, images, training: bool) -> list:
        """[the model's logits, those of each auxiliary classifier]."""
        logits = self.trained(images, training=training)
        return logits if isinstance(logits, list) else [logits]

    def _update_metrics(self, labels, logits) -> dict:
        # A label that sums to 0 marks the filling of a last batch: it counts nothing.
        weights = tf.reduce_sum(labels, axis=1)
        right = tf.equal(tf.argmax(labels, 1), tf.argmax(logits, 1))
        losses = _cross_entropy(labels, logits)
        self.loss_metric.update_state(losses, sample_weight=weights)
        self.accuracy_metric.update_state(right, sample_weight=weights)
        return {metric.name: metric.result() for metric in self.metrics}

    def _kernels(self) -> list:
        return [v.value for v in self.trainable_variables if is_kernel(v)]

    # ---- Statistics of batch normalization

    def recalibrate(self, batches: Iterator, count: int) -> None:
        """Recomputes the moving statistics of batch normalization for the weights as they are.

        The moving statistics lag behind the weights: with a constant learning rate they cost some
        points of accuracy, and those of averaged weights belong to no network at all. "Precise BN":
        Wu and Johnson 2021, arXiv:2105.07576. Dropout is off meanwhile, as it is in the network that
        is deployed: with it the variances would be too large (Li et al. 2018, arXiv:1801.05134).

        Args:
            batches: an iterator of `distribute_strategy` over (images, labels) as in training.
            count: batches to use.
        """
        layers = [x for x in self.layers if isinstance(x, keras.layers.BatchNormalization)]
        if not layers or not count:
            return
        variables = [(x, v) for x in layers for v in (x.moving_mean, x.moving_variance)]
        for _, variable in variables:
            variable.assign(tf.zeros(variable.shape, variable.dtype))
        with self._without_dropout():
            for _ in range(count):
                self._forward(next(batches)[0])
        for layer, variable in variables:
            # From zeros, a moving average of n values weighs 1 - momentum^n in all.
            variable.assign(variable / (1 - layer.momentum**count))

    @contextlib.contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Sets the rates to 0 for the body, in which alone `_forward` is called and so traced."""
        dropouts = [x for x in self.trained.layers if isinstance(x, keras.layers.Dropout)]
        rates = [x.rate for x in dropouts]
        for layer in dropouts:
            layer.rate = 0.0
        try:
            yield
        finally:
            for layer, rate in zip(dropouts, rates, strict=True):
                layer.rate = rate

    @tf.function(autograph=False)
    def _forward(self, images):
        self.distribute_strategy.run(lambda x: self.trained(x, training=True), args=(images,))

    # ---- Averaged weights

    def _update_averages(self) -> None:
        if not self.averages:
            return
        # A short memory at first, so that the initial weights do not count for long.
        step = tf.cast(self.optimizer.iterations.value, tf.float32)
        decay = tf.minimum(self.ema, (1.0 + step) / (10.0 + step))
        for average, weight in zip(self.averages, self.weights, strict=True):
            change = weight.value - average
            average.assign_add(change * tf.cast(1.0 - decay, change.dtype))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights in place of the trained ones for the body, where there are any."""
        weights = self.weights if self.averages else []
        trained = [weight.numpy() for weight in weights]
        for weight, average in zip(weights, self.averages, strict=True):
            weight.assign(average.numpy())
        try:
            yield
        finally:
            for weight, value in zip(weights, trained, strict=True):
                weight.assign(value)


def pixels(input_shape: tuple[int, int, int]) -> tuple:
    """(input, scaled): a keras.Input of uint8 [B, H, W, 3] and the same in [-1, 1]."""
    images = keras.Input(input_shape, dtype="uint8", name="images")
    return images, keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(images)


def _unpack(data) -> tuple:
    """(images, labels) of what Keras hands to a step."""
    images, labels, weights = keras.utils.unpack_x_y_sample_weight(data)
    if weights is not None:
        raise ValueError("sample weights are not supported; scale the labels instead")
    return images, labels


def is_kernel(variable) -> bool:
    """Whether weight decay applies: a matrix or a filter, not a bias or a scale."""
    return len(variable.shape) > 1


def _cross_entropy(targets, logits):
    """float [B]: at least in float32, also under a mixed policy."""
    if logits.dtype in (tf.float16, tf.bfloat16):
        logits = tf.cast(logits, tf.float32)
    return tf.nn.softmax_cross_entropy_with_logits(tf.cast(targets, logits.dtype), logits)
