"""The data card: every figure is shown, every text is text, and the page stands alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from lxml import html

from qwen_ray.data.preparation.card import HITS_FOLDED, HITS_SHOWN, LONG, SHOWN, write_card
from qwen_ray.fsio import beside
from tests.conftest import record

EVIL = "<script>alert('x')</script> & \"<b onclick='y'>\" </details></style>"
TOPICS = {f"chapter-{i:02}": 40 - i for i in range(SHOWN + 7)}


def example() -> dict[str, Any]:
    """A card with every part filled in."""
    kept = [record(f"What is the {i}th organelle?", f"Organelle {i}.", id=f"book/{i}") for i in range(10)]
    hit = {
        "record": "book/9", "where": "book.tar:page/4", "benchmark": "mmlu history", "item": "test-3",
        "part": "passage", "kind": "13-gram", "score": 1.0, "text": "when in the course of human events",
    }  # fmt: skip
    near = {**hit, "record": "book/11", "part": "question", "kind": "near", "score": 0.934, "item": "test-4"}
    return {
        "schema": "qwen-ray/data-card/1",
        "domain": "biology",
        "out": "biology.jsonl",
        "seed": 7,
        "asked": 2000,
        "written": 1600,
        "short_by": 400,
        "not_drawn": 12,
        "sources": {
            "book": {
                "title": "A Book",
                "license": "CC-BY-4.0",
                "read": 12345,
                "kept": 1200,
                "where_to_get": "x.org",
            },
            "trivia": {
                "title": "Trivia",
                "license": "CC0-1.0",
                "read": 655,
                "kept": 400,
                "where_to_get": "y.org",
            },
        },
        "per_license": {"CC-BY-4.0": 1200, "CC0-1.0": 400},
        "coverage": {
            "topics": TOPICS,
            "thin": ["chapter-25", "chapter-26"],
            "lengths": {
                "question": {"p5": 20, "p50": 75.5, "p95": 300, "max": 19000},
                "answer": {"p5": 1, "p50": 30, "p95": 700, "max": 5000},
            },
            "kinds": {"long": 100, "multiple choice": 1500},
        },
        "dropped": {
            "not UTF-8": {"count": 3, "examples": [{"where": "a.jsonl:12", "shown": "�� bytes"}]},
            "duplicate": {"count": 250, "examples": [{"where": "", "shown": "What is a cell?"}]},
        },
        "contamination": {
            "checked": [{"benchmark": "gsm8k", "items": 1319}, {"benchmark": "mmlu history", "items": 204}],
            "hits": [hit, near, {**hit, "item": "test-5"}],
        },
        "difficulty": {"p5": 0.4123, "p50": 1.5, "p95": 4.0},
        "examples": [r.to_dict() for r in kept],
        "hashes": {"data": "d" * 64, "inputs": "1" * 64},
    }


def page(card: dict[str, Any], folder: Path) -> Any:
    return html.fromstring(write_card(card, folder / "biology.jsonl").read_bytes())


def words(element: Any) -> str:
    """Text with its spaces made one."""
    return " ".join(element.text_content().split())


def rows(table: Any) -> list[list[str]]:
    return [[words(cell) for cell in row.xpath("th|td")] for row in table.xpath("tbody/tr")]


def test_files(tmp_path: Path) -> None:
    out = tmp_path / "biology.jsonl"
    path = write_card(example(), out)
    assert path == beside(out, "card.html") == tmp_path / "biology.jsonl.card.html"
    assert json.loads((tmp_path / "biology.jsonl.card.json").read_text()) == example()
    first = path.read_bytes()
    assert write_card(example(), out).read_bytes() == first
    text = first.decode()
    assert text.startswith("<!DOCTYPE html>")
    assert not html.fromstring(first).xpath("//script | //link[@href!='data:,'] | //img | //iframe")
    assert "url(" not in text
    assert "@import" not in text


def test_numbers_sources_and_licences(tmp_path: Path) -> None:
    tree = page(example(), tmp_path)
    names = [words(e) for e in tree.xpath("//section[@id='numbers']//dt")]
    values = [e.text_content() for e in tree.xpath("//section[@id='numbers']//dd")]
    assert dict(zip(names, values, strict=True)) == {
        "written": "1\u202f600", "read": "13\u202f000", "left out": "253", "sound, not drawn": "12",
        "topics": "27", "benchmark hits": "3",
    }  # fmt: skip
    assert "400 fewer than the 2 000 asked for" in words(tree.xpath("//section[@id='numbers']")[0])
    sources, licences = map(rows, tree.xpath("//section[@id='sources']/table"))
    assert sources[0] == ["A Bookbook, CC-BY-4.0x.org", "12 345", "1 20075.0 %"]
    assert [row[1] for row in sources] == ["12 345", "655"]
    assert licences == [["CC-BY-4.0", "1 20075.0 %"], ["CC0-1.0", "40025.0 %"]]
    assert "d" * 64 in words(tree.xpath("//section[@id='hashes']")[0])


def test_coverage(tmp_path: Path) -> None:
    tree = page(example(), tmp_path)
    (section,) = tree.xpath("//section[@id='coverage']")
    open_topics, kinds, lengths = section.xpath("./table")
    (folded,) = section.xpath("./details[summary='7 more']/table")
    shown = rows(open_topics) + rows(folded)
    assert len(rows(open_topics)) == SHOWN
    assert [row[0].removesuffix("thin") for row in shown] == list(TOPICS)
    assert [row[0] for row in shown if row[0].endswith("thin")] == ["chapter-25thin", "chapter-26thin"]
    # The bars are to one scale, folded or not: the longest is full.
    widths = [float(w) for w in section.xpath(".//table[contains(., 'chapter')]//rect/@width")]
    assert widths == [pytest.approx(100 * n / 40, abs=0.01) for n in TOPICS.values()]
    assert [words(li) for li in section.xpath("./div[@id='thin']//li")] == ["chapter-25", "chapter-26"]
    assert rows(kinds) == [["multiple choice", "", "1 50093.8 %"], ["long", "", "1006.2 %"]]
    assert rows(lengths)[0] == ["question", "20", "75.5", "300", "19 000"]
    assert "p5 0.412, median 1.5, p95 4" in words(section.xpath("./p[@id='difficulty']")[0])


def test_drops_are_named_with_examples(tmp_path: Path) -> None:
    tree = page(example(), tmp_path)
    duplicate, bytes_ = tree.xpath("//section[@id='dropped']/details")
    assert words(duplicate.find("summary")) == "duplicate 250"  # most frequent first
    assert "What is a cell?" in words(duplicate)
    assert "249 more of this kind" in words(duplicate)
    assert words(bytes_.find("summary")) == "not UTF-8 3"
    assert "a.jsonl:12" in words(bytes_)


def test_hits_are_counted_by_part_and_named_one_by_one(tmp_path: Path) -> None:
    tree = page(example(), tmp_path)
    (section,) = tree.xpath("//section[@id='contamination']")
    # Record book/9 hits two passages and is one record.
    assert rows(section.find("table")) == [
        ["mmlu history", "204", "1 passage1 question"],
        ["gsm8k", "1 319", "none"],
    ]
    exact, near, other = (words(li) for li in section.xpath("./ul/li"))
    assert exact.startswith(
        "mmlu history, item test-3: passage, 13-gramrecord book/9, book.tar:page/4 when in"
    )
    assert near.startswith("mmlu history, item test-4: question, near 0.93record book/11")
    assert "test-5" in other

    card = example()
    hit = card["contamination"]["hits"][0]
    card["contamination"]["hits"] = [{**hit, "item": f"test-{i}"} for i in range(HITS_SHOWN + 9)]
    (section,) = page(card, tmp_path).xpath("//section[@id='contamination']")
    assert len(section.xpath("./ul/li")) == HITS_SHOWN
    assert len(section.xpath("./details[summary='9 more hits']//li")) == 9
    assert "JSON file" not in words(section)

    card["contamination"]["hits"] *= 20
    (section,) = page(card, tmp_path).xpath("//section[@id='contamination']")
    assert len(section.xpath("./details//li")) == HITS_FOLDED
    assert f"{20 * (HITS_SHOWN + 9) - HITS_SHOWN - HITS_FOLDED} more are in the card's JSON" in words(section)


def test_what_is_absent_is_said(tmp_path: Path) -> None:
    card = example() | {"difficulty": None, "asked": None, "short_by": 0, "dropped": {}, "examples": []}
    card["contamination"] = {"checked": [], "hits": []}
    card["coverage"] |= {"topics": {}, "thin": [], "kinds": {}}
    tree = page(card, tmp_path)
    assert "Not checked against any benchmark" in words(tree.xpath("//section[@id='contamination']")[0])
    assert "Nothing was left out" in words(tree.xpath("//section[@id='dropped']")[0])
    assert not tree.xpath("//p[@id='difficulty']")
    assert "asked for" not in words(tree)
    card["coverage"] |= {"topics": {"cells": 3}}
    assert "No topic is thin" in words(page(card, tmp_path))


def _poison(value: Any) -> Any:
    """The same card with markup in every text and name."""
    if isinstance(value, dict):
        return {key: _poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_poison(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


def test_texts_stay_texts(tmp_path: Path) -> None:
    card = _poison(example())
    for section in ("sources", "per_license", "dropped"):
        card[section] = {name + EVIL: value for name, value in card[section].items()}
    for section in ("topics", "kinds", "lengths"):
        card["coverage"][section] = {name + EVIL: value for name, value in card["coverage"][section].items()}
    clean, poisoned = page(example(), tmp_path), page(card, tmp_path)

    def tags(tree: Any) -> list[str]:
        return [
            e.tag for e in tree.iter() if e.tag not in ("small", "wbr")
        ]  # "thin" is told by name, / breaks

    assert tags(poisoned) == tags(clean)
    told = poisoned.text_content()
    for text in (
        card["examples"][0]["messages"][0]["content"],
        card["dropped"]["duplicate" + EVIL]["examples"][0]["shown"],
    ):
        assert EVIL in text
        assert text in told


def test_long_texts_are_folded_and_whole(tmp_path: Path) -> None:
    card = example()
    text = " ".join(str(i) for i in range(LONG))
    card["examples"][0]["messages"][1]["content"] = text
    (article, *_) = page(card, tmp_path).xpath("//section[@id='examples']/article")
    beginning, rest = article.xpath(".//div[contains(@class, 'assistant')]//div[@class='content']")
    assert len(beginning.text_content()) <= LONG
    assert f"{beginning.text_content()} {rest.text_content()}" == text
    assert rest.getparent().tag == "details"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    """Nothing is asked of the network, no script runs, and long names do not push a phone sideways."""
    card = copy.deepcopy(example())
    card["coverage"]["topics"]["chapter/" + "a-very-long-topic-name" * 5] = 12
    card["sources"]["n" * 90] = card["sources"]["book"] | {"where_to_get": "https://example.org/" + "y" * 150}
    card["examples"][0]["messages"][0]["content"] = EVIL + "z" * 400
    path = write_card(card, tmp_path / "biology.jsonl")
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    view.on("console", lambda message: said.append(message.text))
    view.on("dialog", lambda dialog: said.append(dialog.message))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(path.as_uri())
    assert said == []
    assert asked == [path.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    bars = view.locator("#coverage > table.coverage").first.locator("svg.bar rect")
    first, last = bars.nth(0).bounding_box(), bars.nth(SHOWN - 1).bounding_box()
    assert first["width"] > 60
    assert last["width"] == pytest.approx(first["width"] * (40 - SHOWN + 1) / 40, rel=0.02)
    fold = view.locator("#dropped details").first
    assert not fold.get_by_text("What is a cell?").is_visible()
    fold.locator("summary").click()
    assert fold.get_by_text("What is a cell?").is_visible()
    view.close()
