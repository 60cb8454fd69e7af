"""Which kernels a training step really runs, as TensorFlow's own trace says."""

import ast
import os
import subprocess
import sys

import pytest

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


def start(**changes) -> subprocess.Popen:
    """The step in a new process, with nothing of ours set before but `changes`."""
    ours = {"TF_ENABLE_ONEDNN_OPTS", *environment.DEFAULTS}
    env = {k: v for k, v in os.environ.items() if k not in ours} | changes
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", CODE], text=True, env=env, **pipes)


@pytest.fixture(scope="module")
def ran() -> dict:
    """{"ours" | "off": {kind of kernel: times that it ran}}."""
    processes = {"ours": start(), "off": start(TF_ENABLE_ONEDNN_OPTS="0")}
    found = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found[name] = ast.literal_eval(out.splitlines()[-1])
    return found


LAYERS = 19 + 2  # convolutions of ResNet-20 with the two shortcuts, each with normalization


def test_step_runs_the_kernels_of_onednn_by_our_defaults(ran):
    counts = ran["ours"]
    assert counts["switch"] == "1"  # newer processors take oneDNN without it
    assert counts["_MklNativeConv2D"] == LAYERS
    assert counts["_MklNativeConv2DBackpropFilter"] == LAYERS
    assert counts["_MklNativeConv2DBackpropInput"] == LAYERS - 1  # images need no gradient
    # Ex is the one with ReLU in it.
    fused = [counts.get(f"_MklNativeFusedBatchNorm{kind}", 0) for kind in ("V3", "Ex")]
    assert sum(fused) == counts["_MklNativeFusedBatchNormGradV3"] == LAYERS
    assert not {"Conv2D", "FusedBatchNormV3", "_FusedBatchNormEx"} & set(counts)


def test_user_can_turn_onednn_off(ran):
    counts = ran["off"]
    assert counts["switch"] == "0"
    assert not [kind for kind in counts if "Mkl" in kind]
    assert counts["Conv2D"] == counts["FusedBatchNormGradV3"] == LAYERS
    fused = [counts.get(kind, 0) for kind in ("FusedBatchNormV3", "_FusedBatchNormEx")]
    assert sum(fused) == LAYERS


@pytest.mark.parametrize("name", ["ours", "off"])
def test_step_takes_no_moments_one_by_one_and_updates_each_variable_by_one_kernel(ran, name):
    counts = ran[name]
    assert not {"SquaredDifference", "Rsqrt"} & set(counts)
    assert counts["ResourceApplyAdam"] == counts["variables"] == LAYERS * 3 + 2
