"""Peer: PaddlePaddle, the framework of the book's chapter, dynamic graph. Run by its path."""

from networks import GROUPS, blocks, build
from turns import Turns

turns = Turns()
settings = turns.settings

try:
    import paddle
except ImportError:
    turns.fail("is not installed (pip install paddlepaddle)")
from paddle import nn


def conv_norm(inputs, filters, size=3, stride=1, relu=True, bias=None):
    layers = [nn.Conv2D(inputs, filters, size, stride, size // 2, bias_attr=bias)]
    layers += [nn.BatchNorm2D(filters)] + [nn.ReLU()] * relu
    return nn.Sequential(*layers)


class Block(nn.Layer):
    def __init__(self, inputs, filters, stride):
        super().__init__()
        self.first = conv_norm(inputs, filters, 3, stride, bias=False)
        self.second = conv_norm(filters, filters, relu=False, bias=False)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != filters:
            self.shortcut = conv_norm(inputs, filters, 1, stride, relu=False, bias=False)

    def forward(self, x):
        return nn.functional.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet(depth):
    layers, inputs = [conv_norm(3, 16, bias=False)], 16
    for filters, stride in blocks(depth):
        layers.append(Block(inputs, filters, stride))
        inputs = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(64, 10))


def vgg_bn_drop():
    layers, inputs = [], 3
    for filters, count, rate in GROUPS:
        for index in range(count):
            layers.append(conv_norm(inputs, filters))
            layers += [nn.Dropout(rate)] * (index < count - 1)
            inputs = filters
        layers.append(nn.MaxPool2D(2))
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 512), nn.BatchNorm1D(512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(512, 512), nn.Linear(512, 10))


batch_size = settings["batch_size"]
model = build(turns, resnet, vgg_bn_drop)
model.train()
images = paddle.rand([batch_size, 3, 32, 32])
labels = paddle.randint(0, 10, [batch_size])
optimizer = paddle.optimizer.Adam(1e-3, parameters=model.parameters())


def step():
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    float(loss)


turns.repeat(step, batch_size)
