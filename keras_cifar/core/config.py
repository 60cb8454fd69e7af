"""The flags of training: a small frozen dataclass for each room, and `TrainConfig` of all of them.

Each field is a flag of the same name, and flags are flat: `--epochs 3` is `config.fit.epochs`. A room's
functions take their own part or plain values, never the whole. Standard library only: --help reads it.
"""

import dataclasses
import functools
import typing

from keras_cifar.core import options, places
from keras_cifar.core.image_size import (
    RESIZE,
    SMALL_IMAGE,
    STRETCH,
    resize_rule,
    resizing_stages,
    size_text,
)
from keras_cifar.core.options import FRACTION, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Options, option

OPTIMIZERS = ("adam", "adamw", "sgd", "muon")
STRATEGIES = ("auto", "none", "mirrored", "multiworker")
_NO_SERVERS = (
    "Keras 3 does not support parameter servers; use multiworker, where all workers compute"
)
REFUSED_STRATEGIES = {
    "parameter_server": _NO_SERVERS,
    "parameterserver": _NO_SERVERS,
    "tpu": "TPUs were never tried and are not supported; use mirrored or multiworker on GPUs",
}
DTYPE_POLICIES = ("auto", "float32", "float64", "mixed_float16", "mixed_bfloat16")
PRECISIONS = DTYPE_POLICIES[:2]  # of exports, which are in float32
XLA = ("auto", "on", "off")
TRACKERS = ("none", "mlflow", "wandb")
# Images that are classified at a time: the fastest of 64, 128 and 256 on two cores with ResNet-32.
BATCH_SIZE = 128
URLS = ("http://", "https://", "grpc://")  # of servers that predict
SPLITS = ("train", "val", "test")
BALANCED = "balanced"  # of --class_weight and --sampling

_model, _data, _training, _optimizer = (
    functools.partial(option, group=group) for group in ("Model", "Data", "Training", "Optimizer")
)
_devices, _output = (
    functools.partial(option, group=group, compared=False) for group in ("Devices", "Output")
)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Options):
    """The network and its first weights."""

    model: str = _model("resnet32", "network; --list_models shows them")
    init_from: str | None = _model(
        None,
        "weights of the same network with which a new run starts: imagenet, a run directory, a .keras "
        "file, pretrained:NAME, a state dict of PyTorch (.safetensors, .pth) or hf:REPOSITORY; the "
        "last layer is new if the classes differ",
        shared=False,  # The chief sends its state to all workers.
    )
    freeze: str | None = _model(
        None, "a layer: its weights and those of all layers before it stay as they are"
    )
    unfreeze_epoch: int | None = _model(
        None,
        "epochs for which --freeze applies; afterwards everything is trained (default: all epochs)",
        limit=POSITIVE,
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Options):
    """The images: where they are, how they are split and augmented."""

    data: str = _data(
        "cifar10",
        "a TFDS name, folder:PATH, archive:PATH (the official CIFAR files) or digits (built in)",
    )
    data_dir: str | None = _data(
        None, "where TFDS keeps its data sets", compared=False, shared=False
    )
    cache_dir: str | None = _data(
        None,
        "where decoded images of folders and TFDS are cached; it may be deleted "
        "(default: $XDG_CACHE_HOME/keras_cifar or ~/.cache/keras_cifar)",
        compared=False,
        shared=False,
    )
    image_size: str | None = _data(
        None,
        "pixels to which images are resized: a number for both sides, or HEIGHTxWIDTH, such as "
        "192x256 (default: their own size)",
    )
    resize: str = _data(
        "auto",
        "how: stretch the whole image; or scale it until it covers 1/0.875 of --image_size and crop "
        f"the middle; auto crops to sizes above {SMALL_IMAGE}",
        choices=RESIZE,
    )
    val_fraction: float = _data(
        0.1,
        "share of train held out for validation if the data has no validation split; "
        "0 trains on all images and keeps the last model",
        limit=FRACTION,
    )
    on_bad_image: str = _data(
        "error",
        "what to do about unreadable images of folder:PATH: stop, or skip them and list them in "
        "RUN/skipped.csv",
        choices=("error", "skip"),
    )
    max_bad_share: float = _data(
        0.05,
        "share of unreadable images in train, val or test above which --on_bad_image=skip stops too",
        limit=FRACTION,
        compared=False,
    )
    augment: str = _data(
        "",
        "augmentations in order, such as 'crop(4)|flip|cutout(8)|mixup(0.2)'; also altflip, "
        "resized_crop(0.08,1.0) (as the first it crops the files of folder:PATH), "
        "vflip, rotate(15), erasing(0.25), color(0.4), randaugment(2,9), cutmix(1.0)",
    )
    sampling: str = _data(
        "none",
        "balanced: a pass, as long as before, has as many images of each class, those of small classes "
        "repeated; not with --class_weight balanced",
        choices=("none", BALANCED),
    )

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "image_size", size_text(self.image_size))  # It is frozen.
        resize_rule(self.resize, self.image_size)

    @property
    def rule(self) -> str:
        """What `resize` means, STRETCH or CROP."""
        return resize_rule(self.resize, self.image_size)


