"""Peer: PyTorch, eager or compiled, in either memory format. Run by its path."""

from networks import GROUPS, blocks, build
from turns import Turns

turns = Turns()
settings = turns.settings

try:
    import torch
except ImportError:
    turns.fail("is not installed (pip install torch)")
from torch import nn


def conv_norm(inputs, filters, size=3, stride=1, relu=True, bias=False):
    layers = [nn.Conv2d(inputs, filters, size, stride, size // 2, bias=bias)]
    layers += [nn.BatchNorm2d(filters)] + [nn.ReLU()] * relu
    return nn.Sequential(*layers)


class Block(nn.Module):
    def __init__(self, inputs, filters, stride):
        super().__init__()
        self.first = conv_norm(inputs, filters, 3, stride)
        self.second = conv_norm(filters, filters, relu=False)
        same = stride == 1 and inputs == filters
        self.shortcut = nn.Identity() if same else conv_norm(inputs, filters, 1, stride, relu=False)

    def forward(self, x):
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet(depth):
    layers, inputs = [conv_norm(3, 16)], 16
    for filters, stride in blocks(depth):
        layers.append(Block(inputs, filters, stride))
        inputs = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vgg_bn_drop():
    layers, inputs = [], 3
    for filters, count, rate in GROUPS:
        for index in range(count):
            layers.append(conv_norm(inputs, filters, bias=True))
            layers += [nn.Dropout(rate)] * (index < count - 1)
            inputs = filters
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(512, 512), nn.Linear(512, 10))


batch_size = settings["batch_size"]
torch.manual_seed(0)
model = build(turns, resnet, vgg_bn_drop)
layout = torch.channels_last if settings["channels_last"] else torch.contiguous_format
model = model.train().to(memory_format=layout)
images = torch.rand(batch_size, 3, 32, 32).contiguous(memory_format=layout)
labels = torch.randint(0, 10, (batch_size,))
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
forward = torch.compile(model) if settings["compile"] else model


def step():
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(forward(images), labels).backward()
    optimizer.step()


turns.repeat(step, batch_size)
