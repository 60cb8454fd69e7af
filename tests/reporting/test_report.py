"""The report shows what any run directory holds, and no text of a run becomes markup."""

import base64
import html.parser
import io
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_cifar import report
from keras_cifar.core import cli
from keras_cifar.core.config import TrainConfig
from keras_cifar.core.files import write_json
from keras_cifar.core.run_directory import Run
from keras_cifar.evaluation import disturbances, plots
from keras_cifar.evaluation.evaluator import load_data, predict
from keras_cifar.models import load as load_model
from keras_cifar.reporting import gallery, page, record
from keras_cifar.reporting.page import Gallery
from keras_cifar.training import trainer
from tests.reporting import reports

NAMES = ("ape", "bee", "cow")
SECTIONS = (
    *("training", "curves", "metrics", "classes", "confusion", "mistakes", "calibration"),
    *("disturbances", "reproduce"),
)


def command(*argv) -> int:
    return cli._execute("report", report.main, report.ReportOptions, "RUN", [str(a) for a in argv])


def render(*runs: Run) -> str:
    records = record.load_all(list(runs))
    return page.render(records, [Gallery("no images here")] * len(records))


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

    def handle_endtag(self, tag):
        assert self._open.pop() == tag  # each is closed where it was opened

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text += data + " "

    @property
    def ids(self) -> set:
        return {a["id"] for found in self.elements.values() for a in found if "id" in a}


@pytest.fixture(autouse=True)
def _no_charts(request, monkeypatch):
    """A chart takes 0.1 s, so it is drawn only where a test asks for `charts`."""
    if "charts" not in request.fixturenames:
        monkeypatch.setattr(plots, "svg", lambda figure, title, identifier: "<svg></svg>")


@pytest.fixture
def charts() -> None:
    pass


@pytest.fixture
def run(tmp_path) -> Run:
    """An evaluated run of three classes, with all files."""
    run = reports.write_run(tmp_path / "run", NAMES)
    reports.evaluate(run, NAMES, *reports.predictions(60, 3))
    reports.disturb(run)
    return run


# ---- What it says


def metrics_of(run: Run) -> dict:
    return json.loads(run.evaluation("test").read_text())


def test_metrics_are_in_the_page_in_full_precision(run):
    text = render(run)
    assert text == render(Run(run.path))
    (data,) = reports.data_of(text)["runs"]
    shown, stored = data["evaluations"]["test"], metrics_of(run)
    assert shown == {name: stored[name] for name in shown}
    assert {"accuracy", "loss", "per_class", "intervals", "calibration"} <= shown.keys()
    assert data["disturbances"] == json.loads(run.disturbances("test").read_text())


def test_metrics_are_in_the_text(run):
    metrics = metrics_of(run)
    low, high = metrics["intervals"]["accuracy"]
    error = metrics["calibration"]["expected_calibration_error"]
    pair = metrics["confused"][0]
    text = " ".join(Document(render(run)).text.split())
    for words in (
        f"test accuracy {metrics['accuracy']:.2%} {low:.2%} to {high:.2%}",
        f"Expected calibration error {error:.4f}",
        *("61,706 parameters", "102 images a second", "3 of 3 epochs"),
        "Accuracy 90.00% on 20 images without disturbances, 50.00%",
        f"{pair['true']} {pair['predicted']} {pair['count']}",
    ):
        assert words in text
    assert "unfinished" not in text


def test_the_confusion_matrix_of_few_classes_is_a_table_of_its_counts(run):
    text = render(run)
    body = text[text.index('class="confusion"') :]
    cells = re.findall(r'<td style="--s: ([0-9.]+)"[^>]*>(\d+)</td>', body)
    shares, counts = np.array(cells, float).T.reshape(2, 3, 3)
    np.testing.assert_array_equal(counts, metrics_of(run)["confusion"])
    np.testing.assert_allclose(shares, counts / counts.sum(1, keepdims=True), atol=1e-3)


