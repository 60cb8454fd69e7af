"""A learning rate from some training steps whose rate rises exponentially: the range test.

Smith 2017, arXiv:1506.01186. The data, the network, the optimizer and the batches are those of the run.
"""

import dataclasses

import keras
import numpy as np

from keras_cifar.core.config import DEFAULTS, TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.run_directory import Run, default_run_dir
from keras_cifar.distributed import strategy
from keras_cifar.evaluation import plots
from keras_cifar.reporting import record
from keras_cifar.training.plan import Plan, check_names, prepare

# The lowest and the highest rate: Adam's steps have the size of the rate, SGD's that of the gradients.
RANGES = {"sgd": (1e-5, 10.0), "adam": (1e-6, 1.0), "adamw": (1e-6, 1.0)}

# Steps: a sixth of a pass, so under 2 % of ten passes, within these limits.
SHARE_OF_PASS, MIN_STEPS, MAX_STEPS = 1 / 6, 60, 150

SMOOTHING = 0.8  # decay of the average of the loss; its mean age, 4 steps, is under half a decade
# Of the loss of the first step: the test ends where the average is so much above its lowest value. Much
# later a network that answers the same to all images has a low loss again.
DIVERGED = 0.5
MINIMUM_SHARE = (
    0.1  # of the rate of the lowest loss: the other candidate beside the steepest descent
)


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The losses of a range test, up to the step that diverged.

    Attributes:
        rates: learning rates, float [N].
        losses: cross-entropies of the batches, float [N]; those of the weights before the step.
    """

    rates: np.ndarray
    losses: np.ndarray

    @property
    def smoothed(self) -> np.ndarray:
        """The exponential moving average of the losses, without the bias of its start; float [N]."""
        return smooth(self.losses)

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls most for a factor of the rate."""
        lowest = int(self.smoothed.argmin())
        slopes = np.gradient(self.smoothed, np.log(self.rates))
        return float(self.rates[slopes[: lowest + 1].argmin()])

    @property
    def minimum(self) -> float:
        """The rate at which the smoothed loss is lowest."""
        return float(self.rates[self.smoothed.argmin()])

    @property
    def proposed(self) -> float:
        """The lower one of `steepest` and a tenth of `minimum`, with two digits."""
        return float(f"{min(self.steepest, MINIMUM_SHARE * self.minimum):.1e}")


def smooth(losses: np.ndarray) -> np.ndarray:
    """The exponential moving average of losses, float [N], corrected for its start at 0."""
    average, averages = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averages.append(average / (1 - SMOOTHING**step))
    return np.array(averages)


class _Rising(keras.callbacks.Callback):
    """Sets the rate before each step, takes the loss after it, and stops when the loss diverges."""

    def __init__(self, plan: Plan, rates: np.ndarray):
        super().__init__()
        self._factor, self._rates = plan.learning_rate.factor, rates
        self._before, self.losses = 0.0, []

    def on_train_batch_begin(self, batch, logs=None):
        self._factor.assign(self._rates[batch])

    def on_train_batch_end(self, batch, logs=None):
        loss, _, weight, *_ = self.model.totals - self._before
        self._before = self.model.totals
        averages = smooth([*self.losses, loss / weight])
        limit = averages.min() + DIVERGED * averages[0]
        self.model.stop_training = not averages[-1] <= limit  # also where it is no number
        if not self.model.stop_training:
            self.losses.append(loss / weight)


def count_steps(images: int, batch_size: int) -> int:
    """The steps of the test for so many training images, whatever --steps_per_epoch is."""
    return int(np.clip(SHARE_OF_PASS * images / batch_size, MIN_STEPS, MAX_STEPS))


def measure(config: TrainConfig) -> RangeTest:
    """Trains for some steps with rising learning rates; writes nothing.

    Raises:
        UsageError: a wrong flag, or several workers.
    """
    check_names(config)
    if strategy.choose(config.devices).cluster:
        raise UsageError("--find_learning_rate needs a single worker; give it without --workers")
    # The schedule is 1 in all steps, so that its factor is the rate.
    flags = {"learning_rate": 1.0, "lr_schedule": "constant", "warmup_epochs": 0.0}
    plan = prepare(config.replace(**flags, steps_per_execution=1))
    plan.begin_epoch(0)
    steps = count_steps(len(plan.dataset.train), config.fit.batch_size)
    rates = np.geomspace(*RANGES[config.optimizer.optimizer], steps)
    rising, batches = _Rising(plan, rates), plan.batches(start_step=0)
    with plan.reading():
        plan.model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=[rising])
    return RangeTest(rates[: len(rising.losses)], np.array(rising.losses))


def find(config: TrainConfig) -> str:
    """Draws a range test beside the run directory, which stays as it is; what it found, as text.

    Raises:
        UsageError: as `measure`.
        UserError: the loss does not fall at any rate.
    """
    run = Run(config.output.run_dir or default_run_dir(config))
    picture = run.path.with_name(f"{run.path.name}-learning_rate.png")
    test = measure(config)
    if len(test.rates) < 3 or test.minimum == test.rates[0]:
        raise UserError("the loss fell at no learning rate; are the labels and --init_from right?")
    tenth = MINIMUM_SHARE * test.minimum
    marks = {"steepest descent": test.steepest, "a tenth of the minimum": tenth}
    plots.save(plots.range_test(test.rates, test.losses, test.smoothed, marks), picture)
    # The flags of a recipe are among those that differ from the defaults.
    dropped = ("find_learning_rate", "recipe")
    flags = {k: v for k, v in config.flags().items() if v != DEFAULTS[k] and k not in dropped}
    flags["learning_rate"], smoothed = test.proposed, test.smoothed
    return (
        f"loss      {smoothed[0]:.3f} to {smoothed.min():.3f} at learning rate {test.minimum:.2g}, in "
        f"{len(test.rates)} steps from {test.rates[0]:g} to {test.rates[-1]:.2g}\n"
        f"steepest  {test.steepest:.2g}, where the loss falls most\n"
        f"tenth     {tenth:.2g}, of the rate of the lowest loss\n"
        f"proposed  {test.proposed:g}, the lower one\n"
        f"picture   {picture}\n\n{record.command(flags)}"
    )
