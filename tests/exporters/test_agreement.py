"""Evaluation of a run and prediction with its export agree on every image."""

import json
import pathlib

import numpy as np

from keras_cifar import data, models
from keras_cifar.evaluation import evaluator
from tests.inference.test_predict import command


def test_predict_and_evaluate_agree(trained_run, capsys):
    """Every test image, file by file through `predict`, and through `evaluate`."""
    run = trained_run
    flags = run.read_config()["flags"]
    folder = pathlib.Path(flags["data"].removeprefix("folder:")) / "test"
    argv = [f"--model={run.path}", str(folder), "--format=json", "--top_k=1000"]
    capsys.readouterr()
    assert command(*argv) == 0
    predictions = json.loads(capsys.readouterr().out)
    metrics = evaluator.evaluate_run(run, "test")
    names = run.read_config()["class_names"]

    confusion = np.zeros((len(names), len(names)), int)
    for prediction in predictions:
        label = names.index(pathlib.Path(prediction["file"]).parent.name)
        confusion[label, prediction["top"][0]["index"]] += 1
    assert confusion.tolist() == metrics["confusion"]

    test = data.load(flags["data"], image_size=flags["image_size"]).test
    evaluated = evaluator.predict(models.load(run.model), test)
    # Both go through the classes and the files in the order of their names.
    for prediction, probabilities in zip(predictions, evaluated, strict=True):
        served = sorted((top["index"], top["probability"]) for top in prediction["top"])
        np.testing.assert_allclose([p for _, p in served], probabilities, atol=1e-5)
