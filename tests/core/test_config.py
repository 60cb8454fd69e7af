"""The ranges of the training flags, the parts they belong to, and which of them make another run."""

import dataclasses
import math

import pytest

from keras_cifar.core import cli
from keras_cifar.core.config import COMPARED, FLAGS, TrainConfig, canonical
from keras_cifar.core.errors import UsageError
from keras_cifar.core.image_size import CROP, STRETCH, image_sides

POSITIVE = (
    *("epochs", "batch_size", "learning_rate", "steps_per_epoch", "replicas"),
    *("accumulate_steps", "steps_per_execution", "startup_timeout", "peer_timeout"),
)
NOT_NEGATIVE = (
    *("weight_decay", "warmup_epochs", "precise_bn_batches", "early_stopping", "seed", "seeds"),
    *("global_clipnorm", "checkpoint_every", "checkpoint_seconds", "bias_rate"),
)
SHARES = ("val_fraction", "max_bad_share", "momentum", "label_smoothing", "ema")
FLOATS = ("learning_rate", "weight_decay", "warmup_epochs", "global_clipnorm", *SHARES)


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here changes Keras's state."""


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
        *cases(
            ["image_size"], 0, -1, "0", "x", "", "8x", "8x0", "08", "8X8", " 8", "8x8x3", 1.5, True
        ),
    ],
)
def test_value_out_of_range_is_refused_by_flag_and_value(name, value):
    with pytest.raises(UsageError) as error:
        TrainConfig.from_flags(**{name: value})
    message = str(error.value)
    assert message.startswith(f"--{name}={value} must ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *cases(POSITIVE, 1),
        *cases(("steps_per_epoch", "image_size", "replicas"), None),
        ("image_size", "1"),
        *cases(NOT_NEGATIVE, 0, 1),
        *cases(SHARES, 0, 0.999),
        ("learning_rate", 1e-9),
        ("seed", 2**31 - 1),
    ],
)
def test_value_at_the_limit_of_its_range_is_accepted(name, value):
    assert TrainConfig.from_flags(**{name: value}).flags()[name] == value


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
        TrainConfig.from_flags(**flags)


