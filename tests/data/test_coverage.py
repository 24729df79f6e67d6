"""Places, the even draw, and the coverage report."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from qwen_ray.data.preparation import coverage
from qwen_ray.data.quality import turns
from qwen_ray.data.records import Message, Record


def book_record(
    id: str, *, question: str = "Why is that so?", answer: str = "Because.", **more: str
) -> Record:
    messages = (Message("user", question), Message("assistant", answer))
    return Record(id, messages, "biology", more.get("source", "book"), more.get("license", "CC-BY-4.0"))


def lot(text: str) -> str:
    return sha256(f"1:{text}".encode()).hexdigest()


def drawn(records: list[Record]) -> list[str]:
    order = coverage.spread(records, place=coverage.place, lot=lot, name=lambda r: r.id)
    return [r.id for r in order]


def test_place_is_the_source_and_what_the_id_says() -> None:
    assert coverage.place(book_record("book/ch01/sec2/term-x")) == ("book", "ch01", "sec2")
    assert coverage.place(book_record("book/1")) == ("book",)
    assert coverage.place(book_record("elsewhere/ch01/1")) == ("book",)
    assert coverage.topic(book_record("book/ch01/sec2/term-x")) == "book/ch01"


def test_every_beginning_is_spread_evenly() -> None:
    sizes = {("a", "1"): 30, ("a", "2"): 3, ("b", "1"): 20, ("b", "2"): 20, ("c", "1"): 2}
    records = [book_record(f"{s}/{c}/{i}", source=s) for (s, c), count in sizes.items() for i in range(count)]
    order = drawn(records)
    assert sorted(order) == sorted(r.id for r in records)
    by_source = Counter(i.split("/")[0] for i in order[:6])
    assert by_source == {"a": 2, "b": 2, "c": 2}
    later = Counter(i.split("/")[0] for i in order[:46])
    assert later == {"a": 22, "b": 22, "c": 2}
    in_b = Counter(i.rsplit("/", 1)[0] for i in order[:46] if i.startswith("b"))
    assert in_b == {"b/1": 11, "b/2": 11}


def test_draw_does_not_depend_on_the_order_of_the_records() -> None:
    records = [book_record(f"book/ch{i % 7}/{i}") for i in range(60)]
    assert drawn(records) == drawn(records[::-1])
    assert drawn(records) != sorted(r.id for r in records)


def test_items_beside_groups_are_drawn_too() -> None:
    records = [
        book_record("book/1"),
        book_record("book/2"),
        book_record("book/ch1/1"),
        book_record("book/ch1/s/1"),
    ]
    assert sorted(drawn(records)) == ["book/1", "book/2", "book/ch1/1", "book/ch1/s/1"]
    assert drawn([]) == []


def test_spread_keeps_items_that_are_none_or_zero() -> None:
    items = [0, 1, 2, 3]
    order = coverage.spread(items, place=lambda i: ("a" if i % 2 else "b",), lot=lot, name=str)
    assert sorted(order) == items


def test_report() -> None:
    records = [book_record(f"book/ch1/{i}", answer="x" * (i + 1)) for i in range(100)]
    records += [book_record(f"book/ch2/{i}", answer="x" * 201) for i in range(40)]
    records += [book_record(f"book/ch3/{i}", license="unknown") for i in range(13)]
    choice = "Which of these?\nA. One\nB. Two"
    records += [book_record(f"other/{i}", question=choice, answer="B. Two", source="other") for i in range(4)]
    report = coverage.report(records, "biology")
    assert report["domain"] == "biology"
    assert report["records"] == 157
    assert report["topics"] == {"book/ch1": 100, "book/ch2": 40, "book/ch3": 13, "other": 4}
    assert list(report["topics"]) == sorted(report["topics"])
    assert report["thin"] == ["other"]  # the median topic has 26.5 records, so 5.3 are enough
    assert report["kinds"] == {"long answer": 40, "multiple choice": 4, "short answer": 113}
    assert report["licenses"] == {"CC-BY-4.0": 144, "unknown": 13}
    assert report["sources"] == {"book": 153, "other": 4}
    assert report["lengths"]["question"]["p5"] == len("Why is that so?")
    assert report["lengths"]["answer"] == {"p5": 6, "p50": 62, "p95": 201, "max": 201}
    assert json.loads(json.dumps(report)) == report


def test_thin_is_measured_by_the_median_topic() -> None:
    sizes = {"a": 100, "b": 100, "c": 19, "d": 20}
    records = [book_record(f"book/{t}/{i}") for t, count in sizes.items() for i in range(count)]
    assert coverage.report(records, "d")["thin"] == []  # a fifth of 60 is 12
    records += [book_record(f"book/{t}/{i}") for t in "efg" for i in range(100)]
    assert coverage.report(records, "d")["thin"] == ["book/c"]  # a fifth of 100 is 20


def test_report_of_nothing() -> None:
    report = coverage.report([], "biology")
    assert (report["records"], report["topics"], report["thin"]) == (0, {}, [])
    assert coverage.quantiles([0.5, 2.5, 1.5]) == {"p5": 0.5, "p50": 1.5, "p95": 2.5, "max": 2.5}
    assert report["lengths"]["answer"] == {"p5": 0, "p50": 0, "p95": 0, "max": 0}


def test_a_record_comes_back_from_its_line() -> None:
    one = book_record("book/ch1/1")
    assert Record.from_line(one.line()) == one
    assert turns.shown(one) == "book/ch1/1: Why is that so? → Because."


@pytest.mark.shared
def test_topics_of_the_kev_catalogue(shared_data: Path) -> None:
    """Its topics are vendors: one leads, and most have next to nothing."""
    from qwen_ray.data.sources import get_source

    records = list(get_source("cisa_kev").read(shared_data / "cisa_kev"))
    report = coverage.report(records, "security")
    assert report["records"] == sum(report["topics"].values()) == len(records)
    assert max(report["topics"], key=report["topics"].__getitem__) == "cisa_kev/microsoft"
    assert len(report["topics"]) / 2 < len(report["thin"]) < len(report["topics"])
    assert report["sources"] == {"cisa_kev": len(records)}
