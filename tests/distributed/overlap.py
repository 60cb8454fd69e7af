"""When the packs of gradients are all-reduced: a profile of a step of two workers.

    python -m tests.distributed.overlap INDEX ADDRESSES DIRECTORY

Worker 0 prints seconds as JSON: [start, end] of each all-reduce, and the end of the last gradient.
"""

import json
import pathlib
import sys

from keras_cifar.core import environment

environment.import_tensorflow()

import tensorflow as tf

from keras_cifar.benchmarking.ours import trace_events
from keras_cifar.core.config import TrainConfig
from keras_cifar.training.plan import prepare

FLAGS = {"model": "vgg_bn_drop", "data": "digits", "batch_size": 64, "val_fraction": 0.0}


def main(index: str, addresses: str, directory: str) -> None:
    workers = {"workers": addresses, "worker_index": int(index), "peer_timeout": 300.0}
    plan = prepare(TrainConfig.from_flags(**FLAGS, **workers))
    plan.context.begin_training()
    batches, step = iter(plan.batches(0)), plan.model.make_train_function()
    step(batches, tf.constant(1))
    if int(index):
        step(batches, tf.constant(1)).numpy()
        return
    options = tf.profiler.experimental.ProfilerOptions(python_tracer_level=0)
    with tf.profiler.experimental.Profile(directory, options):
        step(batches, tf.constant(1)).numpy()
    reduced, gradients = [], []
    for name, start, seconds in trace_events(pathlib.Path(directory)):
        if name.endswith(":CollectiveReduceV2"):
            reduced.append([start, start + seconds])
        elif "Conv2DBackpropFilter" in name:
            gradients.append(start + seconds)
    print(json.dumps({"reduced": sorted(reduced), "last gradient": max(gradients)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