def test_the_command_reproduces_the_run(tmp_path):
    flags = {"augment": "crop(4)|flip", "learning_rate": 0.01, "export": False}
    flags["data"] = "folder:/a b"
    run = reports.write_run(tmp_path / "run", NAMES, flags)
    found = record.load(run)
    words = shlex.split(found.command().replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "keras_cifar.train"]
    config, rest = cli.parse(TrainConfig, words[3:])
    assert (config, rest) == (TrainConfig.from_flags(model="lenet5", epochs=3, **flags), [])
    assert set(found.flags()) == {"model", "epochs", *flags}


# ---- Any run


def test_many_classes(tmp_path, charts):
    names = [f"class {i}" for i in range(40)]
    run = reports.write_run(tmp_path / "run", names)
    reports.evaluate(run, names, *reports.predictions(800, 40))
    text = render(run)
    assert {f"run1-{name}" for name in SECTIONS} <= Document(text).ids
    drawing = text[text.index('id="run1-confusion"') :]
    drawing = drawing[: drawing.index("</section>")]
    assert drawing.count(">class 39</text>") == 2  # left and below
    assert len(text) < 500_000


def test_a_class_without_images_has_no_metrics(tmp_path):
    run = reports.write_run(tmp_path / "run", NAMES)
    reports.evaluate(run, NAMES, *reports.predictions(40, 3, absent=(1,)))
    text = render(run)
    row = text[text.index('<th scope="row">bee</th>') :]
    assert row[: row.index("</tr>")].count('data-value="-1"') == 3
    assert 'data-value="0">0<' in row


def test_an_unfinished_run_is_shown(tmp_path):
    text = Document(render(reports.write_run(tmp_path / "run", NAMES, epochs=1))).text
    assert "unfinished: 1 of 3 epochs" in text
    assert "not evaluated yet" in text
    text = Document(render(reports.write_run(tmp_path / "new", NAMES, epochs=0))).text
    assert "No epoch is complete yet" in text


def test_a_run_of_an_older_version_says_what_is_missing(tmp_path):
    run = reports.write_run(tmp_path / "run", NAMES)
    config = json.loads(run.config.read_text())
    del config["parameter_count"], config["versions"]
    config["flags"]["gone"] = "x"  # a flag of another version
    write_json(run.config, config)
    reports.evaluate(run, NAMES, *reports.predictions(40, 3), new=False)
    text = Document(render(run)).text
    assert text.count("repeat the evaluation") == 4
    assert "--disturb" in text
    assert "--gone" in text


def test_values_that_are_not_finite_are_left_out(run):
    run.history.write_text(run.history.read_text().replace("2.0", "nan", 1))
    run.evaluation("test").write_text(json.dumps(metrics_of(run) | {"loss": float("inf")}))
    text = render(run)
    (data,) = reports.data_of(text)["runs"]
    assert data["evaluations"]["test"]["loss"] is None
    assert data["history"][0]["loss"] is None
    assert "nan" not in Document(text).text.lower()


# ---- Text from a run

EVIL = "<script>alert(1)</script>"


