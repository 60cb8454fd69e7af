"""Images of other proportions from training to serving: --resize and an --image_size of two sides."""

import base64
import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorflow_serving.apis import prediction_log_pb2

from keras_cifar import data, models
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.errors import UsageError, UserError
from keras_cifar.core.run_directory import Run, previous_config, with_its_rule
from keras_cifar.data.images import load_image
from keras_cifar.evaluation import evaluator
from keras_cifar.evaluation.evaluator import DataSource
from keras_cifar.evaluation.run_export import export_run
from keras_cifar.exporters import bundle, saved_model, verification
from keras_cifar.inference.predictions import classify_files
from keras_cifar.inference.predictor import Predictor
from keras_cifar.models import classifier, lenet5
from keras_cifar.reporting import record
from keras_cifar.training import trainer
from tests.data.test_images import photo
from tests.exporters.test_formats import needs_formats

SIZE = (66, 88)
SHAPES = ((100, 20), (20, 100), (90, 60), (60, 90), (66, 88), (3, 2))


def small(input_shape, num_classes, name):
    """A network that sees where in the image which colours are."""
    images, x = classifier.image_input(input_shape)
    x = keras.layers.AveragePooling2D(11)(x)
    x = keras.layers.Flatten(name="features")(x)
    logits = keras.layers.Dense(num_classes, name="logits")(x)
    return classifier.Classifier.build_from(images, logits, name)


def write_images(root) -> None:
    for index, shape in enumerate(SHAPES):
        (root / f"class_{index % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.roll(photo(*shape), index, axis=2)
        Image.fromarray(pixels).save(root / f"class_{index % 2}" / f"{index}.png")


def configuration(root, **flags) -> TrainConfig:
    flags = {"model": "small", "epochs": 1, "batch_size": 4, "val_fraction": 0} | flags
    return TrainConfig.from_flags(data=f"folder:{root}", **flags)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        write_images(root / split)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, images):
    """A finished run whose images were cropped, as --resize=auto does at 66 x 88."""
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lenet5.VARIANTS, "small", models.Variant(small, "", 8, 10, 4))
        trainer.train(configuration(images, image_size="66x88", run_dir=str(run.path)), run)
    return run


@pytest.fixture(scope="module")
def files(images) -> list[str]:
    return sorted(map(str, (images / "test").glob("*/*.png")))


def probabilities(rows: list[dict]) -> np.ndarray:
    ordered = [sorted(row["top"], key=lambda choice: choice["index"]) for row in rows]
    return np.array([[choice["probability"] for choice in top] for top in ordered])


def expected(run, files, size=SIZE, rule="crop") -> np.ndarray:
    """What the run's model says to the pixels by a rule."""
    pixels = np.stack([load_image(file, size, rule) for file in files])
    return models.load(run.model)(pixels, training=False).numpy()


def test_the_run_directory_tells_size_and_rule(run, images):
    config = json.loads(run.config.read_text())
    assert config["image_shape"] == [*SIZE, 3]
    assert (config["flags"]["image_size"], config["flags"]["resize"]) == ("66x88", "crop")
    test = evaluator.load_data(run.read_config(), "test").test
    paths = sorted((images / "test").glob("*/*.png"), key=lambda path: str(path))
    np.testing.assert_array_equal(test.images, [load_image(p, SIZE, "crop") for p in paths])
    assert evaluator.evaluate_run(run, "test")["fingerprint"] == test.fingerprint
    command = record.load(run).command()
    assert "--image_size=66x88" in command
    assert "--resize" not in command  # auto is the same


def test_other_data_follows_the_runs_rule(run, images):
    other = DataSource(f"folder:{images}")
    split = evaluator.load_data(run.read_config(), "test", other).test
    own = evaluator.load_data(run.read_config(), "test").test
    np.testing.assert_array_equal(split.images, own.images)


def test_a_run_resumes_by_the_same_rule_alone(run, images):
    previous_config(configuration(images, image_size="66x88"), run)
    previous_config(configuration(images, image_size="66x88", resize="crop"), run)
    with pytest.raises(UsageError, match="--resize was 'crop', is 'stretch'"):
        previous_config(configuration(images, image_size="66x88", resize="stretch"), run)
    with pytest.raises(UsageError, match="--image_size was '66x88', is '88x66'"):
        previous_config(configuration(images, image_size="88x66"), run)


def test_prediction_crops_as_the_training_did(run, files):
    rows, _ = classify_files(Predictor(str(run.path)), files, 2)
    found = probabilities(rows)
    np.testing.assert_allclose(found, expected(run, files), atol=1e-5)
    assert np.abs(found - expected(run, files, rule="stretch")).max() > 1e-3


