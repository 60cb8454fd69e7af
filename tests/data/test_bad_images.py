"""--on_bad_image=skip through training, resuming and evaluating."""

import csv
import os

import pytest

from keras_cifar import data
from keras_cifar.core import config
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import evaluator
from keras_cifar.training import trainer
from tests.conftest import write_folder

EMPTY = "the file is empty"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(configuration, run, the bad files) of a finished run that left out two images."""
    root = tmp_path_factory.mktemp("bad")
    write_folder(root / "images", {"train": 48, "test": 24}, side=12)
    bad = [
        root / "images" / "train" / "class_1" / os.fsdecode(b"caf\xe9\n.png"),
        root / "images" / "test" / "class_2" / "a, b.png",
    ]
    for path in bad:
        path.write_bytes(b"")
    run = Run(root / "run")
    flags = config.TrainConfig.from_flags(
        model="lenet5",
        data=f"folder:{root / 'images'}",
        image_size=16,
        epochs=1,
        batch_size=16,
        export=False,
        on_bad_image="skip",
        run_dir=str(run.path),
    )
    trainer.train(flags, run)
    return flags, run, bad


def table(run: Run) -> list[list[str]]:
    with open(run.skipped, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_run_has_a_list_of_what_was_skipped(trained):
    _, run, (first, second) = trained
    assert table(run) == [
        ["split", "file", "reason"],
        ["train", str(first), EMPTY],
        ["test", str(second), EMPTY],
    ]
    assert run.read_config()["splits"]["test"]["count"] == 24


def test_resuming_has_the_same_images_and_list_and_refuses_the_other_flag(trained, capsys):
    flags, run, _ = trained
    before = table(run)
    run.skipped.unlink()
    trainer.train(flags.replace(max_bad_share=0.5), run)
    assert table(run) == before
    assert "skipped   2 images that cannot be read" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--on_bad_image was 'skip', is 'error'"):
        trainer.train(flags.replace(on_bad_image="error"), run)


def test_new_run_without_skip_or_with_more_than_the_share_fails_before_it_begins(trained, tmp_path):
    flags, _, (first, _) = trained
    with pytest.raises(UserError, match="cannot be read: the file is empty") as error:
        trainer.train(flags.replace(on_bad_image="error"), Run(tmp_path / "new"))
    assert "\\n.png" in str(error.value)
    assert first.name not in str(error.value)  # Its name is two lines.
    with pytest.raises(UserError, match=r"more than --max_bad_share=0\.01"):
        trainer.train(flags.replace(max_bad_share=0.01), Run(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_evaluation_skips_the_same(trained, split):
    _, run, _ = trained
    metrics = evaluator.evaluate_run(run, split)
    assert metrics["count"] == run.read_config()["splits"][split]["count"]


def test_of_other_data_every_image_counts(trained):
    flags, run, _ = trained
    with pytest.raises(UserError, match="cannot be read"):
        evaluator.evaluate_run(run, "test", evaluator.DataSource(flags.data.data))


def test_evaluating_makes_no_directory_that_a_configuration_names(trained, tmp_path):
    _, run, _ = trained
    text = run.config.read_text("utf-8")
    elsewhere = tmp_path / "elsewhere"
    changed = text.replace('"cache_dir": null', f'"cache_dir": "{elsewhere}"')
    assert changed != text
    run.config.write_text(changed, "utf-8")
    try:
        evaluator.evaluate_run(run, "test")
    finally:
        run.config.write_text(text, "utf-8")
    assert not elsewhere.exists()


def test_run_directory_that_is_no_text_is_refused_before_it_begins(trained, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff")
    with pytest.raises(UsageError, match="UTF-8 paths only"):
        trainer.train(trained[0], Run(path))
    assert not path.exists()


def test_skip_is_refused_for_tfds_and_means_nothing_for_digits(tmp_path):
    skip = data.BadImages(True, 0.5)
    with pytest.raises(UsageError, match="--on_bad_image=skip is for --data=folder:PATH"):
        data.load("cifar10", str(tmp_path), bad_images=skip)
    assert not data.load("digits", bad_images=skip).skipped
