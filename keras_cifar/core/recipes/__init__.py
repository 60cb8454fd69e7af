"""Recipes: files of flags beside this one, a result each. Standard library only: commands read it.

NAME.flags is what absl's --flagfile reads: a flag a line, and comments. It begins with a line for each
name in HEAD, in this order:

    # expected: 0.9125                   test accuracy, or "not run"
    # spread: one run                    over which runs, and how far they lay apart
    # basis: published                   published, measured (by us), or none
    # source: He et al. 2015, table 6    who says so; of what is measured, keras_cifar and its revision
    # data: CIFAR-10                     of that figure; "JPEG CIFAR-10" are lossy images
    # hardware: not said                 likewise
    # time: not said                     likewise
    # command: python -m keras_cifar.train --recipe NAME

A figure that was measured later takes the place of "not run", with its spread, basis, source, data,
hardware and time. Further comments say how a recipe differs from its source. Where the images are
(--data, --data_dir) is no part of a recipe, nor is what a machine decides.
"""

import pathlib
import re

from keras_cifar.core.errors import unknown

DIRECTORY = pathlib.Path(__file__).parent
SUFFIX = ".flags"
HEAD = ("expected", "spread", "basis", "source", "data", "hardware", "time", "command")
BASES = ("published", "measured", "none")
NOT_RUN = "not run"

_SHOWN = ("expected", "basis", "data", "time", "hardware", "source")


def names() -> list[str]:
    """The recipes there are, in order."""
    return sorted(path.stem for path in DIRECTORY.glob(f"*{SUFFIX}"))


def find(name: str) -> pathlib.Path:
    """The file of a recipe.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in names():
        raise unknown("--recipe", name, names())
    return DIRECTORY / f"{name}{SUFFIX}"


def head(name: str) -> dict[str, str]:
    """What a recipe says of itself: a text for each name in HEAD.

    Raises:
        UsageError: there is none of this name.
        ValueError: a line is missing.
    """
    lines = find(name).read_text("utf-8").splitlines()
    found = [re.fullmatch(r"# (\w+): (.+)", line) for line in lines[: len(HEAD)]]
    if [match and match[1] for match in found] != list(HEAD):
        raise ValueError(f"{name}{SUFFIX} does not begin with a line for each of {', '.join(HEAD)}")
    return {match[1]: match[2].strip() for match in found}


def table() -> str:
    """All recipes, a line each."""
    rows = [("name", *_SHOWN)]
    rows += [(name, *(head(name)[column] for column in _SHOWN)) for name in names()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, f"\nthe files, with what is to be known of each: {DIRECTORY}"])
