"""The networks of the peers, and which of them the settings ask for. Standard library only."""

import re
import sys
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
    if depth := re.fullmatch(r"resnet(\d+)", name):
        return resnet(int(depth[1]))
    return vgg_bn_drop() if name == "vgg_bn_drop" else sys.exit(f"has no {name}")


def build_modules(turns: Turns, nn, module: type, d: str, bias: str):
    """The network of the settings from modules of PyTorch, or of PaddlePaddle, which has the same ones.

    `nn` is torch.nn or paddle.nn, `module` its base class, `d` its last letter of "Conv2d", and `bias`
    the argument of a convolution that is False where it has no bias.
    """

    def layer(name: str, *arguments, **options):
        return getattr(nn, name + d)(*arguments, **options)

    def conv_norm(inputs, filters, size=3, stride=1, relu=True, use_bias=False):
        options = {} if use_bias else {bias: False}
        layers = [layer("Conv2", inputs, filters, size, stride, size // 2, **options)]
        layers += [layer("BatchNorm2", filters)] + [nn.ReLU()] * relu
        return nn.Sequential(*layers)

    class Block(module):
        def __init__(self, inputs, filters, stride):
            super().__init__()
            self.first = conv_norm(inputs, filters, 3, stride)
            self.second = conv_norm(filters, filters, relu=False)
            self.shortcut = nn.Identity()
            if stride > 1 or inputs != filters:
                self.shortcut = conv_norm(inputs, filters, 1, stride, relu=False)

        def forward(self, x):
            return nn.functional.relu(self.second(self.first(x)) + self.shortcut(x))

    def resnet(depth):
        layers, inputs = [conv_norm(3, 16)], 16
        for filters, stride in blocks(depth):
            layers.append(Block(inputs, filters, stride))
            inputs = filters
        layers += [layer("AdaptiveAvgPool2", 1), nn.Flatten(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)

    def vgg_bn_drop():
        layers, inputs = [], 3
        for filters, count, rate in GROUPS:
            for index in range(count):
                layers.append(conv_norm(inputs, filters, use_bias=True))
                layers += [nn.Dropout(rate)] * (index < count - 1)
                inputs = filters
            layers.append(layer("MaxPool2", 2))
        layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 512), layer("BatchNorm1", 512)]
        layers += [nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 512), nn.Linear(512, 10)]
        return nn.Sequential(*layers)

    return build(turns, resnet, vgg_bn_drop)
