"""Optimizers and learning-rate schedules, from flags."""

import math
import re
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_cifar.core.config import OptimizerConfig
from keras_cifar.core.errors import UsageError, unknown
from keras_cifar.models import weighted
from keras_cifar.models.batch_norm import norms
from keras_cifar.models.classifier import HEAD, Classifier
from keras_cifar.models.training_step import is_kernel

# Smith and Topin 2017, arXiv:1708.07120, in the usual form: linear from a 25th of the peak in three
# tenths of the run, then down along a cosine.
ONECYCLE_RISE = 0.3
ONECYCLE_START = 1 / 25

STEP_FACTOR = 0.1  # at each milestone; He et al. 2015 at half and three quarters of the run

DECAY_GROUPS = 12  # of layers, from one to the next of which --layer_decay applies

# Of the quintic iteration that takes singular values to about 1, and how often: Jordan et al. 2024,
# "Muon", kellerjordan.github.io/posts/muon, and airbench94_muon.
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 3

SCHEDULES = ("constant", "linear", "cosine", "step", "onecycle")


@keras.saving.register_keras_serializable("keras_cifar")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of each step: a kind of SCHEDULES, with its highest rate.

    Args:
        total_steps: steps of the run; `linear`, `cosine` and `onecycle` reach 0 after them.
        warmup_steps: steps of linear warm-up from 0; with `onecycle`, of its rise (0: the default).
        milestones: with `step`, the fractions of the run after which the rate falls to a tenth.
    """

    def __init__(self, kind, peak, total_steps, warmup_steps=0, milestones=()):
        self.kind, self.peak, self.milestones = kind, peak, tuple(milestones)
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.factor = tf.Variable(1.0, trainable=False)  # scales all rates

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        total, start, warmup = self.total_steps, 0.0, self.warmup_steps
        if self.kind == "onecycle":
            warmup, start = warmup or ONECYCLE_RISE * total, ONECYCLE_START
        # The first step of a warm-up from 0 has a rate above 0.
        done = step if start else step + 1
        rising = start + (1 - start) * tf.minimum(done / warmup, 1.0) if warmup else 1.0
        if self.kind == "constant":
            falling = 1.0
        elif self.kind == "step":
            passed = [tf.cast(step >= share * total, tf.float32) for share in self.milestones]
            falling = STEP_FACTOR ** tf.add_n(passed)
        else:
            share = tf.clip_by_value((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
            falling = 1 - share if self.kind == "linear" else (1 + tf.cos(math.pi * share)) / 2
        return self.factor * (self.peak * rising * falling)

    def get_config(self):
        names = ("kind", "peak", "total_steps", "warmup_steps", "milestones")
        return {name: getattr(self, name) for name in names}


class _Replicated:
    """Applies gradients that were all-reduced already; variables can have rates of their own.

    Attributes:
        factors: of the learning rate of each variable, in the order of `build`; empty: 1 for all.
        starts: the iterations after which each variable is trained; empty: 0 for all.
    """

    factors: Sequence[float] = ()
    starts: Sequence[int] = ()

    def rate_of(self, variable, learning_rate):
        """The learning rate of a variable."""
        if not self.factors:
            return learning_rate
        return learning_rate * self.factors[self._get_variable_index(variable)]

    def apply_reduced(self, gradients, variables) -> None:
        """`apply` for gradients that are the same on every replica: Keras's `apply` would sum them."""
        if self.loss_scale_factor:
            gradients = [gradient / self.loss_scale_factor for gradient in gradients]
        self._apply_weight_decay(variables)
        rate = self.learning_rate
        for gradient, variable in zip(gradients, variables, strict=True):
            self.update_step(gradient, variable.value, rate)
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        self.iterations.assign_add(1)


