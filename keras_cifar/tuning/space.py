"""The space of a search: the flags that it sets, each with its range or its alternatives."""

import re
import typing

from optuna import distributions
from optuna.distributions import BaseDistribution, CategoricalDistribution

from keras_cifar.core import cli, config
from keras_cifar.core.config import FLAGS, TrainConfig
from keras_cifar.core.errors import UsageError, unknown
from keras_cifar.core.options import check, fields
from keras_cifar.data import augmentation
from keras_cifar.training.plan import check_names

_ROOMS = (config.ModelConfig, config.DataConfig, config.FitConfig, config.OptimizerConfig)
_COMPARED = {f.name for room in _ROOMS for f in fields(room) if f.metadata["compared"]}
# Validation accuracies compare on the same images only.
SEARCHED = sorted(_COMPARED - {"data", "val_fraction", "on_bad_image", "seed"})

_RANGE = re.compile(r"(log|uniform|int)\((.*)\)")
_OR = re.compile(r"(?:^|\s+)or(?:\s+|$)")  # between alternatives that have | themselves


def parse(text: str, train_flags: list[str]) -> dict[str, BaseDistribution]:
    """The values of each flag in --space, such as `learning_rate=log(1e-4,1e-1); optimizer=adam|sgd`.

    Each limit and each alternative is checked as `train` checks it among the `train_flags`.

    Raises:
        UsageError: a flag that is unknown or cannot be searched, a wrong value, a bad range.
    """
    found: dict[str, BaseDistribution] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, equals, values = map(str.strip, part.partition("="))
        check(bool(equals), f"--space: {part!r} is not FLAG=VALUES, such as optimizer=adam|sgd")
        if name not in SEARCHED:
            what = "flag that cannot be searched" if name in FLAGS else "flag"
            raise unknown(f"{what} in --space:", name, SEARCHED)
        check(name not in found, f"--space has --{name} twice")
        match = _RANGE.fullmatch(values)
        read, given = (_range, match.groups()) if match else (_alternatives, (values,))
        try:
            found[name] = read(name, *given, train_flags)
        except UsageError as error:
            raise UsageError(f"--space: {part}: {error}") from None
    check(bool(found), "--space names no flag; an example is 'learning_rate=log(1e-4,1e-1)'")
    return found


def _value(name: str, text: str, train_flags: list[str]) -> typing.Any:
    """The value of a flag given as text, checked among the other flags."""
    found, _ = cli.parse(TrainConfig, [*train_flags, f"--{name}={text.strip()}"])
    check_names(found)
    augmentation.parse(found.data.augment)
    return found.flags()[name]


def _range(name: str, kind: str, limits: str, train_flags: list[str]) -> BaseDistribution:
    numbers = limits.split(",")
    check(len(numbers) == 2, f"a range has two numbers, such as {kind}(1,10)")
    low, high = (_value(name, number, train_flags) for number in numbers)
    check(type(low) in (int, float), "it is no number; name values, separated by |")
    check(low < high, "the first number must be below the second")
    check(kind != "log" or low > 0, "a logarithmic range begins above 0")
    if kind == "int":
        check(low == int(low) and high == int(high), "the limits must be whole numbers")
    whole = kind == "int" or isinstance(low, int)
    found = distributions.IntDistribution if whole else distributions.FloatDistribution
    return found(low, high, log=kind == "log")


def _alternatives(name: str, text: str, train_flags: list[str]) -> CategoricalDistribution:
    has_bars = name == "augment" or _OR.search(text)
    texts = _OR.split(text) if has_bars else text.split("|")
    check(len(texts) > 1, f"name two values or more, separated by {'or' if has_bars else '|'}")
    return CategoricalDistribution([_value(name, each, train_flags) for each in texts])
