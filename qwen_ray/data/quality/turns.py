"""What of a record is the question and what the answer; the listed choices of a multiple-choice question."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from qwen_ray.data.records import Record

SHOWN_QUESTION, SHOWN_ANSWER = 150, 100  # characters

_CHOICE = re.compile(r"\(?([A-Z])[.):]\)?[ \t]+(\S.*)")
_LETTER = re.compile(r"\(?([A-Z])(?:\)[.:]?|[.:])?")


class Choices(NamedTuple):
    """A multiple-choice question: what is asked, and the text of choice A, B and so on."""

    stem: str
    texts: tuple[str, ...]

    def picked(self, answer: str) -> int | None:
        """The choice that ``answer`` names: by its letter (``B``, ``(B)``), ``B. text`` or its text."""
        answer = answer.strip()
        first = answer.split("\n", 1)[0]
        if letter := _LETTER.fullmatch(first):
            return self._at(letter[1])
        said = normal(first)
        plain = [normal(text) for text in self.texts]
        if said in plain:
            return plain.index(said)
        if lettered := _CHOICE.fullmatch(first):
            at = self._at(lettered[1])
            if at is not None and plain[at] and normal(lettered[2]).startswith(plain[at]):
                return at
        return None

    def _at(self, letter: str) -> int | None:
        at = ord(letter) - ord("A")
        return at if at < len(self.texts) else None


def question(record: Record) -> str:
    """All that is said before the last answer."""
    return "\n".join(m.content for m in record.messages[: last_answer(record)])


def answer(record: Record) -> str:
    """The assistant's last turn."""
    return record.messages[last_answer(record)].content


def choices(text: str) -> Choices | None:
    """Read a question that ends in lines ``A. text``, ``B. text`` (also ``A)``, ``(A)``); else None."""
    lines = text.rstrip().split("\n")
    found: list[str] = []
    at = len(lines)
    while at and (match := _CHOICE.fullmatch(lines[at - 1].strip())):
        found.insert(0, match[2])
        at -= 1
        if match[1] == "A":
            break
    letters = [lines[at + i].strip().lstrip("(")[0] for i in range(len(found))]
    if len(found) < 2 or letters != [chr(ord("A") + i) for i in range(len(found))]:
        return None
    return Choices("\n".join(lines[:at]), tuple(found))


def normal(text: str) -> str:
    """The same for texts that differ only in case, width, spaces or their last stop."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .?!:")


def shown(record: Record) -> str:
    """The record in a line."""
    return f"{record.id}: {question(record)[:SHOWN_QUESTION]} → {answer(record)[:SHOWN_ANSWER]}"


def last_answer(record: Record) -> int:
    """Index of the assistant's last turn, which every record has."""
    return max(i for i, m in enumerate(record.messages) if m.role == "assistant")
