"""The registry's site: what it says of a made-up year, that hostile texts stay texts, and how it shows."""

import io
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from registry_example import (
    BASE,
    GATE,
    HOSTILE,
    adapter_folder,
    evaluation,
    lineage,
    play_pipelines,
    play_year,
    verdict,
)
from test_report import Balance

from qwen_ray.cli import build_parser
from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.registry import PRODUCTION, Registry
from qwen_ray.registry.collect import Retention
from qwen_ray.registry.records import record_evaluation, record_verdict
from qwen_ray.report.lineage_graph import Node, layout
from qwen_ray.report.registry_history import against_base, production_series, read_history
from qwen_ray.report.site import Site, write_site
from qwen_ray.report.site_pages import decided, decisions, spent, standing
from qwen_ray.verbs import Output
from tests.browser import open_alone
from tests.registry.conftest import Clock

GOOD = {**BASE, "biology": 0.44}


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return play_year(tmp_path_factory.mktemp("year"))


@pytest.fixture(scope="module")
def site(year: Registry, tmp_path_factory: pytest.TempPathFactory) -> Site:
    out = tmp_path_factory.mktemp("site")
    return write_site(year, out / "site", pipelines=play_pipelines(out), price=2.5)


@pytest.fixture
def small(tmp_path: Path) -> Registry:
    """One version that a gate would promote, against the base."""
    registry = Registry(tmp_path / "small", clock=Clock())
    made = registry.publish("facts", adapter_folder(tmp_path / "a", "a"), lineage(1))
    record_evaluation(registry, made, evaluation(made.ref, GOOD), location="runs/1.json")
    record_verdict(
        registry, made, verdict("promote", BASE, GOOD, ["biology +20.0: gained"]), baseline="base", run="1"
    )
    return registry


def text(page: Path) -> str:
    """What a page says, on one line."""
    body = page.read_text().partition("<body>")[2]
    flat = " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())
    return re.sub(r"\s([,.;:)])", r"\1", flat)


# -- what histories say


def test_production_and_its_gain_in_one_line(small):
    assert standing(read_history(small, "facts")).word == "Nothing in production"
    assert [v.ref for v in read_history(small, "facts").waiting] == ["facts@1"]
    small.point("facts", PRODUCTION, 1, reason="better")
    history = read_history(small, "facts")
    assert history.waiting == []
    found = standing(history)
    assert (found.word, found.tone) == ("Better than the base", "good")
    assert found.sentence == ("biology +20.0 points (24.0 to 44.0; interval +17.0 to +23.0, n=160).")


def test_waiting_is_what_no_gate_refused_and_nobody_put_away(small, tmp_path):
    small.point("facts", PRODUCTION, 1, reason="better")
    for number in (2, 3, 4):
        folder = adapter_folder(tmp_path / str(number), str(number))
        made = small.publish("facts", folder, lineage(number))
        if number == 2:
            record_verdict(small, made, verdict("hold", GOOD, GOOD, []), baseline="facts@1", run=None)
    small.archive("facts", 3, reason="a mistake")
    assert [version.number for version in read_history(small, "facts").waiting] == [4]


@pytest.mark.parametrize(
    ("scores", "word"),
    [
        ({"biology": 0.25}, "Not shown to be better than the base"),
        ({"biology": 0.60, "history": 0.40}, "Worse than the base somewhere"),
    ],
)
def test_no_gain_and_a_lost_strength_are_said(small, tmp_path, scores, word):
    after = {**BASE, **scores}
    made = small.publish("facts", adapter_folder(tmp_path / "b", "b"), lineage(2))
    record_verdict(small, made, verdict("hold", BASE, after, []), baseline="base", run=None)
    small.point("facts", PRODUCTION, 2, reason="by hand")
    assert standing(read_history(small, "facts")).word == word


def test_against_the_base_through_a_version_between(small, tmp_path):
    made = small.publish("facts", adapter_folder(tmp_path / "b", "b"), lineage(2))
    after = {**GOOD, "biology": 0.5, "history": 0.40}
    record_verdict(small, made, verdict("promote", GOOD, after, []), baseline="facts@1", run=None)
    small.point("facts", PRODUCTION, 2, reason="better")
    history = read_history(small, "facts")
    biology, lost, _ = against_base(history, 2)
    assert (biology.before, biology.after, biology.interval) == (0.24, 0.5, None)
    assert lost.delta == pytest.approx(-0.12)
    assert standing(history).word == "Worse than the base somewhere"


