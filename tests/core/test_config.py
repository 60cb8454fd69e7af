"""The ranges of the training flags, and which of them make another run."""

import dataclasses
import math

import pytest

from keras_cifar.core.config import NOT_COMPARED, TrainConfig
from keras_cifar.core.errors import UsageError

POSITIVE = (
    *("epochs", "batch_size", "learning_rate", "steps_per_epoch", "image_size", "replicas"),
    *("accumulate_steps", "steps_per_execution", "startup_timeout", "peer_timeout"),
)
NOT_NEGATIVE = (
    *("weight_decay", "warmup_epochs", "precise_bn_batches", "early_stopping", "seed", "seeds"),
    "global_clipnorm",
)
SHARES = ("val_fraction", "max_bad_share", "momentum", "label_smoothing", "ema")
FLOATS = ("learning_rate", "weight_decay", "warmup_epochs", "global_clipnorm", *SHARES)


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here leaves anything in Keras."""


def cases(names, *values) -> list:
    return [(name, value) for name in names for value in values]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases(POSITIVE, 0, -1),
        *cases(NOT_NEGATIVE, -1),
        *cases(SHARES, -0.1, 1, 1.5),
        *cases(FLOATS, math.nan, math.inf),
        ("seed", 2**31),
    ],
)
def test_value_out_of_range_is_refused_by_flag_and_value(name, value):
    with pytest.raises(UsageError) as error:
        TrainConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(f"--{name}={value} must ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases(POSITIVE, 1),
        *cases(("steps_per_epoch", "image_size", "replicas"), None),
        *cases(NOT_NEGATIVE, 0, 1),
        *cases(SHARES, 0, 0.999),
        ("learning_rate", 1e-9),
        ("seed", 2**31 - 1),
    ],
)
def test_value_at_the_edge_of_its_range_is_taken(name, value):
    assert getattr(TrainConfig(**{name: value}), name) == value


def test_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 2


def test_every_flag_has_help_a_group_and_a_default_among_its_choices():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"]
        assert field.metadata["group"]
        assert not field.metadata["choices"] or field.default in field.metadata["choices"]


# ---- Differences


def test_no_difference_to_itself():
    config = TrainConfig(model="lenet5", seed=3)
    assert config.differences(dataclasses.asdict(config)) == []


OTHER = {
    "model": "lenet5",
    "data": "digits",
    "image_size": 24,
    "val_fraction": 0.2,
    "on_bad_image": "skip",
    "augment": "flip",
    "epochs": 11,
    "steps_per_epoch": 5,
    "batch_size": 64,
    "optimizer": "sgd",
    "learning_rate": 0.5,
    "momentum": 0.5,
    "nesterov": True,
    "bias_rate": 2.0,
    "lr_schedule": "cosine",
    "warmup_epochs": 1.0,
    "weight_decay": 1e-4,
    "label_smoothing": 0.1,
    "ema": 0.5,
    "precise_bn_batches": 3,
    "early_stopping": 3,
    "seed": 1,
    "global_clipnorm": 1.0,
    "accumulate_steps": 2,
    "dtype_policy": "float64",
    "init_from": "elsewhere",
    "freeze": "logits",
    "deterministic": True,
}


def test_the_list_of_other_values_has_all_flags_that_decide_a_result():
    assert {field.name for field in dataclasses.fields(TrainConfig)} - set(NOT_COMPARED) == set(
        OTHER
    )


@pytest.mark.parametrize(("name", "value"), OTHER.items())
def test_a_difference_names_the_flag_and_both_values(name, value):
    before, after = TrainConfig(), TrainConfig(**{name: value})
    assert after.differences(dataclasses.asdict(before)) == [
        f"--{name} was {getattr(before, name)!r}, is {value!r}"
    ]


def test_all_differences_are_named():
    before, after = TrainConfig(), TrainConfig(**OTHER)
    assert len(after.differences(dataclasses.asdict(before))) == len(OTHER)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run_dir", "elsewhere"),
        ("export", False),
        ("data_dir", "elsewhere"),
        ("cache_dir", "elsewhere"),
        ("max_bad_share", 0.5),
        ("strategy", "mirrored"),
        ("replicas", 2),
        ("startup_timeout", 5.0),
        ("peer_timeout", 5.0),
        ("steps_per_execution", 5),
        ("checkpoint_every", 5),
        ("checkpoint_seconds", 5.0),
        ("on_nan", "rollback"),
        ("dry_run", True),
        ("list_models", True),
        ("list_recipes", True),
        ("recipe", "he_resnet20"),
        ("seeds", 3),
    ],
)
def test_where_it_runs_and_what_is_written_makes_no_difference(name, value):
    assert TrainConfig(**{name: value}).differences(dataclasses.asdict(TrainConfig())) == []


def test_a_flag_that_an_earlier_run_did_not_have_is_a_difference():
    earlier = dataclasses.asdict(TrainConfig())
    del earlier["ema"]
    assert TrainConfig().differences(earlier) == ["--ema was None, is 0.0"]


def test_workers_may_differ_in_what_is_their_own_alone():
    one = TrainConfig(workers="a:1,b:2", worker_index=0, run_dir="x", data_dir="y")
    two = TrainConfig(
        workers="a:1,b:2", worker_index=1, recipe="r", run_dir="z", data_dir="v", cache_dir="c"
    )
    assert one.common() == two.common()
    for name, value in OTHER.items():
        if name == "init_from":  # read by the chief alone
            continue
        other = TrainConfig(workers="a:1,b:2", worker_index=1, **{name: value}).common()
        assert {k for k, v in other.items() if one.common()[k] != v} == {f"--{name}"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 100, "accumulate_steps": 3}, "--batch_size=100 must be a multiple of"),
        ({"workers": "a:1"}, "--workers and --worker_index belong together"),
        ({"worker_index": 0}, "--workers and --worker_index belong together"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**flags)
