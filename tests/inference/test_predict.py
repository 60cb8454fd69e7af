"""The predict command: its formats, models and failures."""

import csv
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_cifar import predict
from keras_cifar.core import cli, environment
from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.data.images import load_image
from keras_cifar.inference import predictions
from keras_cifar.inference.predictor import Predictor
from keras_cifar.pretrained.predictor import NetworkPredictor
from tests.conftest import colour_images

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLASSES = ["class_0", "class_1", "class_2"]


def command(*argv) -> int:
    """The exit status of the command in this process."""
    argv = [str(argument) for argument in argv]
    return cli._execute("predict", predict.main, predict.PredictOptions, "IMAGE ...", argv)


@pytest.fixture
def rows(trained_run, capsys):
    """Runs the command with --format=json: (exit status, the parsed rows, stderr)."""

    def run(*argv, model=trained_run.path):
        status = command(f"--model={model}", "--format=json", *argv)
        captured = capsys.readouterr()
        return status, json.loads(captured.out), captured.err

    return run


@pytest.fixture
def failure(capsys):
    """Runs the command, which must fail before any output: (exit status, the line on stderr)."""

    def run(*argv):
        status = command(*argv)
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("predict: error: ")
        return status, line

    return run


@pytest.fixture
def images(tmp_path) -> list[pathlib.Path]:
    """Six images that the trained run tells apart, of another size than it takes."""
    pixels, labels = colour_images(6, 20, 3, seed=9)
    paths = [tmp_path / f"{i}_class_{label}.png" for i, label in enumerate(labels)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture
def export(trained_run, tmp_path) -> pathlib.Path:
    """A copy of the run's export base, with nothing of the run beside it."""
    return shutil.copytree(trained_run.path / "export", tmp_path / "elsewhere" / "m")


# ---- Formats


def test_json_has_an_object_a_file_in_the_order_given(rows, images, trained_run):
    given = [str(path) for path in reversed(images)]
    status, found, error = rows(*given, "--top_k=10")
    assert (status, error) == (0, "")
    assert [row["file"] for row in found] == given
    pixels = np.stack([load_image(path, (16, 16)) for path in given])
    expected = Predictor(str(trained_run.path)).classify(pixels)
    for row, probabilities in zip(found, expected, strict=True):
        assert list(row) == ["file", "top", "error"]
        assert row["error"] is None
        assert [list(choice) for choice in row["top"]] == [["label", "index", "probability"]] * 3
        indices = [choice["index"] for choice in row["top"]]
        assert indices == np.argsort(-probabilities, kind="stable").tolist()
        assert [choice["label"] for choice in row["top"]] == [CLASSES[i] for i in indices]
        found_probabilities = [choice["probability"] for choice in row["top"]]
        assert found_probabilities == pytest.approx(probabilities[indices], abs=1e-6)
    assert len(set(expected.argmax(1))) > 1


def test_csv_has_a_line_a_class_and_one_a_failure(rows, images, trained_run, capsys, tmp_path):
    missing = tmp_path / "a, b.png"
    _, found, _ = rows(*images, "--top_k=2")
    flags = f"--model={trained_run.path}", "--format=csv", "--top_k=2"
    assert command(*flags, *images, missing) == 1
    out = capsys.readouterr().out
    assert out.startswith("file,rank,label,index,probability,error\n")
    *lines, last = csv.reader(io.StringIO(out))
    assert lines[1:] == [
        [row["file"], str(rank), c["label"], str(c["index"]), str(c["probability"]), ""]
        for row in found
        for rank, c in enumerate(row["top"], 1)
    ]
    assert last == [str(missing), "", "", "", "", "no such file"]


def test_text_has_a_line_a_file(images, trained_run, capsys, tmp_path):
    missing = tmp_path / "none.png"
    assert command(f"--model={trained_run.path}", images[0], missing, images[1]) == 1
    captured = capsys.readouterr()
    first, second, third = captured.out.splitlines()
    assert first.startswith(f"{images[0]}: class_")
    assert first.count("%") == third.count("%") == 3
    assert second == f"{missing}: error: no such file"
    counts = "1 of 3 files could not be classified"
    assert captured.err == f"predict: {counts}, the first: {missing}: no such file\n"


NAMES = ("two\nlines", "\x1b[31mred", "a 'b' \"c\", d", " ", "日本語", "e\u0301", "\u2028")


@pytest.mark.parametrize("form", ["text", "csv", "json"])
def test_any_file_name_is_one_line_of_text_and_itself_in_csv_and_json(
    images, tmp_path, trained_run, monkeypatch, form
):
    folder = tmp_path / "names"
    folder.mkdir()
    for name in (*NAMES, os.fsdecode(b"caf\xe9")):  # the last is not UTF-8
        shutil.copy(images[0], folder / f"{name}.png")
        (folder / f"{name} bad.png").write_bytes(b"")
    # As strict as a real stdout; the captured one is not.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True))
    assert command(f"--model={trained_run.path}", f"--format={form}", "--top_k=1", folder) == 1
    written = os.fsdecode(sys.stdout.buffer.getvalue())
    names = sorted(str(path) for path in folder.iterdir())
    if form == "text":
        *lines, end = written.split("\n")
        assert (len(lines), end) == (len(names), "")
        assert all(line.isprintable() for line in lines if "caf" not in line)
    elif form == "csv":
        assert [x["file"] for x in csv.DictReader(io.StringIO(written, newline=""))] == names
    else:
        assert [row["file"] for row in json.loads(written)] == names


def test_bad_files_do_not_shift_the_predictions_of_others(rows, images, tmp_path):
    paths = images * (BATCH_SIZE // 6 + 2)  # more than a batch
    _, expected, _ = rows(*images)
    paths[3] = paths[BATCH_SIZE + 1] = tmp_path / "none.png"
    status, found, _ = rows(*paths)
    assert status == 1
    assert [row["file"] for row in found] == [str(path) for path in paths]
    for index, row in enumerate(found):
        assert (row["error"] is None) == (index not in (3, BATCH_SIZE + 1))
        for mine, alone in zip(row["top"], expected[index % 6]["top"], strict=False):
            assert mine == alone | {"probability": pytest.approx(alone["probability"], abs=1e-5)}


# ---- Unknown


@pytest.fixture
def some_unknown(rows, images) -> tuple[float, list[dict]]:
    """(the probability of the third of the six images, which three do not reach; their rows)."""
    _, found, _ = rows(*images)
    return sorted(row["top"][0]["probability"] for row in found)[3], found


def test_json_answers_unknown_below_min_probability(rows, images, some_unknown, tmp_path):
    threshold, expected = some_unknown
    missing = tmp_path / "none.png"
    status, found, error = rows(*images, missing, f"--min_probability={threshold}")
    assert status == 1
    summary = f"unknown   3 of 6 images, below --min_probability={threshold}"
    assert error.splitlines()[0] == summary
    assert found.pop() == {"file": str(missing), "top": [], "error": "no such file"}
    for row in expected:
        best = row["top"][0]
        if best["probability"] < threshold:
            best |= {"label": "unknown", "guess": best["label"]}
    assert found == expected
    assert [row["top"][0]["label"] for row in found].count("unknown") == 3


def test_csv_answers_unknown_below_min_probability(images, some_unknown, trained_run, capsys):
    threshold, expected = some_unknown
    flags = f"--model={trained_run.path}", "--format=csv", f"--min_probability={threshold}"
    assert command(*flags, *images) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(lines[0]) == ["file", "rank", "label", "index", "probability", "error"]
    for line in lines:
        top = expected[images.index(pathlib.Path(line["file"]))]["top"]
        choice = top[int(line["rank"]) - 1]
        below = line["rank"] == "1" and choice["probability"] < threshold
        assert line["label"] == ("unknown" if below else choice["label"])
        assert line["index"] == str(choice["index"])
        assert line["probability"] == str(choice["probability"])


def test_text_shows_the_guess_behind_unknown(images, some_unknown, trained_run, capsys):
    threshold, expected = some_unknown
    flags = f"--model={trained_run.path}", "--top_k=1", f"--min_probability={threshold}"
    assert command(*flags, *images) == 0
    for line, row in zip(capsys.readouterr().out.splitlines(), expected, strict=True):
        best = row["top"][0]
        answer = f"{best['label']} {best['probability']:.1%}"
        answer = f"unknown ({answer})" if best["probability"] < threshold else answer
        assert line == f"{row['file']}: {answer}"


def test_features_have_the_label_unknown(rows, images, some_unknown, tmp_path):
    out = tmp_path / "features.npz"
    _, found, _ = rows(*images, f"--min_probability={some_unknown[0]}", f"--features={out}")
    with np.load(out) as archive:
        assert archive["labels"].tolist() == [row["top"][0]["label"] for row in found]


def test_a_class_called_unknown_is_told_apart(rows, images, some_unknown, export):
    threshold, expected = some_unknown
    (export / "1" / "assets" / "labels.txt").write_text("unknown\nclass_1\nclass_2\n")
    _, found, _ = rows(*images, f"--min_probability={threshold}", model=export)
    for row, before in zip(found, expected, strict=True):
        best, guess = row["top"][0], before["top"][0]["label"].replace("class_0", "unknown")
        below = best["probability"] < threshold
        assert best.get("guess") == (guess if below else None)
        assert best["label"] == ("unknown" if below else guess)


# ---- Features


def test_features_are_written_for_the_good_files(rows, images, tmp_path, trained_run):
    out = tmp_path / "new" / "features.npz"
    bad = tmp_path / "none.png"
    status, found, error = rows(images[0], bad, *images[1:], f"--features={out}")
    assert status == 1
    assert str(out) in error
    with np.load(out) as archive:  # without pickles
        assert sorted(archive.files) == ["features", "files", "labels"]
        files, features, labels = (archive[name] for name in ("files", "features", "labels"))
    assert files.tolist() == [str(path) for path in images]
    assert labels.tolist() == [row["top"][0]["label"] for row in found if row["top"]]
    assert features.dtype == np.float32
    pixels = np.stack([load_image(path, (16, 16)) for path in images])
    expected = Predictor(str(trained_run.path)).features(pixels)
    np.testing.assert_allclose(features, expected, atol=1e-5, strict=True)
    assert len(np.unique(features, axis=0)) == 6


def test_features_are_written_though_nobody_reads_the_output(
    images, tmp_path, trained_run, monkeypatch
):
    def closed(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(predictions, "write", closed)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command(f"--model={trained_run.path}", "--features=~/new/f.npz", *images) == 1
    with np.load(tmp_path / "new" / "f.npz") as archive:
        assert len(archive["features"]) == len(images)


def test_features_of_no_file_are_empty_arrays_of_their_types(rows, tmp_path):
    out = tmp_path / "features.npz"
    status, found, error = rows(tmp_path / "a.png", tmp_path / "b.png", f"--features={out}")
    assert (status, [row["error"] for row in found]) == (1, ["no such file"] * 2)
    assert "2 of 2 files" in error
    with np.load(out) as archive:
        assert archive["files"].dtype.kind == archive["labels"].dtype.kind == "U"
        assert archive["files"].shape == archive["labels"].shape == (0,)
        assert archive["features"].dtype == np.float32
        assert archive["features"].ndim == 2


# ---- The model


def test_a_run_its_export_and_a_version_are_the_same_model(rows, images, export, monkeypatch):
    expected = rows(*images)
    monkeypatch.chdir(export.parent)  # The run and its data are elsewhere.
    for model in (export, "m", export / "1"):
        assert rows(*images, model=model) == expected
    for version in ("10", "9"):
        shutil.copytree(export / "1", export / version)
    assert Predictor(str(export)).path == export / "10"  # the newest


def test_any_number_of_images_is_computed_in_batches(trained_run, monkeypatch):
    pixels, _ = colour_images(2 * BATCH_SIZE + 1, 16, 3, seed=3)
    predictor, sizes, constant = Predictor(str(trained_run.path)), [], tf.constant
    monkeypatch.setattr(tf, "constant", lambda x: sizes.append(len(x)) or constant(x))
    for function, width in ((predictor.classify, 3), (predictor.features, 84)):
        sizes.clear()
        found = function(pixels)
        assert sizes == [BATCH_SIZE, BATCH_SIZE, 1]
        assert (found.shape, found.dtype) == ((len(pixels), width), np.float32)
        np.testing.assert_allclose(found[-5:], function(pixels[-5:]), atol=1e-6)
        assert function(pixels[:0]).shape == (0, width)


@pytest.mark.parametrize("policy", ["float32", "auto"])
def test_bfloat16_is_computed_where_it_is_wanted_and_faster(
    rows, images, rewriting, monkeypatch, policy
):
    rows(*images, f"--dtype_policy={policy}")
    expected = [{"auto_mixed_precision_onednn_bfloat16": True}] if policy == "auto" else []
    assert rewriting == expected
    monkeypatch.setattr(environment, "bfloat16_gain", lambda: 0.3)
    rows(*images, f"--dtype_policy={policy}")
    assert rewriting == expected


def test_depthwise_networks_are_computed_in_float32(rewriting):
    inputs = keras.Input((8, 8, 3), dtype="uint8", name="images")
    x = keras.layers.DepthwiseConv2D(3)(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.GlobalAveragePooling2D(name="features")(x)
    network = keras.Model(inputs, keras.layers.Dense(2, "softmax", name="logits")(x))
    predictor = NetworkPredictor(network, ("a", "b"), "stretch", "network")
    assert predictor.choose_precision("auto")[0] == "float32"
    assert not rewriting


def test_rewritten_graphs_predict_the_same(trained_run, tmp_path):
    """In a process of its own, as TensorFlow rewrites all graphs of a process."""
    code = """if True:
        import sys
        import numpy as np
        from keras_cifar.core import environment
        environment.configure()
        environment.import_tensorflow()
        environment.bfloat16_gain = lambda: 1.6
        from keras_cifar.inference.predictor import Predictor
        predictor = Predictor(sys.argv[1])
        assert predictor.choose_precision("auto")[0] == "bfloat16"
        np.save(sys.argv[3], predictor.classify(np.load(sys.argv[2])))
    """
    pixels, _ = colour_images(64, 16, 3, seed=5)
    np.save(tmp_path / "in.npy", pixels)
    paths = [str(tmp_path / name) for name in ("in.npy", "out.npy")]
    subprocess.run([sys.executable, "-c", code, str(trained_run.path), *paths], check=True)
    expected = Predictor(str(trained_run.path)).classify(pixels)
    np.testing.assert_allclose(np.load(paths[1]), expected, atol=0.05)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.png"], "--model=RUN_or_EXPORT_or_URL is needed"),
        (["--model=x"], "name at least one image"),
        (["--model=x", "a.png", "--top_k=0"], "--top_k=0 must be greater than 0"),
        *(
            (["--model=x", "a.png", f"--min_probability={p}"], "must be at least 0 and below 1")
            for p in ("1", "-0.1", "nan")
        ),
        (["--model=x", "a.png", "--timeout=0"], "--timeout=0.0 must be greater than 0"),
        (["--model=x", "a.png", "--format=xml"], "--format 'xml'; choose one of: csv, json, text"),
    ],
)
def test_wrong_usage_is_status_2(failure, argv, message):
    status, line = failure(*argv)
    assert status == 2
    assert message in line


def test_what_holds_no_model_is_status_1(failure, images, tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "other" / "1"))
    for name, message in (
        ("none", f"{tmp_path / 'none'} does not exist"),
        (".", "holds no SavedModel"),
        (images[0].name, "holds no SavedModel"),
        ("other", "is not a valid model"),
    ):
        status, line = failure(f"--model={tmp_path / name}", images[0])
        assert status == 1
        assert message in line


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def keep_one_label(path):
    path.write_text(path.read_text().partition("\n")[0] + "\n")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("saved_model.pb", lambda path: path.write_bytes(b"garbage" * 100)),
        ("saved_model.pb", halve),
        ("variables/variables.data-*", halve),
        ("variables/variables.data-*", pathlib.Path.unlink),
        ("variables/variables.index", pathlib.Path.unlink),
        ("assets/labels.txt", pathlib.Path.unlink),
        ("assets/labels.txt", keep_one_label),
    ],
    ids=["garbage", "graph", "variables", "no variables", "no index", "no labels", "few labels"],
)
def test_a_damaged_model_is_one_line_and_status_1(export, images, capfd, name, damage):
    (path,) = (export / "1").glob(name)
    damage(path)
    assert command(f"--model={export}", images[0]) == 1
    captured = capfd.readouterr()  # including what TensorFlow itself writes
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"predict: error: {export / '1'} is not a valid model: ")
    assert not line.endswith(": ")


def test_the_script_runs_anywhere_and_imports_only_what_it_needs(export, images, tmp_path):
    # The script itself, from another directory, where importing Keras fails.
    code = """
import atexit, runpy, sys
sys.modules["keras"] = None
heavy = ("sklearn", "matplotlib", "pandas", "tensorflow_datasets", "tensorboard")
atexit.register(lambda: print([name for name in heavy if name in sys.modules], file=sys.stderr))
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
    bad = tmp_path / "bad.png"
    bad.write_text("x")
    ours = ("PYTHONPATH", "TF_USE_LEGACY_KERAS")
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / "scripts" / "predict.py", "--model", "m", bad, *images],
        capture_output=True,
        text=True,
        cwd=export.parent,
        env={name: value for name, value in os.environ.items() if name not in ours},
    )
    assert done.returncode == 1, done.stderr
    files = [line.partition(": ")[0] for line in done.stdout.splitlines()]
    assert files == [str(path) for path in (bad, *images)]
    failure, imported = done.stderr.splitlines()
    assert failure.startswith("predict: 1 of 7 files could not be classified")
    assert imported == "[]"