@dataclasses.dataclass(frozen=True)
class FitConfig(Options):
    """How long and in which steps the model is trained."""

    epochs: int = _training(10, "passes over the training images", limit=POSITIVE)
    steps_per_epoch: int | None = _training(
        None, "steps between validations (default: one pass)", limit=POSITIVE
    )
    progressive_resizing: str = _training(
        "",
        "train on smaller images at first, which is faster: PIXELS:SHARE,... such as 24:0.4,28:0.7, 24 "
        "pixels for 0.4 of the epochs, 28 until 0.7, then --image_size",
    )
    batch_size: int = _training(128, "images a step, over all replicas together", limit=POSITIVE)
    accumulate_steps: int = _training(
        1,
        "microbatches in which a batch is computed one after another, to save memory; batch "
        "normalization sees a microbatch",
        limit=POSITIVE,
    )
    norm_batch: str = _training(
        "auto",
        "images whose statistics normalize an image in training: the whole batch, or groups of so many "
        "images, which no replica shares; auto is whole on one device, and each replica's images "
        "where it has 32 or more; fixed keeps the averages of --init_from, for fine-tuning",
    )
    precise_bn_batches: int = _training(
        10,
        "training batches from which the statistics of batch normalization are recomputed after "
        "each epoch; 0 keeps the moving averages",
        limit=NOT_NEGATIVE,
        aliases=("calibration_batches",),
    )
    on_nan: str = _training(
        "stop",
        "when the loss is not finite: stop, or rollback to the last checkpoint with half the "
        "learning rate, at most 3 times",
        choices=("stop", "rollback"),
        compared=False,
    )
    early_stopping: int = _training(
        0,
        "epochs without a better validation accuracy before training stops; 0 never stops",
        limit=NOT_NEGATIVE,
    )
    seed: int = _training(
        0, "of initial weights, dropout, splits, order and augmentation", limit=SEED
    )
    seeds: int = _training(
        0,
        "train this many runs, RUN/seed_N for each N from --seed on, and write mean and standard "
        "deviation of their test accuracy; 0 trains one run in RUN itself",
        limit=NOT_NEGATIVE,
        compared=False,
    )

    def __post_init__(self):
        super().__post_init__()
        resizing_stages(self.progressive_resizing)
        options.check(
            self.batch_size % self.accumulate_steps == 0,
            f"--batch_size={self.batch_size} must be a multiple of "
            f"--accumulate_steps={self.accumulate_steps}",
        )
        options.check(
            self.norm_batch in ("auto", "whole", "fixed")
            or (self.norm_batch.isdecimal() and int(self.norm_batch) > 0),
            f"--norm_batch={self.norm_batch!r} is not auto, whole, fixed or a number of images above 0",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Options):
    """The loss, the update rule and the learning rate."""

    optimizer: str = _optimizer("adam", "update rule", choices=OPTIMIZERS)
    learning_rate: float = _optimizer(1e-3, "the peak of the schedule", limit=POSITIVE)
    momentum: float = _optimizer(0.9, "of sgd", limit=FRACTION)
    nesterov: bool = _optimizer(False, "Nesterov momentum, of sgd and muon")
    bias_rate: float = _optimizer(
        1.0, "factor of the learning rate of biases and normalization, of sgd", limit=NOT_NEGATIVE
    )
    lr_schedule: str = _optimizer(
        "constant",
        "constant, linear, cosine, step(0.5,0.75) (a tenth at these fractions of the run) or onecycle",
    )
    warmup_epochs: float = _optimizer(0.0, "epochs of linear warm-up from zero", limit=NOT_NEGATIVE)
    weight_decay: float = _optimizer(
        0.0,
        "on kernels, not on biases and normalization: decoupled with adamw, else L2 in the gradient",
        limit=NOT_NEGATIVE,
    )
    decay_biases: bool = _optimizer(False, "--weight_decay on biases and normalization, too")
    label_smoothing: float = _optimizer(
        0.0, "share of each label spread over all classes", limit=FRACTION
    )
    layer_decay: float = _optimizer(
        1.0,
        "factor of the learning rate from each twelfth of the layers to the one before it, for "
        "fine-tuning, such as 0.75",
        limit=SHARE,
    )
    head_rate: float = _optimizer(
        1.0, "factor of the learning rate of the last layer, for fine-tuning", limit=POSITIVE
    )
    class_weight: str = _optimizer(
        "none",
        "balanced: an image weighs N / (K n) in the loss of training, for N training images in K "
        "classes, n of them in its own",
        choices=("none", BALANCED),
    )
    ema: float = _optimizer(
        0.0,
        "decay of the exponential moving average of the weights, such as 0.999; the averages are "
        "validated and saved",
        limit=FRACTION,
    )
    global_clipnorm: float = _optimizer(
        0.0,
        "global gradient norm above which all gradients are scaled down to it; 0 does not clip",
        limit=NOT_NEGATIVE,
    )


