"""Flags as dataclass fields: default, help, limits, former names. Standard library only."""

import dataclasses
import math
import pathlib
import typing
from collections.abc import Callable, Iterator

from keras_cifar.core.errors import UsageError


class Limit(typing.NamedTuple):
    """The values that a numeric flag takes."""

    text: str
    holds: Callable[[float], bool]


POSITIVE = Limit("greater than 0 and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Limit("at least 0 and finite", lambda value: 0 <= value < math.inf)
FRACTION = Limit("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Limit("above 0 and at most 1", lambda value: 0 < value <= 1)
SEED = Limit("at least 0 and below 2147483648", lambda value: 0 <= value < 2**31)


def option(
    default: typing.Any,
    help: str,
    group: str,
    choices: tuple = (),
    *,
    refused: dict | None = None,
    limit: Limit | None = None,
    aliases: tuple[str, ...] = (),
    compared: bool = True,
    shared: bool = True,
) -> typing.Any:
    """A dataclass field that `cli` turns into a flag.

    Args:
        group: the heading of --help under which it stands.
        choices: the only values, if the flag has a fixed list.
        refused: value -> why it is refused, for values that users of other tools expect.
        limit: the range of a number; `Options` checks it.
        aliases: former names, which command lines and config.json may still use.
        compared: whether another value makes another run. False for flags that change the result by
            rounding at most: where files are, when checkpoints are written, on which devices it runs.
        shared: whether all workers of a run must have the same value.
    """
    metadata: dict[str, typing.Any] = {"help": help, "group": group, "choices": choices}
    metadata |= {"refused": refused or {}, "limit": limit, "aliases": aliases}
    metadata |= {"compared": compared, "shared": shared}
    return dataclasses.field(default=default, metadata=metadata)


def check(condition: bool, message: str) -> None:
    """Raises UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


def check_temperature(text: str | None) -> None:
    """Raises UsageError for an invalid --temperature."""
    try:
        valid = text in (None, "auto") or 0 < float(text) < math.inf
    except ValueError:
        valid = bool(text) and pathlib.Path(text or "").expanduser().is_dir()
    check(valid, f"--temperature={text} must be auto, a number above 0, or a run directory")


class Options:
    """Base of dataclasses of flags: raises UsageError for a number out of its range."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            limit, value = field.metadata["limit"], getattr(self, field.name)
            if limit and value is not None:
                check(limit.holds(value), f"--{field.name}={value} must be {limit.text}")


def fields(options_class: typing.Any) -> Iterator[dataclasses.Field]:
    """The flags of a dataclass of options, or of the dataclasses that it is made of."""
    for field in dataclasses.fields(options_class):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type)
        else:
            yield field


def build(options_class: typing.Any, flags: dict) -> typing.Any:
    """An instance of a dataclass of options, or of one that is made of them, from flat flags."""
    parts = [f for f in dataclasses.fields(options_class) if dataclasses.is_dataclass(f.type)]
    if not parts:
        return options_class(**flags)
    rest, values = dict(flags), {}
    for part in parts:
        names = [field.name for field in fields(part.type) if field.name in rest]
        values[part.name] = build(part.type, {name: rest.pop(name) for name in names})
    return options_class(**values, **rest)
