"""What a record must be to be trained on. Each refusal has one of a few reasons, and is accounted for."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from pydantic import ConfigDict, Field

from qwen_ray.config import Section
from qwen_ray.data.formats.fields import EMPTY, ROLES
from qwen_ray.data.quality import language, licences, turns
from qwen_ray.data.quality.text_repair import repair
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import SHOWN, Drop, Found

OTHER_DOMAIN = "belongs to another domain"
LICENCE = "licence not allowed"
HUGE = "more than {} characters"
TURNS = "more than {} turns"
UNREADABLE = "unreadable characters"
SHORT_QUESTION = "question of fewer than {} characters"
SHORT_ANSWER = "answer of fewer than {} characters"
PLACEHOLDER = "placeholder left in the answer"
REPEATS = "the answer only repeats the question"
NOT_LISTED = "the answer is none of the choices listed"
LANGUAGE = "in another language than '{}'"

MAX_UNREADABLE = 1e-3  # share of characters
MAX_CONTROLS = 1e-2  # share; more is no text, less is repaired, and so are a few
FEW_CONTROLS = 3
_SHORT = 200  # characters of an answer that names a choice; a longer one explains

# What a user was meant to fill in, and answers that only hold the place of one.
_PLACEHOLDER = re.compile(
    r"\{\{\s*(?:name|author)\s*\}\}|\[(?:your|insert) [\w ]+\](?!\()|\blorem ipsum dolor\b"
    r"|\A\W*(?:todo|tbd|fixme|placeholder|n/a)\W*\Z|\A\s*(?:\.{2,}|…|-{2,}|_{2,})\s*\Z",
    re.I,
)
# Replacement character, private use, surrogates, not assigned.
_GARBAGE = re.compile(r"[^\x00-\x7f]")
_GARBAGE_KINDS = ("Co", "Cs", "Cn")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_TALKS_OF_CHOICE = re.compile(r"\b(?:answer|option|choice)s?\b.{0,20}?\b[A-Z]\b", re.I)
_LETTERED = re.compile(r"\(?[A-Z][.):]")


class Limits(Section):
    """What a record must keep to."""

    model_config = ConfigDict(frozen=True)

    min_question: Annotated[int, Field(ge=1)] = 8
    """Characters of all that comes before the last answer."""
    min_answer: Annotated[int, Field(ge=1)] = 2
    """Characters of the last answer. A number, and the letter of a listed choice, may be shorter."""
    max_characters: Annotated[int, Field(ge=1)] = 20_000
    """Characters of all turns together."""
    max_turns: Annotated[int, Field(ge=2)] = 50
    """Turns, the system's included."""
    language: Annotated[str, Field(pattern="^[a-z]{2}$")] | None = "en"
    """ISO 639-1 code. Long texts that are surely in another language are left out. null: not looked at."""
    licenses: tuple[str, ...] = ()
    """Licences allowed, as shell patterns (CC-BY-*). Default: all but non-commercial, no-derivatives and
    proprietary ones; ``unknown`` is allowed, and counted."""


