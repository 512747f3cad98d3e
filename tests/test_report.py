"""The report: one file that opens offline, in a real browser, without an error; charts drawn, tables that sort."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from figures import changed, judged, latency
from forms import random_path, signature_of
from shipped import bundle_of

from deploy_prune.cli.main import run_command
from deploy_prune.release.manifest import Manifest
from deploy_prune.release.report import write_report
from deploy_prune.release.report.figures import figures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def bundle(tiny_vit, tmp_path):
    path = bundle_of(tiny_vit, tmp_path)
    random_path(tiny_vit, signature_of("tiny_vit")).save(path / "path.safetensors")
    cells = [(1.0, 1.0, 1.0), (0.5, 0.45, 0.6)]
    dense, small = [[latency(*cell), latency(*cell, batch=8)] for cell in cells]
    return changed(
        path,
        dense={**judged(path, "dense", [1.0] * 80 + [0.0] * 20), "latency": dense},
        s02={**judged(path, "s02", [1.0] * 78 + [0.0] * 22), "latency": small},
    )


def test_page_is_one_file_that_names_no_other_and_is_the_same_each_time(bundle, tmp_path):
    page = write_report(bundle, tmp_path / "report.html").read_text()
    assert page == write_report(bundle, tmp_path / "again.html").read_text()
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg|tritonclient.http|http-equiv", "", page)
    assert not re.search(r"<(link|img|iframe)|src=|url\(|@import", page)
    assert "default-src 'none'" in page


def test_finished_bundle_has_its_report_inside_and_takes_no_other_file(bundle, capsys):
    manifest = Manifest.load(bundle / "manifest.json")
    assert "report.html" in manifest.files
    assert run_command(["report", str(bundle), "-o", str(bundle / "again.html")]) == 2
    assert not (bundle / "again.html").exists()


def test_figures_are_those_of_the_manifest_the_plans_and_the_path(bundle):
    found = figures(bundle, Manifest.load(bundle / "manifest.json"))
    _, small = found["members"]
    assert small["latency"][0]["p50"] == 2.0 and small["drop"]["value"] == pytest.approx(0.02)
    assert found["cells"] == ["ort-cpu b1", "ort-cpu b8"]
    heads = found["widths"]["head"]
    assert heads["total"] == [3, 3] and heads["kept"]["s02"] == [2, 2]
    assert found["widths"]["qk"]["kept"]["s02"] == found["widths"]["qk"]["total"]  # of every head that stays
    assert [row["units"] for row in found["path"]["neuron"]] == found["widths"]["neuron"]["total"]
    assert all(row["values"] == sorted(row["values"], reverse=True) for row in found["path"]["neuron"])


def test_text_of_a_bundle_cannot_end_the_script_it_stands_in(bundle, tmp_path):
    manifest = Manifest.load(bundle / "manifest.json")
    evil = "</script><script>alert(1)</script>"
    manifest.model_copy(update={"base": manifest.base.model_copy(update={"reference": evil})}).save(
        bundle / "manifest.json"
    )
    page = write_report(bundle, tmp_path / "report.html").read_text()
    assert evil not in page and page.count("</script>") == 2


def test_pictures_are_written_as_png(bundle, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    arguments = ["report", str(bundle), "-o", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")]
    assert run_command(arguments) == 0
    for name in ("tradeoff", "path", "widths"):
        assert (tmp_path / f"png/{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as driver:
        folder = tmp_path_factory.mktemp("browser")
        context = driver.chromium.launch_persistent_context(
            folder, executable_path=CHROMIUM, args=FLAGS, timeout=120_000
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, bundle, tmp_path) -> Iterator[Any]:
    """The open report; the test fails when the page said anything to the console or asked for anything."""
    said: list[str] = []
    asked: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(write_report(bundle, tmp_path / "report.html").as_uri())
    yield page
    page.close()
    assert said == []
    assert len(asked) == 1, asked


def column(page: Any, index: int) -> list[str]:
    return page.eval_on_selector_all(
        f"#family-table tbody tr td:nth-child({index})", "all => all.map(c => c.innerText)"
    )


def test_browser_draws_every_chart_and_table(page):
    assert page.title() == "tiny · deploy-prune"
    assert page.locator("#pareto-chart circle").count() == 2
    assert page.locator("#width-chart circle").count() > 0
    assert page.locator("#parity-table tbody tr").count() == 2
    drawn = page.evaluate(
        "() => { const c = document.querySelector('#path-chart canvas');"
        " return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size }"
    )
    assert drawn > 50  # many colours, not an empty picture
    assert page.locator("#environment-table tr").count() > 1


def test_browser_sorts_by_a_heading_with_the_keyboard(page):
    assert column(page, 1) == ["dense", "s02"]
    page.focus("#family-table th:nth-child(5) button")
    page.keyboard.press("Enter")
    assert column(page, 1) == ["s02", "dense"]
    assert page.get_attribute("#family-table th:nth-child(5)", "aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert column(page, 1) == ["dense", "s02"]


def test_browser_reaches_every_control_and_point_with_the_tab_key(page):
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "() => { const a = document.activeElement; return a.id || a.closest('[id]')?.id || a.tagName }"
            )
        )
    wanted = {"theme", "family-table", "cost", "filter", "pareto-chart", "path-kind", "path-chart", "width-kind",
              "width-chart", "load-member", "load-tabs", "load-code"}  # fmt: skip
    assert wanted <= reached


def test_browser_shows_figures_of_a_point_in_focus_and_hides_members(page):
    page.focus("#pareto-chart circle >> nth=1")
    assert "s02" in page.inner_text("#tip") and "0.78" in page.inner_text("#tip")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")
    page.click("#filter button >> nth=1")
    assert page.locator("#pareto-chart circle").count() == 1
    page.select_option("#cost", "bytes")
    assert "file size" in page.inner_text("#pareto-chart")


def test_browser_reads_the_path_with_arrow_keys_and_switches_languages(page):
    page.focus("#path-chart canvas")
    first = page.inner_text("#path-says")
    page.keyboard.press("ArrowDown")
    assert first != page.inner_text("#path-says") and "leaves at" in first
    page.click("#load-tabs >> text=C++")
    assert "Ort::Session" in page.inner_text("#load-code") and "models/s02.onnx" in page.inner_text("#load-code")
    page.keyboard.press("ArrowRight")
    assert "tritonclient" in page.inner_text("#load-code")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_browser_fits_the_page_to_phone_and_desk_in_light_and_dark(page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_function("document.querySelector('#pareto-chart svg').clientWidth <= innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, ground = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] }"
    )
    assert contrast(ink, ground) >= 7  # WCAG AAA for text


def contrast(first: str, second: str) -> float:
    """Contrast of two CSS colours by WCAG 2.2: (L₁ + 0.05) / (L₂ + 0.05)."""

    def luminance(css: str) -> float:
        parts = [int(c) / 255 for c in re.findall(r"\d+", css)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_bundles_without_path_scores_or_latency_still_have_a_page(tiny_vit, tmp_path):
    bare = bundle_of(tiny_vit, tmp_path)
    assert Path(write_report(bare, tmp_path / "bare.html")).read_text().startswith("<!doctype html>")
