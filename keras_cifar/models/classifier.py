"""The keras.Model that every builder returns: pixels in, probabilities out, its own training step."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.distributed import sharding
from keras_cifar.distributed.sharding import ShardedBatches
from keras_cifar.models import layers

# Keras walks a functional model recursively, some levels a layer: 1,202 layers pass Python's 1,000.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))

# The weight of each auxiliary classifier's loss: Szegedy et al. 2014, arXiv:1409.4842, section 5.
AUXILIARY_WEIGHT = 0.3

# Losses are divided by this before the weight of the whole batch is known, which corrects it. Any
# constant is right; that of a usual batch keeps gradients in the range of half precision, and a power
# of two keeps them exact.
NOMINAL_BATCH = 128.0

# What a training step adds up: the first three as evaluation, the weight being that of the examples.
METRICS = ("loss", "right answers", "weight", "norm of the gradient", "stop requests")

# What a Keras optimizer has of it; at most one is set.
CLIPPING = ("clipnorm", "global_clipnorm", "clipvalue")

_WRONG_UNDER_REPLICAS = (
    keras.layers.BatchNormalization,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.AlphaDropout,
)
_RIGHT = (layers.BatchNormalization, layers.Dropout)


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
            images: the keras.Input of `image_input`.
            logits: KerasTensor [B, K] of unnormalised log-probabilities.
            auxiliary: further logits, each trained with AUXILIARY_WEIGHT.
        """
        # Probabilities in the variables' type: float32 under a mixed policy.
        dtype = keras.config.dtype_policy().variable_dtype
        output = keras.layers.Activation("softmax", dtype=dtype, name="probabilities")(logits)
        model = cls(images, output, name=name)
        # The loss is computed from logits: exact where a probability rounds to 0 or 1.
        model.logits_model = keras.Model(images, [logits, *auxiliary], name=f"{name}_logits")
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
        accumulate_steps: int = 1,
        steps_per_execution: int = 1,
        jit_compile: bool = False,
        **kwargs,
    ):
        """Configures training.

        Args:
            optimizer: a Keras optimizer or its name. One that clips gradients clips those of the
                whole batch, whatever the number of replicas.
            label_smoothing: share of each label that is spread over all classes, in training only.
            weight_decay: factor of the L2 penalty, half the sum of the squared kernels; not on
                biases and normalization. (Decoupled decay is the optimizer's matter.)
            ema: decay a step of averaged weights; 0 keeps none. `averaged` puts them in place.
            accumulate_steps: parts, one after another, in which a batch is computed; only batch
                normalization notices.
            steps_per_execution: steps between two returns to Python.
            jit_compile: compiles the step with XLA; on one device only.
            **kwargs: of keras.Model.compile, but for losses and metrics, which are fixed.

        Raises:
            ValueError: what several replicas would compute wrongly, or not at all.
        """
        strategy = self.distribute_strategy
        replicas = strategy.num_replicas_in_sync
        made = strategy.extended.variable_created_in_scope
        if replicas > 1:
            if not all(made(weight.value) for weight in self.weights):
                raise ValueError("the model was built outside of the strategy's scope")
            self._check_for_replicas(jit_compile, kwargs.get("run_eagerly"))
        with strategy.scope():
            super().compile(
                optimizer,
                steps_per_execution=steps_per_execution,
                jit_compile=jit_compile,
                **kwargs,
            )
            if not self.optimizer.built:
                self.optimizer.build(self.trainable_variables)
            # Under loss scaling, what clips and counts is inside.
            self._inner = inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
            self.clipping = {name: getattr(inner, name) for name in CLIPPING}
            if inner.gradient_accumulation_steps:
                raise ValueError("give accumulate_steps to compile, not to the optimizer")
            if inner.use_ema:
                raise ValueError("give ema to compile, not use_ema to the optimizer")
            if replicas > 1 and not made(inner.iterations.value):
                raise ValueError("the optimizer was made outside of the strategy's scope")
            self.label_smoothing, self.weight_decay, self.ema = label_smoothing, weight_decay, ema
            self.accumulate_steps = accumulate_steps
            self.averages = [_local_variable(w.value) for w in (self.weights if ema else ())]
            self._stop = _local_variable(tf.zeros([], self._loss_dtype))
            self._sums = []
            if accumulate_steps > 1:
                shapes = [tf.zeros(v.shape, v.dtype) for v in self.trainable_variables]
                self._sums = [_local_variable(x) for x in [*shapes, tf.zeros(4, self._loss_dtype)]]
        self.totals = np.zeros(len(METRICS))
        self.test_function = self._compiled(self._evaluate_steps)
        self._strategy = strategy

    def _check_for_replicas(self, jit_compile, run_eagerly) -> None:
        if jit_compile is True or run_eagerly:
            raise ValueError("jit_compile and run_eagerly are for one device, not for replicas")
        for layer in _all_layers(self.logits_model):
            # Dropout's relatives would draw the same mask on each replica, and Keras's normalization
            # would weigh replicas alike that have unequal parts of a batch.
            if isinstance(layer, _WRONG_UNDER_REPLICAS) and not isinstance(layer, _RIGHT):
                raise ValueError(
                    f"layer {layer.name!r}: keras.layers.{type(layer).__name__} is not right under "
                    "several replicas; use those of keras_cifar.models.layers"
                )

    def make_train_function(self, force: bool = False):
        """Keras's hook; `train_function(iterator, count)` runs steps and sums what they return."""
        if self.train_function is None or force:
            self.train_function = self._compiled(self._train_steps)
        return self.train_function

    def _compiled(self, function):
        return function if self.run_eagerly else tf.function(function, autograph=False)

    # ---- One step

    def train_step(self, data):
        """One step of one replica on its part of a batch: (images, labels).

        Returns:
            float [5], of the whole batch: the sum of the cross-entropies, the number of right
            answers, the weight of the examples, the norm of the gradient before it is clipped, and
            how many replicas' processes were told to stop (`request_stop`).
        """
        alone = layers.replicas() == 1
        return self._update(*self._gradients(*data, divide=alone), divided=alone)

    def _accumulate(self, data) -> None:
        """Adds the gradients and figures of one part of a batch to the sums."""
        gradients, figures = self._gradients(*data)
        for total, value in zip(self._sums, [*gradients, figures], strict=True):
            total.assign_add(value)

    def _update_from_sums(self):
        """The step on what was accumulated; float [5] as of `train_step`."""
        *gradients, figures = [tf.identity(total) for total in self._sums]
        figures = self._update(gradients, figures)
        for total in self._sums:
            total.assign(tf.zeros_like(total))
        return figures

    def _gradients(self, images, labels, divide: bool = False) -> tuple[list, tf.Tensor]:
        """(gradients, figures float [4]) of this replica's examples: all of METRICS but the norm.

        The gradients are of the sum of losses, divided by the examples' weight or by NOMINAL_BATCH.
        """
        labels, smooth = tf.cast(labels, self._loss_dtype), self.label_smoothing
        # A label's sum is its example's weight, 0 for filling. TensorFlow's gradient of the
        # cross-entropy is right for labels of sum 1 alone.
        weights = tf.reduce_sum(labels, axis=1)
        targets = tf.math.divide_no_nan(labels, weights[:, None])
        targets = targets * (1 - smooth) + smooth / labels.shape[-1] if smooth else targets
        with tf.GradientTape() as tape:
            logits, *auxiliary = self._logits(images, training=True)
            losses = _cross_entropy(targets, logits)
            for other in auxiliary:
                losses += AUXILIARY_WEIGHT * _cross_entropy(targets, other)
            total = tf.reduce_sum(losses * tf.cast(weights, losses.dtype))
            total /= tf.cast(tf.reduce_sum(weights), total.dtype) if divide else NOMINAL_BATCH
            scaled = self.optimizer.scale_loss(total)
        gradients = tape.gradient(
            scaled,
            [v.value for v in self.trainable_variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,  # layers.ConvBeforeNorm's bias
        )
        return gradients, tf.concat([self._figures(labels, logits), [self._stop]], 0)

    def _update(self, gradients, figures, divided: bool = False):
        """Adds up over the replicas, changes the weights, returns the METRICS of the whole batch."""
        variables, optimizer = self.trainable_variables, self.optimizer
        if layers.replicas() > 1:
            context = tf.distribute.get_replica_context()
            *gradients, figures = context.all_reduce("SUM", [*gradients, figures])
        if not divided:
            factor = NOMINAL_BATCH / figures[2]
            gradients = [g * tf.cast(factor, g.dtype) for g in gradients]
        if self.weight_decay:
            decay = optimizer.scale_loss(tf.constant(self.weight_decay, self._loss_dtype))
            gradients = [
                g + tf.cast(decay, g.dtype) * v.value if is_kernel(v) else g
                for g, v in zip(gradients, variables, strict=True)
            ]
        norm = self._norm(gradients)
        if layers.replicas() == 1:
            optimizer.apply(gradients, variables)
        elif hasattr(optimizer, "apply_reduced"):
            optimizer.apply_reduced(self._clip(gradients), variables)
        else:
            # Keras adds the replicas' gradients up.
            optimizer.apply([g / layers.replicas() for g in self._clip(gradients)], variables)
        self._update_averages()
        return tf.stack([*tf.unstack(figures[:3]), norm, figures[3]])

    def _norm(self, gradients: list) -> tf.Tensor:
        """The norm of all gradients together, as float []."""
        squares = [tf.cast(tf.nn.l2_loss(g), self._loss_dtype) for g in gradients]
        scale = self.optimizer.scale_loss(tf.constant(1.0, self._loss_dtype))
        norm = tf.sqrt(2 * tf.add_n(squares)) / scale
        if self._inner is self.optimizer:
            return norm
        # Under loss scaling what is too large for half precision is usual: the step is left out.
        return tf.where(tf.math.is_finite(norm), norm, 0)

    def _clip(self, gradients: list) -> list:
        """The gradients of the whole batch, clipped as the optimizer is to."""
        # Under loss scaling the gradients are scaled, and so is the limit.
        scale = self.optimizer.scale_loss(tf.constant(1.0, self._loss_dtype))
        each, together, value = (self.clipping[name] for name in CLIPPING)
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
    def _clipping_here(self) -> Iterator[None]:
        """Keeps the optimizer from clipping what replicas have still to add up, in the body's traces.

        Around all replicas and not in them: they are threads.
        """
        if self.distribute_strategy.num_replicas_in_sync > 1:
            for name in CLIPPING:
                setattr(self._inner, name, None)
        try:
            yield
        finally:
            for name, limit in self.clipping.items():
                setattr(self._inner, name, limit)

    def test_step(self, data):
        """float [3] as of `train_step`, but of one replica's (images, labels) alone."""
        images, labels = data
        logits = self._logits(images, training=False)[0]
        return self._figures(tf.cast(labels, self._loss_dtype), logits)

    def _logits(self, images, training: bool) -> list:
        """[the model's logits, those of each auxiliary classifier]."""
        logits = self.logits_model(images, training=training)
        return logits if isinstance(logits, list) else [logits]

    @property
    def _loss_dtype(self) -> str:
        """Of losses and figures: that of the variables, float32 under a mixed policy."""
        return self.outputs[0].dtype

    def _figures(self, labels, logits):
        weights = tf.reduce_sum(labels, axis=1)
        right = tf.cast(tf.equal(tf.argmax(labels, 1), tf.argmax(logits, 1)), weights.dtype)
        losses = tf.cast(_cross_entropy(labels, logits), weights.dtype)
        return tf.stack([tf.reduce_sum(x) for x in (losses, right * weights, weights)])

    # ---- Many steps

    def _train_steps(self, iterator, count):
        strategy = self.distribute_strategy
        # XLA compiles the step and not the loop, as it knows no iterators.
        train_step = tf.function(self.train_step, jit_compile=True, autograph=False)
        train_step = train_step if self.jit_compile is True else self.train_step

        def step():
            if self.accumulate_steps == 1:
                figures = strategy.run(train_step, args=(next(iterator),))
            else:
                parts = tf.constant(self.accumulate_steps)
                _repeat(parts, lambda: strategy.run(self._accumulate, args=(next(iterator),)))
                figures = strategy.run(self._update_from_sums)
            copies = strategy.experimental_local_results(figures)
            # All of them are computed, though equal: where one replica's graph lacks what only they
            # use, TensorFlow simplifies it otherwise, and its weights differ in the last bit.
            with tf.control_dependencies(copies[1:]):
                return tf.identity(copies[0])

        with self._clipping_here():
            return self._sum_over(step, count, len(METRICS))

    def _evaluate_steps(self, iterator, count):
        strategy = self.distribute_strategy

        def step():
            return strategy.reduce(
                "SUM", strategy.run(self.test_step, args=(next(iterator),)), None
            )

        return self._sum_over(step, count, 3)

    def _sum_over(self, step, count, size):
        """The sum of what `count` calls of `step` return, float [size]."""
        # Without the loop where there is none: the graph in its body is optimized less.
        if self.steps_per_execution == 1:
            return step()
        zeros = tf.zeros(size, self._loss_dtype)
        return tf.while_loop(
            lambda done, _: done < count,
            lambda done, total: (done + 1, total + step()),
            (0, zeros),
            parallel_iterations=1,
        )[1]

    def fit(
        self,
        x,
        y=None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose="auto",
        callbacks=None,
        *,
        validation_data=None,
        shuffle: bool = True,
        initial_epoch: int = 0,
        initial_step: int = 0,
        initial_totals: Sequence[float] = (),
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int = 1,
    ) -> keras.callbacks.History:
        """Keras's `fit`, which is the same on every strategy: one device, many, many machines.

        The loss, the gradients, the figures and the statistics of batch normalization are those of
        the whole batch, also where replicas have unequal parts of it.

        Args:
            x: arrays with `y`, a tf.data.Dataset of whole batches (images uint8 [B, H, W, 3], labels
                float [B, K]) in the same order in every process, or `distribution.ShardedBatches`.
            validation_data: (images, labels), or a data set as `x`.
            shuffle: shuffles arrays, anew each epoch; data sets stay as they are.
            steps_per_epoch: with data sets; without it an epoch is one pass.
            initial_step: where in the initial epoch to go on; the first batch of `x` is that step's.
            initial_totals: what `totals` was there: the sums of METRICS over the epoch so far.
            epochs, verbose, callbacks, initial_epoch, validation_*: as in keras.Model.fit.

        Raises:
            ValueError: data of another form.
        """
        pieces = self._pieces(x, y, batch_size, steps_per_epoch, training=True, shuffle=shuffle)
        validation = validation_data
        if validation is not None:
            validation = validation if isinstance(validation, tuple) else (validation, None)
            validation = self._pieces(
                *validation, validation_batch_size or batch_size, validation_steps, training=False
            )
        callbacks = self._callback_list(callbacks, verbose, epochs, pieces.steps, history=True)
        run = self.make_train_function()
        self.stop_training = False
        batches = None
        callbacks.on_train_begin()
        for epoch in range(initial_epoch, epochs):
            callbacks.on_epoch_begin(epoch)
            # An endless data set goes on; one that ends is begun anew.
            batches = iter(pieces) if batches is None or pieces.steps is None else batches
            first = epoch == initial_epoch
            logs = self._run(
                run,
                batches,
                pieces.steps,
                callbacks.on_train_batch_begin,
                callbacks.on_train_batch_end,
                initial_step if first else 0,
                initial_totals if first else (),
            )
            if validation is not None and (epoch + 1) % validation_freq == 0:
                figures = self.evaluate(
                    validation, verbose=0, callbacks=callbacks, return_dict=True
                )
                logs |= {f"val_{name}": value for name, value in figures.items()}
            callbacks.on_epoch_end(epoch, logs)
            if self.stop_training:
                break
        callbacks.on_train_end(logs if epochs > initial_epoch else None)
        return self.history

    def evaluate(
        self,
        x,
        y=None,
        batch_size: int | None = None,
        verbose="auto",
        steps: int | None = None,
        callbacks=None,
        return_dict: bool = False,
    ):
        """Loss and accuracy over every example once; as keras.Model.evaluate, on every strategy.

        Args:
            x: as of `fit`.
            steps: batches; without it, one pass.
        """
        pieces = self._pieces(x, y, batch_size, steps, training=False)
        callbacks = self._callback_list(callbacks, verbose, 1, pieces.steps)
        callbacks.on_test_begin()
        logs = self._run(
            self.test_function,
            iter(pieces),
            pieces.steps,
            callbacks.on_test_batch_begin,
            callbacks.on_test_batch_end,
        )
        callbacks.on_test_end(logs)
        return logs if return_dict else list(logs.values())

    def _callback_list(self, callbacks, verbose, epochs, steps, history: bool = False):
        if isinstance(callbacks, keras.callbacks.CallbackList):
            return callbacks
        return keras.callbacks.CallbackList(
            callbacks,
            add_history=history,
            add_progbar=verbose != 0,
            verbose=1 if verbose == "auto" else verbose,
            epochs=epochs,
            steps=steps,
            model=self,
        )

    def _run(
        self,
        function: Callable,
        batches: Iterator,
        steps: int | None,
        on_begin: Callable,
        on_end: Callable,
        done: int = 0,
        totals: Sequence[float] = (),
    ) -> dict:
        """Calls `function` until `steps` batches are done, or they end; the mean figures of all."""
        training = function is self.train_function
        totals = np.array(totals or np.zeros(len(METRICS) if training else 3))
        while steps is None or done < steps:
            count = min(self.steps_per_execution, steps - done) if steps else 1
            on_begin(done)
            try:
                totals = totals + function(batches, tf.constant(count)).numpy()
            except (tf.errors.OutOfRangeError, StopIteration):
                if steps is None and done:
                    break
                raise ValueError(f"the data set ended after {done} batches of {steps}") from None
            done += count
            if training:
                self.totals = totals
            on_end(done - 1, _means(totals))
            if self.stop_training and training:
                break
        return _means(totals)

    def request_stop(self) -> None:
        """Has every process of the run see, in `totals` after the same step, that it is to stop."""
        self._stop.assign(tf.ones_like(self._stop))

    def _pieces(self, x, y, batch_size, steps, *, training: bool, shuffle=False) -> ShardedBatches:
        # One that was made and compiled in no scope takes that in which it is called for its own.
        if self.compiled and self.distribute_strategy is not self._strategy:
            raise ValueError("the model was compiled outside of the strategy's scope")
        if isinstance(x, ShardedBatches):
            return x if steps is None else dataclasses.replace(x, steps=steps)
        if not isinstance(x, tf.data.Dataset):
            if y is None:
                raise ValueError("give images and labels, or a tf.data.Dataset of both")
            dataset = tf.data.Dataset.from_tensor_slices((x, y))
            if shuffle:
                # The same order in every process.
                seed = int(self.optimizer.iterations.numpy())
                dataset = dataset.shuffle(len(x), seed, reshuffle_each_iteration=True)
            x = dataset.batch(batch_size or 32)
        elif y is not None or batch_size is not None:
            raise ValueError("a tf.data.Dataset has its own labels and batches: y, batch_size")
        spec = x.element_spec
        if not isinstance(spec, tuple) or len(spec) != 2 or spec[1].shape.rank != 2:
            raise ValueError(
                "the data must be (images, labels) with one-hot or mixed labels [B, K]; for weights, "
                f"scale the labels; got {spec}"
            )
        microbatches = self.accumulate_steps if training else None
        return sharding.split_batches(self.distribute_strategy, x, steps, microbatches)

    def train_on_batch(self, *args, **kwargs):
        raise NotImplementedError("train_on_batch: call fit on the batch")

    def test_on_batch(self, *args, **kwargs):
        raise NotImplementedError("test_on_batch: call evaluate on the batch")

    # ---- Statistics of batch normalization

    def recompute_statistics(self, batches: Iterator, count: int) -> None:
        """Recomputes the moving statistics of batch normalization for the weights as they are.

        The moving statistics lag behind the weights: with a constant learning rate they cost some
        points of accuracy, and those of averaged weights belong to no network at all. "Precise BN":
        Wu and Johnson 2021, arXiv:2105.07576. Dropout is off meanwhile, as it is in the network that
        is deployed: with it the variances would be too large (Li et al. 2018, arXiv:1801.05134).

        Args:
            batches: an iterator over (images, labels) as in training, cut for the replicas.
            count: batches to use.
        """
        norms = [
            x for x in self.layers if isinstance(x, keras.layers.BatchNormalization) and x.trainable
        ]
        if not norms or not count:
            return
        count *= self.accumulate_steps
        variables = [(x, v) for x in norms for v in (x.moving_mean, x.moving_variance)]
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
        dropouts = [x for x in self.logits_model.layers if isinstance(x, keras.layers.Dropout)]
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
        self.distribute_strategy.run(lambda x: self.logits_model(x, training=True), args=(images,))

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


def image_input(input_shape: tuple[int, int, int]) -> tuple:
    """(input, scaled): a keras.Input of uint8 [B, H, W, 3] and the same in [-1, 1]."""
    images = keras.Input(input_shape, dtype="uint8", name="images")
    return images, keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(images)


def _all_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from _all_layers(layer)


def _means(totals: np.ndarray) -> dict[str, float]:
    """The logs of Keras from sums of METRICS."""
    return {"loss": float(totals[0] / totals[2]), "accuracy": float(totals[1] / totals[2])}


def is_kernel(variable) -> bool:
    """Whether weight decay applies: a matrix or a filter, not a bias or a scale."""
    return len(variable.shape) > 1


def _cross_entropy(targets, logits):
    """float [B]: at least in float32, also under a mixed policy."""
    if logits.dtype in (tf.float16, tf.bfloat16):
        logits = tf.cast(logits, tf.float32)
    return tf.nn.softmax_cross_entropy_with_logits(tf.cast(targets, logits.dtype), logits)


def _local_variable(value) -> tf.Variable:
    """A variable that each replica reads and writes for itself."""
    return tf.Variable(value, trainable=False)


def _repeat(count: tf.Tensor, body: Callable) -> None:
    """Calls `body`, which is traced once, `count` times."""

    def once(done):
        body()
        return (done + 1,)

    tf.while_loop(lambda done: done < count, once, (0,), parallel_iterations=1)
