"""Peer: PaddlePaddle, the framework of the tutorial, dynamic graph. Run by its path."""

from networks import build_modules
from turns import Turns

turns = Turns()
settings = turns.settings

import paddle
from paddle import nn

batch_size = settings["batch_size"]
model = build_modules(turns, nn, nn.Layer, "D", "bias_attr")
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
