"""Recipes: files of flags beside this one, each with a known result. Standard library only.

NAME.flags is what absl's --flagfile reads: one flag a line, and comments. It starts with one line for
each name in HEAD, in this order:

    # expected: 0.9125                   test accuracy, or "not run"
    # spread: one run                    of which runs, and how far they differ
    # basis: published                   published, measured (by us), or none
    # source: He et al. 2015, table 6    the paper; for measured results, keras_cifar and its revision
    # data: CIFAR-10                     of the result; "JPEG CIFAR-10" are lossy images
    # hardware: not said                 of the result
    # time: not said                     of the result
    # command: python -m keras_cifar.train --recipe NAME

A measured result replaces "not run", with its spread, basis, source, data, hardware and time. Further
comments say how a recipe differs from its source. A recipe does not say where the images are (--data,
--data_dir), nor what depends on the machine.
"""

import pathlib

from keras_cifar.core.errors import unknown

DIRECTORY = pathlib.Path(__file__).parent
SUFFIX = ".flags"
HEAD = ("expected", "spread", "basis", "source", "data", "hardware", "time", "command")
BASES = ("published", "measured", "none")
NOT_RUN = "not run"
# Names of earlier revisions, for command lines that use them.
FORMER = {"chapter_resnet32": "tutorial_resnet32", "chapter_vgg_bn_drop": "tutorial_vgg_bn_drop"}


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in DIRECTORY.glob(f"*{SUFFIX}"))


def find(name: str) -> pathlib.Path:
    """The file of a recipe; raises UsageError if there is none of this name."""
    name = FORMER.get(name, name)
    if name not in names():
        raise unknown("--recipe", name, names())
    return DIRECTORY / f"{name}{SUFFIX}"


def head(name: str) -> dict[str, str]:
    """What a recipe says about its result: a text for each name in HEAD."""
    lines = find(name).read_text("utf-8").splitlines()[: len(HEAD)]
    return dict(line.removeprefix("# ").split(": ", 1) for line in lines)


def table() -> str:
    """All recipes, one a line."""
    shown = ("expected", "basis", "data", "time", "hardware", "source")
    rows = [["name", *shown]]
    rows += [[name, *(head(name)[column] for column in shown)] for name in names()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, f"\nthe files, with details of each: {DIRECTORY}"])
