"""The exported SavedModel: its signatures and files, and the runtimes that load it."""

import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow.core.protobuf import saved_model_pb2

from keras_cifar import models
from keras_cifar.core.files import versions
from keras_cifar.exporters import saved_model
from tests.conftest import encoded

NAMES = ("cat", "dog", "frog")


def png(pixels: np.ndarray, mode: str | None = None, format: str = "PNG") -> bytes:
    return encoded(Image.fromarray(pixels).convert(mode), format)


@functools.cache
def load(path):
    return tf.saved_model.load(str(path))


def export(name: str, factory) -> tuple:
    """(model, export directory, images)."""
    model = models.build(name, (32, 32, 3), 3).deployable
    random = np.random.default_rng(0)
    # Statistics as after training: not the identity.
    for variable in model.non_trainable_variables:
        if "moving" in variable.path:
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
    path = saved_model.export(model, factory.mktemp("models") / "m", NAMES)
    return model, path, random.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return export("resnet20", tmp_path_factory)


@pytest.fixture(scope="module", params=["resnet20", "googlenet", "nin"])
def exported(request, tmp_path_factory):
    if request.param == "resnet20":
        return request.getfixturevalue("resnet")
    return export(request.param, tmp_path_factory)


def test_signatures_are_the_contract(exported):
    _, path, _ = exported
    found = {}
    for name, signature in load(path).signatures.items():
        outputs = signature.structured_outputs.items()
        (spec,) = signature.structured_input_signature[1].values()
        inputs = (spec.name, spec.dtype, spec.shape.as_list())
        found[name] = (inputs, {k: (v.dtype, v.shape.rank) for k, v in outputs})
    classes = {
        "probabilities": (tf.float32, 2),
        "label": (tf.string, 1),
        "label_index": (tf.int64, 1),
    }
    images = ("images", tf.uint8, [None, 32, 32, 3])
    assert found == {
        "serving_default": (images, classes),
        "serving_bytes": (("image_bytes", tf.string, [None]), classes),
        "features": (images, {"features": (tf.float32, 2)}),
    }


def test_probabilities_equal_the_models(exported):
    model, path, images = exported
    signatures = load(path).signatures
    expected = model(images, training=False).numpy()
    served = signatures["serving_default"](images=tf.constant(images))
    np.testing.assert_allclose(served["probabilities"], expected, atol=1e-5)
    assert served["label_index"].numpy().tolist() == expected.argmax(1).tolist()
    assert served["label"].numpy().tolist() == [NAMES[i].encode() for i in expected.argmax(1)]
    encoded = signatures["serving_bytes"](image_bytes=tf.constant([png(x) for x in images]))
    np.testing.assert_allclose(encoded["probabilities"], expected, atol=1e-5)


def test_features_are_what_the_classifier_sees(exported):
    model, path, images = exported
    features = load(path).signatures["features"](images=tf.constant(images))["features"].numpy()
    if model.name == "nin":  # which averages maps after the classifier
        assert features.shape == (5, 192)
        return
    kernel, bias = (v.numpy() for v in model.get_layer("logits").weights)
    expected = tf.nn.softmax(features @ kernel + bias)
    np.testing.assert_allclose(model(images, training=False), expected, atol=1e-5)


def test_every_format_and_size_is_decoded(resnet):
    _, path, _ = resnet
    serve = load(path).signatures["serving_bytes"]
    random = np.random.default_rng(1)
    large = random.integers(0, 256, (40, 70, 3), dtype=np.uint8)
    files = [png(large, format=form) for form in ("PNG", "BMP", "JPEG", "WEBP")]
    files += [png(large, "L"), png(large, "P", "GIF"), png(large[:1, :1])]
    found = serve(image_bytes=tf.constant(files))
    assert found["probabilities"].shape == (7, 3)
    # PNG and BMP hold the same pixels.
    np.testing.assert_array_equal(found["probabilities"][0], found["probabilities"][1])