@pytest.mark.parametrize("classes", [3, 30])
def test_nothing_in_a_run_becomes_markup_and_the_policy_forbids_the_rest(tmp_path, classes, charts):
    names = [EVIL, "<img src=x onerror=alert(1)>", "\"' onload='x", *map(str, range(classes - 3))]
    run = reports.write_run(
        tmp_path / "</title><b>", names, {"data": f"folder:{EVIL}\n\udcff"}, git_revision=EVIL
    )
    reports.evaluate(run, names, *reports.predictions(200, classes))
    reports.disturb(run, [EVIL])
    records = [record.load(run)]
    url = "data:image/png;base64,"
    mistakes = tuple(
        mistake | {"top": [(EVIL, 0.5)], "image": url, "overlay": url}
        for mistake in records[0].metrics["mistakes"]
    )
    out = tmp_path / "report.html"
    page.write(out, records, [Gallery(mistakes=mistakes)])
    text = out.read_text("utf-8")
    document = Document(text)
    assert len(document.elements["script"]) == 2
    assert all(image["src"] == url for image in document.elements["img"])
    names_of_attributes = {n for found in document.elements.values() for a in found for n in a}
    assert not [name for name in names_of_attributes if name.startswith("on")]
    assert EVIL in document.text
    assert "\\n\\udcff" in document.text
    policy = document.elements["meta"][1]["content"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert not re.search(r"(src|href)\s*=\s*.?(https?:)?//|@import|url\((?!#)|https?://", text)


# ---- Several runs


def test_runs_are_shown_side_by_side(tmp_path, charts):
    runs = []
    for number, flags in enumerate(({"learning_rate": 0.5}, {"augment": EVIL})):
        runs.append(reports.write_run(tmp_path / f"run{number}", NAMES, flags))
        reports.evaluate(runs[-1], NAMES, *reports.predictions(60, 3, seed=number))
    text = render(*runs)
    differing = text[text.index("Flags that differ") :]
    differing = differing[: differing.index("</tbody>")]
    assert re.findall("<code>(--[a-z_]+)</code>", differing) == ["--augment", "--learning_rate"]
    assert "0.5" in differing
    compared = text[text.index('id="compared"') : text.index('id="run1"')]
    charts = re.findall('aria-label="(?:Loss|Error) over the epochs">.*?</svg>', compared, re.S)
    for number, run in enumerate(runs, start=1):
        loss, error = (chart.count(f"stroke: var(--c{number})") for chart in charts)
        assert loss == error > 1
        assert f'<path style="stroke: var(--c{number})"' in compared  # in the legend
        assert f"{metrics_of(run)['accuracy']:.2%}" in compared
    assert {f"run{n}-{name}" for n in (1, 2) for name in SECTIONS} <= Document(text).ids


def test_runs_of_the_same_name_are_named_by_their_paths(tmp_path):
    runs = [reports.write_run(tmp_path / name / "run", NAMES) for name in "ab"]
    assert [one.name for one in record.load_all(runs)] == [str(run.path) for run in runs]


# ---- Images


def test_the_training_images_are_shown_where_there_is_a_picture(run):
    assert "Training images" not in render(run)
    images = np.zeros((24, 128, 128, 3), np.uint8)
    images[:] = np.random.default_rng(0).integers(0, 256, (24, 1, 1, 3))
    plots.save(plots.samples(images, np.eye(3)[[0] * 24], NAMES), run.samples)
    text = render(run)
    document = Document(text)
    assert "run1-samples" in document.ids
    assert {"href": "#run1-samples"} in document.elements["a"]
    (image,) = document.elements["img"]
    kind, _, encoded = image["src"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert len(encoded) < 100_000
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as shown, Image.open(run.samples) as png:
        difference = np.subtract(shown, png.convert("RGB"), dtype=int)
    assert np.abs(difference).mean() < 2
    assert len(Document(render(run, Run(run.path))).elements["img"]) == 2


@pytest.fixture(scope="module")
def evaluated(trained_run, tmp_path_factory) -> Run:
    """A copy of `trained_run` with mistakes in its evaluation."""
    run = Run(shutil.copytree(trained_run.path, tmp_path_factory.mktemp("evaluated") / "run"))
    run.disturbances("test").unlink(missing_ok=True)
    run.samples.unlink()
    config = run.read_config()
    test = load_data(config, "test").test
    probabilities = predict(load_model(run.model), test)
    probabilities[::3] = np.roll(probabilities[::3], 1, axis=1)
    data = test.fingerprint, config["flags"]["data"]
    reports.evaluate(run, config["class_names"], test.labels, probabilities, *data)
    return run


@pytest.fixture
def evaluated_run(evaluated, tmp_path) -> Run:
    return Run(shutil.copytree(evaluated.path, tmp_path / "run"))


def test_mistakes_are_shown_under_grad_cam(evaluated_run, capsys):
    assert command(evaluated_run.path) == 0
    written = evaluated_run.path / "report.html"
    assert capsys.readouterr().out == f"report    {written}\n"
    document = Document(written.read_text())
    mistakes, images = metrics_of(evaluated_run)["mistakes"], document.elements["img"]
    assert len(images) == 2 * len(mistakes) > 0
    assert all(image["src"].startswith("data:image/png;") for image in images)
    assert images[0]["alt"] == f"test image {mistakes[0]['row']}, {mistakes[0]['true']}"
    assert images[0]["src"] != images[1]["src"]
    first = written.read_bytes()
    assert command(evaluated_run.path, evaluated_run.path, f"--out={written}2") == 0
    assert written.read_bytes() == first


def test_evaluations_of_other_images_are_left_out(run):
    """Earlier revisions wrote them to the same files."""
    for path, name in (
        (run.disturbances("test"), "disturbances"),
        (run.evaluation("test"), "split"),
    ):
        assert getattr(record.load(run), name)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "another"}))
        assert getattr(record.load(run), name) is None


