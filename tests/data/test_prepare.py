"""Preparing a domain: what is kept, what is left out and told, and how the draw is spread."""

import json
from collections import Counter
from pathlib import Path

import pytest

from qwen_ray.data.prepare import prepare, report_path
from qwen_ray.data.records import Message, Record, read_records, write_records
from qwen_ray.errors import UserError


def record(id: str, question: str, answer: str, **more: str) -> Record:
    given = {"domain": "biology", "source": "book", "license": "CC0-1.0", **more}
    return Record(id, (Message("user", question), Message("assistant", answer)), **given)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Two chapters: ch1 has one section of 20 questions, ch2 two sections of 4."""
    path = tmp_path / "book.jsonl"
    sizes = {"ch1/s1": 20, "ch2/s1": 4, "ch2/s2": 4}
    write_records(
        path,
        (
            record(f"book/{place}/q{i}", f"What is {place} number {i}?", f"It is {i}.")
            for place, n in sizes.items()
            for i in range(n)
        ),
    )
    return path


def test_draw_is_even_over_chapters_and_sections_and_repeatable(book, tmp_path):
    out = tmp_path / "out.jsonl"
    report = prepare("biology", {"file": book}, 12, out)
    assert (report.written, report.short_by, report.not_drawn) == (12, 0, 16)
    assert report.per_part == {"book/ch1": 6, "book/ch2": 6}
    drawn = read_records(out)
    assert Counter(r.id.rsplit("/", 1)[0] for r in drawn) == {
        "book/ch1/s1": 6,
        "book/ch2/s1": 3,
        "book/ch2/s2": 3,
    }
    first = out.read_bytes()
    prepare("biology", {"file": book}, 12, out)
    assert out.read_bytes() == first
    prepare("biology", {"file": book}, 12, out, seed=1)
    assert out.read_bytes() != first


def test_a_larger_draw_only_adds(book, tmp_path):
    prepare("biology", {"file": book}, 10, tmp_path / "small.jsonl")
    prepare("biology", {"file": book}, 20, tmp_path / "large.jsonl")
    assert read_records(tmp_path / "large.jsonl")[:10] == read_records(tmp_path / "small.jsonl")


def test_draw_is_even_over_sources_and_the_rest_fills_up(book, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(
            json.dumps({"question": f"How much is {i} + 1?", "answer": f"#### {i + 1}"}) + "\n"
            for i in range(5)
        )
    )
    report = prepare("biology", {"file": book, "gsm8k": train}, 20, tmp_path / "out.jsonl")
    assert report.per_source == {"book": 15, "gsm8k": 5}
    assert report.per_license == {"CC0-1.0": 15, "MIT": 5}
    assert report.read == {"file": 28, "gsm8k": 5}


def test_every_drop_is_reported_with_examples(tmp_path):
    path = tmp_path / "in.jsonl"
    write_records(
        path,
        [
            record("a", "What is a cell?", "The unit of life."),
            record("b", "what  is a CELL", "The unit of life"),
            record("c", "What is DNA?", "An acid."),
            record("d", "What is DNA?", "A base."),
            record("e", "Why?", "Because."),
            record("f", "What is a gene worth?", "x"),
            record("g", "Who are you, please?", "I am {{name}}."),
            record("h", "What was the Boston Massacre?", "A riot.", domain="history"),
        ],
    )
    with open(path, "a") as f:
        f.write(
            '{"id": "i", "messages": [{"role": "user", "content": ""},{"role": "assistant", "content": "?"}],'
        )
        f.write('"domain": "biology", "source": "book", "license": "CC0-1.0"}\n')
    report = prepare("biology", {"file": path}, 5, tmp_path / "out.jsonl")
    written = json.loads(report_path(tmp_path / "out.jsonl").read_text())
    assert [r.id for r in read_records(tmp_path / "out.jsonl")] == ["a"]
    assert {why: drop["count"] for why, drop in written["dropped"].items()} == {
        "same question with another answer": 2,
        "same question and answer as an earlier record": 1,
        "question of fewer than 8 characters": 1,
        "answer of fewer than 2 characters": 1,
        "placeholder left in the answer": 1,
        "belongs to another domain": 1,
        "empty question or answer": 1,
    }
    assert written["dropped"]["same question with another answer"]["examples"][0] == (
        "What is DNA?: c → An acid. | d → A base."
    )
    assert written["read"]["file"] == written["written"] + sum(
        d["count"] for d in written["dropped"].values()
    )
    assert (written["asked"], written["short_by"]) == (5, 4)
    assert "4 fewer than the 5 asked for" in str(report)


def test_examples_are_capped_and_counts_are_not(tmp_path):
    path = tmp_path / "in.jsonl"
    write_records(
        path,
        [record(f"r{i}", "Which?", f"That {i}.") for i in range(9)]
        + [record("k", "What is a cell?", "Small.")],
    )
    report = prepare("biology", {"file": path}, None, tmp_path / "out.jsonl")
    drop = report.drops["question of fewer than 8 characters"]
    assert (drop["count"], len(drop["examples"])) == (9, 3)
    assert (report.asked, report.short_by) == (None, 0)


def test_conversations_that_only_begin_alike_are_not_repeats(tmp_path):
    path = tmp_path / "in.json"
    start = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A model."}]
    ends = (
        [{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": f"Answer {i}."}]
        for i in range(2)
    )
    path.write_text(json.dumps([{"conversations": start + end} for end in ends]))
    assert prepare("general", {"file": path}, None, tmp_path / "out.jsonl").written == 2


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path):
    path = tmp_path / "in.jsonl"
    write_records(path, [record("a", "What was 1776?", "A year.", domain="history")])
    with pytest.raises(UserError, match="domain 'biology' has no data: 1 x belongs to another domain"):
        prepare("biology", {"file": path}, 5, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_arguments(book, tmp_path):
    with pytest.raises(UserError, match="unknown source 'gsm8'"):
        prepare("biology", {"file": book, "gsm8": book}, 5, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="size is 0"):
        prepare("biology", {"file": book}, 0, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="no source given"):
        prepare("biology", {}, 5, tmp_path / "out.jsonl")


@pytest.mark.shared
def test_a_thousand_real_biology_records(shared_data, tmp_path):
    out = tmp_path / "biology.jsonl"
    report = prepare("biology", {"openstax_biology": shared_data / "openstax_biology"}, 1000, out)
    assert (report.written, len(read_records(out))) == (1000, 1000)
    chapters = report.per_part.values()
    assert len(chapters) == 47
    assert max(chapters) - min(chapters) <= 1
