"""The texts that a router learns from: questions of records, and a background of other subjects."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import yaml

from qwen_ray.data.records import Record
from qwen_ray.data.split import number_of

OTHER = "other"
"""Class of the questions that belong to no domain, and of those on which a router abstained."""
_SUBJECTS = Path(__file__).with_name("subjects.yaml")
_LONGEST = 600  # characters, of what an embedder sees of a question


def ending(question: str) -> str:
    """What of a question is embedded, in training and after: its last 600 characters, from a whole word on.

    A long question starts with a passage and ends in what is asked and the choices, which say more of its
    domain; an embedder reads the start only (256 tokens).
    """
    text = question.strip()
    if len(text) <= _LONGEST:
        return text
    first, space, rest = text[-_LONGEST - 1 :].partition(" ")
    return rest if space else first[1:]


def asked(record: Record) -> str:
    """The record's first question, as :func:`ending` has it."""
    return ending(next((m.content for m in record.messages if m.role == "user"), ""))


def questions_of(records: Iterable[Record], *, seed: int) -> dict[str, list[str]]:
    """The different questions of each domain, by name; those to hold out come first, by their hash."""
    found: dict[str, set[str]] = {}
    for record in records:
        found.setdefault(record.domain, set()).add(asked(record))
    return {
        domain: sorted(found[domain] - {""}, key=lambda question: number_of(question, seed=seed))
        for domain in sorted(found)
    }


@lru_cache(maxsize=1)
def subjects() -> dict[str, tuple[str, ...]]:
    """What people ask about, by subject; see the file's own head."""
    document = yaml.safe_load(_SUBJECTS.read_text(encoding="utf-8"))
    return {subject: tuple(texts) for subject, texts in document.items()}
