"""The predict command: what goes in, what comes out, and how it fails."""

import concurrent.futures
import csv
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_cifar import predict
from keras_cifar.core import cli
from keras_cifar.core.config import BATCH_SIZE
from keras_cifar.data.images import ImageError, load_image
from keras_cifar.inference.predictor import Predictor
from tests.commands import hostile
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
def pictures(tmp_path) -> list[pathlib.Path]:
    """Six pictures that the trained run tells apart, of other sizes than it takes."""
    images, labels = colour_images(6, 20, 3, seed=9)
    paths = [tmp_path / f"{i}_class_{label}.png" for i, label in enumerate(labels)]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture
def export(trained_run, tmp_path) -> pathlib.Path:
    """A copy of the run's export base, with nothing of the run beside it."""
    return shutil.copytree(trained_run.path / "export", tmp_path / "elsewhere" / "m")


# ---- Formats


def test_json_has_an_object_a_file_in_the_order_given(rows, pictures):
    given = [str(path) for path in reversed(pictures)]
    status, answer, error = rows(*given)
    assert status == 0
    assert error == ""
    assert [row["file"] for row in answer] == given
    for row in answer:
        assert list(row) == ["file", "top", "error"]
        assert row["error"] is None
        assert len(row["top"]) == 3
        for choice in row["top"]:
            assert list(choice) == ["label", "index", "probability"]
            assert CLASSES[choice["index"]] == choice["label"]


def test_the_most_probable_class_comes_first(rows, pictures):
    _, answer, _ = rows(*pictures, "--top_k=10")
    for row in answer:
        probabilities = [choice["probability"] for choice in row["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert sorted(choice["label"] for choice in row["top"]) == CLASSES


def test_answers_are_the_models(rows, pictures, trained_run):
    _, answer, _ = rows(*pictures)
    images = np.stack([load_image(path, (16, 16)) for path in pictures])
    expected = Predictor(str(trained_run.path)).classify(images)
    for row, probabilities in zip(answer, expected, strict=True):
        for choice in row["top"]:
            assert choice["probability"] == pytest.approx(probabilities[choice["index"]], abs=1e-6)
    assert [row["top"][0]["index"] for row in answer] == expected.argmax(1).tolist()


def test_training_pictures_are_recognised(rows, image_folder):
    _, answer, _ = rows(image_folder / "train")
    right = [row["top"][0]["label"] == pathlib.Path(row["file"]).parent.name for row in answer]
    assert len(right) == 96
    assert np.mean(right) > 0.6


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (2, 2), (3, 3), (1000, 3)])
def test_top_k_is_the_number_of_classes_named(rows, pictures, top_k, count):
    _, answer, _ = rows(pictures[0], f"--top_k={top_k}")
    assert len(answer[0]["top"]) == count


def test_csv_has_a_line_a_class_and_one_a_failure(pictures, trained_run, capsys, tmp_path):
    missing = tmp_path / "a, b.png"
    status = command(
        f"--model={trained_run.path}", "--format=csv", "--top_k=2", pictures[0], missing
    )
    assert status == 1
    out = capsys.readouterr().out
    assert out.startswith("file,rank,label,index,probability,error\n")
    lines = list(csv.DictReader(io.StringIO(out)))
    assert [line["file"] for line in lines] == [str(pictures[0])] * 2 + [str(missing)]
    assert [line["rank"] for line in lines] == ["1", "2", ""]
    assert [line["error"] for line in lines] == ["", "", "no such file"]
    assert float(lines[0]["probability"]) >= float(lines[1]["probability"]) > 0
    assert lines[0]["label"] == CLASSES[int(lines[0]["index"])]
    assert not any(lines[2][name] for name in ("rank", "label", "index", "probability"))


def test_csv_and_json_say_the_same(rows, pictures, trained_run, capsys):
    _, answer, _ = rows(*pictures)
    command(f"--model={trained_run.path}", "--format=csv", *pictures)
    lines = csv.DictReader(io.StringIO(capsys.readouterr().out))
    expected = [
        (row["file"], c["label"], c["index"], c["probability"])
        for row in answer
        for c in row["top"]
    ]
    got = [(x["file"], x["label"], int(x["index"]), float(x["probability"])) for x in lines]
    assert got == expected


