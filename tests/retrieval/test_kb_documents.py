"""What knowledge bases are made of, and the questions that their documents answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.data.records import write_records
from qwen_ray.data.sources import Drops
from qwen_ray.errors import UserError
from qwen_ray.retrieval.documents import (
    CHOICES,
    Origin,
    Question,
    book_questions,
    embedded_questions,
    question_from,
    read_documents,
)
from tests.conftest import record

PAGE = """---
title: "Swifts"
---

A swift sleeps on the wing ([link](#fig)) and lands only to nest.

<div data-type="exercise">
<div data-type="problem">
Where does a swift sleep?
</div>
<div data-type="solution">
It sleeps on the wing.
</div>
</div>

<div data-type="glossary" markdown="1">
### Glossary

swift
: a bird that sleeps in the air
</div>
"""


def read(kind: str, path: Path | str, license: str = "unknown") -> list[tuple[str, str, str, str]]:
    found = read_documents([Origin(kind, str(path), license)], Drops())
    return [(document.key, document.title, document.text, document.license) for document in found]


def test_a_folder_of_markdown_and_text_by_its_sections(notes: Path) -> None:
    assert read("text", notes, "CC-BY-4.0") == [
        (
            "notes/birds/swift/the-common-swift",
            "The common swift",
            "Swifts sleep on the wing and land only to nest.",
            "CC-BY-4.0",
        ),
        ("notes/rivers/rivers", "Rivers", "The Okavango ends in a delta.", "CC-BY-4.0"),
        ("notes/rivers/rivers/length", "Rivers > Length", "The Nile is 6,650 km long.", "CC-BY-4.0"),
        ("notes/glaciers", "", "Aletsch is the largest glacier of the Alps.", "CC-BY-4.0"),
    ]
    assert [text for *_, text, _ in read("text", notes / "glaciers.txt")] == [
        "Aletsch is the largest glacier of the Alps."
    ]


def test_records_are_documents_but_for_multiple_choice(tmp_path: Path) -> None:
    path, drops = tmp_path / "records.jsonl", Drops()
    asked = record("Which bird sleeps flying?\nA. swift\nB. owl", "A. swift", id="choice")
    write_records(path, [record("Where do swifts sleep?", "On the wing.", id="plain"), asked])
    (document,) = read_documents([Origin("file", str(path))], drops)
    assert (document.key, document.text) == ("plain", "Where do swifts sleep?\nOn the wing.")
    assert document.license == "CC0-1.0"
    assert drops.counts == {CHOICES: 1}


def test_a_book_gives_its_text_and_asks_its_exercises_and_glossary(tmp_path: Path) -> None:
    (tmp_path / "contents").mkdir()
    (tmp_path / "contents" / "m1.md").write_text(PAGE)
    (tmp_path / "SUMMARY.md").write_text("* [Birds](contents/m1.md){: .chapter}\n")
    (document,) = read("openstax_biology", tmp_path)
    assert document[:2] == ("openstax_biology/m1", "Swifts")
    assert document[2].startswith("A swift sleeps on the wing")
    assert "Where does" not in document[2]
    assert document[3] == "CC-BY-3.0"
    asked = book_questions("openstax_biology", tmp_path)
    assert "Where does a swift sleep?" in [question.text for question in asked]
    assert any("sleeps in the air" in question.text for question in asked)  # the glossary's definition
    assert {question.relevant for question in asked} == {("openstax_biology/m1",)}


def test_the_embedded_questions_use_no_wording_of_the_documents() -> None:
    documents = {key: text for key, _, text, _ in read("embedded", "biology")}
    insulin = "tiny-facts/biology/hormone/insulin"
    assert "The main source of insulin in the body is the pancreas." in documents[insulin]
    asked = embedded_questions("biology")
    assert Question("What part of the body mainly makes insulin?", (insulin,)) in asked
    assert {key for question in asked for key in question.relevant} == set(documents)


def test_a_question_is_answered_by_a_passage_of_its_document_or_by_one_passage() -> None:
    question = Question("?", ("book/m1", "book/m2#abc"))
    assert question.answered_by("book/m1#123")
    assert question.answered_by("book/m2#abc")
    assert not question.answered_by("book/m2#123")
    assert not question.answered_by("book/m10#123")


@pytest.mark.parametrize(
    ("kind", "path", "fix"),
    [("txt", "x", "did you mean"), ("embedded", "biologie", "biology"), ("text", "/no/such/folder", "path")],
)
def test_what_cannot_be_read_is_named(kind: str, path: str, fix: str) -> None:
    with pytest.raises(UserError) as e:
        read(kind, path)
    assert fix in e.value.fix


@pytest.mark.parametrize(
    "row",
    [{"question": "a"}, {"question": "", "relevant": ["a"]}, ["a"], {"question": "a", "relevant": []}],
)
def test_a_line_that_is_no_question(row: object) -> None:
    with pytest.raises(UserError, match=r"q\.jsonl:3"):
        question_from(row, "q.jsonl:3")
