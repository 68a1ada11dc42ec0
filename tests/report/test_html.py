"""The pages: what they escape, and how they behave in a real browser (Debian's chromium, headless)."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.comparison_runs import make_probs, make_truth

from research.evaluation.calibration import logit
from research.evaluation.metrics import build_metrics
from research.report import run_page
from research.report.document import (
    Below,
    Box,
    Code,
    Document,
    Figure,
    Figures,
    Heading,
    Hidden,
    Link,
    Paragraph,
    Strong,
    Table,
    Typed,
    render_html,
    render_markdown,
)
from research.runs.directory import RunDirectory
from research_config import ExperimentConfig, saved_settings

HOSTILE = "<script>alert(1)</script>"
LABELS = ("হুমকি", HOSTILE, '"><img src=x onerror=alert(2)>')
ABUSE = "</p></details><script>document.title = 'pwned'</script> খারাপ কথা"
BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report.html of a run whose labels and texts attack it."""
    folder = tmp_path_factory.mktemp("html") / "run"
    truth = make_truth(80)
    probs = {name: make_probs(truth, skill, skill) for name, skill in (("teacher", 4), ("control", 2), ("student", 3))}
    parts = {name: {"validation": values, "test": values} for name, values in probs.items()}
    logits = {name: logit(values) for name, values in probs.items()}
    metrics = build_metrics(LABELS, dict.fromkeys(("train", "validation", "test"), truth), parts, {})
    with RunDirectory(folder) as run:
        run.claim(saved_settings(ExperimentConfig(label_columns=LABELS, with_control=True)))
        run.write_history([{"epoch": 1, "total_loss": 0.5, "val_f1_macro": 0.6}])
        run.write_predictions("test", range(80), range(80), LABELS, truth, logits)
        run_page.write_report(folder, metrics, lambda index: dict.fromkeys(index, ABUSE))
    return folder / "report.html"


