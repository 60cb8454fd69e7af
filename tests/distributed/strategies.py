"""The cases that test_strategies.py compares: the same computations under several strategies.

    python -m tests.distributed.strategies DIRECTORY '{"mirrored 2": ["sgd", ...], ...}'

Each strategy and each worker has a process: a second MirroredStrategy after one with float64 aborts.
The processes are forked from one that has imported TensorFlow but not started it, as the import takes
as long as some cases. Process N of a strategy computes its cases in turn and writes arrays
"CASE|what|name" to `DIRECTORY/STRATEGY-N.npz`; its output is beside it.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import json
import operator
import os
import pathlib
import sys
import time
import traceback

from keras_cifar.core import environment

environment.import_tensorflow()

import keras
import numpy as np
import tensorflow as tf

from keras_cifar import models
from keras_cifar.core.config import TrainConfig
from keras_cifar.distributed import strategy
from keras_cifar.models import classifier, layers, lenet5
from keras_cifar.models.precise_batch_norm import without_dropout
from keras_cifar.training import optimizers
from keras_cifar.training.plan import prepare
from tests.distributed.test_rendezvous import free_addresses


def workers(count: int) -> list[dict]:
    addresses = ",".join(free_addresses(count))
    flags = {"strategy": "multiworker", "workers": addresses, "peer_timeout": 300.0}
    return [flags | {"worker_index": index} for index in range(count)]


# Flags of each process.
STRATEGIES = {
    "one device": lambda: [{"strategy": "none"}],
    "mirrored 2": lambda: [{"strategy": "mirrored", "replicas": 2}],
    "mirrored 3": lambda: [{"strategy": "mirrored", "replicas": 3}],
    "2 workers": lambda: workers(2),
    "3 workers": lambda: workers(3),
}

# ---- Runs, as trainer.train makes them

BASE = {
    "model": "tiny",
    "data": "digits",
    "image_size": 8,
    "batch_size": 96,
    "epochs": 2,
    "steps_per_epoch": 4,
    "learning_rate": 0.02,
    "augment": "crop(1)|flip",
    "dtype_policy": "float64",
    "val_fraction": 0.1,
    "precise_bn_batches": 2,
    "norm_batch": "whole",
}
SGD = {"optimizer": "sgd", "learning_rate": 0.1}
# Rounding alone may move an activation across ReLU's kink, which changes the weights by the learning
# rate times the gradient of one pixel.
FLOAT32 = {"dtype_policy": "float32", "learning_rate": 1e-3}


RUNS = {
    "adam": {},
    "sgd": SGD,
    "sgd float32": SGD | FLOAT32,
    "uneven batches": SGD | {"batch_size": 97},
    "global_clipnorm": SGD | {"global_clipnorm": 0.05},
    "accumulate_steps": SGD | {"batch_size": 98, "accumulate_steps": 2},
    "ema": SGD | {"ema": 0.5},
    "label_smoothing": SGD | {"label_smoothing": 0.1},
    "cutmix": SGD | {"augment": "crop(1)|flip|cutmix(1.0)"},
    "mixup": SGD | {"augment": "crop(1)|flip|mixup(0.5)"},
    "auxiliary heads": SGD | {"model": "tiny_heads"},
    "steps_per_execution": SGD | {"steps_per_execution": 3},
    "l2": SGD | {"weight_decay": 0.01, "decay_biases": True},
    "progressive_resizing": SGD | {"progressive_resizing": "6:0.5"},
}
RUNS["all at once"] = functools.reduce(operator.or_, list(RUNS.values())[4:])
GROUPS = {"norm_batch": "8"}
RUNS |= {
    "groups": GROUPS,
    "groups, float32": SGD | FLOAT32 | GROUPS,
    "groups, all at once": RUNS["all at once"] | GROUPS | {"batch_size": 96},
    "groups, unfrozen": RUNS["all at once"]
    | GROUPS
    | {"optimizer": "adamw", "batch_size": 96, "freeze": "stage0_relu", "unfreeze_epoch": 1},
    # 48 or 49 images.
    "each replica by itself": SGD | {"batch_size": 97, "norm_batch": "auto"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "muon": SGD | {"optimizer": "muon", "nesterov": True, "bias_rate": 2.0},
    "dropout": {"model": "tiny_drop"},
    "resnet20 adam": {"model": "resnet20", "steps_per_epoch": 10, "learning_rate": 1e-3},
}
# Those that use averaged weights, recompute statistics and evaluate at the end.
DEPLOYED = ("adam", "ema", "all at once", *(name for name in RUNS if name.startswith("groups")))
# Whole networks, for a few steps. With SGD, as the gradient of a bias before normalization is 0 but
# for rounding, which Adam turns into steps. Dropout, whose masks differ between replicas and one
# device, is disabled except in the last.
WHOLE = SGD | {"learning_rate": 0.01, "batch_size": 13, "steps_per_epoch": 2}
VGG = WHOLE | {"model": "vgg_bn_drop", "image_size": 32}
LARGE = {
    "googlenet": WHOLE | {"model": "googlenet", "image_size": 16},
    "vgg_bn_drop": VGG,
    "vgg_bn_drop dropout": VGG,
    "mobilenetv3small": WHOLE | {"model": "mobilenetv3small", "image_size": 32},
}


def tiny(input_shape=(8, 8, 3), num_classes=3, name="tiny", head=False, dropout=0.0):
    """Two convolutions with batch normalization, one of which has a bias that does nothing."""
    images, x = classifier.image_input(input_shape)
    x = layers.conv_norm(x, 6, 3, 1, name="stage0")
    y = keras.layers.GlobalAveragePooling2D(name="head0_features")(x)
    auxiliary = [keras.layers.Dense(num_classes, name="head0")(y)] if head else []
    x = layers.conv_norm(x, 6, 3, 2, name="stage1", bias=True)
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    if dropout:
        x = layers.Dropout(dropout, name="drop")(x)
    logits = keras.layers.Dense(num_classes, name="logits")(x)
    return classifier.Classifier.build_from(images, logits, name, auxiliary)


def register() -> None:
    """Adds the small networks to the choices of --model."""
    for name, arguments in {"": {}, "_heads": {"head": True}, "_drop": {"dropout": 0.3}}.items():
        build = functools.partial(tiny, **arguments)
        lenet5.VARIANTS[f"tiny{name}"] = models.Variant(build, "", 8, 10, 4)


def train(name: str, config: TrainConfig, context: strategy.DistributedContext) -> dict:
    plan = prepare(config.replace(**BASE | (RUNS | LARGE)[name]), context)
    model, config = plan.model, plan.config
    recording, disabled = Recording(context), name in LARGE and "dropout" not in name
    phases = keras.callbacks.LambdaCallback(lambda epoch, logs: plan.begin_epoch(epoch))
    with without_dropout(model.logits_model) if disabled else contextlib.nullcontext():
        history = model.fit(
            plan.batches(0),
            epochs=config.fit.epochs,
            validation_data=plan.validation(),
            validation_freq=config.fit.epochs,
            callbacks=[recording, phases],
            verbose=0,
        ).history
    found = recording.found | state(model, context)
    found |= {f"metrics|{name}": np.array(values) for name, values in history.items()}
    found["validation|size"] = np.array(len(plan.dataset.val))
    if name not in DEPLOYED:
        return found
    with model.averaged():
        model.recompute_statistics(iter(plan.batches(3)), config.fit.precise_bn_batches)
        found |= copied("deployed", model.weights, context)
        found["metrics|deployed"] = np.array(model.evaluate(plan.validation(), verbose=0))
    return found


class Recording(keras.callbacks.Callback):
    """Records the weights before training and after a step, and the metrics of each call."""

    def __init__(self, context):
        super().__init__()
        self.context, self.steps, self.found = context, [], {}

    def on_train_begin(self, logs=None):
        self.found |= copied("initial", self.model.trainable_weights, self.context)

    def on_train_batch_end(self, batch, logs=None):
        if not self.steps:
            self.found |= copied("first", self.model.trainable_weights, self.context)
        self.steps.append([logs["loss"], logs["accuracy"]])
        self.found["metrics|steps"] = np.array(self.steps)


def state(model, context) -> dict:
    """All variables that training changes."""
    return (
        copied("weights", model.variables, context)
        | copied("optimizer", model.optimizer.variables, context)
        | copied("averages", model.averages, context)
    )


def copied(what: str, variables, context) -> dict:
    """Values by name; also under "unequal" if the replicas' copies differ."""
    found = {}
    for index, variable in enumerate(variables):
        value = getattr(variable, "value", variable)
        value = variable if callable(value) else value
        copies = [x.numpy() for x in context.strategy.experimental_local_results(value)]
        found[f"{what}|{index} {variable.name}"] = copies[0]
        if not all(np.array_equal(copy, copies[0], equal_nan=True) for copy in copies):
            found[f"unequal|{what} {index} {variable.name}"] = np.stack(copies)
    return found