class _OneKernel(_Replicated):
    """Adam's update as one kernel per variable (ResourceApplyAdam); Keras's takes about 14."""

    def update_step(self, gradient, variable, learning_rate):
        if self.amsgrad:
            return super().update_step(gradient, variable, learning_rate)
        index, dtype = self._get_variable_index(variable), variable.dtype
        step = self.iterations + 1
        if self.starts:
            # The moments are zeros until then. (Loss scaling skips steps, which are no iterations.)
            step = tf.maximum(step - self.starts[index], 1)
        step = tf.cast(step, dtype)
        beta_1, beta_2 = (tf.constant(beta, dtype) for beta in (self.beta_1, self.beta_2))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(beta_1, step),
            beta2_power=tf.pow(beta_2, step),
            lr=tf.cast(self.rate_of(variable, learning_rate), dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.constant(self.epsilon, dtype),
            grad=tf.cast(gradient, dtype),
        )


@keras.saving.register_keras_serializable("keras_cifar")
class Adam(_OneKernel, keras.optimizers.Adam):
    """keras.optimizers.Adam (Kingma and Ba 2014, arXiv:1412.6980), with fewer kernels per step."""


@keras.saving.register_keras_serializable("keras_cifar")
class AdamW(_OneKernel, keras.optimizers.AdamW):
    """keras.optimizers.AdamW (Loshchilov and Hutter 2017), with fewer kernels per step."""

    def _apply_weight_decay(self, variables):
        """Keras's, but that it decays each variable in proportion to its own learning rate."""
        if not self.factors:
            return super()._apply_weight_decay(variables)
        for variable in filter(self._use_weight_decay, variables):
            value, rate = variable.value, self.rate_of(variable, self.learning_rate)
            value.assign_sub(value * tf.cast(self.weight_decay * rate, value.dtype))


