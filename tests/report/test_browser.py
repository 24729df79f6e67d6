"""The report in a real browser: nothing is asked of the network, everything shows, it fits a phone."""

from pathlib import Path

import pytest
from report_example import BASE, GOOD, comparison, example, result

from tests.browser import open_alone

LONG = "mmlu high_school_european_history_and_more"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example(tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
)
def test_report_shows_whole_and_alone(browser, report, tmp_path, width, scheme):
    page = open_alone(
        browser, report, width=width, scheme=scheme, picture=tmp_path / f"report-{width}-{scheme}.png"
    )

    assert page.get_by_role("heading", name="Verdict Promote").is_visible()
    row = page.locator("#scores-section tbody tr").first
    assert row.is_visible()
    shown = " ".join(row.inner_text().split())
    assert shown == "biology target 160 24.0 17.0 to 31.0 62.0 55.0 to 69.0 +38.0 +33.0 to +43.0 gained"
    assert page.locator("#scores-section tbody tr").count() == 3
    assert "−21.0" in page.locator("#extra").inner_text()

    plots = page.locator("svg.plot")
    assert plots.count() == 3
    for i in range(3):
        box = plots.nth(i).bounding_box()
        assert box["width"] > 300
        assert box["height"] > 80
    page.close()


def test_colours_follow_the_scheme(browser, report):
    seen = set()
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(report.as_uri())
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        # A plot's text takes its colour from the page's variables.
        text = page.evaluate("getComputedStyle(document.querySelector('svg.plot text')).fill")
        assert paper != text
        seen.add((paper, text))
        page.close()
    assert len(seen) == 2


def test_long_names_do_not_push_a_phone_sideways(browser, tmp_path):
    before, after = result(None, BASE), result("a-rather-long-adapter-name-for-a-phone@12", GOOD)
    for r in (before, after):
        r["categories"][LONG] = dict(r["categories"]["history"])
    path = example(
        tmp_path / "long.html",
        comparison=comparison(before, after),
        baseline=before,
        candidate=after,
        commands=["qwen-ray train --out " + "x" * 200],
        extra=None,
    )
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.goto(path.as_uri())
    page.screenshot(path=tmp_path / "long.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.get_by_role("rowheader", name=LONG).is_visible()
    page.close()