def test_scores_of_production_over_time(year):
    history = read_history(year, "facts")
    biology = production_series(history)[0]
    assert (biology.name, biology.role, biology.base) == ("biology", "target", BASE["biology"])
    times = [measure.at for measure in biology.measures]
    assert times == sorted(times)
    for measure in biology.measures:
        held = [
            p for p in history.periods if p.since <= measure.at and (p.until is None or measure.at <= p.until)
        ]
        assert measure.version in {p.version for p in held}
    starts = {p.since for p in history.periods}
    assert starts <= set(times)  # each change of production shows
    assert len(set(times) - starts) >= 5  # so do the weekly benchmarks between
    assert "untaught facts" not in [s.name for s in production_series(history)]


def test_decisions_say_what_and_why(year):
    found = decisions(read_history(year, "facts"))
    words = [decision.word for decision in found]
    assert words.count("Rolled back to this") == 1
    assert words.count("Override") == 1
    refused = next(d for d in found if d.word == "Gate: regress")
    assert refused.version == 7
    assert refused.why[0].startswith("history -")  # what spoke against it, before what did not
    back = next(d for d in found if d.word == "Rolled back to this")
    assert back.why == [f"users complained {HOSTILE} (by bo)"]


def test_reasons_that_decided_come_first(small):
    def row(name: str, role: str, delta: float, suite: str) -> dict[str, Any]:
        ends = {"baseline": 0.5, "candidate": 0.5 + delta, "delta_ci": [delta - 0.03, delta + 0.03]}
        return {"name": name, "role": role, "n": 100, "suite": suite, **ends}

    reasons = [
        "mmlu/biology +10.0 (interval +7.0 to +13.0, n=100): gained more than 5 points",
        "mmlu/law -5.0 (interval -8.0 to -2.0, n=100): kept, within the tolerance of 6 points",
        "tiny/law -5.0 (interval -8.0 to -2.0, n=100): lost more than the tolerance of 4 points",
        "the adapter has 9 bytes: above the 8 bytes allowed",
    ]
    rows = [row("biology", "target", 0.1, "mmlu"), row("law", "strength", -0.05, "mmlu")]
    value = {
        "verdict": "regress",
        "reasons": reasons,
        "categories": [*rows, row("law", "strength", -0.05, "tiny")],
        "gate": {**GATE, "tolerances": {"mmlu/law": 0.06}},
        "baseline": "base",
    }
    small.record("facts", 1, "verdict", value)
    history = read_history(small, "facts")
    verdict = history.versions[1].verdict
    assert verdict
    assert [change.name for change in verdict.changes] == ["mmlu/biology", "mmlu/law", "tiny/law"]
    assert decided(verdict) == [reasons[2], reasons[3], reasons[0], reasons[1]]
    small.point("facts", PRODUCTION, 1, reason="by hand")
    assert standing(read_history(small, "facts")).sentence.endswith("Worse: tiny/law.")


def test_cost_is_seconds_times_gpus_or_said_to_be_missing(year):
    facts = list(read_history(year, "facts").versions.values())
    total = spent(facts, price=2.5)
    assert (total.versions, total.unknown) == (32, 6)
    assert total.gpu_hours == pytest.approx(26 * 4 * 0.5)
    assert total.dollars == pytest.approx(2.5 * 52)


def test_cost_in_notes_counts_too(small):
    small.record("facts", 1, "note", {"cost": {"seconds": 1800, "gpus": 2}})
    small.record("facts", 1, "note", {"cost": {"seconds": "long", "gpus": 2}})
    found = spent(read_history(small, "facts").versions.values(), price=None)
    assert (found.gpu_hours, found.hours, found.dollars) == (2 + 1, 1.0, None)