@dataclasses.dataclass(frozen=True)
class DevicesConfig(Options):
    """Devices, workers and precision."""

    strategy: str = _devices(
        "auto",
        "auto: multiworker in a cluster (--workers, TF_CONFIG or SLURM), else mirrored with several "
        "GPUs or --replicas",
        choices=STRATEGIES,
        refused=REFUSED_STRATEGIES,
    )
    replicas: int | None = _devices(
        None,
        "replicas on this machine (default: one for each GPU); virtual CPU devices without a GPU",
        limit=POSITIVE,
    )
    workers: str | None = _devices(
        None, "host:port,host:port,... of all workers; the first is the chief, which writes"
    )
    worker_index: int | None = _devices(
        None, "which of --workers this process is, from 0", shared=False
    )
    startup_timeout: float = _devices(
        120.0, "seconds to wait for all workers at the start", limit=POSITIVE, shared=False
    )
    peer_timeout: float = _devices(
        45.0,
        "seconds that a worker may keep the others waiting before they give up",
        limit=POSITIVE,
    )
    steps_per_execution: int = _devices(
        1, "steps between returns to Python; more are faster on GPUs", limit=POSITIVE
    )
    dtype_policy: str = _devices(
        "auto",
        "auto: mixed_bfloat16 on GPUs with bfloat16 tensor cores and CPUs that are faster with it, "
        "else float32; a run that is resumed keeps its own",
        choices=DTYPE_POLICIES,
        compared=True,
    )
    xla: str = _devices(
        "auto",
        "whether XLA compiles the training step, on one device; auto is off: it slows CPUs and was not "
        "measured on GPUs",
        choices=XLA,
    )
    deterministic: bool = _devices(
        False,
        "the same bits on GPUs too, which is slower and copies all images into memory; on CPUs the "
        "bits are always the same",
        compared=True,
    )

    def __post_init__(self):
        super().__post_init__()
        options.check(
            (self.workers is None) == (self.worker_index is None),
            "--workers and --worker_index belong together",
        )


