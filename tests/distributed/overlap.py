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
    for name, start, end in events(pathlib.Path(directory)):
        if name.endswith(":CollectiveReduceV2"):
            reduced.append([start, end])
        elif "Conv2DBackpropFilter" in name:
            gradients.append(end)
    print(json.dumps({"reduced": sorted(reduced), "last gradient": max(gradients)}))


def events(directory: pathlib.Path):
    """(name, start, end) of each event of a profile, in seconds."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    for path in directory.rglob("*.xplane.pb"):
        for plane in xplane_pb2.XSpace.FromString(path.read_bytes()).planes:
            for line in plane.lines:
                for event in line.events:
                    start = line.timestamp_ns / 1e9 + event.offset_ps / 1e12
                    name = plane.event_metadata[event.metadata_id].name
                    yield name, start, start + event.duration_ps / 1e12


if __name__ == "__main__":
    main(*sys.argv[1:])
