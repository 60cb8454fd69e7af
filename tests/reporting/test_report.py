"""The report says what the run directory says, of any run, and nothing in a run becomes markup."""

import html.parser
import json
import re
import shlex
import shutil
import types

import numpy as np
import pytest
import sklearn.metrics

from keras_cifar import report
from keras_cifar.core import cli
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.files import write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation.evaluator import load_data, predict
from keras_cifar.models import load as load_model
from keras_cifar.reporting import gallery, page, record
from keras_cifar.reporting.page import Gallery
from keras_cifar.training import trainer
from tests.reporting import reports

NAMES = ("ape", "bee", "cow")
SECTIONS = (
    *("training", "curves", "figures", "classes", "confusion", "mistakes", "calibration"),
    *("disturbances", "again"),
)


def command(*argv) -> int:
    return cli._execute("report", report.main, report.ReportOptions, "RUN", [str(a) for a in argv])


def render(*runs: Run) -> str:
    records = record.load_all(list(runs))
    return page.render(records, [Gallery("no pictures here")] * len(records))


class Document(html.parser.HTMLParser):
    """The elements of a page by name, with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text, self._open = {}, "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.setdefault(tag, []).append(dict(attributes))
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.setdefault(tag, []).append(dict(attributes))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag  # each is closed where it was opened

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text += data + " "

    @property
    def ids(self) -> set:
        return {a["id"] for found in self.elements.values() for a in found if "id" in a}


@pytest.fixture
def run(tmp_path) -> Run:
    """A run of three classes that was evaluated, with all files."""
    run = reports.write_run(tmp_path / "run", NAMES)
    reports.evaluate(run, NAMES, *reports.predictions(60, 3))
    reports.disturb(run)
    return run


# ---- What it says


def test_the_figures_are_scikit_learns_to_the_last_digit(run):
    with np.load(run.evaluation("test").with_suffix(".npz")) as kept:
        labels, probabilities = kept["labels"], kept["probabilities"]
    (data,) = reports.data_of(render(run))["runs"]
    figures, predicted = data["evaluations"]["test"], probabilities.argmax(1)
    assert figures["accuracy"] == pytest.approx(
        sklearn.metrics.accuracy_score(labels, predicted), abs=1e-12
    )
    exact = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    assert figures["loss"] == pytest.approx(-np.log(exact).mean(), abs=1e-12)
    precision, recall, f1, count = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(3)
    )
    for i, name in enumerate(NAMES):
        row = figures["per_class"][name]
        found = [row[key] for key in ("precision", "recall", "f1", "count")]
        np.testing.assert_allclose(found, [precision[i], recall[i], f1[i], count[i]], atol=1e-12)


def test_every_figure_is_in_the_text(run):
    text = " ".join(Document(render(run)).text.split())
    figures = json.loads(run.evaluation("test").read_text())
    assert f"{figures['accuracy']:.2%}" in text
    low, high = figures["intervals"]["accuracy"]
    assert f"{low:.2%} to {high:.2%}" in text
    assert (
        f"Expected calibration error {figures['calibration']['expected_calibration_error']:.4f}"
        in text
    )
    assert "61,706 parameters" in text
    assert "102 images a second" in text
    assert "3 of 3 epochs" in text
    assert "Accuracy 90.00% on 20 images as they are, 50.00%" in text
    pair = figures["confused"][0]
    assert f"{pair['true']} {pair['predicted']} {pair['count']}" in text


def test_the_confusion_matrix_of_few_classes_is_a_table_of_its_counts(run):
    text = render(run)
    body = text[text.index('class="confusion"') :]
    cells = re.findall(r'<td style="--s: ([0-9.]+)"[^>]*>(\d+)</td>', body)
    counts = np.array([int(count) for _, count in cells]).reshape(3, 3)
    np.testing.assert_array_equal(
        counts, json.loads(run.evaluation("test").read_text())["confusion"]
    )
    shares = np.array([float(share) for share, _ in cells]).reshape(3, 3)
    np.testing.assert_allclose(shares, counts / counts.sum(1, keepdims=True), atol=1e-3)


def test_the_command_makes_the_same_run(tmp_path):
    flags = {
        "augment": "crop(4)|flip",
        "learning_rate": 0.01,
        "export": False,
        "data": "folder:/a b",
    }
    run = reports.write_run(tmp_path / "run", NAMES, flags)
    found = record.load(run)
    words = shlex.split(found.command().replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "keras_cifar.train"]
    config, rest = cli.parse(TrainConfig, words[3:])
    assert (config, rest) == (TrainConfig.from_flags(model="lenet5", epochs=3, **flags), [])
    assert set(found.flags()) == {"model", "epochs", *flags}


def test_the_same_run_gives_the_same_bytes(run):
    assert render(run) == render(Run(run.path))


# ---- Any run


@pytest.mark.parametrize("classes", [2, 100])
def test_any_number_of_classes(tmp_path, classes):
    names = [f"class {i}" for i in range(classes)]
    run = reports.write_run(tmp_path / "run", names)
    labels, probabilities = reports.predictions(2000, classes)
    reports.evaluate(run, names, labels, probabilities)
    text = render(run)
    document = Document(text)
    assert all(f"run1-{name}" in document.ids for name in SECTIONS)
    if classes > page.MAX_NUMBERED:
        matrix = sklearn.metrics.confusion_matrix(labels, probabilities.argmax(1))
        drawing = text[text.index('class="matrix"') :]
        assert drawing[: drawing.index("</svg>")].count("M") == (matrix > 0).sum()
        assert drawing.count(">class 99</text>") == 2  # beside the drawing and above it
    assert len(text) < 5e6


def test_a_class_without_images_has_no_figures(tmp_path):
    run = reports.write_run(tmp_path / "run", NAMES)
    reports.evaluate(run, NAMES, *reports.predictions(40, 3, absent=(1,)))
    text = render(run)
    row = text[text.index('<th scope="row">bee</th>') :]
    assert row[: row.index("</tr>")].count('data-value="-1"') == 3
    assert 'data-value="0">0<' in row


def test_a_run_that_stopped_early_is_shown_as_far_as_it_came(tmp_path):
    text = Document(render(reports.write_run(tmp_path / "run", NAMES, epochs=1))).text
    assert "not come to its end: 1 of 3 epochs" in text
    assert "not evaluated yet" in text
    text = Document(render(reports.write_run(tmp_path / "new", NAMES, epochs=0))).text
    assert "No epoch is done yet" in text


def test_a_run_that_is_done_is_not_called_unfinished(run):
    assert "not come to its end" not in render(run)


def test_a_run_of_an_older_version_says_what_is_missing(tmp_path):
    run = reports.write_run(tmp_path / "run", NAMES)
    config = json.loads(run.config.read_text())
    del config["parameter_count"], config["versions"]
    config["flags"]["gone"] = "x"  # a flag of another version
    write_json(run.config, config)
    reports.evaluate(run, NAMES, *reports.predictions(40, 3), new=False)
    text = Document(render(run)).text
    assert text.count("evaluate again") == 4
    assert "--disturb" in text
    assert "--gone" in text


def test_figures_that_are_no_numbers_are_left_open(run):
    run.history.write_text(run.history.read_text().replace("2.0", "nan", 1))
    figures = json.loads(run.evaluation("test").read_text()) | {"loss": float("inf")}
    run.evaluation("test").write_text(json.dumps(figures))
    text = render(run)
    (data,) = reports.data_of(text)["runs"]
    assert data["evaluations"]["test"]["loss"] is None
    assert data["history"][0]["loss"] is None
    assert "nan" not in Document(text).text.lower()


# ---- Text from a run

EVIL = "<script>alert(1)</script>"


@pytest.mark.parametrize("classes", [3, 30])
def test_nothing_in_a_run_becomes_markup(tmp_path, classes):
    names = [EVIL, "<img src=x onerror=alert(1)>", "\"' onload='x", *map(str, range(classes - 3))]
    run = reports.write_run(
        tmp_path / "</title><b>", names, {"data": f"folder:{EVIL}\n\udcff"}, git_revision=EVIL
    )
    reports.evaluate(run, names, *reports.predictions(200, classes))
    reports.disturb(run, [EVIL])
    records = [record.load(run)]
    url = "data:image/png;base64,"
    mistakes = tuple(
        mistake | {"top": [(EVIL, 0.5)], "picture": url, "overlay": url}
        for mistake in records[0].figures["mistakes"]
    )
    out = tmp_path / "report.html"
    page.write(out, records, [Gallery(mistakes=mistakes)])
    document = Document(out.read_text("utf-8"))
    assert len(document.elements["script"]) == 2
    assert all(image["src"] == url for image in document.elements["img"])
    names_of_attributes = {n for found in document.elements.values() for a in found for n in a}
    assert not [name for name in names_of_attributes if name.startswith("on")]
    assert EVIL in document.text
    assert "\\n\\udcff" in document.text


def test_the_policy_forbids_everything_else(run):
    text = render(run)
    policy = Document(text).elements["meta"][1]["content"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert not re.search(r"(src|href)\s*=\s*.?(https?:)?//|@import|url\(|https?://", text)


# ---- Several runs


@pytest.fixture
def two(tmp_path):
    runs = []
    for number, flags in enumerate(({"learning_rate": 0.5}, {"augment": EVIL})):
        run = reports.write_run(tmp_path / f"run{number}", NAMES, flags)
        reports.evaluate(run, NAMES, *reports.predictions(60, 3, seed=number))
        runs.append(run)
    return runs


def test_runs_stand_side_by_side(two):
    text = render(*two)
    document = Document(text)
    differing = text[text.index("Flags that differ") :]
    differing = differing[: differing.index("</tbody>")]
    assert re.findall("<code>(--[a-z_]+)</code>", differing) == ["--learning_rate", "--augment"]
    assert "0.5" in differing
    compared = text[text.index('id="compared"') : text.index('id="run1"')]
    assert compared.count('<svg class="chart"') == 2
    assert all(f'line c{n}"' in compared and f'line c{n} dashed"' in compared for n in (1, 2))
    for run in two:
        assert f"{json.loads(run.evaluation('test').read_text())['accuracy']:.2%}" in compared
    assert {f"run{n}-{name}" for n in (1, 2) for name in SECTIONS} <= document.ids


def test_runs_of_the_same_name_are_named_by_their_paths(tmp_path):
    runs = [reports.write_run(tmp_path / name / "run", NAMES) for name in "ab"]
    assert [one.name for one in record.load_all(runs)] == [str(run.path) for run in runs]


# ---- Pictures


@pytest.fixture
def evaluated_run(trained_run, tmp_path) -> Run:
    """A copy of `trained_run` that is not as good as it could be, with all files of an evaluation."""
    run = Run(tmp_path / "run")
    shutil.copytree(trained_run.path, run.path)
    test = load_data(run.read_config(), "test").test
    probabilities = predict(load_model(run.model), test)
    probabilities[::3] = np.roll(probabilities[::3], 1, axis=1)
    names = run.read_config()["class_names"]
    data = run.read_config()["flags"]["data"]
    reports.evaluate(run, names, test.labels, probabilities, test.fingerprint, data)
    return run


def test_mistakes_are_shown_with_what_led_to_them(evaluated_run, capsys):
    assert command(evaluated_run.path) == 0
    written = evaluated_run.path / "report.html"
    assert capsys.readouterr().out == f"report    {written}\n"
    document = Document(written.read_text())
    mistakes = json.loads(evaluated_run.evaluation("test").read_text())["mistakes"]
    assert len(document.elements["img"]) == 2 * len(mistakes) > 0
    assert all(image["src"].startswith("data:image/png;") for image in document.elements["img"])
    assert (
        f"test image {mistakes[0]['row']}, {mistakes[0]['true']}"
        == document.elements["img"][0]["alt"]
    )
    assert document.elements["img"][0]["src"] != document.elements["img"][1]["src"]
    first = written.read_bytes()
    assert command(evaluated_run.path, evaluated_run.path, f"--out={written}2") == 0
    assert command(evaluated_run.path) == 0
    assert written.read_bytes() == first


def test_without_the_data_the_report_says_so(evaluated_run, capsys):
    config = json.loads(evaluated_run.config.read_text())
    figures = json.loads(evaluated_run.evaluation("test").read_text()) | {"data": "folder:/gone"}
    config["flags"]["data"] = "folder:/gone"
    write_json(evaluated_run.config, config)
    write_json(evaluated_run.evaluation("test"), figures)
    assert command(evaluated_run.path) == 0
    assert "run: without pictures (" in capsys.readouterr().out
    document = Document((evaluated_run.path / "report.html").read_text())
    assert "The pictures are left out: " in document.text
    assert "img" not in document.elements


def test_pictures_of_other_images_than_those_evaluated_are_not_shown(evaluated_run):
    found = record.load(evaluated_run)
    found.figures["fingerprint"] = "another"
    assert "have changed" in gallery.load(evaluated_run, found).missing


def test_a_disturbed_image_is_shown_at_each_strength(evaluated_run, monkeypatch):
    def apply(name, images, strength, seed):
        return np.full_like(images, 10 * strength)

    fake = types.SimpleNamespace(DISTURBANCES={"jpeg": None}, apply=apply)
    monkeypatch.setattr(gallery, "disturbances", fake)
    reports.disturb(evaluated_run)  # rotation, which is no more, and jpeg
    found = record.load(evaluated_run)
    pictures = gallery.load(evaluated_run, found)
    assert set(pictures.disturbed) == {"jpeg"}
    assert len(set(pictures.disturbed["jpeg"])) == 5
    text = page.render([found], [pictures])
    assert 'alt="jpeg of strength 5"' in text
    assert not gallery.load(evaluated_run, found, disturbed=False).disturbed


def test_large_pictures_are_made_small():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 400, 3), np.uint8)
    assert len(gallery._url(pixels)) < 10_000


# ---- The commands


def test_training_ends_with_the_report(trained_run):
    written = (trained_run.path / "report.html").read_text()
    assert all(f"run1-{name}" in Document(written).ids for name in SECTIONS)


def test_a_report_that_cannot_be_written_ends_no_training(trained_run, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write", fail)
    dataset = load_data(trained_run.read_config(), "test")
    trainer.report(trained_run, load_model(trained_run.model), dataset)
    assert capsys.readouterr().err == (
        f"no report: {trained_run.path / 'report.html'} cannot be written: No space left on device\n"
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("eval/test.json", "{"),
        ("eval/test.json", '{"accuracy": 1}'),
        ("eval/test.npz", "no archive"),
        ("eval/test_disturbances.json", "[]"),
        ("history.csv", "epoch,loss\n1,x\n"),
        ("history.csv", "loss\n1\n"),
        ("config.json", {"versions": "x"}),
        ("config.json", {"parameter_count": "<b>"}),
        ("eval/test.json", {"accuracy": "<b>"}),
        (
            "eval/test.json",
            {
                "mistakes": [
                    {
                        "row": 99,
                        "true": "ape",
                        "predicted": "bee",
                        "probability": 1,
                        "true_probability": 0,
                    }
                ]
            },
        ),
        ("eval/test.json", {"confused": [{"true": "x", "predicted": "ape", "count": 1}]}),
        ("eval/test.json", {"intervals": {"loss": ["x", "y"]}}),
        ("eval/test.json", {"calibration": {}}),
        ("eval/test_disturbances.json", {"clean_accuracy": []}),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(run, file, content, capsys):
    if isinstance(content, dict):
        content = json.dumps(json.loads((run.path / file).read_text()) | content)
    (run.path / file).write_text(content)
    assert command(run.path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{run.path / file} is damaged: " in error


@pytest.mark.parametrize(("runs", "words"), [([], "name at least one"), (["a"] * 9, "at most 8")])
def test_wrong_usage_is_status_2(runs, words, capsys):
    assert command(*runs) == 2
    assert words in capsys.readouterr().err


def test_an_evaluation_of_other_classes_is_refused(run, capsys):
    reports.evaluate(run, ("x", "y"), *reports.predictions(40, 2))
    assert command(run.path) == 1
    assert "is of other classes than the run" in capsys.readouterr().err


def test_predictions_of_other_figures_are_refused(run, capsys):
    labels, probabilities = reports.predictions(59, 3)
    path = run.evaluation("test").with_suffix(".npz")
    np.savez(path, labels=labels, probabilities=probabilities)
    assert command(run.path) == 1
    assert f"{path} is not of the figures in" in capsys.readouterr().err


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert command(tmp_path) == 1
    assert "is not a run directory" in capsys.readouterr().err