def test_text_has_a_line_a_file(pictures, trained_run, capsys, tmp_path):
    missing = tmp_path / "none.png"
    assert command(f"--model={trained_run.path}", pictures[0], missing) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{pictures[0]}: class_")
    assert first.count("%") == 3
    assert second == f"{missing}: error: no such file"


@pytest.mark.parametrize("form", ["text", "csv", "json"])
def test_a_name_that_is_not_utf_8_stops_nothing(pictures, trained_run, monkeypatch, form):
    name = os.fsencode(pictures[0].parent) + b"/caf\xe9.png"
    try:
        shutil.copy(pictures[0], name)
    except OSError:
        pytest.skip("this file system refuses such names")
    # As strict as a real stdout; the captured one is not.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True))
    status = command(f"--model={trained_run.path}", f"--format={form}", os.fsdecode(name))
    assert status == 0
    assert b"class_" in sys.stdout.buffer.getvalue()


NAMES = ("two\nlines", "\x1b[31mred", "a 'b' \"c\", d", " ", "日本語", "e\u0301", "\u2028")


def test_any_name_is_one_line_of_text_and_itself_in_csv_and_json(
    rows, pictures, tmp_path, trained_run, capsys, monkeypatch
):
    folder = tmp_path / "names"
    folder.mkdir()
    for name in (*NAMES, os.fsdecode(b"caf\xe9")):
        shutil.copy(pictures[0], folder / f"{name}.png")
        (folder / f"{name} bad.png").write_bytes(b"")
    names = sorted(str(path) for path in folder.iterdir())
    status, answer, error = rows(folder)
    assert status == 1
    assert [row["file"] for row in answer] == names
    assert len(error.splitlines()) == 1
    assert command(f"--model={trained_run.path}", folder) == 1
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert len(lines) == len(names)
    assert all(line.isprintable() for line in lines)
    # The bytes of a name as they are, which the captured stdout would not take.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True))
    assert command(f"--model={trained_run.path}", "--format=csv", "--top_k=1", folder) == 1
    written = os.fsdecode(sys.stdout.buffer.getvalue())
    table = csv.DictReader(io.StringIO(written, newline=""))
    assert [line["file"] for line in table] == names


# ---- Files in


def test_a_folder_stands_for_its_pictures_sorted(rows, tmp_path):
    for name in ("b.png", "a.PNG", "sub/deep/c.jpg", "sub/a.bmp", "notes.txt", "sub/x.csv"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".txt", ".csv"):
            path.write_text("x")
        else:
            Image.new("RGB", (5, 5)).save(path)
    status, answer, _ = rows(tmp_path / "folder")
    names = [os.path.relpath(row["file"], tmp_path / "folder") for row in answer]
    assert names == ["a.PNG", "b.png", "sub/a.bmp", "sub/deep/c.jpg"]
    assert status == 0


def test_what_is_hidden_or_a_folder_is_no_picture_of_a_folder(rows, pictures, tmp_path):
    (tmp_path / "._0_class_0.png").write_bytes(b"\x00\x05\x16\x07")  # macOS writes such files
    (tmp_path / "album.jpg").mkdir()
    status, answer, _ = rows(tmp_path)
    assert [row["file"] for row in answer] == [str(path) for path in pictures]
    assert status == 0


def test_a_pattern_stands_for_what_it_matches_sorted(rows, pictures, tmp_path):
    _, answer, _ = rows(tmp_path / "*_class_1.png", tmp_path / "[0]*.png")
    assert [row["file"] for row in answer] == [str(pictures[i]) for i in (1, 4, 0)]


def test_a_pattern_may_cross_folders(rows, image_folder):
    _, answer, _ = rows(image_folder / "**" / "00[01].png")
    assert len(answer) == 4


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(rows, pictures, tmp_path):
    odd = tmp_path / "x[1]*.png"
    shutil.copy(pictures[0], odd)
    status, answer, _ = rows(odd)
    assert status == 0
    assert [(row["file"], len(row["top"])) for row in answer] == [(str(odd), 3)]


def test_a_file_is_taken_whatever_it_is_called(rows, pictures, tmp_path):
    shutil.copy(pictures[0], tmp_path / "picture.dat")
    status, answer, _ = rows(tmp_path / "picture.dat")
    assert status == 0
    assert len(answer[0]["top"]) == 3