@keras.saving.register_keras_serializable("keras_cifar")
class SGD(_Replicated, keras.optimizers.SGD):
    """keras.optimizers.SGD; `bias_rate` scales the rate of all variables that are not kernels."""

    def __init__(self, *args, bias_rate=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias_rate = bias_rate

    def update_step(self, gradient, variable, learning_rate):
        learning_rate = self.rate_of(variable, learning_rate)
        if not is_kernel(variable):
            learning_rate = learning_rate * self.bias_rate
        super().update_step(gradient, variable, learning_rate)

    def get_config(self):
        return super().get_config() | {"bias_rate": self.bias_rate}


@keras.saving.register_keras_serializable("keras_cifar")
class Muon(SGD):
    """SGD with orthogonal updates of filters: Muon (Jordan et al. 2024), as airbench94_muon has it.

    A filter [H, W, C, F] is a matrix [H W C, F]. Its momentum, with singular values of about 1, is the
    update. Before that the filter gets the norm sqrt(F), which the normalization after it undoes. All
    other variables, also filters of depthwise convolutions, have SGD's update.
    """

    def update_step(self, gradient, variable, learning_rate):
        filters = variable.shape[-1]
        if len(variable.shape) != 4 or filters == 1:
            return super().update_step(gradient, variable, learning_rate)
        dtype, rate = variable.dtype, self.rate_of(variable, learning_rate)
        update = gradient = tf.cast(gradient, dtype)
        if self.momentum:
            momentum = self.momentums[self._get_variable_index(variable)].value
            update = momentum.assign(self.momentum * momentum + gradient)
            update = gradient + self.momentum * update if self.nesterov else update
        update = tf.reshape(orthogonal(tf.reshape(update, (-1, filters))), variable.shape)
        value = variable * (math.sqrt(filters) / tf.norm(variable))
        variable.assign(value - tf.cast(rate, dtype) * update)


def orthogonal(matrix: tf.Tensor) -> tf.Tensor:
    """The matrix with singular values of about 1, between 0.7 and 1.2 but for those near 0."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = tf.transpose(matrix) if tall else matrix
    x = x / (tf.norm(x) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = tf.matmul(x, x, transpose_b=True)
        x = a * x + tf.matmul(b * square + c * tf.matmul(square, square), x)
    return tf.transpose(x) if tall else x


def parse_schedule(text: str) -> tuple[str, tuple[float, ...]]:
    """(kind, milestones) of --lr_schedule, such as `step(0.5,0.75)`.

    Raises:
        UsageError: an unknown schedule, or milestones that are not increasing fractions.
    """
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    if not match or match[1] not in SCHEDULES:
        choices = [name.replace("step", "step(0.5,0.75)") for name in SCHEDULES]
        raise unknown("schedule", text, choices)
    kind, inside = match[1], match[2]
    try:
        milestones = tuple(float(share) for share in inside.split(",")) if inside else ()
    except ValueError:
        milestones = (math.nan,)
    ordered = all(a < b for a, b in zip((0.0, *milestones), (*milestones, 1.0), strict=True))
    if (kind == "step") != bool(milestones) or not ordered:
        raise UsageError(
            f"--lr_schedule={text}: step takes increasing fractions of the run between 0 and 1, as in "
            "step(0.5,0.75); the others take none"
        )
    return kind, milestones


def schedule(config: OptimizerConfig, epochs: int, steps_per_epoch: int) -> Schedule:
    """The schedule that the flags describe."""
    kind, milestones = parse_schedule(config.lr_schedule)
    total, warmup = epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise UsageError(f"--warmup_epochs={config.warmup_epochs} must be below --epochs={epochs}")
    return Schedule(kind, config.learning_rate, total, warmup, milestones)


def compile_model(
    model: Classifier,
    config: OptimizerConfig,
    rate: Schedule,
    late: Sequence[keras.Layer] = (),
    start: int = 0,
    **kwargs,
) -> None:
    """Compiles a model with the optimizer and the loss that the flags describe.

    Weight decay is decoupled with adamw (Loshchilov and Hutter 2017, arXiv:1711.05101), and L2 in the
    gradient with the others. It applies to kernels, and with `decay_biases` to all else too, which
    then shrinks as much in a step as kernels do.

    Args:
        late: layers that are frozen for the first `start` iterations.
        **kwargs: of `Classifier.compile`.

    Raises:
        UsageError: Muon without normalization.
    """
    if config.optimizer == "muon" and next(norms(model), None) is None:
        raise UsageError(
            f"--optimizer=muon sets the norm of filters, so that batch normalization must follow them, "
            f"and {model.name} has none; use adam, adamw or sgd"
        )
    l2, clipping = config.weight_decay, {"global_clipnorm": config.global_clipnorm or None}
    bias_decay = l2 if config.decay_biases else 0.0
    if config.optimizer == "adam":
        optimizer = Adam(rate, **clipping)
    elif config.optimizer in ("sgd", "muon"):
        clipping["bias_rate"] = config.bias_rate
        bias_decay /= config.bias_rate or 1.0  # With 0 biases stay as they are.
        kind = SGD if config.optimizer == "sgd" else Muon
        optimizer = kind(rate, config.momentum, config.nesterov, **clipping)
    else:
        optimizer, l2, bias_decay = AdamW(rate, config.weight_decay, **clipping), 0.0, 0.0
        others = [v for v in model.trainable_variables if not is_kernel(v)]
        optimizer.exclude_from_weight_decay([] if config.decay_biases else others)
    loss = {"label_smoothing": config.label_smoothing, "weight_decay": l2, "bias_decay": bias_decay}
    model.compile(optimizer, ema=config.ema, **loss, **kwargs)
    if config.layer_decay != 1 or config.head_rate != 1:
        optimizer.factors = rate_factors(model, config.layer_decay, config.head_rate)
    if late:
        variables = {id(variable) for layer in late for variable in layer.trainable_variables}
        optimizer.starts = [start * (id(v) in variables) for v in model.trainable_variables]


def rate_factors(model: Classifier, layer_decay: float, head_rate: float) -> list[float]:
    """The factor of the learning rate of each trainable variable, in the model's order.

    It is `head_rate` for the last layer, and falls by `layer_decay` in each twelfth of the layers from
    there to the input: twelve are the layers of ViT-B, for which Bao et al. 2021 (BEiT,
    arXiv:2106.08254) decay it so.
    """
    # These are in the order of the layers; the model's own end with the auxiliary classifiers.
    layers, factors = weighted(model.logits_model), {}
    for number, (name, layer) in enumerate(layers.items()):
        factor = layer_decay ** (DECAY_GROUPS - DECAY_GROUPS * number // (len(layers) - 1))
        factor = head_rate if name == HEAD else factor
        factors |= {id(variable): factor for variable in layer.trainable_variables}
    return [factors[id(variable)] for variable in model.trainable_variables]
