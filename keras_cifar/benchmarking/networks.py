"""The shapes of the peers' networks, and which of them is asked for. Standard library only."""

import re
from collections.abc import Callable, Iterator

from turns import Turns

# Of vgg_bn_drop: filters, convolutions and the dropout between them of each group.
GROUPS = ((64, 2, 0.3), (128, 2, 0.4), (256, 3, 0.4), (512, 3, 0.4), (512, 3, 0.4))


def blocks(depth: int) -> Iterator[tuple[int, int]]:
    """(filters, stride) of each block of a ResNet of that depth."""
    for stage, filters in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            yield filters, 2 if stage and not block else 1


def build(turns: Turns, resnet: Callable, vgg_bn_drop: Callable):
    """The network of the settings: `resnet(depth)` or `vgg_bn_drop()`."""
    name = turns.settings["model"]
    depth = re.fullmatch(r"resnet(\d+)", name)
    if not depth and name != "vgg_bn_drop":
        turns.fail(f"has no {name}")
    return resnet(int(depth[1])) if depth else vgg_bn_drop()