def missing(path):
    return path / "none.png", "no such file"


def empty_folder(path):
    (path / "empty").mkdir()
    return path / "empty", "the folder has no pictures"


def pattern_without_match(path):
    return path / "none*.png", "nothing matches this pattern"


def dangling_link(path):
    (path / "link.png").symlink_to("nowhere")
    return path / "link.png", "no such file"


def text_file(path):
    (path / "text.png").write_text("x")
    return path / "text.png", "not an image in a format that can be read"


def empty_file(path):
    (path / "empty.jpg").write_bytes(b"")
    return path / "empty.jpg", "the file is empty"


def truncated(path):
    Image.fromarray(colour_images(1, 64, 3)[0][0]).save(path / "cut.jpg")
    (path / "cut.jpg").write_bytes((path / "cut.jpg").read_bytes()[:-200])
    return path / "cut.jpg", "truncated"


def name_too_long(path):
    return path / ("x" * 300 + ".png"), "name too long"


def pipe(path):
    os.mkfifo(path / "pipe.png")
    return path / "pipe.png", "it is a pipe or a device"


def device(path):
    return pathlib.Path("/dev/zero"), "it is a pipe or a device"


def circle(path):
    (path / "circle.png").symlink_to("circle.png")
    return path / "circle.png", "no such file"


def bomb(path):
    (path / "bomb.png").write_bytes(hostile.png(40_000, 40_000))
    return path / "bomb.png", "the image has more than 178,956,970 pixels"