def test_parts_are_frozen_and_hold_the_flags_of_their_room():
    config = TrainConfig.from_flags(epochs=3, data="digits", model="lenet5", replicas=2)
    assert (config.fit.epochs, config.data.data) == (3, "digits")
    assert (config.model.model, config.devices.replicas) == ("lenet5", 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.fit.epochs = 2
    assert TrainConfig.from_flags(**config.flags()) == config
    changed = config.replace(epochs=4)
    assert (changed.fit.epochs, changed.replace(epochs=3)) == (4, config)
    with pytest.raises(TypeError):
        TrainConfig.from_flags(no_such_flag=1)


# ---- Differences


def parsed(flags: str) -> dict:
    """The values of flags, which are written without their dashes."""
    names = [flag.partition("=")[0] for flag in flags.split()]
    values = cli._read(TrainConfig, [f"--{flag}" for flag in flags.split()])[0]
    return {name: values[name] for name in names}


OTHER = parsed(
    "model=lenet5 data=digits image_size=24 resize=crop val_fraction=0.2 on_bad_image=skip "
    "augment=flip epochs=11 steps_per_epoch=5 batch_size=64 accumulate_steps=2 precise_bn_batches=3 "
    "progressive_resizing=12:0.5 decay_biases "
    "early_stopping=3 seed=1 optimizer=sgd learning_rate=0.5 momentum=0.5 nesterov bias_rate=2 "
    "layer_decay=0.75 head_rate=10 "
    "lr_schedule=cosine warmup_epochs=1 weight_decay=1e-4 label_smoothing=0.1 ema=0.5 "
    "class_weight=balanced sampling=balanced "
    "global_clipnorm=1 dtype_policy=float64 norm_batch=8 init_from=elsewhere freeze=logits "
    "unfreeze_epoch=5 deterministic"
)
SAME = parsed(
    "run_dir=elsewhere export=false data_dir=elsewhere cache_dir=elsewhere max_bad_share=0.5 "
    "strategy=mirrored replicas=2 workers=a:1 worker_index=0 startup_timeout=5 peer_timeout=5 "
    "steps_per_execution=5 checkpoint_every=5 checkpoint_seconds=5 on_nan=rollback dry_run "
    "list_models list_recipes recipe=he_resnet20 seeds=3 xla=on track=wandb "
    "find_learning_rate"
)


def test_the_two_lists_have_all_flags():
    assert (set(OTHER), set(SAME)) == (COMPARED, FLAGS.keys() - COMPARED)


@pytest.mark.parametrize(("name", "value"), OTHER.items())
def test_a_difference_names_the_flag_and_both_values(name, value):
    before = TrainConfig.from_flags(image_size=48)
    after = before.replace(**{name: value})
    difference = f"--{name} was {canonical(before.flags())[name]!r}, is {value!r}"
    assert after.differences(before.flags()) == [difference]


def test_where_it_runs_and_what_is_written_makes_no_difference():
    default = TrainConfig().flags()
    assert len(TrainConfig.from_flags(**OTHER, **SAME).differences(default)) == len(OTHER)
    assert TrainConfig.from_flags(**SAME).differences(default) == []


@pytest.mark.parametrize("before", ["whole", "8", "replica"])
def test_what_this_machine_chooses_is_not_compared(before):
    earlier = TrainConfig().flags() | {"norm_batch": before}
    assert TrainConfig().differences(earlier) == []
    other = TrainConfig.from_flags(norm_batch="16").differences(earlier)
    assert other == [f"--norm_batch was {before!r}, is '16'"]


def test_a_run_that_is_older_than_a_flag_has_its_default():
    earlier = TrainConfig().flags()
    del earlier["ema"]
    assert TrainConfig().differences(earlier) == []
    assert TrainConfig.from_flags(ema=0.5).differences(earlier) == ["--ema was 0.0, is 0.5"]
    assert canonical(earlier)["ema"] == 0.0


def test_a_run_with_the_former_name_of_a_flag_is_compared_by_it():
    earlier = TrainConfig().flags()
    del earlier["precise_bn_batches"]
    earlier["calibration_batches"] = 3
    assert TrainConfig().differences(earlier) == ["--precise_bn_batches was 3, is 10"]
    assert TrainConfig.from_json(earlier).fit.precise_bn_batches == 3


def test_a_flag_of_a_newer_revision_is_ignored():
    later = TrainConfig().flags() | {"flag_of_tomorrow": 1}
    assert TrainConfig.from_json(later) == TrainConfig.from_flags(resize="stretch")
    assert TrainConfig().differences(later) == []


@pytest.mark.parametrize(
    ("image_size", "text", "sides"),
    [
        (None, None, None),
        (32, "32", (32, 32)),
        ("32", "32", (32, 32)),
        ("32x32", "32", (32, 32)),
        ("192x256", "192x256", (192, 256)),
    ],
)
def test_an_image_size_has_one_form(image_size, text, sides):
    config = TrainConfig.from_flags(image_size=image_size)
    assert (config.data.image_size, image_sides(image_size)) == (text, sides)
    earlier = config.flags() | {"image_size": image_size}
    assert config.differences(earlier) == []
    assert TrainConfig.from_json(earlier).data == config.replace(resize=config.data.rule).data


@pytest.mark.parametrize(
    ("image_size", "rule"),
    [(None, STRETCH), (64, STRETCH), (65, CROP), ("64x300", STRETCH), ("65x300", CROP)],
)
def test_auto_crops_to_sizes_that_are_not_small(image_size, rule):
    assert TrainConfig.from_flags(image_size=image_size).data.rule == rule


def test_the_rule_is_compared_and_not_how_it_was_written():
    auto = TrainConfig.from_flags(image_size=96)
    crop, stretch = auto.replace(resize="crop"), auto.replace(resize="stretch")
    assert crop.differences(auto.flags()) == auto.differences(crop.flags()) == []
    assert auto.differences(stretch.flags()) == ["--resize was 'stretch', is 'crop'"]
    small = TrainConfig.from_flags(image_size=32)
    assert small.replace(resize="stretch").differences(small.flags()) == []


def test_a_run_that_is_older_than_the_rules_stretched():
    earlier = TrainConfig().flags() | {"image_size": 224}
    del earlier["resize"]
    assert canonical(earlier)["resize"] == "stretch"
    assert canonical(earlier)["image_size"] == "224"
    old = TrainConfig.from_json(earlier)
    assert old.data.rule == STRETCH
    assert old.differences(earlier) == []
    new = TrainConfig.from_flags(image_size=224).differences(earlier)
    assert new == ["--resize was 'stretch', is 'crop'"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resize": "crop"}, "--resize=crop needs --image_size"),
        ({"resize": "pad", "image_size": 8}, "unknown --resize 'pad'"),
        ({"resize": None, "image_size": 8}, "unknown --resize None"),
    ],
)
def test_an_impossible_rule_is_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig.from_flags(**flags)
    with pytest.raises(UsageError, match=message):
        canonical(TrainConfig().flags() | flags)


def test_workers_may_differ_in_their_own_flags_only():
    one = TrainConfig.from_flags(workers="a:1,b:2", worker_index=0, run_dir="x", data_dir="y")
    one = one.replace(image_size=48)
    own = {"recipe": "r", "run_dir": "z", "data_dir": "v", "cache_dir": "c", "export": False}
    own["track"] = "mlflow"
    two = one.replace(worker_index=1, startup_timeout=1.0, init_from="elsewhere", **own)
    assert one.shared_flags() == two.shared_flags()
    for name, value in (OTHER | {"peer_timeout": 5.0, "seeds": 3}).items():
        if name == "init_from":  # read by the chief alone
            continue
        other = one.replace(**{name: value}).shared_flags()
        assert {k for k, v in other.items() if one.shared_flags()[k] != v} == {f"--{name}"}


def test_a_flagfile_has_the_configuration_and_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [
        "--recipe=he_resnet20",
        "--nesterov",
        "--noexport",
        "--data=folder:photos",
        "--epochs=3",
    ]
    config, _ = cli.parse(TrainConfig, [*argv, "--learning_rate=0.012345678901234567"])
    file = tmp_path / "x.flags"
    file.write_text(config.flagfile())
    expected = config.replace(recipe=None, data=f"folder:{tmp_path}/photos")
    assert cli.parse(TrainConfig, [f"--flagfile={file}"])[0] == expected
