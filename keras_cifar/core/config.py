"""The flags of training as one frozen dataclass. Standard library only: --help reads it."""

import dataclasses
import math
import typing

from keras_cifar.core.errors import UsageError

OPTIMIZERS = ("adam", "adamw", "sgd")
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
# Images that are classified at a time: the fastest of 64, 128 and 256 on two cores with ResNet-32.
BATCH_SIZE = 128
SPLITS = ("train", "val", "test")


def option(
    default: typing.Any, help: str, group: str, choices: tuple = (), refused: dict | None = None
) -> typing.Any:
    """A dataclass field that `cli` turns into a flag.

    Args:
        choices: the only values, where there are any.
        refused: why those who ask for another value do not get it.
    """
    metadata = {"help": help, "group": group, "choices": choices, "refused": refused or {}}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run; each field is a flag of the same name.

    Raises:
        UsageError: a value is out of its range.
    """

    recipe: str | None = option(
        None,
        "flags that give a known result, which those beside it override; --list_recipes shows them",
        "Model and data",
    )
    model: str = option("resnet32", "network; --list_models shows them", "Model and data")
    data: str = option(
        "cifar10",
        "a TFDS name, folder:PATH, archive:PATH (the official CIFAR files) or digits (built in)",
        "Model and data",
    )
    data_dir: str | None = option(None, "where TFDS keeps its data sets", "Model and data")
    cache_dir: str | None = option(
        None,
        "where the decoded images of folders and TFDS are kept for the next start; it may be deleted "
        "(default: $XDG_CACHE_HOME/keras_cifar or ~/.cache/keras_cifar)",
        "Model and data",
    )
    image_size: int | None = option(
        None,
        "pixels; images are resized to a square of it (default: as they are)",
        "Model and data",
    )
    val_fraction: float = option(
        0.1,
        "share of train held out for validation where the data has no validation split; "
        "0 trains on all and keeps the last model",
        "Model and data",
    )
    on_bad_image: str = option(
        "error",
        "what is done about pictures of folder:PATH that cannot be used: stop, or leave them out "
        "and list them in RUN/skipped.csv",
        "Model and data",
        ("error", "skip"),
    )
    max_bad_share: float = option(
        0.05,
        "share of the pictures of train, val or test above which --on_bad_image=skip stops all the "
        "same",
        "Model and data",
    )
    augment: str = option(
        "",
        "augmentations in order, such as 'crop(4)|flip|cutout(8)|mixup(0.2)'; also altflip, "
        "color(0.4), randaugment(2,9), cutmix(1.0)",
        "Model and data",
    )

    epochs: int = option(10, "passes over the training images", "Training")
    steps_per_epoch: int | None = option(
        None, "steps between validations (default: one pass)", "Training"
    )
    batch_size: int = option(128, "images a step, over all replicas together", "Training")
    optimizer: str = option("adam", "update rule", "Training", OPTIMIZERS)
    learning_rate: float = option(1e-3, "the highest of the schedule", "Training")
    momentum: float = option(0.9, "of sgd", "Training")
    nesterov: bool = option(False, "Nesterov's momentum, of sgd", "Training")
    bias_rate: float = option(
        1.0, "factor of the learning rate of biases and normalization, of sgd", "Training"
    )
    lr_schedule: str = option(
        "constant",
        "constant, linear, cosine, step(0.5,0.75) (a tenth at these shares of the run) or onecycle",
        "Training",
    )
    warmup_epochs: float = option(0.0, "epochs of linear warm-up from zero", "Training")
    weight_decay: float = option(
        0.0,
        "on kernels, not on biases and normalization: decoupled with adamw, else L2 in the gradient",
        "Training",
    )
    label_smoothing: float = option(0.0, "share of each label spread over all classes", "Training")
    ema: float = option(
        0.0, "decay a step of averaged weights, e.g. 0.999; they are what is validated and saved",
        "Training",
    )  # fmt: skip
    global_clipnorm: float = option(
        0.0, "norm of all gradients together above which they are scaled down to it; 0 clips none",
        "Training",
    )  # fmt: skip
    accumulate_steps: int = option(
        1,
        "parts, one after another, in which a batch is computed to save memory; batch normalization "
        "sees the parts",
        "Training",
    )
    precise_bn_batches: int = option(
        10,
        "training batches from which the statistics of batch normalization are recomputed after "
        "each epoch; 0 keeps the moving averages",
        "Training",
    )
    init_from: str | None = option(
        None,
        "a run directory, .keras file or pretrained:NAME of the same network whose weights a new run "
        "begins with; the last layer is new where the classes are others",
        "Training",
    )
    freeze: str | None = option(
        None, "a layer: it and all that it is computed from keep their weights", "Training"
    )
    on_nan: str = option(
        "stop",
        "when the loss is not finite: stop, or rollback to the last checkpoint with half the "
        "learning rate, at most 3 times",
        "Training",
        ("stop", "rollback"),
    )
    early_stopping: int = option(
        0, "epochs without a better validation accuracy before stopping; 0 never stops", "Training"
    )
    seed: int = option(0, "of initial weights, dropout, splits, order and augmentation", "Training")
    seeds: int = option(
        0,
        "trains so many runs, RUN/seed_N for each N from --seed on, and writes mean and deviation of "
        "their test accuracy; 0 is one run in RUN itself",
        "Training",
    )

    strategy: str = option(
        "auto",
        "auto: multiworker where there is a cluster (--workers, TF_CONFIG or SLURM), else mirrored "
        "where there are several GPUs or --replicas",
        "Devices",
        STRATEGIES,
        REFUSED_STRATEGIES,
    )
    replicas: int | None = option(
        None,
        "replicas on this machine (default: one for each GPU); without GPU, virtual CPU devices",
        "Devices",
    )
    workers: str | None = option(
        None,
        "host:port,host:port,... of all workers; the first is the chief, which writes",
        "Devices",
    )
    worker_index: int | None = option(None, "which of --workers this process is, from 0", "Devices")
    startup_timeout: float = option(
        120.0, "seconds to wait for all workers at the start", "Devices"
    )
    peer_timeout: float = option(
        45.0, "seconds that a worker may keep the others waiting before they give up", "Devices"
    )
    steps_per_execution: int = option(
        1, "steps between returns to Python; more are faster on GPUs", "Devices"
    )
    dtype_policy: str = option(
        "auto",
        "auto: mixed_bfloat16 on GPUs that are made for it, else float32",
        "Devices",
        DTYPE_POLICIES,
    )

    deterministic: bool = option(
        False,
        "the same bits again on GPUs too, which is slower and copies all images into memory; on CPUs "
        "they always are",
        "Devices",
    )

    run_dir: str | None = option(
        None,
        "where everything is written (default: runs/MODEL-DATA-TIME); again: resumes",
        "Output",
    )
    checkpoint_every: int = option(
        0, "steps between checkpoints, besides those after each epoch; 0: by time alone", "Output"
    )
    checkpoint_seconds: float = option(
        600.0, "seconds between checkpoints; 0: none between the ends of epochs", "Output"
    )
    export: bool = option(True, "write RUN/export/1, a SavedModel, at the end", "Output")
    dry_run: bool = option(False, "say what would be done, without training", "Output")
    list_models: bool = option(False, "print the networks and end", "Output")
    list_recipes: bool = option(False, "print the recipes and end", "Output")

    def __post_init__(self):
        positive = (
            "epochs",
            "batch_size",
            "learning_rate",
            "steps_per_epoch",
            "image_size",
            "replicas",
            "accumulate_steps",
            "steps_per_execution",
            "startup_timeout",
            "peer_timeout",
        )
        for name in positive:
            value = getattr(self, name)
            check(
                value is None or 0 < value < math.inf,
                f"--{name}={value} must be greater than 0 and finite",
            )
        for name in (
            "weight_decay",
            "global_clipnorm",
            "warmup_epochs",
            "precise_bn_batches",
            "early_stopping",
            "checkpoint_every",
            "checkpoint_seconds",
            "seed",
            "seeds",
        ):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"--{name}={value} must be at least 0 and finite")
        for name in ("val_fraction", "max_bad_share", "momentum", "label_smoothing", "ema"):
            value = getattr(self, name)
            check(0 <= value < 1, f"--{name}={value} must be at least 0 and below 1")
        check(self.seed < 2**31, f"--seed={self.seed} must be below 2147483648")
        check(
            self.batch_size % self.accumulate_steps == 0,
            f"--batch_size={self.batch_size} must be a multiple of "
            f"--accumulate_steps={self.accumulate_steps}",
        )
        check(
            (self.workers is None) == (self.worker_index is None),
            "--workers and --worker_index belong together",
        )

    @classmethod
    def from_json(cls, flags: dict) -> "TrainConfig":
        """The configuration of flags that were written into a run; unknown ones are left out.

        Raises:
            UsageError: a value is of another type or out of its range.
        """
        known = {}
        for field in dataclasses.fields(cls):
            if field.name in flags:
                value = known[field.name] = flags[field.name]
                kinds = float | int if field.type is float else field.type
                # To Python, a bool is an int.
                right = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
                check(right, f"--{field.name}={value!r} is of a wrong type")
        return cls(**known)

    def common(self) -> dict:
        """The flags that all workers of a run must share."""
        values = dataclasses.asdict(self)
        return {f"--{name}": v for name, v in values.items() if name not in NOT_SHARED}

    def differences(self, other: dict) -> list[str]:
        """What differs from the flags of an earlier run, where it decides the result."""
        mine = {name: v for name, v in dataclasses.asdict(self).items() if name not in NOT_COMPARED}
        return [
            f"--{name} was {other.get(name)!r}, is {value!r}"
            for name, value in mine.items()
            if other.get(name) != value
        ]


# Flags that do not change what is computed but by rounding: where files are (the data's fingerprint
# is compared beside the flags), what stops it, what is written and when, and on which devices it runs.
NOT_COMPARED = (
    *("run_dir", "export", "dry_run", "list_models", "list_recipes", "data_dir", "cache_dir"),
    *("recipe", "seeds", "max_bad_share"),
    *("strategy", "replicas", "workers", "worker_index", "startup_timeout", "peer_timeout"),
    *("steps_per_execution", "checkpoint_every", "checkpoint_seconds", "on_nan"),
)


# Flags that may differ between the workers of a run.
NOT_SHARED = (
    *("recipe", "run_dir", "export", "data_dir", "cache_dir", "worker_index", "startup_timeout"),
    "init_from",  # The chief's state is everybody's.
)


def check(condition: bool, message: str) -> None:
    """Raises UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)
