"""The contender that this package is: step, pipeline, fit, predict or profile, one a process."""

import collections
import functools
import pathlib
import tempfile
import time
from collections.abc import Iterator

from keras_cifar.benchmarking.turns import Turns
from keras_cifar.core import environment

environment.import_tensorflow()

import keras
import numpy as np
import tensorflow as tf

from keras_cifar import data, models
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.run_directory import Run
from keras_cifar.exporters import saved_model
from keras_cifar.inference.predictor import Predictor
from keras_cifar.training import optimizers, trainer
from keras_cifar.training.plan import prepare

SHAPE = (32, 32, 3)
CLASSES = 10
PROFILED_STEPS = 3

# A kernel has the kind of the first key that is part of its name.
KINDS = {
    "Jpeg": "JPEG",
    "Resize": "resizing",
    "Conv2D": "convolutions",
    "BatchNorm": "batch normalization",
    "ResourceApply": "optimizer",
    "Random": "dropout",
    "Pool": "pooling",
    "MatMul": "dense layers",
}


def random_split(count: int) -> data.Split:
    """Noise in place of images."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, *SHAPE), np.uint8)
    return data.Split(images, random.integers(0, CLASSES, count))


def train_function(settings: dict):
    """A training step, compiled as `fit` compiles it, on the same batch of noise each time."""
    keras.config.set_dtype_policy(environment.dtype_policy(settings["dtype_policy"])[0])
    model = models.build(settings["model"], SHAPE, CLASSES)
    xla, _ = environment.use_xla(settings["xla"], "none")
    model.compile(optimizers.Adam(1e-3), jit_compile=xla)
    size = settings["batch_size"]
    batch = next(iter(data.training_batches(random_split(size), CLASSES, size, "", 0)))
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    run = model.make_train_function()
    return lambda: run(batches, tf.constant(1))


def step(turns: Turns) -> None:
    """Images a second of the bare training step."""
    turns.repeat(train_function(turns.settings), turns.settings["batch_size"])


def profile(turns: Turns) -> None:
    """The share of each kind of kernel in the time of all kernels of a step, or of a batch."""
    if turns.settings.get("image_size"):
        batches = pipeline(turns.settings)
        run = functools.partial(next, batches)
    else:
        run = train_function(turns.settings)
    for _ in range(turns.settings["warm_up"]):
        run()
    turns.wait()
    with tempfile.TemporaryDirectory() as directory:
        options = tf.profiler.experimental.ProfilerOptions(python_tracer_level=0)
        with tf.profiler.experimental.Profile(directory, options):
            for _ in range(PROFILED_STEPS):
                run()
        kernels = kernel_times(pathlib.Path(directory))
    shares = collections.Counter()
    for kernel, seconds in kernels.items():
        kind = next((kind for part, kind in KINDS.items() if part in kernel), "elementwise")
        shares[kind] += seconds / kernels.total()
    turns.report(0.0, shares=dict(shares.most_common()))


def kernel_times(directory: pathlib.Path) -> collections.Counter:
    """Seconds of each type of CPU kernel in a trace of TensorFlow's profiler."""
    times = collections.Counter()
    for event, _, seconds in trace_events(directory):
        # "stage0_block0_1_conv/convolution:_MklNativeConv2D"; "::" are the runtime's own.
        name, colon, kernel = event.rpartition(":")
        if colon and "/" in name and not name.endswith(":") and kernel.isidentifier():
            times[kernel] += seconds
    return times


def trace_events(directory: pathlib.Path) -> Iterator[tuple[str, float, float]]:
    """(name, start, duration), in seconds, of each event in a trace of TensorFlow's profiler."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    for path in directory.rglob("*.xplane.pb"):
        for plane in xplane_pb2.XSpace.FromString(path.read_bytes()).planes:
            names = {key: value.name for key, value in plane.event_metadata.items()}
            for line in plane.lines:
                for event in line.events:
                    start = line.timestamp_ns / 1e9 + event.offset_ps / 1e12
                    yield names[event.metadata_id], start, event.duration_ps / 1e12


def pipeline(settings: dict) -> Iterator:
    """The batches of the input pipeline."""
    augment = settings["augment"]
    if settings["data"]:
        options = {name: settings.get(name) for name in ("image_size", "cache_dir")}
        split = data.load(settings["data"], val_fraction=0, augment=augment, **options).train
    else:
        split = random_split(settings["images"])
    return iter(data.training_batches(split, CLASSES, settings["batch_size"], augment, 0))


def batches_of(turns: Turns) -> None:
    """Images a second of the input pipeline alone."""
    batches = pipeline(turns.settings)
    turns.repeat(lambda: next(batches), turns.settings["batch_size"])


class TakesTurns(keras.callbacks.Callback):
    """Makes each epoch of a `fit` a turn, except the first, which traces."""

    def __init__(self, turns: Turns):
        super().__init__()
        self.turns = turns

    def on_epoch_begin(self, epoch, logs=None):
        if epoch:
            self.turns.wait()
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.ended = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        if epoch:
            images = self.turns.settings["steps"] * self.turns.settings["batch_size"]
            self.turns.report(images / (self.ended - self.started))


def fit(turns: Turns) -> None:
    """Images a second of training as `train` does it, with all callbacks."""
    names = ("model", "data", "augment", "batch_size", "dtype_policy", "xla")
    flags = {name: turns.settings[name] for name in names}
    flags |= {"steps_per_epoch": turns.settings["steps"], "epochs": 10**6, "val_fraction": 0.0}
    flags |= turns.settings.get("flags", {})
    plan = prepare(TrainConfig.from_flags(**flags))
    with tempfile.TemporaryDirectory() as directory:
        trainer.fit(plan, Run(pathlib.Path(directory)), callbacks=(TakesTurns(turns),))


def predict(turns: Turns) -> None:
    """Images a second of an exported model, which is float32, on images in memory."""
    settings = turns.settings
    keras.config.set_dtype_policy(environment.dtype_policy(settings["dtype_policy"])[0])
    model = models.build(settings["model"], SHAPE, CLASSES).deployable
    names = tuple(str(number) for number in range(CLASSES))
    path = saved_model.export(model, pathlib.Path(settings["export"]), names)
    predictor = Predictor(str(path))
    half = settings["dtype_policy"] == "mixed_bfloat16"
    predictor.choose_precision("auto" if half else "float32")
    images = random_split(settings["count"]).images
    turns.repeat(lambda: predictor.classify(images), len(images))


WORK = {"step": step, "profile": profile, "pipeline": batches_of, "fit": fit, "predict": predict}

if __name__ == "__main__":
    turns = Turns()
    WORK[turns.settings["what"]](turns)