def test_events_that_lack_things_are_shown_as_they_are(small, tmp_path):
    small.record("facts", 1, "verdict", {"verdict": "hmm", "categories": [{"name": "x"}, "odd"]})
    small.record("facts", 1, "evaluation", {"categories": {"x": {"score": "high"}, "y": {"score": 0.5}}})
    small.record("facts", 1, "override", {})
    write_site(small, tmp_path / "out")
    page = text(tmp_path / "out" / "adapters" / "facts" / "1.html")
    assert "suite not recorded" in page
    assert "somebody decided against the gate, which said nothing" in page
    assert "hmm" in page


# -- the graph


def test_lanes_of_the_graph_do_not_cross_dots():
    def version(number: int, *parents: str) -> Node:
        return Node(f"v{number}", f"v{number}", parents)

    versions = [
        version(1, "base"), version(2, "v1"), version(3, "v1"), version(4, "v2"),
        version(5, "base"), version(6, "v4", "v3"), version(7, "v3"), version(8, "v1"),
    ]  # fmt: skip
    places = layout([Node("base", "base")], versions)
    assert places.lane["base"] == 0
    assert places.lane["v1"] == places.lane["v2"] == places.lane["v4"] == places.lane["v6"]
    for child in versions:
        (parent, *_) = child.parents
        if parent != "base":  # the line runs in the child's lane, from its row down to the parent's
            between = range(places.row[parent] + 1, places.row[child.key])
            inside = [v.key for v in versions if places.row[v.key] in between]
            on_line = [key for key in inside if places.lane[key] == places.lane[child.key]]
            assert on_line == []


# -- the pages


def test_a_page_for_the_registry_each_name_and_each_version(site):
    have = {str(p.relative_to(site.index.parent)) for p in site.pages}
    versions = {f"adapters/facts/{n}" for n in range(1, 33)} | {"adapters/both/1"}
    files = {f"{v}.{kind}" for v in versions for kind in ("html", "md")}
    assert have == {"index.html", "adapters/facts/index.html", "adapters/both/index.html", *files}


def test_every_link_leads_to_a_page(site):
    seen = 0
    for page in site.pages:
        if page.suffix == ".html":
            for href in re.findall(r'<a href="([^"]+)"', page.read_text()):
                assert (page.parent / href).is_file(), (page, href)
                seen += 1
    assert seen > 300


def test_first_page_answers_what_a_manager_asks(site):
    said = text(site.index)
    for part in (
        "adapters 2 in production 1 versions 33 verdicts 32 GPU-hours 52 dollars 130.00",
        "facts@31 Higher than the base biology +",
        "In production since 2026-12-04: verdict of run 31 (by run 0031)",
        "Canary facts@32 answers 10 %",
        "Waiting both@1 (not judged yet)",
        "52 GPU-hours",
        "130.00 dollars; 6 of 32 versions recorded no cost",
        "new data: <script>",
        "Promote facts@1",
        "10.0 min; stages done: train",
        "Not finished 0.0 min; stages done: train 1 failure train: the loss is nan",
    ):
        assert part in said, part
    assert said.count("Gate: ") == 32


def test_a_versions_page_explains_it(site):
    said = text(site.index.parent / "adapters/facts/10.html")
    for part in (
        "ana decided against the gate, which said hold",
        "Made from facts@9",
        "2026-04-15 to 2026-04-26",
        "against facts@9",
        "s3://results/10.json",
        "CC-BY-3.0 (800), MIT (9)",
        "optim.learning_rate 0.0002",
        '"fingerprint": "b0d11b31',
        "no clear gain",
    ):
        assert part in said, part


def test_what_comes_from_outside_is_escaped_on_every_page(site):
    for page in site.pages:
        if page.suffix == ".html":
            source = page.read_text()
            parser = Balance()
            parser.feed(source)
            assert parser.open == []
            assert len(parser.ids) == len(set(parser.ids)), page
            assert not re.search(r"<(script|iframe|img|object|embed)\b|@import|\bsrc=|https?://", source)
    assert "&lt;script&gt;" in site.index.read_text()


def test_the_same_registry_gives_the_same_bytes(small, tmp_path):
    first, second = (write_site(small, tmp_path / name) for name in ("a", "b"))
    assert [p.read_bytes() for p in first.pages] == [p.read_bytes() for p in second.pages]