def test_the_signatures_of_files_crop_once(run, files):
    signatures = Predictor(str(run.path)).signatures
    whole = tf.constant([pathlib.Path(file).read_bytes() for file in files])
    found = signatures["serving_bytes"](image_bytes=whole)["probabilities"]
    np.testing.assert_allclose(found, expected(run, files), atol=1e-5)
    done = [tf.io.encode_png(load_image(file, SIZE, "crop")) for file in files]
    again = signatures["serving_cropped"](image_bytes=tf.stack(done))["probabilities"]
    np.testing.assert_allclose(again, found, atol=1e-5)
    zoomed = signatures["serving_bytes"](image_bytes=tf.stack(done))["probabilities"]
    assert np.abs(zoomed - found).max() > 1e-3


def test_the_export_names_its_rule(run):
    path = run.export / "1"
    stored = json.loads((path / verification.FILE).read_text())
    assert stored["resize"] == "crop"
    assert set(stored["figures"]) == {"serving_default", "serving_bytes", "serving_cropped"}
    assert "takes the middle" in (run.export / bundle.NOTES).read_text()
    records = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        for record in tf.data.TFRecordDataset(str(path / bundle.WARMUP))
    ]
    assert "serving_cropped" in {record.model_spec.signature_name for record in records}


def test_a_server_is_sent_what_it_need_not_crop_again(run, files):
    pytest.importorskip("starlette", reason="the extra `serve` is not installed")
    from keras_cifar.inference.remote import RemotePredictor
    from tests.serving.server import serving

    with serving(run.path) as server:
        remote = RemotePredictor(server.url, 60)
        assert (remote.size, remote.rule) == (SIZE, "crop")
        rows, features = classify_files(remote, files, 2, with_features=True)
        local = classify_files(Predictor(str(run.path)), files, 2, with_features=True)
        assert rows == local[0]
        np.testing.assert_array_equal(features, local[1])
        encoded = pathlib.Path(files[0]).read_bytes()
        instances = [{"b64": base64.b64encode(encoded).decode()}]
        body = {"signature_name": "serving_bytes", "instances": instances}
        status, answer = server.request("POST", "/v1/models/model:predict", body)
        assert status == 200
        np.testing.assert_allclose(
            answer["predictions"][0]["probabilities"], expected(run, files)[0], atol=1e-5
        )


@pytest.fixture
def old(run, tmp_path, images):
    """A run of a revision before --resize: its images were stretched to 66 x 66."""
    config = json.loads(run.config.read_text())
    dataset = data.load(f"folder:{images}", image_size=66, resize="stretch", val_fraction=0)
    config["flags"]["image_size"] = 66
    del config["flags"]["resize"]
    config |= {"image_shape": [66, 66, 3], "splits": dataset.describe()}
    old = Run(tmp_path / "old")
    old.path.mkdir()
    old.config.write_text(json.dumps(config))
    small((66, 66, 3), 2, "small").deployable.save(old.model)
    return old


def test_a_run_before_the_rules_goes_on_stretching(old, images, files):
    previous_config(configuration(images, image_size="66", resize="stretch"), old)
    with pytest.raises(UsageError, match="--resize was 'stretch', is 'crop'"):
        previous_config(configuration(images, image_size="66", resize="crop"), old)
    same_command = configuration(images, image_size="66")
    assert previous_config(with_its_rule(same_command, old), old)
    assert with_its_rule(same_command, Run(old.path / "new")) == same_command
    assert evaluator.evaluate_run(old, "test")["fingerprint"]
    path, _ = export_run(str(old.path), "saved_model")
    predictor = Predictor(str(path))
    assert (predictor.size, predictor.rule) == ((66, 66), "stretch")
    assert set(predictor.signatures) == {"serving_default", "serving_bytes", "features"}
    rows, _ = classify_files(predictor, files, 2)
    stretched = expected(old, files, (66, 66), "stretch")
    np.testing.assert_allclose(probabilities(rows), stretched, atol=1e-5)


def test_an_export_whose_files_differ_is_discarded(tmp_path, monkeypatch):
    """The check sees whether `serving_bytes` crops as `resize_images` does."""
    monkeypatch.setattr(saved_model, "with_margin", lambda images: images)
    model = small((*SIZE, 3), 2, "small").deployable
    kernel = model.get_layer("logits").kernel
    kernel.assign(10 * np.random.default_rng(0).normal(size=kernel.shape))
    with pytest.raises(UserError, match=r"discarded: .* of serving_bytes"):
        saved_model.export(model, tmp_path / "m", ("a", "b"), rule="crop")


@needs_formats
@pytest.mark.parametrize("form", ["onnx", "litert"])
def test_other_formats_take_two_sides_and_name_the_rule(run, tmp_path, form):
    path, _ = export_run(str(run.path), form, out=str(tmp_path / form))
    assert json.loads((path / verification.FILE).read_text())["resize"] == "crop"
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path / "model.onnx")
        assert session.get_inputs()[0].shape[1:] == [*SIZE, 3]
        assert session.get_modelmeta().custom_metadata_map["resize"] == "crop"
