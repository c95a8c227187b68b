"""The page in a real browser, Debian's chromium: opened from disk, used as a reader would.

Skipped where there is no chromium; `.ci/run` installs it.
"""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, sync_playwright

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.explanation.explanation import explain
from lymphfeat.explanation.page import render_page
from lymphfeat.settings import ExplainSettings
from tests.test_model import make_model
from tests.tiny import write_red_cohort

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    root = tmp_path_factory.mktemp("explained")
    cohort = Cohort.load(write_red_cohort(root / "cohort", "01010101??"))
    file = root / "report.html"
    file.write_text(
        render_page(explain(make_model("topbottomk"), cohort, ExplainSettings(device="cpu")))
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        complaints: list[str] = []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: complaints.append(request.url))
        tab.goto(file.as_uri())
        tab.wait_for_selector("html[data-ready]")
        tab.set_default_timeout(10_000)
        yield tab
        mine = [told for told in complaints if not told.startswith((file.as_uri(), "data:"))]
        assert mine == []  # no error on the console, nothing asked of any network
        browser.close()


@pytest.fixture
def cohort(page: Page) -> Page:
    page.keyboard.press("Escape")
    page.evaluate("location.hash = '#cohort'")
    page.wait_for_selector("#view-cohort:not([hidden])")
    page.fill("#find", "")
    page.select_option("#by-label", "")
    return page


def ids(page: Page) -> list[str]:
    rows = page.locator("#patients tbody tr")
    return [str(id) for id in rows.evaluate_all("rows => rows.map(r => r.dataset.id)")]


def test_filters(cohort: Page) -> None:
    assert len(ids(cohort)) == 10
    cohort.select_option("#by-label", "1")
    assert sorted(ids(cohort)) == ["P1", "P3", "P5", "P7"]
    assert cohort.inner_text("#count") == "4 of 10 patients"
    cohort.fill("#find", "p3")
    assert ids(cohort) == ["P3"]
    cohort.fill("#find", "nobody")
    assert ids(cohort) == []


def test_sorts_and_says_so(cohort: Page) -> None:
    errors_first = cohort.locator("#patients tbody tr").evaluate_all(
        "rows => rows.map(r => r.classList.contains('error'))"
    )
    assert errors_first == sorted(errors_first, reverse=True)
    cohort.click("button[data-key=n]")
    sizes = cohort.locator("#patients tbody tr td:nth-child(7)").all_inner_texts()
    assert [int(size) for size in sizes] == sorted((int(size) for size in sizes), reverse=True)
    assert cohort.get_attribute("th:has(button[data-key=n])", "aria-sort") == "descending"
    cohort.click("button[data-key=id]")
    assert ids(cohort) == [f"P{n}" for n in range(10)]
    cohort.keyboard.press("Enter")  # the button keeps the focus
    assert ids(cohort) == [f"P{n}" for n in range(9, -1, -1)]


def test_a_patient_opens_and_its_maps_toggle(cohort: Page) -> None:
    cohort.click("#patients tr[data-id=P3] a")
    cohort.wait_for_selector("#plate .tile")
    assert cohort.inner_text("#view-patient h1") == "P3"
    assert cohort.locator("#plate .tile").count() == 4
    cohort.wait_for_function("document.querySelector('#plate img').complete")
    assert cohort.locator("#plate canvas").count() == 0
    cohort.click("#plate-mode :text-is('Raw grid')")
    assert cohort.locator("#plate canvas").count() == 4
    grey = cohort.locator("#plate canvas").first.evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, 1, 1).data]"
    )
    assert grey[0] == grey[1] == grey[2]
    assert grey[3] == 255
    assert "sum" in cohort.inner_text(".contributions")
    assert "object" not in cohort.inner_text("#view-patient")
    cohort.click("#plate-mode :text-is('Cells')")
    assert cohort.locator("#plate canvas").count() == 0


def test_a_cell_opens_by_keyboard(cohort: Page) -> None:
    cohort.click("#patients tr[data-id=P3] a")
    cohort.focus("#plate .tile >> nth=0")
    cohort.keyboard.press("Enter")
    assert "1 of 4" in cohort.inner_text("dialog")
    cohort.keyboard.press("ArrowRight")
    assert "2 of 4" in cohort.inner_text("dialog")
    assert cohort.locator("dialog .grid td").count() == 4
    cohort.keyboard.press("Escape")
    assert not cohort.locator("dialog").is_visible()


def test_prints_without_controls(cohort: Page) -> None:
    cohort.click("#patients tr[data-id=P3] a")
    cohort.wait_for_selector("#plate .tile")
    cohort.emulate_media(media="print")
    assert cohort.locator("#plate img").first.is_visible()
    assert not cohort.locator(".pager, .controls, nav").locator("visible=true").count()
    cohort.emulate_media(media="screen")


def test_sections_theme_and_strips(cohort: Page) -> None:
    assert cohort.locator("[data-strip]").count() == 4
    before = cohort.evaluate("getComputedStyle(document.body).backgroundColor")
    cohort.click("#theme")
    assert cohort.evaluate("getComputedStyle(document.body).backgroundColor") != before
    cohort.click("#theme")
    for name, told in (("trust", "Deleting cells"), ("about", "What this page cannot tell")):
        cohort.click(f"nav a[data-view={name}]")
        cohort.wait_for_selector(f"#view-{name}:not([hidden])")
        assert told in cohort.inner_text("main")
    assert "not a medical device" in cohort.inner_text("body")