# ---- Calls of Classifier.fit on arrays


@dataclasses.dataclass(frozen=True)
class Fit:
    """`fit` on a number of examples, `evaluate` on others."""

    examples: int
    batch_size: int
    optimizer: str = "SGD"
    arguments: dict = dataclasses.field(default_factory=dict)
    compile: dict = dataclasses.field(default_factory=dict)
    dtype_policy: str = "float64"
    unknown_length: bool = False
    validation: bool = False
    ours: bool = False


FITS = {
    "even": Fit(36, 12),
    "first batch uneven": Fit(39, 13),
    "last batch uneven": Fit(43, 12, validation=True),
    "last batch of one": Fit(37, 12),
    "last batch of two": Fit(38, 12),
    "batches of two": Fit(5, 2),
    "accumulated, fewer than microbatches": Fit(16, 11, compile={"accumulate_steps": 3}),
    "several steps a call": Fit(100, 13, compile={"steps_per_execution": 3}, validation=True),
    "unknown length": Fit(37, 12, unknown_length=True),
    "clipnorm": Fit(36, 12, arguments={"clipnorm": 0.02}),
    "clipvalue": Fit(36, 12, arguments={"clipvalue": 0.005}),
    "global_clipnorm of the optimizer": Fit(37, 12, arguments={"global_clipnorm": 0.02}),
    "Keras's RMSprop": Fit(39, 13, "RMSprop", {"weight_decay": 0.1}),
    "class_weight": Fit(
        43,
        13,
        compile={
            "class_weight": (0.5, 2.0, 4.0),
            "accumulate_steps": 2,
            "label_smoothing": 0.1,
            "steps_per_execution": 2,
        },
    ),
    "our SGD": Fit(39, 13, ours=True),
    "our SGD, scaled loss": Fit(39, 13, arguments={"loss_scale_factor": 8.0}, ours=True),
    "mixed_float16": Fit(39, 13, dtype_policy="mixed_float16"),
    "mixed_float16, ours, several steps, accumulated": Fit(
        39,
        13,
        arguments={"global_clipnorm": 0.02},
        compile={"accumulate_steps": 2, "steps_per_execution": 3},
        dtype_policy="mixed_float16",
        ours=True,
    ),
}


