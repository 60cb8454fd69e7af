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
def image(tmp_path):
    """An image of another size and aspect ratio than the model takes, in a rotated JPEG."""
    pixels = colour_images(3, 40, 3, seed=4)[0][2].repeat(2, axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


def test_the_page_uses_only_its_server(served_run):
    status, page = served_run.request("GET", "/")
    assert status == 200
    assert page.startswith("<!doctype html>")
    assert "{{" not in page
    assert 'MODEL = "/v1/models/model"' in page
    assert not re.search(r"(src|href)\s*=\s*.?(https?:)?//|@import|url\(|https?://", page)
    assert 'lang="en"' in page
    assert 'name="viewport"' in page


@pytest.fixture
def page(browser, address):
    """The page, with its requests in `page.requests`; it must not report an error."""
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme="light")
    page = context.new_page()
    page.requests, errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(10_000)
    page.goto(address)
    yield page
    context.close()
    assert errors == []


def shares(page) -> list[tuple[str, float]]:
    """(class, percent) of each row, when there are some."""
    page.wait_for_selector("#classes li")
    rows = (row.locator("span").all_text_contents() for row in page.locator("#classes li").all())
    return [(texts[0], float(texts[1][:-1])) for texts in rows]


def test_a_chosen_image_is_classified_as_locally(page, image, address, trained_run, tmp_path):
    page.set_input_files("#file", image)
    found = shares(page)
    predictor = Predictor(str(trained_run.path))
    expected = predictor.classify(load_image(image, (16, 16))[np.newaxis])[0]
    assert [name for name, _ in found] == [predictor.class_names[i] for i in np.argsort(-expected)]
    np.testing.assert_allclose([s for _, s in found], 100 * np.sort(expected)[::-1], atol=0.2)
    assert page.locator("#said").text_content() == f"Prediction: {found[0][0]}"
    assert page.locator("#shown").is_visible()
    widths = page.locator("#classes b").evaluate_all("bars => bars.map(b => b.offsetWidth)")
    whole = page.locator("#classes i").first.evaluate("track => track.offsetWidth")
    np.testing.assert_allclose(np.array(widths) / whole, [s / 100 for _, s in found], atol=0.01)
    # Nothing is cut off on a phone, and no other server got a request.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert all(url.startswith((address, "blob:", "data:")) for url in page.requests)
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    if folder := os.environ.get("SCREENSHOTS"):
        shutil.copy(shot, folder)
    colours = {tuple(c) for c in np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)}
    assert (0x1F, 0x6F, 0xEB) in colours  # a bar's


def test_a_dropped_image_is_classified(page, image):
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "x.jpg", {type: "image/jpeg"}));
            const drop = new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
            document.getElementById("drop").dispatchEvent(drop);
        }""",
        base64.b64encode(image.read_bytes()).decode(),
    )
    assert len(shares(page)) == 3


def test_an_image_is_chosen_by_keyboard(page, image):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert (
        page.evaluate("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    )
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(image)
    assert len(shares(page)) == 3


def test_a_file_that_is_not_an_image_is_reported(page, tmp_path, image):
    page.set_input_files("#file", image)
    shares(page)
    (tmp_path / "x.png").write_bytes(b"no image")
    page.set_input_files("#file", tmp_path / "x.png")
    page.wait_for_selector("#said.bad")
    assert "not an image" in page.locator("#said").text_content()
    assert page.locator("#classes li").count() == 0
    assert not page.locator("#shown").is_visible()


def test_an_unreachable_server_is_reported(page, image):
    page.route("**/v1/**", lambda route: route.abort())
    page.set_input_files("#file", image)
    page.wait_for_selector("#said.bad")
    assert page.locator("#said").text_content() == "The server cannot be reached."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    colours = page.evaluate(
        """() => ["backgroundColor", "color"].map(
            name => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"""
    )
    back, text = (np.mean(colour) for colour in colours)
    assert (back > 200 > 60 > text) if scheme == "light" else (back < 60 < 200 < text)