def test_an_empty_registry_and_missing_pipelines(tmp_path):
    registry = Registry(tmp_path / "none")
    page = text(write_site(registry, tmp_path / "out").index)
    assert "The registry is empty." in page
    with pytest.raises(UserError, match="no pipeline has run here"):
        write_site(registry, tmp_path / "out", pipelines=tmp_path / "none")


def test_what_was_removed_keeps_its_page(small, tmp_path):
    made = small.publish("facts", adapter_folder(tmp_path / "b", "b"), lineage(2))
    small.archive("facts", 1, reason="old")
    small.clock.days(3)
    assert [r.version for r in small.collect(Retention(archived_days=1), dry_run=False)] == [1]
    write_site(small, tmp_path / "out")
    pages = tmp_path / "out" / "adapters" / "facts"
    assert made.ref in text(pages / "2.html")
    said = text(pages / "1.html")
    assert "files removed" in said
    assert "biology +20.0: gained" in said
    assert "v1 2026-01-01 promote files removed" in text(pages / "index.html")


# -- the verb


def report(*words: str) -> dict[str, Any]:
    """What ``qwen-ray report --json`` prints."""
    stdout = io.StringIO()
    args = build_parser().parse_args(["report", "--json", *words])
    assert args.verb(args, Output(stdout, as_json=True)) == EXIT_OK
    found: dict[str, Any] = json.loads(stdout.getvalue())
    return found


def test_verb_writes_the_site(small, tmp_path):
    out = tmp_path / "out"
    said = report("--registry", str(small.root), "--out", str(out), "--title", "Ours & theirs")
    assert said == {"report": str(out / "index.html"), "pages": 4, "adapters": ["facts"]}
    assert "<h1>Ours &amp; theirs</h1>" in (out / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--registry", "nowhere"], "no such registry"),
        ([], "nothing to report on"),
        (["before.json"], "nothing to report on"),
        (["a.json", "b.json", "--registry", "."], "BASELINE is for a report on two results"),
        (["--targets", "biology", "--price", "2"], "--targets is for a report on two results, --price"),
        (["--pipelines", "."], "nothing to report on"),
        (["--registry", ".", "--price", "-1"], "-1 is no price"),
        (["--registry", ".", "--pipelines", "."], "no pipeline has run here"),
        (["a.json", "b.json"], "no such file"),
    ],
)
def test_verb_says_what_is_wrong(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        report(*words, "--out", "out")
    assert not (tmp_path / "out").exists()


# -- in a browser


@pytest.mark.parametrize("page", ["index", "adapters/facts/index", "adapters/facts/10"])
@pytest.mark.parametrize("size", [(390, "dark"), (800, "light"), (1600, "light")])
def test_pages_show_whole_and_alone(browser, site, tmp_path, page, size):
    width, scheme = size
    file = site.index.parent / f"{page}.html"
    shown = open_alone(browser, file, width=width, scheme=scheme, picture=tmp_path / "site.png")
    assert shown.locator("h1").is_visible()
    for plot in shown.locator("svg.plot").all():
        assert plot.bounding_box()["width"] > 300
    table = shown.locator("table.log, table.scores").first.bounding_box()
    assert table["x"] + table["width"] <= width
    shown.close()


def test_keyboard_reaches_links_and_shows_where_it_is(browser, site):
    page = browser.new_page(viewport={"width": 800, "height": 900})
    page.goto((site.index.parent / "adapters/facts/index.html").as_uri())
    page.keyboard.press("Tab")
    focused = "getComputedStyle(document.activeElement)"
    assert page.evaluate("document.activeElement.textContent") == "Adapters in production"
    assert page.evaluate(f"{focused}.outlineStyle") == "solid"
    link = page.locator("svg.lineage a").first
    link.focus()
    assert page.evaluate(f"{focused}.outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_url("**/facts/32.html")
    assert page.get_by_role("heading", name="facts@32").is_visible()
    page.close()


def test_readable_without_javascript(browser, site):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 800, "height": 900})
    page = context.new_page()
    page.goto(site.index.as_uri())
    assert page.get_by_role("heading", name="facts@31").is_visible()
    older = page.get_by_text("older", exact=False).first
    older.click()  # details unfold by the browser itself
    assert page.get_by_text("The same, older").is_visible()
    context.close()
