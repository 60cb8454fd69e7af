"""Peer: plain Keras 3 on TensorFlow, as pip installs it, with the layers its guides use.

Run by its path, so that keras_cifar's switches are not set.
"""

from networks import GROUPS, blocks, build
from turns import Turns

turns = Turns()
settings = turns.settings

import keras
import numpy as np
import tensorflow as tf

keras.config.set_dtype_policy(settings["dtype_policy"])
L = keras.layers


def conv_norm(x, filters, size=3, stride=1, relu=True, bias=False):
    x = L.Conv2D(filters, size, stride, "same", use_bias=bias)(x)
    x = L.BatchNormalization()(x)
    return L.ReLU()(x) if relu else x


def resnet(x, depth):
    x = conv_norm(x, 16)
    for filters, stride in blocks(depth):
        shortcut = conv_norm(x, filters, 1, stride, relu=False) if stride > 1 else x
        y = conv_norm(conv_norm(x, filters, 3, stride), filters, relu=False)
        x = L.ReLU()(L.Add()([y, shortcut]))
    return L.Dense(10)(L.GlobalAveragePooling2D()(x))


def vgg_bn_drop(x):
    for filters, count, rate in GROUPS:
        for index in range(count):
            x = conv_norm(x, filters, bias=True)
            if index < count - 1:
                x = L.Dropout(rate)(x)
        x = L.MaxPooling2D()(x)
    x = L.Dropout(0.5)(L.Flatten()(x))
    x = L.Dropout(0.5)(L.ReLU()(L.BatchNormalization()(L.Dense(512)(x))))
    return L.Dense(10)(L.Dense(512)(x))


batch_size = settings["batch_size"]
inputs = keras.Input((32, 32, 3))
logits = build(turns, lambda depth: resnet(inputs, depth), lambda: vgg_bn_drop(inputs))
model = keras.Model(inputs, logits)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
random = np.random.default_rng(0)
if settings["what"] == "predict":
    images = random.random((settings["count"], 32, 32, 3), np.float32)
    turns.repeat(lambda: model.predict(images, batch_size=batch_size, verbose=0), len(images))
images = random.random((batch_size, 32, 32, 3), np.float32)
batch = tf.constant(images), tf.constant(random.integers(0, 10, batch_size))
batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
model.make_train_function()
turns.repeat(lambda: model.train_function(batches), batch_size)
