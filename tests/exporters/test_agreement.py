"""Evaluation of a run and prediction with its export agree on every image."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from keras_cifar import data, models, predict
from keras_cifar.core import cli
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import evaluator
from keras_cifar.training import trainer


def check_agreement(run: Run, capsys) -> None:
    """Every test image, file by file through `predict`, and through `evaluate`."""
    flags = run.read_config()["flags"]
    folder = pathlib.Path(flags["data"].removeprefix("folder:")) / "test"
    argv = [f"--model={run.path}", str(folder), "--format=json", "--top_k=1000"]
    capsys.readouterr()
    assert cli._execute("predict", predict.main, predict.PredictOptions, "IMAGE", argv) == 0
    predictions = json.loads(capsys.readouterr().out)
    metrics = evaluator.evaluate_run(run, "test")
    names = run.read_config()["class_names"]

    confusion = np.zeros((len(names), len(names)), int)
    for prediction in predictions:
        confusion[
            names.index(pathlib.Path(prediction["file"]).parent.name), prediction["top"][0]["index"]
        ] += 1
    assert confusion.tolist() == metrics["confusion"]

    test = data.load(flags["data"], image_size=flags["image_size"]).test
    evaluated = evaluator.predict(models.load(run.model), test)
    # Both go through the classes and the files in the order of their names.
    for prediction, probabilities in zip(predictions, evaluated, strict=True):
        served = np.zeros(len(names))
        for top in prediction["top"]:
            served[top["index"]] = top["probability"]
        np.testing.assert_allclose(served, probabilities, atol=1e-5)


def test_predict_and_evaluate_agree(trained_run, capsys):
    check_agreement(trained_run, capsys)


@pytest.mark.cifar
def test_predict_and_evaluate_agree_on_200_real_images(tmp_path, capsys):
    source = pathlib.Path(os.environ["CIFAR10_FOLDER"])
    folder = tmp_path / "images"
    for split, count in (("train", 100), ("test", 20)):
        for directory in sorted((source / split).iterdir()):
            target = folder / split / directory.name
            target.mkdir(parents=True)
            for file in sorted(directory.iterdir())[:count]:
                shutil.copy(file, target)
    run = Run(tmp_path / "run")
    config = TrainConfig.from_flags(
        model="resnet20", data=f"folder:{folder}", epochs=2, batch_size=50
    )
    assert trainer.train(config, run)["count"] == 200
    check_agreement(run, capsys)
    assert (
        max(
            row["count"]
            for row in json.loads(run.evaluation("test").read_text())["per_class"].values()
        )
        == 20
    )
