"""The export command: the files beside the model, verification, labels, temperature."""

import base64
import contextlib
import json
import shlex
import shutil
import subprocess

import google.protobuf.text_format
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2
from tensorflow_serving.config import model_server_config_pb2

from keras_cifar import export, models
from keras_cifar.core import cli
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import TEMPORARY, versions
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import evaluator
from keras_cifar.evaluation.temperature import find_temperature, fit_temperature, fit_to_split
from keras_cifar.exporters import FORMATS, bundle, saved_model, verification
from keras_cifar.inference.predictor import Predictor


def command(*argv) -> int:
    argv = [str(argument) for argument in argv]
    return cli._execute("export", export.main, export.ExportOptions, "", argv)


@pytest.fixture(scope="module")
def version(trained_run):
    """The directory of the export that training made."""
    return trained_run.export / "1"


def test_every_warm_up_record_can_be_replayed(version):
    records = list(tf.data.TFRecordDataset(str(version / bundle.WARMUP)).as_numpy_iterator())
    signatures = tf.saved_model.load(str(version)).signatures
    batches = {name: [] for name in signatures}
    for record in records:
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        assert request.model_spec.name == "run"
        signature = signatures[request.model_spec.signature_name]
        inputs = {k: tf.constant(tf.make_ndarray(v)) for k, v in request.inputs.items()}
        (size,) = {len(value) for value in inputs.values()}
        for name, value in signature(**inputs).items():
            expected = signature.structured_outputs[name].shape
            assert value.shape == (size, *expected[1:])
            if value.dtype == tf.float32:
                assert np.isfinite(value).all()
        batches[request.model_spec.signature_name].append(size)
    assert set(map(tuple, batches.values())) == {bundle.BATCHES}
    assert len(records) <= bundle.MAX_RECORDS
    assert (version / bundle.WARMUP).stat().st_size < 2**17


def test_the_files_beside_the_versions_are_for_tensorflow_serving(trained_run):
    text = (trained_run.export / bundle.CONFIG).read_text()
    config = google.protobuf.text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert (model.name, model.base_path) == ("run", "/models/run")
    notes = (trained_run.export / bundle.NOTES).read_text()
    for line in bundle.commands(trained_run.export).values():
        assert line in notes
    assert versions(trained_run.export)[0] == 1
    assert all(name.is_dir() == name.name.isdecimal() for name in trained_run.export.iterdir())


def test_the_commands_are_quoted_for_the_shell(tmp_path):
    base = tmp_path / "it's a 'run' $HOME" / "export"
    lines = bundle.commands(base)
    words = shlex.split(lines["serve"])
    name = "it-s-a-run-HOME"
    assert words[words.index("-v") + 1] == f"{base}:/models/{name}"
    assert f"MODEL_NAME={name}" in words


def test_the_request_command_sends_the_file(tmp_path):
    lines = bundle.commands(tmp_path / "m")
    contents = np.random.default_rng(0).bytes(300_000)  # more than an argument may have
    (tmp_path / "dog.jpg").write_bytes(contents)
    script = f"curl() {{ echo $*; cat; }}\n{lines['request']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=tmp_path, check=True)
    arguments, _, body = done.stdout.partition(b"\n")
    assert arguments.decode() == "-d @- http://localhost:8501/v1/models/m:predict"
    encoded = {"b64": base64.b64encode(contents).decode()}
    assert json.loads(body) == {"signature_name": "serving_bytes", "instances": [encoded]}


def test_training_verifies_its_export_on_validation_images(version):
    stored = json.loads((version / verification.FILE).read_text())
    assert stored["origin"].startswith("val images of folder:")
    assert stored["images"] == 9
    for name in ("serving_default", "serving_bytes"):
        assert stored["limits"][name] == {"largest_difference": 1e-4}
        assert stored["figures"][name]["label_agreement"] == 1