def examples(count: int, seed: int = 0, side: int = 8) -> tuple:
    """(uint8 [N, side, side, 3], float32 [N, 3]): noise around a colour of each class, some mixed."""
    random = np.random.default_rng(seed)
    colours = np.array([[90, 120, 150], [150, 90, 120], [120, 150, 90]])
    noise = random.integers(-80, 81, (count, side, side, 3))
    labels = random.integers(0, 3, count)
    images = (colours[labels][:, None, None] + noise).astype(np.uint8)
    mixed = np.eye(3)[labels] * 0.75 + np.eye(3)[random.integers(0, 3, count)] * 0.25
    return images, mixed.astype(np.float32)


def fit(case: Fit, config: TrainConfig, context: strategy.DistributedContext) -> dict:
    keras.config.set_dtype_policy(case.dtype_policy)
    keras.utils.set_random_seed(1)
    package = optimizers if case.ours else keras.optimizers
    with context.strategy.scope():
        model = tiny()
        optimizer = getattr(package, case.optimizer)(0.1, **case.arguments)
        model.compile(optimizer, **case.compile)
    recording, data = Recording(context), examples(case.examples)
    arguments = {"epochs": 2, "callbacks": [recording], "verbose": 0}
    if case.unknown_length:
        data = tf.data.Dataset.from_tensor_slices(data).batch(case.batch_size)
        data = data.filter(lambda *_: True)
        history = model.fit(data, steps_per_epoch=-(-case.examples // case.batch_size), **arguments)
    else:
        validation = {}
        if case.validation:
            validation = {"validation_data": examples(11, 1), "validation_batch_size": 5}
        history = model.fit(*data, case.batch_size, **validation, **arguments)
    found = recording.found | state(model, context)
    found |= {f"metrics|{name}": np.array(values) for name, values in history.history.items()}
    if case.dtype_policy == "mixed_float16":
        # A step whose gradients are not finite.
        model.optimizer.dynamic_scale.assign(2.0**120)
        found |= copied("before the overflow", model.trainable_weights, context)
        model.fit(*examples(case.batch_size), case.batch_size, verbose=0)
        found |= copied("after the overflow", model.trainable_weights, context)
        found |= copied("scale", [model.optimizer.dynamic_scale], context)
    return found


# ---- The effect of rounding alone


def resnet20(config, context, order: int | None = None) -> dict:
    """20 steps of SGD with momentum in float32.

    Args:
        order: a seed that permutes the examples in each batch: only the order of sums changes.
    """
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1)
    steps, size = 20, 96
    images, labels = examples(steps * size, side=32)
    places = np.arange(steps * size).reshape(steps, size)
    if order is not None:
        places = places[:, np.random.default_rng(order).permutation(size)]
    with context.strategy.scope():
        model = models.build("resnet20", (32, 32, 3), labels.shape[1])
        model.compile(keras.optimizers.SGD(1e-3, momentum=0.9))
    recording, places = Recording(context), places.ravel()
    arguments = {"shuffle": False, "callbacks": [recording], "verbose": 0}
    model.fit(images[places], labels[places], size, **arguments)
    return recording.found | state(model, context)


ROUNDING = {
    f"resnet20 in order {order}": functools.partial(resnet20, order=order)
    for order in (None, 0, 1, 2)
}


# ---- Single layers


def run_split(context, function, *arrays) -> list[list[np.ndarray]]:
    """Runs a function on shards of each array; the replicas' copies of each result."""
    strategy = context.strategy

    def shards(array):
        parts = np.array_split(array, strategy.num_replicas_in_sync)
        return strategy.experimental_distribute_values_from_function(
            lambda value: tf.constant(parts[value.replica_id_in_sync_group])
        )

    call = tf.function(lambda *values: strategy.run(function, values), autograph=False)
    results = tf.nest.flatten(call(*map(shards, arrays)))
    return [[np.asarray(v) for v in strategy.experimental_local_results(r)] for r in results]


# (channels, noise_shape)
MASKS = [(16, None), (6, None), (16, (None, 1))]


def masks(config: TrainConfig, context: strategy.DistributedContext) -> dict:
    """Which elements each replica drops, in two calls, by either way of drawing them."""
    keras.config.set_dtype_policy("float32")
    found = {}
    for channels, noise_shape in MASKS:
        with context.strategy.scope():
            layer = layers.Dropout(0.5, noise_shape, seed=1)
        drop = functools.partial(layer, tf.ones((4096, channels)), training=True)
        call = tf.function(functools.partial(context.strategy.run, drop), autograph=False)
        for number in range(2):
            for index, mask in enumerate(context.strategy.experimental_local_results(call())):
                found[f"{channels} {noise_shape}|{number} {index}"] = mask.numpy() == 0
    return found


# (dtype, mean of the inputs, rank, training)
NORMS = [
    *((dtype, mean, 4, True) for dtype in ("float32", "float64") for mean in (0, 1000)),
    ("float32", 0, 2, True),
    ("float32", 0, 4, False),
]


def normalization(config: TrainConfig, context: strategy.DistributedContext) -> dict:
    """Outputs, gradients and statistics of BatchNormalization on a batch whose halves differ."""
    found = {}
    for dtype, mean, rank, training in NORMS:
        random, shape = np.random.default_rng(0), (8, 3, 3, 4) if rank == 4 else (8, 4)
        with context.strategy.scope():
            layer = layers.BatchNormalization(dtype=dtype)
            layer.build(shape)
        for weight in layer.weights:
            weight.assign(random.uniform(0.5, 2, weight.shape))
        moves = np.arange(8).reshape(-1, *[1] * (rank - 1)) / 4
        x = (random.normal(mean, 1, shape) + moves).astype(dtype)
        factors = random.normal(0, 1, shape).astype(dtype)

        def step(x, factors, layer=layer, training=training):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training)
                target = tf.reduce_sum(y * factors)
            return y, *tape.gradient(target, [x, layer.gamma.value, layer.beta.value])

        y, inputs, gamma, beta = run_split(context, step, x, factors)
        case = f"{dtype} {mean} {rank} {training}"
        found[f"{case}|y"], found[f"{case}|input gradient"] = map(np.concatenate, (y, inputs))
        found[f"{case}|gamma gradient"], found[f"{case}|beta gradient"] = sum(gamma), sum(beta)
        found |= copied(case, [layer.moving_mean, layer.moving_variance], context)
    return found