def test_without_the_data_the_report_says_so(evaluated_run, capsys):
    data = evaluated_run.read_config()["flags"]["data"]
    for path in (evaluated_run.config, evaluated_run.evaluation("test")):
        path.write_text(path.read_text().replace(data, "folder:/gone"))
    assert command(evaluated_run.path) == 0
    assert "run: without images (" in capsys.readouterr().out
    document = Document((evaluated_run.path / "report.html").read_text())
    assert "The images are left out: " in document.text
    assert "img" not in document.elements


def test_images_that_have_changed_since_the_evaluation_are_not_shown(evaluated_run):
    found = record.load(evaluated_run)
    found.metrics["fingerprint"] = "another"
    assert "have changed" in gallery.load(evaluated_run, found).missing


def test_a_disturbed_image_is_shown_at_each_strength(evaluated_run, monkeypatch):
    few = {name: disturbances.DISTURBANCES[name] for name in ("jpeg", "noise")}
    monkeypatch.setattr(disturbances, "DISTURBANCES", few)
    reports.disturb(evaluated_run, ("jpeg", "gone"))  # of a version with other disturbances
    found = record.load(evaluated_run)
    images = gallery.load(evaluated_run, found)
    assert set(images.disturbed) == {"jpeg"}
    assert len(set(images.disturbed["jpeg"])) == 5
    text = page.render([found], [images])
    assert 'alt="jpeg of strength 5"' in text
    assert not gallery.load(evaluated_run, found, runs=2).disturbed


def test_large_images_are_reduced():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 400, 3), np.uint8)
    assert len(gallery._url(pixels)) < 10_000


# ---- The commands


def test_training_ends_with_the_report_or_a_warning(trained_run, monkeypatch, capsys):
    ids = Document(trained_run.report.read_text()).ids
    assert {f"run1-{name}" for name in SECTIONS} <= ids

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write", fail)
    dataset = load_data(trained_run.read_config(), "test")
    trainer.write_report(trained_run, load_model(trained_run.model), dataset)
    expected = f"warning: {trained_run.report} cannot be written: No space left on device\n"
    assert capsys.readouterr().err == expected


MISTAKE = {"row": 0, "true": "ape", "predicted": "bee", "probability": 1, "true_probability": 0}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("eval/test.json", "{"),
        ("eval/test.json", '{"accuracy": 1}'),
        ("eval/test.json", {"accuracy": "<b>"}),
        ("eval/test.json", {"mistakes": [MISTAKE | {"row": 99}]}),
        ("eval/test.json", {"mistakes": [MISTAKE | {"probability": "ape"}]}),
        ("eval/test.json", {"confused": [{"true": "x", "predicted": "ape", "count": 1}]}),
        ("eval/test.json", {"intervals": {"loss": ["x", "y"]}}),
        ("eval/test.json", {"calibration": {}}),
        ("eval/test.npz", "no archive"),
        ("eval/test_disturbances.json", "[]"),
        ("eval/test_disturbances.json", {"clean_accuracy": []}),
        ("samples.png", "no image"),
        ("history.csv", "loss\n1\n"),
        ("config.json", {"versions": "x"}),
        ("config.json", {"parameter_count": "<b>"}),
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


def test_files_that_do_not_belong_together_are_refused(run, tmp_path, capsys):
    labels, probabilities = reports.predictions(59, 3)
    np.savez(run.predictions("test"), labels=labels, probabilities=probabilities)
    assert command(run.path) == 1
    assert f"{run.predictions('test')} does not belong to" in capsys.readouterr().err
    reports.evaluate(run, ("x", "y"), *reports.predictions(40, 2))
    assert command(run.path) == 1
    assert "has other classes than the run" in capsys.readouterr().err
    assert command(tmp_path) == 1
    assert "is not a run directory" in capsys.readouterr().err
