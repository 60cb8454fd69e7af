"""The space of a search: ranges, alternatives, and what is refused in one line."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from keras_cifar.core.errors import UsageError
from keras_cifar.tuning import space

CROPS = ("crop(4)|flip", "crop(4)|flip|cutout(8)", "")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("learning_rate=log(1e-4,1e-1)", FloatDistribution(1e-4, 1e-1, log=True)),
        ("weight_decay = uniform( 0 , 0.5 )", FloatDistribution(0, 0.5)),
        ("batch_size=int(16,64)", IntDistribution(16, 64)),
        ("batch_size=log(16,64)", IntDistribution(16, 64, log=True)),
        ("warmup_epochs=int(0,3)", IntDistribution(0, 3)),
        ("optimizer=adam|sgd", CategoricalDistribution(["adam", "sgd"])),
        ("learning_rate=0.1|0.01", CategoricalDistribution([0.1, 0.01])),
        ("nesterov=true|false", CategoricalDistribution([True, False])),
        ("model=lenet5|resnet20", CategoricalDistribution(["lenet5", "resnet20"])),
        (
            "lr_schedule=step(0.5,0.75)|cosine",
            CategoricalDistribution(["step(0.5,0.75)", "cosine"]),
        ),
        (f"augment={' or '.join(CROPS)}", CategoricalDistribution(CROPS)),
    ],
)
def test_values_of_a_flag(text, found):
    ((name, values),) = space.parse(text, []).items()
    assert name == text.partition("=")[0].strip()
    assert values == found


def test_several_flags_are_separated_by_semicolons():
    assert list(space.parse("ema=0|0.9; optimizer=adam|sgd;", [])) == ["ema", "optimizer"]


def test_values_are_checked_among_the_flags_of_training():
    text = "accumulate_steps=1|3"
    with pytest.raises(
        UsageError, match="--batch_size=128 must be a multiple of --accumulate_steps=3"
    ):
        space.parse(text, [])
    assert "accumulate_steps" in space.parse(text, ["--batch_size=12"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--space names no flag"),
        ("learning_rate", "'learning_rate' is not FLAG=VALUES"),
        ("learning_rat=1|2", "unknown flag in --space: 'learning_rat'; choose one of:"),
        *(
            (f"{name}=1|2", f"unknown flag that cannot be searched in --space: '{name}'")
            for name in ("data", "data_dir", "run_dir", "replicas", "seeds", "seed", "recipe")
        ),
        ("ema=0|0.9; ema=0|0.5", "--space has --ema twice"),
        ("optimizer=adam|adamax", "optimizer=adam|adamax: unknown --optimizer 'adamax'; choose"),
        ("model=lenet5|lenet6", "unknown model 'lenet6'"),
        ("lr_schedule=cosine|sine", "'sine'"),
        ("augment=crop(4)|flip or crop(4)|flop", "'flop'"),
        ("optimizer=adam", "name two values or more, separated by |"),
        ("augment=crop(4)|flip", "name two values or more, separated by or"),
        ("momentum=uniform(0.5,1)", "--momentum=1.0 must be at least 0 and below 1"),
        ("learning_rate=log(0,1)", "--learning_rate=0.0 must be greater than 0"),
        ("weight_decay=log(0,1)", "a logarithmic range begins above 0"),
        ("ema=uniform(0.9,0.5)", "the first number must be below the second"),
        ("ema=uniform(0.9)", "a range has two numbers, such as uniform(1,10)"),
        ("learning_rate=log(low,1)", "low"),
        ("warmup_epochs=int(0.5,3)", "the limits must be whole numbers"),
        ("nesterov=int(0,1)", "it is no number"),
    ],
)
def test_wrong_spaces_are_one_line(text, words):
    with pytest.raises(UsageError) as caught:
        space.parse(text, [])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
