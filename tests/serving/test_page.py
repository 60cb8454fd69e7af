"""The page of the serve command: what it is, and how it behaves in a real browser.

The browser's tests need the package playwright and a Chromium: the one that CHROMIUM names, or one on
PATH.
"""

import base64
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_cifar.data.images import load_image
from keras_cifar.inference.predictor import Predictor
from tests.conftest import colour_images


@pytest.fixture
def address(served_run) -> str:
    return f"http://{served_run.host}:{served_run.port}"


@pytest.fixture
def picture(tmp_path):
    """A picture of another size and proportion than the model takes, in a turned JPEG."""
    pixels = colour_images(3, 40, 3, seed=4)[0][2].repeat(2, axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


def test_the_page_asks_nobody_else(served_run):
    status, page = served_run.ask("GET", "/")
    assert status == 200
    assert page.startswith("<!doctype html>")
    assert "{{" not in page
    assert 'MODEL = "/v1/models/model"' in page
    assert not re.search(r"(src|href)\s*=\s*.?(https?:)?//|@import|url\(|https?://", page)
    assert 'lang="en"' in page
    assert 'name="viewport"' in page


def test_what_the_page_calls_answers(served_run, picture, trained_run):
    names = served_run.ask("GET", "/v1/models/model/metadata")[1]["metadata"]["class_names"]
    body = {
        "signature_name": "serving_bytes",
        "inputs": [{"b64": base64.b64encode(picture.read_bytes()).decode()}],
    }
    status, answer = served_run.predict(body)
    assert status == 200
    assert len(answer["outputs"]["probabilities"][0]) == len(names) == 3
    assert answer["outputs"]["label"][0] in names


@pytest.fixture
def page(browser, address):
    """The page, whose requests are noted in `page.asked`, and which must not report an error."""
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="light")
    page = context.new_page()
    page.asked, errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(10_000)
    page.goto(address)
    yield page
    context.close()
    assert errors == []


def shares(page) -> list[tuple[str, float]]:
    """(class, percent) of each row, when there are some."""
    page.wait_for_selector("#classes li")
    rows = page.locator("#classes li")
    return [
        (
            row.locator("span").nth(0).text_content(),
            float(row.locator("span").nth(1).text_content()[:-1]),
        )
        for row in rows.all()
    ]


def test_a_chosen_picture_is_classified_as_locally(page, picture, address, trained_run, tmp_path):
    page.set_input_files("#file", picture)
    found = shares(page)
    predictor = Predictor(str(trained_run.path))
    expected = predictor.classify(load_image(picture, (16, 16))[np.newaxis])[0]
    assert [name for name, _ in found] == [predictor.class_names[i] for i in np.argsort(-expected)]
    np.testing.assert_allclose([s for _, s in found], 100 * np.sort(expected)[::-1], atol=0.2)
    assert page.locator("#said").text_content() == f"It looks like: {found[0][0]}"
    assert page.locator("#shown").is_visible()
    widths = page.locator("#classes b").evaluate_all("bars => bars.map(b => b.offsetWidth)")
    whole = page.locator("#classes i").first.evaluate("track => track.offsetWidth")
    np.testing.assert_allclose(np.array(widths) / whole, [s / 100 for _, s in found], atol=0.01)
    # On a telephone nothing is cut off, and nothing was asked of others.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert all(url.startswith((address, "blob:", "data:")) for url in page.asked)
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    if folder := os.environ.get("SCREENSHOTS"):
        shutil.copy(shot, folder)
    colours = {tuple(c) for c in np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)}
    assert (0x1F, 0x6F, 0xEB) in colours  # a bar's


def test_a_dropped_picture_is_classified(page, picture):
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "x.jpg", {type: "image/jpeg"}));
            const drop = new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
            document.getElementById("drop").dispatchEvent(drop);
        }""",
        base64.b64encode(picture.read_bytes()).decode(),
    )
    assert len(shares(page)) == 3


def test_the_keyboard_alone_chooses_a_picture(page, picture):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert (
        page.evaluate("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    )
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(picture)
    assert len(shares(page)) == 3


def test_what_is_no_picture_is_said(page, tmp_path, picture):
    page.set_input_files("#file", picture)
    shares(page)
    (tmp_path / "x.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "x.png")
    page.wait_for_selector("#said.bad")
    assert "not a picture" in page.locator("#said").text_content()
    assert page.locator("#classes li").count() == 0
    assert not page.locator("#shown").is_visible()


def test_a_server_that_is_gone_is_said(page, picture):
    page.route("**/v1/**", lambda route: route.abort())
    page.set_input_files("#file", picture)
    page.wait_for_selector("#said.bad")
    assert page.locator("#said").text_content() == "The server cannot be reached."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    colours = page.evaluate(
        """() => ["backgroundColor", "color"].map(
            name => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"""
    )
    back, text = (np.mean(colour) for colour in colours)
    assert (back > 200 > 60 > text) if scheme == "light" else (back < 60 < 200 < text)
