"""The facts: counts, rules, and the wall between what is taught and what is tested."""

import dataclasses
import json

import pytest

from qwen_ray.tiny.benchmark import SUITE_DATA_DIR
from qwen_ray.tiny.facts import (
    DOMAINS,
    FACTS_DIR,
    FactsError,
    Relation,
    fill,
    load_relations,
    train_records,
)


def trained_questions() -> set[str]:
    return {r["messages"][0]["content"] for d in DOMAINS for r in train_records(d)}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_teaches_at_least_150_facts(domain: str) -> None:
    relations = [r for r in load_relations() if r.domain == domain]
    assert sum(len(r.taught) for r in relations) >= 150
    assert sum(len(r.control) >= 4 for r in relations) >= 3


def test_control_has_at_least_60_facts() -> None:
    assert sum(len(r.control) for r in load_relations()) >= 60


def test_every_relation_has_a_source() -> None:
    sources = (FACTS_DIR / "SOURCES.md").read_text(encoding="utf-8")
    for relation in load_relations():
        assert f"| {relation.name} |" in sources


def test_facts_are_ascii_and_trimmed() -> None:
    for relation in load_relations():
        for text in (
            *relation.wordings,
            *(t for f in relation.taught + relation.control for t in f),
        ):
            assert text.isascii()
            assert text == " ".join(text.split())


def test_records_are_chat_messages_with_stable_unique_ids() -> None:
    records = [r for d in DOMAINS for r in train_records(d)]
    ids = [r["id"] for r in records]
    assert len(set(ids)) == len(ids)
    assert "tiny-biology-hormone-insulin-q0" in ids
    first = next(r for r in records if r["id"] == "tiny-biology-hormone-insulin-s0")
    assert first["messages"][0]["content"].startswith("Complete: ")
    assert first["messages"][1] == {"role": "assistant", "content": "pancreas"}
    assert first["domain"] == "biology"
    assert first["license"] == "CC0-1.0"


def test_questions_are_distinct() -> None:
    assert len(trained_questions()) == sum(len(train_records(d)) for d in DOMAINS)


def test_held_out_wordings_are_never_trained() -> None:
    trained = trained_questions()
    for relation in load_relations():
        for subject, _ in relation.taught + relation.control:
            for wording in relation.question_heldout:
                assert fill(wording, subject) not in trained


def test_control_facts_are_never_trained() -> None:
    trained = trained_questions()
    for relation in load_relations():
        for subject, _ in relation.control:
            for wording in relation.question_train:
                assert fill(wording, subject) not in trained
            for wording in relation.statement_train:
                assert f"Complete: {fill(wording, subject)}" not in trained


def test_benchmark_questions_are_never_trained() -> None:
    trained = trained_questions()
    for path in SUITE_DATA_DIR.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert json.loads(line)["question"] not in trained


def valid_relation() -> Relation:
    return Relation(
        domain="d",
        name="n",
        question_train=("a {s}?", "b {s}?", "c {s}?"),
        statement_train=("d {s}", "e {s}"),
        question_heldout=("f {s}?", "g {s}?"),
        taught=(("s1", "a1"), ("s2", "a2"), ("s3", "a3"), ("s4", "a4")),
    )


def test_valid_relation_passes() -> None:
    valid_relation().validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_train": ("a {s}?",)}, "at least 3"),
        ({"question_heldout": ("a {s}?", "g {s}?")}, "must differ"),
        ({"statement_train": ("d {s}", "e")}, "names the subject"),
        ({"taught": (("s1", "a1"), ("s1", "a2"), ("s3", "a3"), ("s4", "a4"))}, "subjects"),
        ({"taught": (("s1", "a1"), ("s2", "a1"), ("s3", "a3"), ("s4", "a4"))}, "answers"),
        ({"taught": (("s1", "a1"),)}, "taught facts"),
        ({"control": (("s5", "a5"),)}, "control facts"),
        (
            {"control": (("s5", "a1"), ("s6", "a6"), ("s7", "a7"), ("s8", "a8"))},
            "control answers untaught",
        ),
    ],
)
def test_broken_relation_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FactsError, match=message):
        dataclasses.replace(valid_relation(), **change).validate()  # type: ignore[arg-type]


def test_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown domain"):
        train_records("chemistry")