def outside(config: TrainConfig, context: strategy.DistributedContext) -> dict:
    """Layers that are called outside of the replicas: there is one batch, and one mask."""
    x = np.random.default_rng(0).normal(1, 2, (8, 3, 3, 4)).astype(np.float32)
    with context.strategy.scope():
        layer = layers.BatchNormalization(dtype="float32")
        found = {"x": x, "norm": layer(x, training=True)}
        copies = context.strategy.experimental_local_results(layer.moving_mean.value)
        found["moving_mean"] = copies[-1].numpy()
        found["dropped"] = layers.Dropout(0.5, seed=1, dtype="float32")(x, training=True)
    return {key: np.asarray(value) for key, value in found.items()}


CASES = (
    {name: functools.partial(train, name) for name in RUNS | LARGE}
    | {name: functools.partial(fit, case) for name, case in FITS.items()}
    | ROUNDING
    | {"masks": masks, "normalization": normalization, "outside": outside}
)


def compute(flags: dict, names: list[str], path: pathlib.Path) -> None:
    config, found = TrainConfig.from_flags(**flags), {}
    try:
        spec = strategy.choose(config.devices)
        with strategy.DistributedContext(spec, config.devices) as context:
            for name in names:
                start = time.process_time()
                keras.utils.clear_session(free_memory=False)
                for key, value in CASES[name](config, context).items():
                    found[f"{name}|{key}"] = value
                print(f"{time.process_time() - start:6.1f} s  {name}", flush=True)
            context.begin_training()
    finally:
        np.savez(path, **found)


def start(flags: dict, names: list[str], path: pathlib.Path) -> int:
    """Forks a process that computes the cases; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        faulthandler.enable()  # writes the stack when a signal ends the process
        compute(flags, names, path)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(directory: str, plan: str) -> int:
    register()
    # A forked process has only the thread that called fork.
    assert len(os.listdir("/proc/self/task")) == 1
    started = {}
    for name, cases in json.loads(plan).items():
        for index, flags in enumerate(STRATEGIES[name]()):
            path = pathlib.Path(directory, f"{name}-{index}.npz")
            started[path.stem] = start(flags, cases, path)
    failed = 0
    for process, child in started.items():
        # -N for a process that signal N ended.
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(f"{process} ended with {status}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
