"""Recipes: what each says of itself, that its flags are right, and how the command line takes them."""

import re
import shlex

import numpy as np
import pytest

from keras_cifar.core import cli, recipes
from keras_cifar.core.config import COMPARED, TrainConfig
from keras_cifar.core.errors import UsageError
from keras_cifar.data import augmentation
from keras_cifar.training import optimizers
from keras_cifar.training import plan as planning
from tests.conftest import write_folder

NAMES = recipes.names()
# What takes more than 1.5 s to trace, or is a network of another recipe.
SLOW = ("he_resnet32", "he_resnet44", "he_resnet56", "he_resnet110", "vgg16_bn", "googlenet_bn")
SLOW += ("tutorial_resnet32", "resnet20_onecycle", "resnet32_onecycle")
SLOW += ("vgg_bn_drop_onecycle", "googlenet_onecycle", "fast5", "fast45")


def parsed(*argv) -> TrainConfig:
    return cli.parse(TrainConfig, list(argv))[0]


def lines(name: str) -> list[str]:
    """The flags in a recipe's file."""
    return [x for x in recipes.find(name).read_text("utf-8").splitlines() if x.startswith("--")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of a few images as large as CIFAR's."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root, {"train": 20, "test": 4}, side=32, classes=2)
    return root


# ---- The files


@pytest.mark.parametrize("name", NAMES)
def test_head_says_what_is_expected_and_where_that_comes_from(name):
    head = recipes.head(name)
    assert tuple(head) == recipes.HEAD
    assert head["basis"] in recipes.BASES
    assert (head["basis"] == "none") == (head["expected"] == recipes.NOT_RUN)
    if head["basis"] != "none":
        assert re.fullmatch(r"0\.\d{4}", head["expected"])
        assert re.search("arXiv|https://|keras_cifar", head["source"])
    *program, first, second = shlex.split(head["command"])[:5]
    assert program == ["python", "-m", "keras_cifar.train"]
    assert parsed(first, second).output.recipe == name


@pytest.mark.parametrize("name", NAMES)
def test_flags_are_known_decide_the_result_and_do_not_say_where_images_are(name):
    given = [line.partition("=")[0].removeprefix("--") for line in lines(name)]
    assert len(set(given)) == len(given)
    assert set(given) <= COMPARED - {"data", "seed", "dtype_policy"}
    needed = {"model", "epochs", "batch_size", "optimizer", "learning_rate", "val_fraction"}
    assert needed <= set(given)
    config = parsed(f"--recipe={name}")
    planning.check_names(config)
    augmentation.parse(config.data.augment)
    optimizers.schedule(config.optimizer, config.fit.epochs, config.fit.steps_per_epoch or 351)


def test_he_et_al_take_64000_steps_with_the_rate_of_the_paper():
    for name in (name for name in NAMES if name.startswith("he_")):
        config = parsed(f"--recipe={name}")
        rate = optimizers.schedule(config.optimizer, config.fit.epochs, config.fit.steps_per_epoch)
        assert config.fit.epochs * config.fit.steps_per_epoch == rate.total_steps == 64_000
        steps = (1000, 31_999, 32_000, 47_999, 48_000, 63_999)
        rates = [float(rate(step)) for step in steps]
        np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)
        warm = name == "he_resnet110"
        np.testing.assert_allclose(float(rate(199)), 0.05 if warm else 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES]
)
def test_recipe_trains(name, images, tmp_path):
    config = parsed(
        f"--recipe={name}",
        f"--data=folder:{images}",
        *("--epochs=30", "--steps_per_epoch=1", "--batch_size=2", f"--cache_dir={tmp_path}"),
    )
    plan = planning.prepare(config)
    before = plan.model.get_weights()
    history = plan.model.fit(plan.batches(0), epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert any((a != b).any() for a, b in zip(before, plan.model.get_weights(), strict=True))


# ---- The command line


def test_recipe_gives_its_flags_and_those_beside_it_win_wherever_they_stand():
    plain = parsed("--recipe=he_resnet20")
    assert (plain.model.model, plain.optimizer.learning_rate) == ("resnet20", 0.1)
    for argv in (["--recipe=he_resnet20", "--epochs=3"], ["--epochs=3", "--recipe", "he_resnet20"]):
        assert parsed(*argv) == plain.replace(epochs=3)


def test_recipe_in_a_file_of_flags_counts_too(tmp_path):
    file = tmp_path / "mine.flags"
    file.write_text("--recipe=he_resnet20\n--batch_size=64\n")
    assert parsed(f"--flagfile={file}") == parsed("--recipe=he_resnet20", "--batch_size=64")


def test_recipe_is_recorded_and_no_difference_where_its_flags_are_the_same():
    config = parsed("--recipe=he_resnet20")
    without = parsed(*lines("he_resnet20"))
    assert config.output.recipe == "he_resnet20"
    assert without.output.recipe is None
    assert config.differences(without.flags()) == []
    assert config.differences(parsed("--recipe=he_resnet32").flags())


def test_former_name_of_a_recipe_is_accepted():
    assert parsed("--recipe=chapter_resnet32").fit == parsed("--recipe=tutorial_resnet32").fit


def test_unknown_recipe_lists_the_choices():
    with pytest.raises(UsageError, match="unknown --recipe 'x'; choose one of: fast15, "):
        parsed("--recipe=x")
    for path in ("../recipes/he_resnet20", str(recipes.find("he_resnet20"))):
        with pytest.raises(UsageError, match="unknown --recipe"):
            parsed(f"--recipe={path}")


def test_table_shows_the_results_of_all_recipes():
    for name in NAMES:
        (line,) = re.findall(f"^{name} .*$", recipes.table(), re.M)
        head = recipes.head(name)
        assert all(head[key] in line for key in ("expected", "time", "hardware", "source"))