class Outline(html.parser.HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_page_holds_nothing_from_elsewhere(page: Path) -> None:
    outline = Outline(page.read_text(encoding="utf-8"))
    for _, attributes in outline.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith(("data:", "fold_", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert len(outline.all("script")) == 1 and len(outline.all("style")) == 1
    policy = next(tag["content"] or "" for tag in outline.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_a_report_without_plots_draws_none_and_shows_none(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(page.parent, folder, ignore=shutil.ignore_patterns("plots"))
    metrics = {"labels": [], "headline": {"model": "student", "part": "test", "metric": "f1_macro", "value": 0.5}}
    run_page.write_report(folder, metrics, plots=False)
    assert not (folder / "plots").exists()
    assert Outline((folder / "report.html").read_text(encoding="utf-8")).all("img") == []
    assert "![" not in (folder / "report.md").read_text(encoding="utf-8")


def test_contents_lead_to_every_section(page: Path) -> None:
    outline = Outline(page.read_text(encoding="utf-8"))
    anchors = [f"#{tag['id']}" for tag in outline.all("h2")]
    assert len(set(anchors)) == len(anchors) > 5
    assert [tag["href"] for tag in outline.all("a")] == anchors


def test_scores_and_their_meaning_come_before_figures_and_figures_before_tables(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    order = ['class="box"', "<table", "<nav", 'id="figures"', "<img", 'id="scores-on-the-test-part"', 'id="flags"']
    assert sorted(order, key=text.index) == order and text.count("<nav") == 1
    assert text.index("<small>") < text.index("<nav")  # the intervals


def test_page_can_be_read_aloud(page: Path) -> None:
    outline = Outline(page.read_text(encoding="utf-8"))
    assert outline.all("html") == [{"lang": "en"}]
    assert len(outline.all("h1")) == 1
    assert all(tag.get("alt") for tag in outline.all("img")) and len(outline.all("img")) == 4
    assert {tag.get("scope") for tag in outline.all("th")} == {"col", "row"}
    assert len(outline.all("caption")) == len(outline.all("table")) > 5
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"<button[^>]*>\s*</button>", text)


def test_labels_and_texts_are_escaped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and HOSTILE not in text and "<img src=x" not in text
    assert "&lt;/details&gt;&lt;script&gt;document.title" in text
    assert "alert(1)" not in page.with_name("report.md").read_text(encoding="utf-8").replace("&lt;script&gt;alert(1)", "")


def test_every_inline_and_block_is_rendered_both_ways() -> None:
    blocks: list[Any] = [
        Heading("A <b> heading"),
        Paragraph(("see ", Strong("this*"), ", ", Typed("--kd_alpha"), " and ", Link("fold_1", "fold_1/report"))),
        Table("caption", ["name", "value"], [["a|b", "1"], ["c", Hidden("Show", "secret\u0007 text")]]),
        Code("python x.py ```"),
        Figures([Figure("plots/x.png", "What it shows")]),
        Box([Paragraph(("0.8", Below("0.7 to 0.9")))]),
    ]
    markdown = render_markdown(Document("t", blocks))
    assert r"see **this\***, `--kd_alpha` and [fold_1](fold_1/report.md)" in markdown
    assert r"| a\|b | 1 |" in markdown and "secret" not in markdown and "````bash" in markdown
    assert "\n\n0.8 (0.7 to 0.9)\n" in markdown
    text = render_html(Document("t", blocks), {"plots/x.png": b"png"})
    assert "<p>0.8 <small>0.7 to 0.9</small>" in " ".join(text.split()).replace("> ", ">").replace(" <p", "<p")
    assert '<strong>this*</strong>, <code>--kd_alpha</code> and <a href="fold_1/report.html">' in text
    assert '<p dir="auto">secret\ufffd text</p>' in text and 'alt="What it shows"' in text


def test_words_of_bangla_keep_their_joiners() -> None:
    word = "র‍্যাব"  # with a zero-width joiner
    document = Document(word, [Heading(word)])
    assert word in render_markdown(document) and word in render_html(document, {})


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless chromium that records what its console and its network see."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*BROWSER_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    session = webdriver.Chrome(options=options, service=service)
    yield session
    session.quit()


def open_page(browser: Any, page: Path, width: int = 1200) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


def requested_urls(browser: Any) -> list[str]:
    """Return the addresses asked for since the last call, data URIs and the browser's own pages left out."""
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "chrome:", "about:"))]


def column(browser: Any, table: int, number: int) -> list[str]:
    script = (
        "return Array.from(document.querySelectorAll('table')[arguments[0]].tBodies[0].rows)"
        ".map(row => row.cells[arguments[1]].textContent)"
    )
    return browser.execute_script(script, table, number)


def click_header(browser: Any, table: int, number: int) -> str:
    header = browser.find_elements("css selector", "table")[table].find_elements("css selector", "thead th")[number]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", header)
    header.find_element("css selector", "button").click()
    return header.get_attribute("aria-sort")


def test_opening_a_page_logs_nothing_and_asks_the_network_for_nothing(browser: Any, page: Path) -> None:
    requested_urls(browser)
    browser.get_log("browser")
    open_page(browser, page)
    assert requested_urls(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
    assert browser.title == "run"


def test_hostile_names_do_nothing(browser: Any, page: Path) -> None:
    open_page(browser, page)
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert HOSTILE in browser.find_element("css selector", "main").text
    assert len(browser.find_elements("css selector", "script")) == 1


def test_policy_refuses_a_script_that_got_in(browser: Any, page: Path) -> None:
    open_page(browser, page)
    browser.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.ran = 1'; document.body.append(script);"
        "const image = new Image(); image.src = 'https://example.org/x.png'; document.body.append(image)"
    )
    assert browser.execute_script("return window.ran") is None
    assert sum("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")) == 2


def test_a_click_on_a_header_sorts_by_number_and_back(browser: Any, page: Path) -> None:
    open_page(browser, page)
    before = column(browser, 1, 2)
    assert click_header(browser, 1, 2) == "ascending"
    assert column(browser, 1, 2) == sorted(before, key=float)
    assert click_header(browser, 1, 2) == "descending"
    assert column(browser, 1, 2) == sorted(before, key=float, reverse=True)


def test_signs_and_empty_cells_sort_as_numbers_do(browser: Any, tmp_path: Path) -> None:
    cells = ["+0.02", "–", "1,200", "<0.001", "-0.5", "0.3 to 0.4", "", "9 %"]
    table = Table("numbers", ["n", "value"], [[str(place), cell] for place, cell in enumerate(cells)])
    path = tmp_path / "report.html"
    path.write_text(render_html(Document("t", [table]), {}), encoding="utf-8")
    open_page(browser, path)
    click_header(browser, 0, 1)
    rising = ["-0.5", "<0.001", "+0.02", "0.3 to 0.4", "9\u00a0%", "1,200"]
    assert column(browser, 0, 1)[:6] == rising and set(column(browser, 0, 1)[6:]) == {"–", ""}
    click_header(browser, 0, 1)
    assert column(browser, 0, 1)[:6] == rising[::-1] and set(column(browser, 0, 1)[6:]) == {"–", ""}


def test_first_column_stays_and_dark_readers_get_dark_paper(browser: Any, page: Path) -> None:
    open_page(browser, page, 390)
    cell = "document.querySelectorAll('table')[1].tBodies[0].rows[0].cells[0]"
    before = browser.execute_script(f"return {cell}.getBoundingClientRect().left")
    browser.execute_script("document.querySelectorAll('.scroll')[1].scrollLeft = 200")
    assert browser.execute_script(f"return {cell}.getBoundingClientRect().left") == before
    background = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(background) == "rgb(255, 255, 255)"
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    dark = browser.execute_script(background)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert dark == "rgb(22, 24, 27)"


def test_texts_are_hidden_until_they_are_clicked(browser: Any, page: Path) -> None:
    open_page(browser, page)
    texts = browser.find_elements("css selector", "details p")
    assert len(texts) == 20 and not any(text.is_displayed() for text in texts)
    summary = browser.find_elements("css selector", "details summary")[0]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", summary)
    summary.click()
    assert [text.is_displayed() for text in texts] == [True] + [False] * 19
    assert texts[0].text == ABUSE


@pytest.mark.parametrize("width", [1200, 390])
def test_page_fits_a_desk_and_a_phone(browser: Any, page: Path, width: int) -> None:
    open_page(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    figures = browser.find_elements("css selector", "figure img")
    assert all(0.4 * min(width, 900) < figure.size["width"] <= width for figure in figures)


def test_page_of_a_comparison_sorts_too(browser: Any, tmp_path: Path) -> None:
    from support.comparison_runs import write_run

    import research_compare

    for alpha in (0.3, 0.9):
        write_run(tmp_path / "grid" / f"a{alpha}", 2 + alpha, kd_alpha=alpha)
    assert research_compare.main([str(tmp_path / "grid"), "--resamples", "100", "--output", str(tmp_path / "out")]) == 0
    requested_urls(browser)
    open_page(browser, tmp_path / "out" / "report.html")
    assert browser.get_log("browser") == [] and len(requested_urls(browser)) == 1
    click_header(browser, 0, 0)
    click_header(browser, 0, 0)
    assert column(browser, 0, 0) == ["a0.9", "a0.3"]


def test_rendering_imports_neither_numpy_nor_torch() -> None:
    code = "import sys, research.report.document; sys.exit(bool({'numpy', 'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