def postscript(path):
    (path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    return path / "a.png", "not an image in a format that can be read"


BAD = (
    pipe,
    device,
    circle,
    bomb,
    postscript,
    missing,
    empty_folder,
    pattern_without_match,
    dangling_link,
    text_file,
    empty_file,
    truncated,
    name_too_long,
)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_gets_its_reason_and_the_others_go_on(rows, pictures, tmp_path, bad):
    path, why = bad(tmp_path)
    status, answer, error = rows(pictures[0], path, pictures[1])
    assert status == 1
    assert [row["file"] for row in answer] == [str(p) for p in (pictures[0], path, pictures[1])]
    assert why in answer[1]["error"]
    assert answer[1]["top"] == []
    assert [bool(row["top"]) for row in answer] == [True, False, True]
    (line,) = error.splitlines()
    assert line.startswith(f"predict: 1 of 3 files could not be classified, the first: {path}: ")
    assert line.endswith(answer[1]["error"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_locked_folder_stops_no_other_file(rows, pictures, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    try:
        status, answer, _ = rows(locked / "a.png", locked, pictures[0])
    finally:
        locked.chmod(0o755)
    assert status == 1
    assert [bool(row["error"]) for row in answer] == [True, True, False]


def test_a_folder_that_the_system_refuses_is_named(rows, pictures, tmp_path, monkeypatch):
    locked, scandir = tmp_path / "pictures" / "locked", os.scandir
    locked.mkdir(parents=True)
    shutil.copy(pictures[0], tmp_path / "pictures")

    def refuse(path):
        if pathlib.Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, answer, _ = rows(tmp_path / "pictures")
    assert status == 1
    assert [row["error"] for row in answer] == [None, "Permission denied"]
    assert answer[1]["file"] == str(locked)


def test_links_in_a_folder_lead_nowhere_else(rows, pictures, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(pictures[0], folder / "a.png")
    (folder / "up").symlink_to("..")
    (folder / "self").symlink_to(".")
    status, answer, _ = rows(folder)
    assert status == 0
    assert [row["file"] for row in answer] == [str(folder / "a.png")]


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_files_are_found_soon(tmp_path, count):
    for index in range(count):
        os.close(os.open(f"{tmp_path}/{index:06}.png", os.O_CREAT))
    start = time.monotonic()
    tracemalloc.start()
    files = sum(1 for _ in predict.find_files([str(tmp_path)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert files == count
    assert time.monotonic() - start < 10
    assert peak < 1500 * count


def test_when_every_file_is_bad_there_are_only_reasons(rows, tmp_path):
    status, answer, error = rows(tmp_path / "a.png", tmp_path / "b.png")
    assert status == 1
    assert [row["error"] for row in answer] == ["no such file"] * 2
    assert "2 of 2 files" in error


def test_more_pictures_than_a_batch_agree_with_single_ones(rows, tmp_path):
    images, _ = colour_images(predict.BATCH_SIZE + 7, 16, 3, seed=5)
    paths = [tmp_path / f"{i:03}.png" for i in range(len(images))]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels).save(path)
    paths[3].write_text("bad")  # must shift no other's answer
    status, answer, _ = rows(tmp_path)
    assert status == 1
    assert [row["file"] for row in answer] == [str(path) for path in paths]
    for index in (0, 2, 4, *range(predict.BATCH_SIZE - 1, predict.BATCH_SIZE + 2), len(paths) - 1):
        _, (single,), _ = rows(paths[index])
        assert {c["label"]: c["probability"] for c in single["top"]} == pytest.approx(
            {c["label"]: c["probability"] for c in answer[index]["top"]}, abs=1e-5
        )


# ---- Decoding beside classifying

PATIENCE = 30  # seconds until what should happen counts as not happening


class Watch:
    """Stands in for `load_image`: pictures are their numbers, and who reads when is known."""

    def __init__(self, monkeypatch, threads: int = 2):
        self.lock, self.read, self.released = threading.Lock(), [], threading.Event()
        self.released.set()
        self.broken = {}
        monkeypatch.setattr("keras_cifar.data.images.load_image", self.load)
        monkeypatch.setattr(predict, "BATCH_SIZE", 4)
        monkeypatch.setattr(predict, "THREADS", threads)

    def load(self, name, size):
        assert self.released.wait(PATIENCE)
        with self.lock:
            self.read.append(int(name))
        if name in self.broken:
            raise self.broken[name]
        return np.full((*size, 3), int(name) % 256, np.uint8)

    def until(self, count: int):
        """Waits until `count` pictures were read; whether that happened."""
        end = time.monotonic() + PATIENCE
        while len(self.read) < count and time.monotonic() < end:
            time.sleep(0.001)
        return len(self.read) >= count


def names(count: int):
    return ((str(i), None) for i in range(count))


@pytest.fixture(params=[1, 2, 5])
def watch(request, monkeypatch) -> Watch:
    return Watch(monkeypatch, request.param)


def test_the_next_batch_is_decoded_while_one_is_classified(watch):
    batches = predict._batches(names(12), (2, 2))
    next(batches)
    # The caller is classifying the first four now: it asks for nothing.
    assert watch.until(8)
    next(batches)
    assert watch.until(12)


def test_a_batch_is_classified_while_the_next_is_not_decoded_yet(watch):
    batches = predict._batches(names(12), (2, 2))
    next(batches)
    assert watch.until(8)
    watch.released.clear()
    assert [name for name, _, _ in next(batches)] == ["4", "5", "6", "7"]
    watch.released.set()
    assert len(list(batches)) == 1


def test_pictures_keep_their_order_whoever_reads_them(watch):
    batches = list(predict._batches(names(1001), (2, 2)))
    assert [len(batch) for batch in batches] == [4] * 250 + [1]
    done = [item for batch in batches for item in batch]
    assert [name for name, _, _ in done] == [str(i) for i in range(1001)]
    assert all((pixels == int(name) % 256).all() for name, pixels, _ in done)
    assert sorted(watch.read) == list(range(1001))


def test_errors_between_pictures_stay_where_they_are(watch):
    watch.broken = {"5": ImageError("torn")}
    given = [("0", None), ("x", "no such file"), *((str(i), None) for i in range(2, 10))]
    done = [item for batch in predict._batches(iter(given), (2, 2)) for item in batch]
    assert [(name, error) for name, _, error in done if error] == [
        ("x", "no such file"),
        ("5", "torn"),
    ]
    assert [pixels is None for _, pixels, _ in done] == [i in (1, 5) for i in range(10)]
    assert 1 not in watch.read


def test_only_so_many_pictures_are_held(watch):
    # At most the batch that the caller has and those that are decoded ahead of it.
    bound = predict.BATCH_SIZE * (1 + predict.AHEAD)
    handed = 0
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield str(i), None

    batches = predict._batches(endless(), (2, 2))
    for _ in range(50):
        handed += len(next(batches))
        before = handed - predict.BATCH_SIZE
        assert watch.until(handed + predict.BATCH_SIZE)
        assert len(watch.read) <= before + bound
        assert len(taken) <= before + bound
    batches.close()


def test_a_bug_in_decoding_is_not_hidden(watch):
    watch.broken = {"6": ZeroDivisionError("bug")}
    batches = predict._batches(names(100), (2, 2))
    next(batches)
    with pytest.raises(ZeroDivisionError, match="bug"):
        list(batches)
    assert len(watch.read) < 100


def test_who_stops_early_waits_for_no_more_than_what_is_being_read(monkeypatch):
    watch = Watch(monkeypatch, threads=2)
    shutdown = concurrent.futures.ThreadPoolExecutor.shutdown

    def release(pool, *args, **kwargs):
        watch.released.set()
        shutdown(pool, *args, **kwargs)

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "shutdown", release)
    batches = predict._batches(names(100), (2, 2))
    next(batches)
    assert watch.until(8)
    watch.released.clear()
    next(batches)  # Two of the next four are being read, or soon will be.
    batches.close()
    assert len(watch.read) <= 10


def test_no_files_are_no_batches(watch):
    assert list(predict._batches(names(0), (2, 2))) == []


# ---- Features


def test_features_are_written_for_the_good_files(rows, pictures, tmp_path, trained_run):
    out = tmp_path / "new" / "features.npz"
    bad = tmp_path / "none.png"
    status, answer, error = rows(pictures[0], bad, *pictures[1:], f"--features={out}")
    assert status == 1
    assert str(out) in error
    with np.load(out) as archive:  # without pickles
        assert sorted(archive.files) == ["features", "files", "labels"]
        files, features, labels = (archive[name] for name in ("files", "features", "labels"))
    assert files.tolist() == [str(path) for path in pictures]
    assert labels.tolist() == [row["top"][0]["label"] for row in answer if row["top"]]
    assert features.dtype == np.float32
    images = np.stack([load_image(path, (16, 16)) for path in pictures])
    expected = Predictor(str(trained_run.path)).features(images)
    assert features.shape == expected.shape
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert len(np.unique(features, axis=0)) == 6


def test_features_of_no_file_are_empty_arrays_of_their_types(rows, tmp_path):
    out = tmp_path / "features.npz"
    rows(tmp_path / "none.png", f"--features={out}")
    with np.load(out) as archive:
        assert archive["files"].dtype.kind == archive["labels"].dtype.kind == "U"
        assert archive["files"].shape == archive["labels"].shape == (0,)
        assert archive["features"].dtype == np.float32
        assert archive["features"].ndim == 2
        assert len(archive["features"]) == 0


# ---- The model


@pytest.mark.parametrize("below", [".", "export", "export/1"])
def test_a_run_its_export_and_a_version_are_the_same_model(rows, pictures, trained_run, below):
    expected = rows(*pictures)
    assert rows(*pictures, model=trained_run.path / below) == expected


def test_the_newest_version_is_taken(export):
    shutil.copytree(export / "1", export / "10")
    shutil.copytree(export / "1", export / "9")
    assert Predictor(str(export)).path == export / "10"


def test_an_export_works_when_the_run_and_the_data_are_gone(rows, pictures, export, monkeypatch):
    expected = rows(*pictures)
    monkeypatch.chdir(export.parent)
    for model in (export, "m", export / "1"):
        assert rows(*pictures, model=model) == expected


def test_the_model_knows_its_size_and_classes(export):
    predictor = Predictor(str(export))
    assert predictor.size == (16, 16)
    assert predictor.class_names == tuple(CLASSES)
    probabilities = predictor.classify(np.zeros((2, 16, 16, 3), np.uint8))
    assert probabilities.shape == (2, 3)
    assert probabilities.dtype == np.float32


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a.png"], "--model=RUN_or_EXPORT_or_URL is needed"),
        (["--model=x"], "name at least one picture"),
        (["--model=x", "a.png", "--top_k=0"], "--top_k=0 must be greater than 0"),
        (["--model=x", "a.png", "--top_k=two"], "top_k"),
        (["--model=x", "a.png", "--format=xml"], "--format 'xml'; choose one of: csv, json, text"),
        (["--model=x", "a.png", "--nothing"], "nothing"),
    ],
)
def test_wrong_usage_is_status_2(failure, argv, words):
    status, line = failure(*argv)
    assert status == 2
    assert words in line


def test_a_model_that_does_not_exist_is_status_1(failure, tmp_path):
    status, line = failure(f"--model={tmp_path / 'none'}", "a.png")
    assert status == 1
    assert f"{tmp_path / 'none'} does not exist" in line


@pytest.mark.parametrize("name", [".", "a.png"])
def test_what_holds_no_model_is_status_1(failure, pictures, tmp_path, name):
    (tmp_path / "a.png").write_text("")
    status, line = failure(f"--model={tmp_path / name}", pictures[0])
    assert status == 1
    assert "holds no SavedModel" in line


def test_a_model_of_another_program_is_status_1(failure, pictures, tmp_path):
    import tensorflow as tf

    tf.saved_model.save(tf.Module(), str(tmp_path / "other" / "1"))
    status, line = failure(f"--model={tmp_path / 'other'}", pictures[0])
    assert status == 1
    assert "is not a model that can be used" in line


def cut(name):
    def damage(version):
        (path,) = version.glob(name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def remove(name):
    def damage(version):
        (path,) = version.glob(name)
        path.unlink()

    return damage


def garbage(version):
    (version / "saved_model.pb").write_bytes(b"garbage" * 100)


def drop_a_class(version):
    labels = version / "assets" / "labels.txt"
    labels.write_text(labels.read_text().partition("\n")[0] + "\n")


@pytest.mark.parametrize(
    "damage",
    [
        garbage,
        cut("saved_model.pb"),
        cut("variables/variables.data-*"),
        remove("variables/variables.data-*"),
        remove("variables/variables.index"),
        remove("assets/labels.txt"),
        drop_a_class,
    ],
    ids=["garbage", "graph", "variables", "no variables", "no index", "no labels", "few labels"],
)
def test_a_damaged_model_is_one_line_and_status_1(export, pictures, capfd, damage):
    damage(export / "1")
    assert command(f"--model={export}", pictures[0]) == 1
    captured = capfd.readouterr()  # what TensorFlow itself writes included
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"predict: error: {export / '1'} is not a model that can be used: ")
    assert not line.endswith(": ")


# ---- As a program


def test_the_script_needs_no_keras_and_no_run(export, pictures, tmp_path):
    # The script itself, from another directory, where importing Keras fails.
    code = """
import runpy, sys
sys.modules["keras"] = None
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
    script = ROOT / "scripts" / "predict.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, script, "--model", export, "--format", "json", *pictures],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert [row["file"] for row in json.loads(done.stdout)] == [str(path) for path in pictures]
    assert done.stderr == ""


def test_the_script_runs_from_another_directory(export, pictures, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("x")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "predict.py", "--model", "m", bad, pictures[0]],
        capture_output=True,
        text=True,
        cwd=export.parent,
    )
    assert done.returncode == 1
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == [
        str(bad),
        str(pictures[0]),
    ]
    assert len(done.stderr.splitlines()) == 1


def test_the_program_imports_only_what_it_needs(export, pictures, tmp_path):
    code = """
import atexit, runpy, sys
heavy = ("keras", "sklearn", "matplotlib", "pandas", "tensorflow_datasets", "tensorboard")
atexit.register(lambda: print("imported", [name for name in heavy if name in sys.modules]))
sys.argv[0] = "predict"
runpy.run_module("keras_cifar.predict", run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", export, pictures[0]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["imported []"]


def test_classify_takes_any_number_of_images(trained_run):
    images, _ = colour_images(BATCH_SIZE + 3, 16, 3, seed=3)
    predictor = Predictor(str(trained_run.path))
    for function in (predictor.classify, predictor.features):
        every = function(images)
        assert len(every) == len(images)
        np.testing.assert_allclose(every[-5:], function(images[-5:]), atol=1e-6)
        assert len(function(images[:0])) == 0


def test_classify_works_in_batches(trained_run, monkeypatch):
    predictor, sizes, constant = Predictor(str(trained_run.path)), [], tf.constant
    monkeypatch.setattr(tf, "constant", lambda x: sizes.append(len(x)) or constant(x))
    predictor.classify(np.zeros((2 * BATCH_SIZE + 1, 16, 16, 3), np.uint8))
    assert sizes == [BATCH_SIZE, BATCH_SIZE, 1]