def check(found: Found, limits: Limits, domain: str) -> Found | Drop:
    """The record with its text repaired (:func:`repair`), or the first reason to leave it out."""
    record = found.record
    if (refused := next(_before_repair(record, limits, domain), None)) is None:
        messages = tuple(Message(m.role, repair(m.content)) for m in record.messages)
        if messages != record.messages:
            record = replace(record, messages=messages)
        refused = next(_after_repair(record, limits), None)
    if refused is None:
        return found if record is found.record else Found(record, found.where)
    reason, detail = refused
    shown = f"{detail}: {_shown(record)}" if detail else _shown(record)
    return Drop(reason, found.where, shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…")


def _before_repair(record: Record, limits: Limits, domain: str) -> Iterator[tuple[str, str]]:
    """What can be told at once: nothing is repaired of a record that is too large or not asked for."""
    characters = sum(len(m.content) for m in record.messages)
    if record.domain != domain:
        yield OTHER_DOMAIN, record.domain
    if not licences.is_allowed(record.license, limits.licenses):
        yield LICENCE, record.license
    if characters > limits.max_characters:
        yield HUGE.format(limits.max_characters), f"{characters} characters"
    if len(record.messages) > limits.max_turns:
        yield TURNS.format(limits.max_turns), f"{len(record.messages)} turns"
    if not _in_order(record):
        yield ROLES, " ".join(m.role for m in record.messages[:10])
    controls = sum(len(_CONTROL.findall(m.content)) for m in record.messages)
    if controls > max(FEW_CONTROLS, MAX_CONTROLS * characters):
        yield UNREADABLE, f"{controls} control characters"


def _after_repair(record: Record, limits: Limits) -> Iterator[tuple[str, str]]:
    question, answer = turns.question(record).strip(), turns.answer(record).strip()
    if (
        not question
        or not answer
        or not all(m.content.strip() for m in record.messages if m.role != "system")
    ):
        yield EMPTY, ""
    if garbage := _unreadable(record):
        yield UNREADABLE, garbage
    if len(question) < limits.min_question:
        yield SHORT_QUESTION.format(limits.min_question), ""
    listed = _listed(record)
    if len(answer) < limits.min_answer and not (answer.isdecimal() or listed):
        yield SHORT_ANSWER.format(limits.min_answer), ""
    if _PLACEHOLDER.search(language.prose(answer)):
        yield PLACEHOLDER, ""
    if turns.normal(answer) == turns.normal(record.messages[turns.last_answer(record) - 1].content):
        yield REPEATS, ""
    if listed and not _names_a_choice(answer, listed):
        yield NOT_LISTED, ""
    if limits.language and (other := language.is_other(f"{question}\n{answer}", limits.language)):
        yield LANGUAGE.format(limits.language), other


def _in_order(record: Record) -> bool:
    """The system's turn first, if any, then user and assistant in turns."""
    roles = [m.role for m in record.messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    return "assistant" in roles and all(
        role == ("assistant" if i % 2 else "user") for i, role in enumerate(roles)
    )


def _unreadable(record: Record) -> str:
    """What cannot be read, if that is more than a slip."""
    text = "".join(m.content for m in record.messages)
    if text.isascii():
        return ""
    counts = Counter(
        c for c in _GARBAGE.findall(text) if c == "\ufffd" or unicodedata.category(c) in _GARBAGE_KINDS
    )
    # A surrogate cannot be written as UTF-8 at all.
    if counts.total() <= MAX_UNREADABLE * len(text) and not any("\ud800" <= c <= "\udfff" for c in counts):
        return ""
    return ", ".join(f"{n} x U+{ord(c):04X}" for c, n in counts.most_common(3))


def _listed(record: Record) -> turns.Choices | None:
    """The choices of the question just before the last answer."""
    return turns.choices(record.messages[turns.last_answer(record) - 1].content)


def _names_a_choice(answer: str, listed: turns.Choices) -> bool:
    """False only if ``answer`` looks like a choice and is none: an explanation need not quote one."""
    if listed.picked(answer) is not None:
        return True
    if _LETTERED.match(answer):
        return False
    said = turns.normal(answer)
    return (
        len(answer) > _SHORT
        or _TALKS_OF_CHOICE.search(answer) is not None
        or any(text in said or (len(said) > 2 and said in text) for text in map(turns.normal, listed.texts))
    )


def _shown(record: Record) -> str:
    """As :func:`turns.shown`, of a record that need not have an answer; what cannot be written is escaped."""
    text = turns.shown(record) if _has_answer(record) else f"{record.id}: {record.messages[:1]}"
    return text.encode("utf-8", "backslashreplace").decode()


def _has_answer(record: Record) -> bool:
    return any(m.role == "assistant" for m in record.messages)
