"""The report in a real browser: a Chromium on PATH, or the one that CHROMIUM names."""

import os

import numpy as np
import pytest

from keras_cifar.reporting import gallery, record
from keras_cifar.reporting import page as report
from keras_cifar.reporting.page import Gallery
from tests.reporting import reports
from tests.reporting.test_report import SECTIONS

LONG = "a_very_long_name_" * 12
WIDTHS = (390, 1280)  # pixels of a telephone and of a screen


def write(path, *class_names) -> str:
    """The address of a report of a run for each of `class_names`."""
    records, galleries = [], []
    image = gallery._url(np.full((32, 32, 3), 90, np.uint8))
    for number, names in enumerate(class_names):
        flags = {"data": f"folder:/{LONG}", "learning_rate": 0.1 + number}
        run = reports.write_run(path / f"{LONG}{number}", names, flags)
        reports.evaluate(run, names, *reports.predictions(300, len(names)))
        reports.disturb(run)
        found = record.load(run)
        mistakes = tuple(
            m | {"top": [(names[0], 0.5)], "image": image, "overlay": image}
            for m in found.metrics["mistakes"][:5]
        )
        records.append(found)
        galleries.append(Gallery("", mistakes, {"jpeg": [image] * 5}))
    report.write(path / "report.html", records, galleries)
    return (path / "report.html").as_uri()


KINDS = {
    "few": [[LONG, "bee", *map(str, range(8))]],
    "many": [[f"class {i}" for i in range(100)]],
    "several": [["a", "b"], [LONG, "b", "c"]],
}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory) -> dict[str, str]:
    return {kind: write(tmp_path_factory.mktemp(kind), *runs) for kind, runs in KINDS.items()}


@pytest.fixture
def visit(browser):
    """Opens an address; the page must ask nobody else and have nothing to complain about."""
    contexts, asked, errors = [], [], []

    def visit(address, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.set_default_timeout(10_000)
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_section_is_there_and_nothing_sticks_out(visit, addresses, kind, width):
    page = visit(addresses[kind], width)
    for number in (1, 2) if kind == "several" else (1,):
        for name in SECTIONS:
            section = page.locator(f"#run{number}-{name}")
            assert section.is_visible()
            assert len(section.inner_text().splitlines()) > 1  # more than its title
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter(e => !e.closest(".scroll *, .skip, svg *"))
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"""
    )
    assert outside == []
    assert page.locator("h1").count() == page.locator("main").count() == 1


def test_the_keyboard_sorts_the_classes(visit, addresses):
    page = visit(addresses["few"])
    button = page.locator("th button", has_text="recall")
    heading = button.locator("xpath=..")

    def recalls():
        cells = page.locator("#run1-classes tbody td:nth-child(3)").all()
        return [float(cell.get_attribute("data-value")) for cell in cells]

    before = recalls()
    button.focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert recalls() == sorted(before) != before
    page.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") == "descending"
    assert recalls() == sorted(before, reverse=True)
    page.locator("th button", has_text="class").press("Enter")
    assert heading.get_attribute("aria-sort") is None
    names = page.locator("#run1-classes tbody th").all_inner_texts()
    assert names == [*map(str, range(8)), LONG, "bee"]


def test_the_first_tab_leads_to_the_content(visit, addresses):
    page = visit(addresses["few"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#main"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")


def test_who_does_not_see_is_told(visit, addresses):
    page = visit(addresses["several"])
    unnamed = "img:not([alt]), img[alt=''], svg:not([aria-label]):not([aria-hidden])"
    unnamed += ", table:not(:has(caption)), th:not([scope]), section:not([aria-labelledby])"
    assert page.locator(unnamed).count() == 0
    missing = page.evaluate(
        """() => [...document.querySelectorAll("[aria-labelledby], a[href]")]
            .map(e => e.getAttribute("aria-labelledby") ?? e.getAttribute("href").slice(1))
            .filter(id => !document.getElementById(id))"""
    )
    assert missing == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)


CONTRAST = """() => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = element => {  // the colour behind an element's text
    paint.fillStyle = getComputedStyle(document.body).backgroundColor;
    paint.fillRect(0, 0, 1, 1);
    const path = [];
    for (let e = element; e; e = e.parentElement) path.unshift(e);
    for (const e of path) {
      paint.fillStyle = getComputedStyle(e).backgroundColor;
      paint.fillRect(0, 0, 1, 1);
    }
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let least = 21;
  const words = "h1, h2, h3, p, dt, dd, li, td, th, caption, a, summary, .soft, .bad, b, pre";
  for (const element of document.querySelectorAll(words)) {
    const text = getComputedStyle(element).color.match(/\\d+/g).slice(0, 3).map(Number);
    const [a, b] = [light(text), light(over(element))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(visit, addresses, scheme):
    page = visit(addresses["several"], color_scheme=scheme)
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG 2.2, 1.4.3
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=os.path.join(folder, f"report_{scheme}.png"))


def test_it_prints_dark_on_white(visit, addresses):
    page = visit(addresses["few"], color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST) >= 4.5
    assert not page.locator("nav").is_visible()
    assert page.pdf().startswith(b"%PDF")
