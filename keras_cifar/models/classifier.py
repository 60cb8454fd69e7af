"""The keras.Model that every builder returns: images in, probabilities out, its own training step."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_cifar.models import batch_norm, layers, loop, resizing, training_step
from keras_cifar.models.precise_batch_norm import PreciseBatchNorm
from keras_cifar.models.training_step import EVALUATION_METRICS, METRICS, TrainingStep
from keras_cifar.models.weight_averaging import WeightAverages

HEAD = "logits"  # of every family: the layer that depends on the number of classes

Shape = tuple[int, int, int]  # of an image: height, width, 3
# The factor of pixels and what is added, for all channels or for each.
Scaling = tuple[float | list[float], float | list[float]]

# Keras walks a functional model recursively, some levels a layer: 1,202 layers pass Python's 1,000.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))


@keras.saving.register_keras_serializable("keras_cifar")
class Classifier(keras.Model):
    """A functional model from uint8 images [B, H, W, 3] to probabilities float [B, K].

    `compile` takes an optimizer and the options of the loss; `fit`, `evaluate` and `predict` are
    Keras's. Labels are float32 [B, K]: one-hot, or mixed by augmentation. The reported loss is the
    cross-entropy of the main classifier alone, against the labels before smoothing and without class
    weights, so that training and validation compare.

    Make one with `build_from`.
    """

    @classmethod
    def build_from(cls, images, logits, name: str, auxiliary: Sequence = ()) -> "Classifier":
        """Builds the model from the keras.Input of `image_input` to logits [B, K].

        Further logits are those of auxiliary classifiers, each trained with AUXILIARY_WEIGHT. Neither
        the model's output nor `deployable` has them.
        """
        # Probabilities have the type of the variables: float32 under a mixed policy.
        dtype = layers.variable_dtype()
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
        class_weight: Sequence[float] | None = None,
        weight_decay: float = 0.0,
        bias_decay: float = 0.0,
        ema: float = 0.0,
        accumulate_steps: int = 1,
        norm_batch: str | int = batch_norm.WHOLE,
        jit_compile: bool = False,
        **kwargs,
    ):
        """Configures training.

        Args:
            optimizer: a Keras optimizer or its name. One that clips gradients clips those of the
                whole batch, whatever the number of replicas.
            label_smoothing: share of each label that is spread over all classes, in training.
            class_weight: [K], above 0. An example weighs, in the loss of training, the mean of its
                classes' weights in the shares of its label, and the loss of a batch is the weighted
                mean: the sum of w_i l_i over the sum of w_i, as of PyTorch's CrossEntropyLoss(weight).
                The reported loss and accuracy stay those without weights. None weighs all alike.
            weight_decay, bias_decay: factors of the L2 penalty, half the sum of squares, of kernels and
                of all else. (Decoupled decay is an option of the optimizer.)
            ema: decay of averaged weights in each step; 0 keeps none. `averaged` uses them.
            accumulate_steps: microbatches in which a batch is computed; only normalization differs.
            norm_batch: the examples that are normalized together in training: the "whole" batch or
                microbatch, each "replica"'s shard of it, or groups of so many consecutive examples.
            jit_compile: compiles the step with XLA; on one device only.
            **kwargs: of keras.Model.compile, except losses and metrics, which are fixed.

        Raises:
            ValueError: several replicas would compute it wrongly, or not at all; class_weight is wrong.
        """
        self._strategy = strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync > 1:
            created_here = strategy.extended.variable_created_in_scope
            if not all(created_here(weight.value) for weight in self.weights):
                raise ValueError("the model was built outside of the strategy's scope")
            if jit_compile is True or kwargs.get("run_eagerly"):
                raise ValueError("jit_compile and run_eagerly are for one device, not for replicas")
            layers.check_for_replicas(self.logits_model)
        with strategy.scope():
            super().compile(optimizer, jit_compile=jit_compile, **kwargs)
            if not self.optimizer.built:
                self.optimizer.build(self.trainable_variables)
            training_step.check_optimizer(self.optimizer, strategy)
            self._averages = WeightAverages(self.weights, ema)
            self.averages = self._averages.variables  # a checkpoint has them
            network, variables = self.logits_model, self.trainable_variables
            statistics = batch_norm.configure(network, norm_batch)
            options = self._loss_dtype, label_smoothing, weight_decay, accumulate_steps
            options += statistics, class_weight, bias_decay
            self._step = TrainingStep(network, variables, self.optimizer, self._averages, *options)
        self._norm_batch, eager = norm_batch, self.run_eagerly
        self._precise_batch_norm = PreciseBatchNorm(network, strategy, statistics, eager)
        self.totals = np.zeros(len(METRICS))
        self.test_function = self._compiled(self._evaluate_steps)

    # ---- Functions of TensorFlow

    def make_train_function(self, force: bool = False):
        """Keras's hook: `train_function(iterator, count)` sums what `count` steps return."""
        if self.train_function is None or force:
            self.train_function = self._compiled(self._train_steps)
        return self.train_function

    def train_step(self, data):
        """Keras's hook: one step of one replica on its shard (images, labels); see TrainingStep."""
        return self._step(*data)

    def test_step(self, data):
        """Keras's hook: float [3], EVALUATION_METRICS of one replica's (images, labels) alone."""
        images, labels = data
        logits = training_step.compute_logits(self.logits_model, images, training=False)[0]
        return training_step.evaluation_metrics(tf.cast(labels, self._loss_dtype), logits)

    def _train_steps(self, iterator, count):
        strategy = self.distribute_strategy

        # XLA compiles what a replica computes and not the loop, as it knows no iterators.
        def compiled(function):
            xla = self.jit_compile is True
            return tf.function(function, jit_compile=True, autograph=False) if xla else function

        def step():
            return self._step.run(strategy, iterator, self.train_step, compiled)

        with self._step.clipping_all_reduced(strategy):
            return self._sum_steps(step, count, METRICS)

    def _evaluate_steps(self, iterator, count):
        strategy = self.distribute_strategy

        def step():
            metrics = strategy.run(self.test_step, args=(next(iterator),))
            return strategy.reduce("SUM", metrics, None)

        return self._sum_steps(step, count, EVALUATION_METRICS)

    def _sum_steps(self, step, count, metrics):
        return loop.sum_steps(step, count, self.steps_per_execution, len(metrics), self._loss_dtype)

    def _compiled(self, function):
        return function if self.run_eagerly else tf.function(function, autograph=False)

    @property
    def _loss_dtype(self) -> str:
        """Of losses and metrics: the type of the variables, float32 under a mixed policy."""
        return self.outputs[0].dtype

    # ---- Training and evaluation

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

        Loss, gradients and metrics are those of the whole batch, also where replicas have unequal
        shards of it.

        Args:
            x: arrays with `y`, a tf.data.Dataset of whole batches (images uint8 [B, H, W, 3], labels
                float [B, K]) in the same order in every process, or `sharding.ShardedBatches`.
            shuffle: shuffles arrays, again in each epoch; data sets stay as they are.
            initial_step: the step of the initial epoch to resume at; `x` starts with its batch.
            initial_totals: `totals` at that step: the sums of METRICS over the epoch so far.
        """
        seed = int(self.optimizer.iterations.numpy()) if shuffle and y is not None else None
        microbatches = self._step.accumulate_steps
        batches = self._batches(x, y, batch_size, steps_per_epoch, microbatches, seed)
        validation = validation_data
        if validation is not None:
            pair = validation if isinstance(validation, tuple) else (validation, None)
            size = validation_batch_size or (batch_size if pair is validation else None)
            validation = self._batches(*pair, size, validation_steps)
        callbacks = loop.callback_list(self, callbacks, verbose, batches.steps, epochs, True)
        loop.fit(
            self,
            batches,
            validation,
            callbacks,
            epochs=epochs,
            initial_epoch=initial_epoch,
            initial_step=initial_step,
            initial_totals=initial_totals,
            validation_freq=validation_freq,
        )
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
        """Loss and accuracy over every example once: keras.Model.evaluate with the data of `fit`."""
        batches = self._batches(x, y, batch_size, steps)
        callbacks = loop.callback_list(self, callbacks, verbose, batches.steps)
        logs = loop.evaluate(self, batches, callbacks)
        return logs if return_dict else list(logs.values())

    def _batches(self, *arguments):
        # A model that was compiled in no scope adopts the scope in which it is called.
        if self.compiled and self.distribute_strategy is not self._strategy:
            raise ValueError("the model was compiled outside of the strategy's scope")
        return loop.as_batches(self.distribute_strategy, *arguments)

    def train_on_batch(self, *args, **kwargs):
        raise NotImplementedError("train_on_batch: call fit on the batch")

    def test_on_batch(self, *args, **kwargs):
        raise NotImplementedError("test_on_batch: call evaluate on the batch")

    # ---- Beyond Keras

    def update_trainable(self) -> None:
        """Lets `fit` train, from its next epoch on, the layers that are trainable now.

        They must have been so at `compile`: the optimizer keeps the state of all that were. Frozen
        batch normalization uses its moving statistics.
        """
        with self._strategy.scope():
            statistics = batch_norm.configure(self.logits_model, self._norm_batch)
            changed = {"variables": self.trainable_variables, "statistics": statistics}
            self._step = dataclasses.replace(self._step, **changed)
        precise = self._precise_batch_norm
        self._precise_batch_norm = dataclasses.replace(precise, statistics=statistics)
        self.train_function = None

    def set_training_size(self, size: resizing.Size | None) -> None:
        """Lets `fit`, from its next epoch on, resize images to `size` (height, width); None keeps them.

        `resizing.takes` says whether the network can. Validation has images of their own size.
        """
        if size != self._step.image_size:
            resizing.allow(self.logits_model, self.inputs[0].shape[1:3] if size is None else None)
            with self._strategy.scope():
                self._step = dataclasses.replace(self._step, image_size=size)
            self.train_function = None

    def request_stop(self) -> None:
        """Makes every process of the run see, in `totals` after the same step, that it is to stop."""
        self._step.request_stop()

    def recompute_statistics(self, batches: Iterator, count: int) -> None:
        """Recomputes the statistics of batch normalization from `count` batches of training."""
        self._precise_batch_norm.recompute(batches, count * self._step.accumulate_steps)

    def averaged(self):
        """A context with the averaged weights in place of the trained ones, where there are any."""
        return self._averages.in_place()


def image_input(input_shape: Shape, scale=1 / 127.5, offset=-1.0) -> tuple:
    """(input, scaled): a keras.Input of uint8 [B, H, W, 3] and the same times `scale` plus `offset`.

    Both are numbers or lists of one for each channel. By default the result is in [-1, 1].
    """
    images = keras.Input(input_shape, dtype="uint8", name="images")
    # In bfloat16, pixels above 127 would lose a bit before the offset is added.
    rescaling = keras.layers.Rescaling(scale, offset, dtype=layers.variable_dtype(), name="scale")
    return images, rescaling(images)


def get_scaling(model: keras.Model) -> Scaling | None:
    """The scale and offset with which a model's layer `scale` transforms pixels; None without it."""
    layers = [layer for layer in model.layers if layer.name == "scale"]
    return (layers[0].scale, layers[0].offset) if layers else None


def set_scaling(model: keras.Model, scaling: Scaling) -> None:
    """Sets what `get_scaling` returns, before TensorFlow has traced the model."""
    layer = model.get_layer("scale")
    layer.scale, layer.offset = scaling
