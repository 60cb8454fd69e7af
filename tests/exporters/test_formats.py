"""ONNX and LiteRT: written, verified, and loaded by their own runtimes."""

import json
import os
import pathlib
import sys
from importlib.util import find_spec

import keras
import numpy as np
import pytest

from keras_cifar import models
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import versions
from keras_cifar.data import load, training_batches
from keras_cifar.exporters import litert, onnx, verification
from keras_cifar.training import optimizers
from tests.exporters.test_export import command

NAMES = ("cat", "dog", "frog")


def smooth(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [count, side, side, 3]."""
    noise = np.random.default_rng(seed).uniform(0, 255, (count, 4, 4, 3))
    return np.asarray(keras.ops.image.resize(noise, (side, side)), np.uint8)


def network(name: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = models.build(name, (32, 32, 3), 3)
    model.compile()
    model.recompute_statistics(iter([(smooth(64),)]), 1)
    return model.deployable


SAMPLES = verification.Samples(smooth(40), "smooth images", smooth(40, seed=1))
needs_formats = pytest.mark.skipif(
    not all(map(find_spec, ("onnxruntime", "tf2onnx", "ai_edge_litert"))),
    reason="the extra `formats` is not installed",
)


@needs_formats
@pytest.mark.parametrize("name", ["resnet20", pytest.param("googlenet_bn", marks=pytest.mark.slow)])
def test_onnxruntime_agrees_with_the_model(tmp_path, name):
    import onnxruntime

    model = network(name)
    path = onnx.export(model, tmp_path / "m", NAMES, samples=SAMPLES)
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    images = smooth(7, seed=2)
    probabilities, index = session.run(["probabilities", "label_index"], {"images": images})
    expected = model(images, training=False).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-4, rtol=0)
    assert index.tolist() == expected.argmax(1).tolist()
    (images,) = session.get_inputs()
    assert (images.type, images.shape[1:]) == ("tensor(uint8)", [32, 32, 3])
    assert session.get_modelmeta().custom_metadata_map["class_names"].split() == list(NAMES)
    assert (path / "labels.txt").read_text().split() == list(NAMES)
    stored = json.loads((path / verification.FILE).read_text())
    assert stored["figures"]["onnxruntime"]["largest_difference"] < 1e-4


@needs_formats
def test_litert_agrees_with_the_model(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model = network("resnet20")
    path = litert.export(model, tmp_path / "m", NAMES, samples=SAMPLES)
    images = smooth(7, seed=2)
    expected = model(images, training=False).numpy()
    for file, atol in (("model.tflite", 1e-4), ("model_int8.tflite", 0.1)):
        found = Interpreter(str(path / file)).get_signature_runner()(images=images)
        np.testing.assert_allclose(found["probabilities"], expected, atol=atol, rtol=0)
        assert found["label_index"].tolist() == found["probabilities"].argmax(1).tolist()
    assert (path / "model_int8.tflite").stat().st_size < (path / "model.tflite").stat().st_size / 2
    assert (path / "labels.txt").read_text().split() == list(NAMES)


@needs_formats
def test_integers_that_differ_too_much_are_discarded(tmp_path, monkeypatch):
    monkeypatch.setattr(litert, "INT8_BOUND", 1e-5)
    with pytest.raises(UserError, match=r"mean difference .*model_int8\.tflite .*more than 1e-05"):
        litert.export(network("lenet5"), tmp_path / "m", NAMES, samples=SAMPLES)
    assert list((tmp_path / "m").iterdir()) == []


@needs_formats
@pytest.mark.parametrize("module", [onnx, litert])
def test_an_export_that_differs_from_the_model_is_discarded(tmp_path, monkeypatch, module):
    fold = module.folding.fold

    def wrong(model):
        folded = fold(model)
        folded.get_layer("logits").kernel.assign(-folded.get_layer("logits").kernel)
        return folded

    monkeypatch.setattr(module.folding, "fold", wrong)
    with pytest.raises(UserError, match="the export was discarded"):
        module.export(network("lenet5"), tmp_path / "m", NAMES, samples=SAMPLES)
    assert versions(tmp_path / "m") == []
    assert list((tmp_path / "m").iterdir()) == []


@needs_formats
def test_integers_need_training_images(tmp_path):
    with pytest.raises(UserError, match="need training images"):
        litert.export(network("lenet5"), tmp_path / "m", NAMES)


@pytest.mark.parametrize(("form", "package"), [("onnx", "tf2onnx"), ("litert", "ai_edge_litert")])
def test_a_missing_package_is_one_line(trained_run, capsys, monkeypatch, form, package):
    for name in [package, *(x for x in sys.modules if x.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert command(f"--run={trained_run.path}", f"--format={form}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert package in line
    assert "pip install 'keras_cifar[formats]'" in line


@needs_formats
@pytest.mark.parametrize("form", ["onnx", "litert"])
def test_the_command_writes_the_format_beside_the_export(trained_run, capfd, form):
    assert command(f"--run={trained_run.path}", f"--format={form}", "--temperature=2") == 0
    path = trained_run.path / form / "1"
    output = capfd.readouterr().out
    assert str(path) in output
    assert "verified" in output
    assert json.loads((path / verification.FILE).read_text())["calibration"]["temperature"] == 2


@needs_formats
@pytest.mark.cifar
def test_the_formats_keep_the_accuracy_of_a_trained_network_on_2000_real_images(tmp_path):
    import onnxruntime
    from ai_edge_litert.interpreter import Interpreter

    folder = pathlib.Path(os.environ["CIFAR10_FOLDER"])
    dataset = load(f"folder:{folder}")
    keras.utils.set_random_seed(0)
    model = models.build("resnet20", (32, 32, 3), 10)
    model.compile(optimizers.Adam(1e-3))
    batches = training_batches(dataset.train, 10, batch_size=128, augment="flip", seed=0)
    model.fit(batches, steps_per_epoch=300, epochs=1, verbose=0)
    model.recompute_statistics(iter([(dataset.train.take(np.arange(0, 45_000, 22)).images,)]), 1)
    model = model.deployable
    samples = verification.of_dataset(dataset, "cifar10")
    paths = [
        x.export(model, tmp_path, dataset.class_names, samples=samples) for x in (onnx, litert)
    ]

    test = dataset.test.spread(2000)
    session = onnxruntime.InferenceSession(
        paths[0] / onnx.MODEL, providers=["CPUExecutionProvider"]
    )

    def classify(file):
        runner = Interpreter(str(paths[1] / file)).get_signature_runner()
        return lambda x: runner(images=x)["probabilities"]

    classifiers = {
        "model": lambda x: model(x, training=False),
        "onnx": lambda x: session.run(None, {"images": x})[1],
        "float": classify(litert.FLOAT),
        "int8": classify(litert.INT8),
    }
    given = {name: verification.in_batches(f, test.images) for name, f in classifiers.items()}
    accuracy = {name: (x.argmax(1) == test.labels).mean() for name, x in given.items()}
    differences = {name: verification.compare(given["model"], x) for name, x in given.items()}
    print(accuracy, differences, sep="\n")
    assert accuracy["model"] > 0.4
    assert differences["onnx"]["largest_difference"] < 1e-4
    assert differences["float"]["largest_difference"] < 1e-4
    assert abs(accuracy["int8"] - accuracy["float"]) <= 0.01
