"""Whose statistics normalize a batch, by --norm_batch, and what the first lines say about the data."""

import dataclasses

import numpy as np
import pytest

from keras_cifar.core.config import FitConfig, TrainConfig
from keras_cifar.core.errors import UsageError
from keras_cifar.data import Dataset, Split
from keras_cifar.training.first_lines import describe_classes, describe_sizes
from keras_cifar.training.plan import check_names, choose_norm_batch


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Nothing here changes Keras's state."""


def choose(flag: str, replicas: int, batch_size: int = 128, accumulate_steps: int = 1) -> tuple:
    fit = FitConfig(norm_batch=flag, batch_size=batch_size, accumulate_steps=accumulate_steps)
    return choose_norm_batch(fit, replicas)


@pytest.mark.parametrize(
    ("arguments", "chosen", "why"),
    [
        (("auto", 1), "whole", "the whole batch (one replica)"),
        (("auto", 2), 64, "each replica's 64 images (a replica has 32 or more)"),
        (("auto", 4), 32, "each replica's 32 images (a replica has 32 or more)"),
        (("auto", 3), "replica", "each replica's 42 or 43 images (a replica has 32 or more)"),
        (("auto", 8), "whole", "the whole batch (a replica has fewer than 32 images)"),
        (("auto", 4, 127), "whole", "the whole batch (a replica has fewer than 32 images)"),
        (("auto", 1, 128, 2), "whole", "each microbatch (one replica)"),
        (("auto", 2, 128, 2), 32, "each replica's 32 images (a replica has 32 or more)"),
        (("auto", 2, 128, 4), "whole", "each microbatch (a replica has fewer than 32 images)"),
        (("whole", 2), "whole", "the whole batch (--norm_batch)"),
        (("fixed", 2), "fixed", "the data that the first weights were trained on (--norm_batch)"),
        (("16", 1), 16, "groups of 16 images"),
        (("16", 2), 16, "groups of 16 images"),
        (("64", 1, 128, 2), 64, "groups of 64 images"),
    ],
)
def test_choice_depends_on_the_images_of_a_replica(arguments, chosen, why):
    assert choose(*arguments) == (chosen, why)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("48", 1),
            "--norm_batch=48 does not divide the 128 images of each replica; use 128, 64, ",
        ),
        (("128", 2), "the 64 images of each replica; use 64, 32, 16, 8, 4, 2, whole"),
        (("2", 3), "the 42 or 43 images of each replica; use whole"),
        (("64", 2, 128, 2), "the 32 images of each replica; use 32, 16, 8, 4, 2, whole"),
    ],
)
def test_groups_that_do_not_divide_are_refused_with_those_that_do(arguments, message):
    with pytest.raises(UsageError) as error:
        choose(*arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["0", "-8", "half", "8.5", "", "Whole"])
def test_a_wrong_value_is_refused_in_one_line(value):
    with pytest.raises(UsageError, match=r"^--norm_batch=.* is not auto, whole, fixed or a number"):
        FitConfig(norm_batch=value)


# ---- Sizes of the files


@pytest.mark.parametrize(
    ("sizes", "size", "rule", "lines"),
    [
        ((), (224, 224), "crop", []),
        (
            ((3024, 4032), (600, 400), (120, 213)),
            (224, 224),
            "crop",
            [
                "images    213 x 120 to 4,032 x 3,024 pixels (of 3 sampled), crop: the short side "
                "becomes 256 and the middle 224 x 224 stays"
            ],
        ),
        (
            ((500, 375), (500, 375)),
            (96, 128),
            "crop",
            [
                "images    375 x 500 pixels (of 2 sampled), crop: all are scaled to cover 146 x 110 "
                "and the middle 128 x 96 stays"
            ],
        ),
        (
            ((20, 90), (40, 30)),
            (32, 48),
            "stretch",
            [
                "images    30 x 40 to 90 x 20 pixels (of 2 sampled), stretch: all become 48 x 32, "
                "whatever their aspect ratio"
            ],
        ),
    ],
)
def test_first_lines_tell_the_sizes_of_the_files_and_what_becomes_of_them(sizes, size, rule, lines):
    split = Split(np.zeros((1, *size, 3), np.uint8), np.zeros(1, np.int64))
    assert describe_sizes(Dataset(split, None, split, ("a",), "", (), sizes), rule) == lines
    in_files = Dataset(dataclasses.replace(split, files=True), None, split, ("a",), "", (), sizes)
    assert ["in training; else" in line for line in describe_sizes(in_files, rule)] == [True] * len(
        lines
    )


# ---- Uneven classes


@pytest.mark.parametrize(
    ("counts", "flags", "lines"),
    [
        ((5000, 5000, 5000), {}, ["classes   5,000 images of each"]),
        ((10, 14, 12), {}, ["classes   10 images of a to 14 of b"]),
        (
            (15, 10, 12),
            {},
            [
                "classes   10 images of b to 15 of a; --class_weight balanced or --sampling balanced "
                "evens them out"
            ],
        ),
        (
            (0, 1, 1000),
            {},
            [
                "classes   1 image of b to 1,000 of c; --class_weight balanced or --sampling balanced "
                "evens them out"
            ],
        ),
        (
            (10, 1000, 20),
            {"sampling": "balanced"},
            [
                "classes   10 images of a to 1,000 of b; all are drawn equally often "
                "(--sampling balanced)"
            ],
        ),
        (
            (10, 10, 10),
            {"class_weight": "balanced"},
            ["classes   10 images of each; all count alike in the loss (--class_weight balanced)"],
        ),
    ],
)
def test_first_lines_name_the_smallest_and_the_largest_class(counts, flags, lines):
    labels, config = np.repeat(range(3), counts), TrainConfig.from_flags(**flags)
    assert describe_classes(labels, ("a", "b", "c"), config) == lines
    assert describe_classes(labels[:1], ("a",), config) == []


def test_fixed_averages_need_weights_that_have_some():
    with pytest.raises(UsageError, match=r"^--norm_batch=fixed .* needs --init_from$"):
        check_names(TrainConfig.from_flags(norm_batch="fixed"))
    check_names(TrainConfig.from_flags(norm_batch="fixed", init_from="imagenet"))
    with pytest.raises(
        UsageError, match=r"^--optimizer=muon .* the averages of --norm_batch=fixed"
    ):
        check_names(
            TrainConfig.from_flags(norm_batch="fixed", init_from="imagenet", optimizer="muon")
        )
