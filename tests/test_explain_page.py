"""The page in a real browser, Debian's chromium: opened from disk, used as a reader would.

Skipped where there is no chromium; `.ci/run` installs it.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.explanation.explanation import Explanation, explain
from lymphfeat.explanation.page import render_page
from lymphfeat.explanation.thumbnails import PER_SHEET
from lymphfeat.extraction import extract
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_heads
from lymphfeat.settings import ExplainSettings, ExtractSettings, FitSettings, SyntheticSettings
from lymphfeat.synthetic.cohort import write_synthetic_cohort
from tests.test_explain_final import network
from tests.test_model import make_model
from tests.test_thumbnails import paint_cohort
from tests.tiny import BACKBONE, write_red_cohort

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    root = tmp_path_factory.mktemp("explained")
    cohort = Cohort.load(write_red_cohort(root / "cohort", "01010101??"))
    file = root / "report.html"
    file.write_text(
        render_page(explain(make_model("topbottomk"), cohort, ExplainSettings(device="cpu")))
    )
    yield from opened(browser, file)


def opened(browser: Browser, file: Path) -> Iterator[Page]:
    """Open a page, and check at the end that it did not complain, or ask anything of a network."""
    tab = browser.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: complaints.append(request.url))
    tab.goto(file.as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.set_default_timeout(10_000)
    yield tab
    assert [told for told in complaints if not told.startswith((file.as_uri(), "data:"))] == []
    tab.close()


def test_nothing_that_tables_hold_is_run(browser: Browser, tmp_path: Path) -> None:
    """Nor would it be if it were injected: the policy of the page allows one script."""
    evil = "<img src=x onerror=hacked()>"
    root = write_red_cohort(tmp_path / "cohort", "0101")
    for number in range(4):
        (root / f"P{number}").rename(root / f"P{number}{evil}")
    lines = (root / "cohort.csv").read_text().splitlines()
    table = [f"{lines[0]},{evil}"] + [f"P{i}{evil},{i % 2},{evil}" for i in range(4)]
    (root / "cohort.csv").write_text("\n".join(table))
    file = tmp_path / "report.html"
    found = explain(make_model("topk"), Cohort.load(root), ExplainSettings(device="cpu"))
    file.write_text(render_page(found), encoding="utf-8")
    for tab in opened(browser, file):  # that complains if a policy had to stop anything
        tab.click("#patients tbody tr a >> nth=0")
        tab.wait_for_selector("#plate .tile")
        assert tab.locator("img[onerror]").count() == 0
        assert evil in tab.locator("#view-patient").inner_text()
    tab = browser.new_page()
    tab.goto(file.as_uri())
    tab.evaluate("document.body.innerHTML = '<img src=x onerror=\"window.hacked = 1\">'")
    tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), "
        "{textContent: 'window.hacked = 1'}))"
    )
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.hacked") is None
    tab.close()


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
    cohort.wait_for_selector("#plate canvas.cell[data-drawn]")
    assert cohort.locator("#plate canvas.map").count() == 0
    cohort.click("#plate-mode :text-is('Raw grid')")
    assert cohort.locator("#plate canvas.map").count() == 4
    grey = cohort.locator("#plate canvas.map").first.evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, 1, 1).data]"
    )
    assert grey[0] == grey[1] == grey[2]
    assert grey[3] == 255
    assert "sum" in cohort.inner_text(".contributions")
    assert "object" not in cohort.inner_text("#view-patient")
    cohort.click("#plate-mode :text-is('Cells')")
    assert cohort.locator("#plate canvas.map").count() == 0


def test_every_cell_has_its_own_picture(browser: Browser, tmp_path: Path) -> None:
    """On the plate, in the dialog and in the strips; more cells than a sheet holds."""
    colours = paint_cohort(tmp_path / "cohort", {"A": PER_SHEET + 3, "B": 2})
    cohort = Cohort.load(tmp_path / "cohort")
    found = explain(make_model("topk"), cohort, ExplainSettings(device="cpu", precision="float32"))
    file = tmp_path / "report.html"
    file.write_text(render_page(found))
    for tab in opened(browser, file):
        tab.wait_for_selector("#extremes [data-drawn]")
        strips = {_painted(tile) for tile in tab.locator("#extremes .tile").all()}
        assert strips <= {_named(each) for each in colours.values()}
        assert len(strips) > 1
        for patient in range(2):
            tab.evaluate(f"location.hash = '#patient={patient}'")
            tab.wait_for_selector(f"#view-patient h1:text-is('{'AB'[patient]}')")
            tab.wait_for_selector("#plate .tile:last-child [data-drawn]")
            for tile in tab.locator("#plate .tile").all():
                name = tile.get_attribute("data-name")
                assert _painted(tile) == _named(colours["AB"[patient], str(name)])
        tab.click("#plate .tile >> nth=1")
        name = tab.inner_text("#cell-title").split(" · ")[1]
        assert _painted(tab.locator("dialog")) == _named(colours["B", name])


def _painted(place: Locator) -> tuple[int, ...]:
    """Return the colour in the middle of the picture there."""
    middle = place.locator("canvas.cell").evaluate(
        "c => [...c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data]"
    )
    return _named(middle[:3])


def _named(colour: Sequence[int]) -> tuple[int, ...]:
    """Return a colour as steps of 32, from which WebP is never far."""
    return tuple(round(value / 32) for value in colour)


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
    assert cohort.locator("#plate canvas.cell").first.is_visible()
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


# --- final models and attention -------------------------------------------------------------------


@contextmanager
def open_page(browser: Browser, explanation: Explanation, file: Path) -> Iterator[Page]:
    file.write_text(render_page(explanation))
    yield from opened(browser, file)


def test_a_final_model_says_what_speaks_for_a_patient(browser: Browser, tmp_path: Path) -> None:
    synthetic = SyntheticSettings(patients=24, test_patients=0, images=3, difficulty=0.0)
    cohort = Cohort.load(write_synthetic_cohort(synthetic, tmp_path / "cohort", workers=1))
    recipe = ExtractSettings(backbone=BACKBONE, precision="float32", device="cpu", threads=1)
    store = extract(cohort, tmp_path / "store.h5", recipe)
    settings = FitSettings(seeds=1, folds=3, epochs=2, fusions=("late",), threads=1)
    fit_heads(store, agg="mean+std", settings=settings, out=tmp_path / "run")
    model = finalize(tmp_path / "run", tmp_path / "model", row="mean+std + clinical (late)")
    explanation = explain(model, cohort, ExplainSettings(device="cpu", precision="float32"))
    with open_page(browser, explanation, tmp_path / "report.html") as page:
        page.evaluate("location.hash = '#patient=2'")
        page.wait_for_selector("#parts")
        told = page.inner_text("#parts")
        assert "What speaks for tumoral: " in told
        assert f"{explanation.shares['images'][2]:+.2f}".replace("-", "−") in told
        assert page.locator("#parts .contributions tr").count() == 1 + 3 + 1 + 1
        assert "Without images" in page.inner_text("#view-patient")
        page.click("nav a[data-view=trust]")
        page.wait_for_selector("#view-trust:not([hidden])")
        table = page.inner_text("#subgroups")
        assert "each judged by what had not seen its label" in table
        assert explanation.subgroups is not None
        assert page.locator("#subgroups tbody tr").count() == len(explanation.subgroups.rows)
        assert "object" not in table
        page.click("nav a[data-view=about]")
        page.wait_for_selector("#view-about:not([hidden])")
        assert "Images and clinical attributes" in page.inner_text("main")


def test_attention_is_called_so(browser: Browser, tmp_path: Path) -> None:
    cohort = Cohort.load(write_red_cohort(tmp_path / "cohort", "0101??"))
    found = explain(network("attention", 0), cohort, ExplainSettings(device="cpu"))
    with open_page(browser, found, tmp_path / "report.html") as page:
        page.evaluate("location.hash = '#patient=3'")
        page.wait_for_selector("[data-strip^='Cells with the highest attention']")
        assert "High attention does not mean that a cell is abnormal" in page.inner_text("main")
        assert page.locator("#order option:text-is('attention')").count() == 1
        shares = page.locator("[data-strip^='Cells'] .tile b").all_inner_texts()
        numbers = [float(share.split()[0]) for share in shares]
        assert numbers == sorted(numbers, reverse=True)
        page.click("#plate .tile >> nth=0")
        assert "Attention" in page.inner_text("dialog dl")
