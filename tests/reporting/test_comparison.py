"""Runs side by side: the table, the flags that differ, the image, and invalid runs."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_cifar import compare
from keras_cifar.core import cli
from keras_cifar.core.errors import UserError
from keras_cifar.core.files import write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.reporting import comparison
from tests.reporting import reports

# Epochs of (val_accuracy, seconds, images a second).
SLOW = [(0.2, 10.0, 100.0), (0.4, 20.0, 300.0), (0.6, 30.0, 200.0)]
FAST = [(0.5, 1.0, 900.0), (0.7, 1.0, 1000.0)]


def write(path, epochs=SLOW, accuracy=0.5, interval=None, validated=True, **flags):
    """A run directory with what a comparison reads."""
    run = reports.write_run(path, ["a", "b"], flags, epochs=0, parameter_count=12345)
    header = "epoch,loss,accuracy,val_accuracy,seconds,images_per_second"
    rows = [f"{i},1.0,{a / 2},{a},{s},{v}" for i, (a, s, v) in enumerate(epochs, start=1)]
    text = "\n".join([header, *rows]) + "\n"
    run.history.write_text(text if validated else text.replace("val_accuracy", "other"))
    if accuracy is not None:
        metrics = {"accuracy": accuracy, "data": flags.get("data", "digits"), "fingerprint": "b"}
        metrics |= {"intervals": {"accuracy": interval}} if interval else {}
        write_json(run.evaluation("test"), metrics)
    return str(path)


@pytest.fixture
def command(capsys):
    """Runs the command: (exit status, lines on stdout, stderr)."""

    def run(*argv):
        argv = [str(argument) for argument in argv]
        options = compare.CompareOptions
        status = cli._execute("compare", compare.main, options, "RUN ...", argv, tensorflow=False)
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return run


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell]


def test_the_table_has_accuracy_time_and_speed(tmp_path, command):
    a = write(tmp_path / "a", accuracy=0.8125, interval=[0.80, 0.82])
    b = write(tmp_path / "b", FAST, accuracy=None)
    status, lines, _ = command(a, b)
    assert status == 0
    found = list(map(cells, lines))
    assert ", ".join(found[0]) == "run, test accuracy, error, time, images/s, epochs, parameters"
    assert found[1] == [a, "0.8125", "[0.8000, 0.8200]", "18.75%", "60.0 s", "200", "3", "12,345"]
    assert found[2] == [b, "not tested", "2.0 s", "950", "2", "12,345"]
    assert len(lines) == 3  # and no table of flags, as none differs


def test_flags_that_decide_and_differ_are_shown(tmp_path, command):
    a = write(tmp_path / "a", epochs=SLOW, learning_rate=0.5, model="lenet5", run_dir="x")
    b = write(tmp_path / "b", learning_rate=0.25, model="lenet5", recipe="he_resnet20")
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    del config["flags"]["ema"]  # A flag that is newer than the run is no difference.
    path.write_text(json.dumps(config))
    _, lines, _ = command(a, b)
    shown = [line.split() for line in lines[lines.index("") + 1 :]]
    assert shown == [["flag", a, b], ["--learning_rate", "0.5", "0.25"]]


def test_metrics_of_other_images_are_left_out(tmp_path, command):
    path = Run(write(tmp_path / "a")).evaluation("test")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "folder:moved"}))
    assert "not tested" not in command(tmp_path / "a")[1][1]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "another"}))
    assert "not tested" in command(tmp_path / "a")[1][1]


def test_seeds_count_as_one_run(tmp_path, command):
    several = tmp_path / "several"
    for seed, accuracy in enumerate((0.5, 0.7, None)):
        write(several / f"seed_{seed}", FAST if seed else SLOW, accuracy, seed=seed)
    alone = write(tmp_path / "alone", seed=7)
    _, lines, _ = command(several, alone)
    found = cells(lines[1])
    # The standard deviation is that of a sample; time and epochs are means of a run.
    assert found[1:5] == ["0.6000", "± 0.1414, 2 of 3 seeds", "40.00%", "21.3 s"]
    assert found[6] == "2.3"
    assert lines[-1].split() == ["--seed", "-", "7"]


def test_curves_have_the_epochs_that_all_seeds_have(tmp_path):
    for seed, epochs in enumerate((SLOW, FAST)):
        write(tmp_path / f"seed_{seed}", epochs)
    what, values, seconds = comparison.load(str(tmp_path)).curve()
    assert what == "validation"
    np.testing.assert_allclose(values, [[0.2, 0.4], [0.5, 0.7]])
    np.testing.assert_allclose(seconds, [[10, 30], [1, 2]])
    what, values, _ = comparison.load(write(tmp_path / "a", validated=False)).curve()
    assert what == "train"
    np.testing.assert_allclose(values, [[0.1, 0.2, 0.3]])


def test_the_image_shows_each_run_and_the_band_of_seeds(tmp_path, command):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", FAST)
    for seed, epochs in enumerate((SLOW, [(x + 0.2, s, v) for x, s, v in SLOW])):
        write(tmp_path / "several" / f"seed_{seed}", epochs)

    def drawn(*runs):
        out = tmp_path / "out.png"
        status, lines, _ = command(*runs, f"--out={out}")
        assert (status, lines[-1]) == (0, f"image     {out}")
        with Image.open(out) as image:
            return np.asarray(image.convert("RGB")).astype(int)

    one, two, band = drawn(a), drawn(a, b), drawn(tmp_path / "several")
    assert one.shape == two.shape
    assert (one != two).any()
    # The light blue of the band is in no other.
    light = [(np.abs(x - (199, 219, 250)).max(axis=-1) < 6).sum() for x in (one, band)]
    assert light[1] > 1000 > light[0]


def test_a_run_without_an_epoch_is_in_the_table_and_not_in_the_image(tmp_path, command):
    a, b = write(tmp_path / "a", [], accuracy=None), write(tmp_path / "b")
    assert command(a, b, "--out", tmp_path / "x.png")[0] == 0
    status, _, error = command(a, "--out", tmp_path / "y.png")
    assert (status, "no run has completed an epoch" in error) == (1, True)
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        ([], 2, "name at least one run"),
        (["RUN", "--out=x.txt"], 2, "--out=x.txt must end with .png"),
        (["/nowhere"], 1, "run directory /nowhere does not exist"),
    ],
)
def test_wrong_usage_is_one_line(command, argv, status, words):
    found, _, error = command(*argv)
    assert found == status
    assert error.count("\n") == 1
    assert words in error


def test_no_run_and_damaged_files_are_errors(tmp_path):
    with pytest.raises(UserError, match="is not a run directory: it has neither"):
        comparison.load(str(tmp_path))
    run = Run(write(tmp_path / "a"))
    whole = run.history.read_text()
    damages = (whole.replace("30.0", "?"), whole.replace("seconds", "x"), "epoch\n1,2\n")
    found = [(run.history, damage) for damage in damages]
    found += [(run.evaluation("test"), damage) for damage in ("", "[]", '{"accuracy": "much"}')]
    for path, damage in found:
        whole = path.read_text()
        path.write_text(damage)
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            comparison.load(str(run.path))
        path.write_text(whole)


def test_real_run_is_read(trained_run, command):
    accuracy = json.loads(trained_run.evaluation("test").read_text())["accuracy"]
    assert f"{accuracy:.4f}" in command(trained_run.path)[1][1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(119.94, "119.9 s"), (120, "2.0 min"), (7200, "2.0 h"), (90000, "25.0 h")]
)
def test_durations(seconds, text):
    assert comparison.duration(seconds) == text
