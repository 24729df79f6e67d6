"""The report's contents, its escaping, and that it needs nothing but itself."""

import re
from html.parser import HTMLParser

import pytest
from report_example import BASE, EXPLANATION, GOOD, comparison, example, result

from qwen_ray.errors import UserError
from qwen_ray.report.html import RunCurve
from qwen_ray.report.plots import before_after, loss_curve
from qwen_ray.report.rows import category_rows


@pytest.fixture
def page(tmp_path) -> str:
    return example(tmp_path / "report.html").read_text()


class Balance(HTMLParser):
    """Fails on a tag that is closed out of turn, and collects ids."""

    VOID = ("meta", "link", "path", "use", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_markup_is_balanced_and_ids_are_unique(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    # Whatever a plot refers to by id is there.
    for ident in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert ident in parser.ids


def test_it_needs_nothing_but_itself(page):
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//\w", page)
    assert not re.search(r"<(script|iframe|img|object|embed)\b|@import|\bsrc=", page)
    assert page.count("<link") == 1
    assert "default-src 'none'" in page


def test_parts_come_in_order(page):
    parts = [
        'class="verdict promote"',
        "Every target gained enough",
        "gained more than 5 points",
        "<caption>Scores in points",
        'aria-label="Scores before and after. biology: before 24.0, after 62.0;',
        'aria-label="Loss of run facts over the steps: training',
        'aria-label="Loss of run facts, without replay over',
        "<h2>Without replay</h2>",
        "verdict regress</caption>",
        EXPLANATION,
        "What the scores mean",
        "A target must gain more than 5 points",
        "Why these categories",
        "qwen-ray train configs/facts.yaml --out runs/facts\n",
        "<caption>Versions</caption>",
        "<caption>Settings</caption>",
        "evaluation: batch.size",
        "<caption>Training data mixture</caption>",
        "MIT, unknown",
    ]
    found = [page.find(part) for part in parts]
    assert -1 not in found, parts[found.index(-1)]
    assert found == sorted(found)


def test_tables_are_accessible(page):
    assert '<html lang="en">' in page
    assert "<title>Facts for the tiny model</title>" in page
    tables = re.findall(r"<table.*?</table>", page, re.S)
    assert len(tables) == 6
    for table in tables:
        assert "<caption>" in table
        assert 'scope="col"' in table
        assert 'scope="row"' in table
        assert not re.search(r"<th(?! scope=|ead)", table)
    assert page.count('role="img" aria-label="') == 3


def test_everything_from_outside_is_escaped(tmp_path):
    bad = '<script>alert("x")</script>'
    names = {bad: 0.3, "untaught facts": 0.2}
    before, after = result(None, names), result(bad, names)
    for r in (before, after):
        r["categories"] = {bad: {"role": "target", "n": 9, "score": 0.3, "ci": [0.1, 0.5], "metric": bad}}
        r["settings"] = {bad: bad}
    page = example(
        tmp_path / "r.html",
        title=bad,
        comparison=comparison(before, after, reasons=[bad]),
        baseline=before,
        candidate=after,
        runs=[RunCurve(bad, [{"step": 1, "loss": 2.0}])],
        sections=[],
        commands=[bad],
        versions={bad: bad},
        extra=None,
        mixture=None,
    ).read_text()
    assert "<script" not in page
    assert "alert(&#34;x&#34;)" in page
    parser = Balance()
    parser.feed(page)


@pytest.mark.parametrize("verdict", ["promote", "hold", "regress"])
def test_each_verdict_is_a_word_and_a_colour(tmp_path, verdict):
    before, after = result(None, BASE), result("facts@1", GOOD)
    page = example(tmp_path / "r.html", comparison=comparison(before, after, verdict)).read_text()
    assert f'class="verdict {verdict}"' in page
    assert f"</small> {verdict.capitalize()}</h2>" in page


def test_meaning_depends_on_the_role():
    before = result(None, BASE)

    def meanings(**scores: float) -> dict[str, str]:
        after = result("facts@1", {**BASE, **scores})
        return {row.name: row.meaning for row in category_rows(comparison(before, after), before, after)}

    assert meanings(biology=0.34, history=0.47) == {
        "biology": "gained",
        "history": "lost",
        "arithmetic": "kept",
    }
    assert meanings(biology=0.26, history=0.60) == {
        "biology": "no clear gain",
        "history": "gained as well",
        "arithmetic": "kept",
    }
    assert meanings(biology=0.26)["biology"] == "no clear gain"
    assert meanings(biology=0.14)["biology"] == "got worse"


def test_a_setting_that_differs_shows_both(tmp_path):
    before, after = result(None, BASE), result("facts@1", GOOD)
    before["settings"]["seed"] = 1
    page = example(tmp_path / "r.html", baseline=before, candidate=after).read_text()
    assert "baseline 1, candidate 0" in page


def test_a_result_that_was_not_compared_is_refused(tmp_path):
    other = result(None, {"biology": 0.2, "untaught facts": 0.2})
    with pytest.raises(UserError, match="the baseline result has no category 'history'"):
        example(tmp_path / "r.html", baseline=other)
    assert not (tmp_path / "r.html").exists()


def test_bare_minimum_still_renders(tmp_path):
    nothing = {"runs": [], "sections": [], "commands": [], "versions": {}, "extra": None, "mixture": None}
    page = example(tmp_path / "r.html", **nothing).read_text()
    assert 'id="training"' not in page
    assert 'id="extra"' not in page
    run = RunCurve(
        "odd", [{"step": 1, "loss": float("nan")}, {"loss": 2.0}, {"step": 2, "tokens_per_second": 9.0}]
    )
    assert "Run odd recorded no loss." in example(tmp_path / "r.html", runs=[run]).read_text()


def test_same_input_same_bytes(tmp_path):
    assert example(tmp_path / "a.html").read_bytes() == example(tmp_path / "b.html").read_bytes()


def test_plots_keep_names_that_look_like_formulas():
    before, after = result(None, BASE), result("facts@1", GOOD)
    rows = category_rows(comparison(before, after), before, after)
    strange = [type(rows[0])(**{**vars(rows[0]), "name": "cost $x_1$ & more"})]
    assert ">cost $x_1$ &amp; more<" in before_after(strange, "p")
    assert loss_curve(RunCurve("none", []), "p") is None
