"""A learning rate from some training steps whose rate rises exponentially: the range test.

Smith 2017, arXiv:1506.01186. The data, the network, the optimizer and the batches are those of the run.
"""

import dataclasses

import keras
import numpy as np

from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.run_directory import Run, default_run_dir
from keras_cifar.distributed import strategy
from keras_cifar.evaluation import plots
from keras_cifar.models import batch_norm
from keras_cifar.reporting import record
from keras_cifar.training.plan import Plan, check_names, prepare

# Their steps have the size of the rate; those of the others depend on that of the gradients.
ADAPTIVE = ("adam", "adamw")
# The lowest and the highest rate.
RANGES = dict.fromkeys(("sgd", "muon"), (1e-5, 10.0)) | dict.fromkeys(ADAPTIVE, (1e-6, 1.0))

# Steps: an eighth of a pass, for under 2 % of the time of ten passes with the start; and their limits.
SHARE_OF_PASS, MIN_STEPS, MAX_STEPS = 1 / 8, 45, 150

SMOOTHING = 0.8  # decay of the average of the loss, whose mean age is 4 steps
SPAN = 1.8  # decades of the rate over which a slope is taken; that of a few steps is mostly noise
# Of the loss of the first step: the test ends where the average is so much above its lowest value. Much
# later a network that answers the same to all images has a low loss again.
DIVERGED = 0.5

# The candidates: this, and a share of the rate of the lowest loss. SGD diverges at nearly the same rate
# with each seed, while its loss falls slowly over decades; Adam's has a wide, flat bottom.
STEEPEST = "the steepest descent"
TENTH, FIFTH = 0.1, 0.2
SHARES = {
    TENTH: "a tenth of the rate of the lowest loss",
    FIFTH: "a fifth of the rate of the lowest loss",
}


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The losses of a range test, up to the step that diverged.

    Attributes:
        rates: learning rates, float [N].
        losses: cross-entropies of the batches, float [N]; those of the weights before the step.
        share: of the rate of the lowest loss, for a candidate; one of SHARES.
    """

    rates: np.ndarray
    losses: np.ndarray
    share: float = TENTH

    @property
    def smoothed(self) -> np.ndarray:
        """The exponential moving average of the losses, without the bias of its start; float [N]."""
        return smooth(self.losses)

    @property
    def candidates(self) -> dict[str, float]:
        """The rate in the middle of the steepest descent, and the share of that of the lowest loss."""
        lowest, logs = int(self.smoothed.argmin()), np.log10(self.rates)
        width = min(round(SPAN / (logs[1] - logs[0])), len(logs))
        # The middle of a window is not behind the lowest loss, if a window fits.
        last = min(max(lowest - width // 2, 0), len(logs) - width)
        windows = [slice(start, start + width) for start in range(last + 1)]
        slopes = [np.polyfit(logs[window], self.losses[window], 1)[0] for window in windows]
        middle = int(np.argmin(slopes)) + width // 2
        found = {STEEPEST: self.rates[middle], SHARES[self.share]: self.share * self.rates[lowest]}
        return {name: float(f"{rate:.1e}") for name, rate in found.items()}

    def proposed(self, optimizer: str) -> str:
        """Which candidate to train with."""
        return STEEPEST if optimizer in ADAPTIVE else SHARES[self.share]


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


def choose_share(model: keras.Model, optimizer: str) -> float:
    """FIFTH for SGD where batch normalization follows the filters, else TENTH."""
    # The scale of such filters changes no loss: they grow until the rate fits (Arora et al. 2018,
    # arXiv:1812.03981). Other networks learn worse long before they diverge.
    adapts = optimizer == "sgd" and any(map(batch_norm.uses_batches, batch_norm.norms(model)))
    return FIFTH if adapts else TENTH


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
    share = choose_share(plan.model, config.optimizer.optimizer)
    return RangeTest(rates[: len(rising.losses)], np.array(rising.losses), share)


def find(config: TrainConfig) -> str:
    """Draws a range test beside the run directory, which stays as it is; what it found, as text.

    Raises:
        UsageError: as `measure`.
        UserError: the loss does not fall at any rate.
    """
    run = Run(config.output.run_dir or default_run_dir(config))
    picture = run.path.with_name(f"{run.path.name}-learning_rate.png")
    test = measure(config)
    smoothed = test.smoothed
    if len(smoothed) < 3 or smoothed.argmin() == 0:
        raise UserError("the loss fell at no learning rate; are the labels and --init_from right?")
    name, candidates = test.proposed(config.optimizer.optimizer), test.candidates
    plots.save(plots.range_test(test.rates, test.losses, smoothed, candidates), picture)
    flags = config.replace(find_learning_rate=False).given() | {"learning_rate": candidates[name]}
    return (
        f"loss      {smoothed[0]:.3f} to {smoothed.min():.3f}, in {len(smoothed)} steps with rates "
        f"from {test.rates[0]:g} to {test.rates[-1]:.2g}\n"
        f"found     {', '.join(f'{rate:g}: {what}' for what, rate in candidates.items())}\n"
        f"proposed  {candidates[name]:g}, {name}\n"
        f"picture   {picture}\n\n{record.command(flags)}"
    )
