"""Which kernels a training step really runs, as TensorFlow's own trace says."""

import ast
import os
import subprocess
import sys

from keras_cifar.core import environment

CODE = """
from keras_cifar.core import environment
environment.import_tensorflow()
import collections
import os
import pathlib
import tempfile
import numpy as np
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2
from keras_cifar.training import optimizers
from keras_cifar.models import resnet_cifar

model = resnet_cifar.resnet_cifar(20, (8, 8, 3), 3)
model.compile(optimizers.Adam(1e-3))
images = tf.zeros((4, 8, 8, 3), tf.uint8)
labels = tf.constant(np.eye(3, dtype=np.float32)[[0, 1, 2, 0]])
step = tf.function(model.train_step, autograph=False)
options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=2)
with tempfile.TemporaryDirectory() as folder:
    tf.profiler.experimental.start(folder, options)
    step((images, labels))
    tf.profiler.experimental.stop()
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
ran = collections.Counter(
    plane.event_metadata[event.metadata_id].name.rpartition(":")[2]  # name:kind
    for plane in space.planes
    for line in plane.lines
    for event in line.events
)
switch = os.environ.get("TF_ENABLE_ONEDNN_OPTS")
print({"switch": switch, "variables": len(model.trainable_variables)} | ran)
"""


LAYERS = 19 + 2  # convolutions of ResNet-20 with the two shortcuts, each with normalization


def test_step_runs_one_kernel_of_onednn_for_each_layer_and_one_update_for_each_variable():
    ours = {"TF_ENABLE_ONEDNN_OPTS", *environment.DEFAULTS}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    counts = ast.literal_eval(done.stdout.splitlines()[-1])
    assert counts["switch"] == "1"  # newer processors take oneDNN without it
    assert counts["_MklNativeConv2D"] == LAYERS
    assert counts["_MklNativeConv2DBackpropFilter"] == LAYERS
    assert counts["_MklNativeConv2DBackpropInput"] == LAYERS - 1  # images need no gradient
    # Ex is the one with ReLU in it.
    fused = [counts.get(f"_MklNativeFusedBatchNorm{kind}", 0) for kind in ("V3", "Ex")]
    assert sum(fused) == counts["_MklNativeFusedBatchNormGradV3"] == LAYERS
    others = {"Conv2D", "FusedBatchNormV3", "_FusedBatchNormEx", "SquaredDifference", "Rsqrt"}
    assert not others & set(counts)
    assert counts["ResourceApplyAdam"] == counts["variables"] == LAYERS * 3 + 2