def test_invalid_images_are_marked_and_the_others_are_predicted(resnet):
    _, path, images = resnet
    serve = load(path).signatures["serving_bytes"]
    good = [png(x) for x in images]
    alone = serve(image_bytes=tf.constant(good))
    assert not np.isnan(alone["probabilities"]).any()
    bad = [b"", b"text", b"\xff\xd8\xff", good[0][:200], good[1][:-20] + b"x" * 20]
    only = serve(image_bytes=tf.constant(bad))
    found = serve(image_bytes=tf.constant(bad + good))
    for name in ("probabilities", "label", "label_index"):
        np.testing.assert_array_equal(found[name], np.concatenate([only[name], alone[name]]))
    assert np.isnan(only["probabilities"]).all()
    assert only["label"].numpy().tolist() == [b""] * 5
    assert only["label_index"].numpy().tolist() == [-1] * 5


def test_it_loads_without_keras_and_this_package(resnet, tmp_path):
    model, path, images = resnet
    code = f"""
import sys
sys.modules["keras"] = sys.modules["keras_cifar"] = None  # importing either now fails
import tensorflow as tf
serve = tf.saved_model.load({str(path)!r}).signatures["serving_default"]
print(serve(images=tf.constant({images.tolist()}, tf.uint8))["probabilities"].numpy().tolist())
"""
    (tmp_path / "x.py").write_text(code)
    done = subprocess.check_output([sys.executable, "-I", "x.py"], text=True, cwd=tmp_path)
    expected = model(images, training=False).numpy()
    np.testing.assert_allclose(json.loads(done), expected, atol=1e-5)


def test_libtensorflows_c_api_gives_the_same_from_all_signatures(resnet, tmp_path):
    _, path, images = resnet
    files = [png(x) for x in images[:4]] + [b"no image"]
    contents = np.frombuffer(b"".join(files), np.uint8)
    lengths = [len(x) for x in files]
    np.savez(tmp_path / "in.npz", images=images, contents=contents, lengths=lengths)
    graph = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    names = {
        name: [{k: (t.name, t.dtype) for k, t in side.items()} for side in (d.inputs, d.outputs)]
        for name, d in graph.meta_graphs[0].signature_def.items()
        if not name.startswith("__")
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    program = pathlib.Path(__file__).with_name("c_api.py")
    command = [sys.executable, "-I", program, path, "names.json", "in.npz", "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    signatures = load(path).signatures
    expected = {}
    for name, signature in signatures.items():
        (given,) = signature.structured_input_signature[1]
        value = tf.constant(files if given == "image_bytes" else images)
        expected |= {f"{name}/{k}": v.numpy() for k, v in signature(**{given: value}).items()}
    assert set(found.files) == set(expected)
    assert len(expected) == 7
    for name, value in expected.items():
        if value.dtype == np.float32:
            np.testing.assert_allclose(found[name], value, atol=1e-6, rtol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value.astype(found[name].dtype))
    assert found["serving_bytes/label_index"][-1] == -1


def test_openvino_gives_the_same(exported):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model, path, images = exported
    core = openvino.Core()
    network = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = network({"images": images})
    expected = model(images, training=False).numpy()
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-4, rtol=0)
    assert found["label_index"].tolist() == expected.argmax(1).tolist()
    assert found["label"].tolist() == [NAMES[i] for i in expected.argmax(1)]


def test_versions_count_up_and_nothing_temporary_is_left(tmp_path):
    model = models.build("lenet5", (16, 16, 3), 3).deployable
    base = tmp_path / "base"
    assert saved_model.export(model, base, NAMES, version=6).name == "6"
    assert saved_model.export(model, base, NAMES).name == "7"
    assert versions(base) == [6, 7]
    assert {p.name for p in base.iterdir()} == {"6", "7", "models.config", "SERVING.md"}
    assert (base / "7" / "assets" / "labels.txt").read_text() == "cat\ndog\nfrog\n"