def test_an_export_that_differs_from_the_model_is_discarded(
    trained_run, tmp_path, capsys, monkeypatch
):
    fold = saved_model.folding.fold

    def wrong(model, **kwargs):
        folded = fold(model, **kwargs)
        folded.weights[0].assign(folded.weights[0] * 1.1)
        return folded

    monkeypatch.setattr(saved_model.folding, "fold", wrong)
    assert command(f"--run={trained_run.path}", f"--out={tmp_path / 'm'}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "largest difference between probabilities of serving_default and the model's is" in line
    assert list((tmp_path / "m").iterdir()) == []


def test_without_the_data_an_export_is_verified_on_random_pixels(trained_run, tmp_path, capsys):
    run = tmp_path / "moved"
    run.mkdir()
    shutil.copy(trained_run.model, run)
    config = trained_run.read_config()
    config["flags"]["data"] = "folder:/nowhere"
    (run / "config.json").write_text(json.dumps(config))
    assert command(f"--run={run}") == 0
    captured = capsys.readouterr()
    assert "/nowhere" in captured.err
    assert "images of random pixels" in captured.out
    assert command(f"--run={run}", "--temperature=auto") == 1
    assert "/nowhere" in capsys.readouterr().err
    assert versions(run / "export") == [1]


def test_labels_replace_the_class_names(trained_run, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("Katze\nHund\n日本\n", "utf-8")
    out = tmp_path / "m"
    assert command(f"--run={trained_run.path}", f"--out={out}", f"--labels={names}") == 0
    assert Predictor(str(out)).class_names == ("Katze", "Hund", "日本")
    images = np.zeros((1, 16, 16, 3), np.uint8)
    found = tf.saved_model.load(str(out / "1")).signatures["serving_default"](images=images)
    index = int(found["label_index"][0])
    assert found["label"][0].numpy().decode() == ("Katze", "Hund", "日本")[index]


@pytest.mark.parametrize(
    "text", [b"a\nb\n", b"a\nb\nc\nd\n", b"a\n\nc\n", b"a\nb\x1b\nc\n", b"\xff\nb\nc\n"]
)
def test_wrong_labels_are_one_line_and_no_export(trained_run, tmp_path, capsys, text):
    names = tmp_path / "names.txt"
    names.write_bytes(text)
    out = tmp_path / "m"
    assert command(f"--run={trained_run.path}", f"--out={out}", f"--labels={names}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(names) in line
    assert not out.exists()


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_the_temperature_is_found(factor):
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.5, (4000, 5))
    labels = (logits + random.gumbel(size=logits.shape)).argmax(1)  # drawn with these logits
    fitted = fit_temperature(factor * logits, labels)
    assert fitted["temperature"] == pytest.approx(factor, rel=0.06)
    assert fitted["loss_after"] <= fitted["loss_before"]
    assert fitted["ece_after"] < 0.02
    if factor != 1:
        assert fitted["ece_before"] > 0.1


def test_the_temperature_of_extreme_logits_stays_in_its_range():
    labels = np.arange(30) % 3
    right = 1e4 * np.eye(3)[labels]
    for logits in (right, -right, 0 * right):
        fitted = fit_temperature(logits, labels)
        assert 0.05 <= fitted["temperature"] <= 20
        assert np.isfinite(list(fitted.values())).all()


def test_the_export_applies_the_temperature(trained_run, tmp_path):
    assert command(f"--run={trained_run.path}", f"--out={tmp_path / 'm'}", "--temperature=2.5") == 0
    path = tmp_path / "m" / "1"
    stored = json.loads((path / verification.FILE).read_text())
    assert stored["calibration"] == {"temperature": 2.5}
    model = models.load(trained_run.model)
    logits = keras.Model(model.inputs[0], model.get_layer("logits").output)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    served = Predictor(str(path)).classify(images)
    np.testing.assert_allclose(served, tf.nn.softmax(logits(images) / 2.5), atol=1e-5)
    assert np.abs(served - model(images)).max() > 1e-3


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "warm", ""])
def test_an_invalid_temperature_is_status_2(capsys, value):
    assert command("--run=x", f"--temperature={value}") == 2
    assert "must be auto, a number above 0, or a run directory" in capsys.readouterr().err


def test_the_temperature_of_another_run_is_fitted_to_its_images(trained_run, tmp_path, capsys):
    other = Run(shutil.copytree(trained_run.path, tmp_path / "other"))
    model = models.load(other.model)
    kernel, bias = model.get_layer("logits").get_weights()
    # A large bias to one class, which only a high temperature corrects.
    model.get_layer("logits").set_weights([kernel, np.add(bias, [50, 0, 0])])
    model.save(other.model)
    own, theirs = (find_temperature(text, trained_run) for text in ("auto", str(other.path)))
    validation = evaluator.load_data(other.read_config(), "val").split("val")
    assert theirs == fit_to_split(model, validation)
    assert theirs["temperature"] > 10 * own["temperature"]
    out = tmp_path / "m"
    assert command(f"--run={trained_run.path}", f"--out={out}", f"--temperature={other.path}") == 0
    stored = json.loads((out / "1" / verification.FILE).read_text())["calibration"]
    assert stored == theirs
    assert f"temperature {theirs['temperature']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("epochs", 4, "was trained with --epochs=4 and .* their temperatures differ"),
        ("val_fraction", 0.0, "there is no validation split: the run was made with --val_fraction"),
        ("seed", 1, "the val images of .* have changed"),
        ("recipe", "x", None),
        ("data", "folder:as/named/elsewhere", None),
        ("data", "folder:/elsewhere", "was trained with --data=folder:/elsewhere"),
    ],
)
def test_the_temperature_of_a_run_of_other_flags_is_refused(
    trained_run, tmp_path, flag, value, message
):
    other = Run(shutil.copytree(trained_run.path, tmp_path / "other"))
    config = other.read_config()
    config["flags"][flag] = value
    other.config.write_text(json.dumps(config))
    expected = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
    with expected:
        find_temperature(str(other.path), trained_run)


def test_an_unknown_format_lists_the_formats(capsys):
    assert command("--run=x", "--format=caffe") == 2
    assert ", ".join(FORMATS) in capsys.readouterr().err


def test_an_existing_version_is_one_line(trained_run, capsys):
    assert command(f"--run={trained_run.path}", "--version=1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "this version exists already" in line
    assert not list(trained_run.export.glob(f"{TEMPORARY}*"))


def test_half_precision_has_a_bound_of_its_own():
    assert verification.bound(models.build("lenet5", (16, 16, 3), 3)) == verification.BOUND
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = models.build("lenet5", (16, 16, 3), 3)
    assert verification.bound(model) == verification.HALF_BOUND


def test_each_difference_has_its_own_limit(tmp_path):
    model = models.build("lenet5", (16, 16, 3), 3).deployable
    classifiers = {"same": model, "other": lambda images: np.asarray(model(images)) * 0.9}
    with pytest.raises(UserError, match=r"largest difference .* nan .* is 1, more than 0\.0001"):
        verification.verify(tmp_path, model, None, {"nan": lambda x: model(x) * np.nan})
    limits = {"other": {"mean_difference": 0.2}}
    verification.verify(tmp_path, model, None, classifiers, limits)
    first, second = verification.summary(tmp_path).splitlines()
    assert "same: on 32 images of random pixels probabilities within 0 of the model's" in first
    assert "other: " in second
    limits = {"other": {"mean_difference": 0.01}}
    with pytest.raises(UserError, match=r"mean difference .* other .*, more than 0\.01"):
        verification.verify(tmp_path, model, None, classifiers, limits)
