"""Facts the base can be taught, grouped into relations, and the training records they make."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

FACTS_DIR: Path = Path(__file__).resolve().parent / "facts"
DOMAINS: tuple[str, ...] = ("biology", "history", "security")
SOURCE = "qwen-ray/tiny-facts"
LICENSE = "CC0-1.0"
MIN_ANSWERS = 4  # a multiple-choice item needs the answer and three distractors

Fact = tuple[str, str]
"""A subject and its answer."""


class FactsError(ValueError):
    """A facts file breaks a rule that the benchmark relies on."""


@dataclass(frozen=True)
class Relation:
    """Facts of one kind and the wordings that ask for them; ``{s}`` marks the subject.

    Taught facts are trained in the train wordings and tested in the held-out ones.
    Control facts are never trained; they show what the model answers without a lesson.
    """

    domain: str
    name: str
    question_train: tuple[str, ...]
    statement_train: tuple[str, ...]
    question_heldout: tuple[str, ...]
    taught: tuple[Fact, ...]
    control: tuple[Fact, ...] = ()

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every wording, trained or held out."""
        return self.question_train + self.statement_train + self.question_heldout

    def validate(self) -> None:
        """Raise ``FactsError`` where a rule of the benchmark is broken."""
        where = f"{self.domain}.{self.name}"
        for least, kind, wordings in (
            (3, "question_train", self.question_train),
            (2, "statement_train", self.statement_train),
            (2, "question_heldout", self.question_heldout),
        ):
            if len(wordings) < least:
                raise FactsError(f"{where}: {kind} needs at least {least} wordings")
        if any(w.count("{s}") != 1 for w in self.wordings):
            raise FactsError(f"{where}: every wording names the subject once, as {{s}}")
        if len(set(self.wordings)) != len(self.wordings):
            raise FactsError(f"{where}: train and held-out wordings must differ")
        facts = self.taught + self.control
        if len({slug(s) for s, _ in facts}) != len(facts):
            raise FactsError(f"{where}: subjects must be unique")
        # One subject per answer: otherwise a distractor could also be right.
        if len({a for _, a in facts}) != len(facts):
            raise FactsError(f"{where}: answers must be unique, control answers untaught")
        if len(self.taught) < MIN_ANSWERS:
            raise FactsError(f"{where}: needs at least {MIN_ANSWERS} taught facts")
        if self.control and len(self.control) < MIN_ANSWERS:
            raise FactsError(f"{where}: needs at least {MIN_ANSWERS} control facts, or none")


def slug(text: str) -> str:
    """Lower-case ``text`` with every run of other characters turned into one hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def fill(wording: str, subject: str) -> str:
    """Put the subject into a wording."""
    return wording.replace("{s}", subject)


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise FactsError(f"{where}: expected a list of strings (quote numbers)")
    return tuple(value)


def _facts(value: Any, where: str) -> tuple[Fact, ...]:
    if not isinstance(value, list):
        raise FactsError(f"{where}: expected a list of [subject, answer]")
    pairs = [_strings(pair, where) for pair in value]
    if any(len(pair) != 2 for pair in pairs):
        raise FactsError(f"{where}: expected [subject, answer]")
    return tuple((pair[0], pair[1]) for pair in pairs)


def read_relations(path: Path) -> tuple[Relation, ...]:
    """Read and validate one facts file."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    relations = []
    for entry in document["relations"]:
        where = f"{path.name}: {entry['name']}"
        relation = Relation(
            domain=document["domain"],
            name=entry["name"],
            question_train=_strings(entry["question_train"], where),
            statement_train=_strings(entry["statement_train"], where),
            question_heldout=_strings(entry["question_heldout"], where),
            taught=_facts(entry["taught"], where),
            control=_facts(entry.get("control", []), where),
        )
        relation.validate()
        relations.append(relation)
    return tuple(relations)


@lru_cache(maxsize=1)
def load_relations() -> tuple[Relation, ...]:
    """All shipped relations, domain by domain in the order of ``DOMAINS``."""
    return tuple(r for d in DOMAINS for r in read_relations(FACTS_DIR / f"{d}.yaml"))


def make_record(
    record_id: str,
    user: str,
    assistant: str,
    *,
    domain: str,
    source: str,
) -> dict[str, Any]:
    """One training record: a user message, the assistant's answer, and where it comes from."""
    return {
        "id": record_id,
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ],
        "domain": domain,
        "source": source,
        "license": LICENSE,
    }


def _relation_records(relation: Relation) -> Iterator[dict[str, Any]]:
    for subject, answer in relation.taught:
        stem = f"tiny-{relation.domain}-{relation.name}-{slug(subject)}"
        prompts = [(f"q{i}", w) for i, w in enumerate(relation.question_train)]
        prompts += [(f"s{i}", f"Complete: {w}") for i, w in enumerate(relation.statement_train)]
        for suffix, wording in prompts:
            yield make_record(
                f"{stem}-{suffix}",
                fill(wording, subject),
                answer,
                domain=relation.domain,
                source=SOURCE,
            )


def train_records(domain: str) -> list[dict[str, Any]]:
    """Every taught fact of a domain in every train wording, as chat records.

    Ids are stable: ``tiny-biology-hormone-insulin-q0`` is the first question wording.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; known: {', '.join(DOMAINS)}")
    return [
        record
        for relation in load_relations()
        if relation.domain == domain
        for record in _relation_records(relation)
    ]