@dataclasses.dataclass(frozen=True)
class OutputConfig(Options):
    """What is written, where and when."""

    run_dir: str | None = _output(
        None,
        "where everything is written (default: runs/MODEL-DATA-TIME); an existing run resumes",
        shared=False,
    )
    checkpoint_every: int = _output(
        0,
        "steps between checkpoints, besides those after each epoch; 0: by time alone",
        limit=NOT_NEGATIVE,
    )
    checkpoint_seconds: float = _output(
        600.0, "seconds between checkpoints; 0: none between the ends of epochs", limit=NOT_NEGATIVE
    )
    export: bool = _output(True, "write RUN/export/1, a SavedModel, at the end", shared=False)
    track: str = _output(
        "none",
        "also log the run to a tracker: mlflow (MLFLOW_TRACKING_URI says where) or wandb",
        choices=TRACKERS,
        shared=False,
    )
    recipe: str | None = _output(
        None,
        "flags that give a known result; flags on the command line override them; --list_recipes "
        "shows the recipes",
        shared=False,
    )
    find_learning_rate: bool = _output(
        False,
        "try rising learning rates for some steps, propose one and write nothing but a picture",
    )
    dry_run: bool = _output(False, "print what would be done, without training")
    list_models: bool = _output(False, "print the networks and exit")
    list_recipes: bool = _output(False, "print the recipes and exit")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    fit: FitConfig = FitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    devices: DevicesConfig = DevicesConfig()
    output: OutputConfig = OutputConfig()

    @classmethod
    def from_flags(cls, **flags) -> "TrainConfig":
        """The configuration of flags by name; UsageError for a wrong value, TypeError for a name."""
        return options.build(cls, flags)

    @classmethod
    def from_json(cls, flags: dict) -> "TrainConfig":
        """The configuration of a config.json without unknown flags; UsageError for a wrong value."""
        flags = {name: value for name, value in canonical(flags).items() if name in FLAGS}
        for name, value in flags.items():
            kinds: typing.Any = FLAGS[name].type
            kinds = float | int if kinds is float else kinds
            # To Python, a bool is an int.
            right = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
            options.check(right, f"--{name}={value!r} has the wrong type")
        return cls.from_flags(**flags)

    def flags(self) -> dict:
        """All flags by name."""
        return {k: v for part in dataclasses.asdict(self).values() for k, v in part.items()}

    def given(self) -> dict:
        """The flags that are not at their defaults; those of a recipe are among them, not its name."""
        flags = self.flags() | {"recipe": None}
        return {name: value for name, value in flags.items() if value != DEFAULTS[name]}

    def flagfile(self) -> str:
        """The contents of a --flagfile for this configuration, from any directory."""
        flags = self.given() | places.recorded(self.flags())
        return "".join(f"--{name}={value}\n" for name, value in flags.items())

    def replace(self, **flags) -> "TrainConfig":
        """The same configuration with other values of some flags."""
        return self.from_flags(**self.flags() | flags)

    def shared_flags(self) -> dict:
        """The flags that all workers of a run must have in common, as `--name`."""
        values = self.flags()
        return {f"--{n}": values[n] for n, field in FLAGS.items() if field.metadata["shared"]}

    def differences(self, previous: dict, paths: dict | None = None) -> list[str]:
        """The flags that decide the result and differ from those of an earlier run, as text.

        With `auto` this machine decides, which may be another one. `paths` are those of the earlier
        run's config.json: a place may be named in another way.
        """
        mine, previous = canonical(self.flags()), canonical(previous)
        same = places.same(places.recorded(mine), places.recorded(previous, paths))
        return [
            f"--{name} was {theirs!r}, is {mine[name]!r}"
            for name, theirs in previous.items()
            if name in COMPARED - same and mine[name] not in (theirs, "auto")
        ]


# The flags of training by name, their defaults, and those that decide the result.
FLAGS = {field.name: field for field in options.fields(TrainConfig)}
DEFAULTS = {name: field.default for name, field in FLAGS.items()}
COMPARED = frozenset(name for name, field in FLAGS.items() if field.metadata["compared"])
_FORMER = {alias: name for name, f in FLAGS.items() for alias in f.metadata["aliases"]}


def canonical(flags: dict) -> dict:
    """The flags of a config.json in their present form; those that it lacks have their defaults.

    A flag that is newer than the run does not make it another run. `resize` is the rule itself.
    """
    # Before there was --resize, all runs stretched.
    known: dict[str, typing.Any] = DEFAULTS | {"resize": STRETCH}
    known |= {_FORMER.get(name, name): value for name, value in flags.items()}
    rule = resize_rule(known["resize"], known["image_size"])
    return known | {"image_size": size_text(known["image_size"]), "resize": rule}
