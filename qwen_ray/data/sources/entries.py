"""What the readers of catalogues share: an entry's Records, wrong choices, text cut at a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qwen_ray.data.lots import integer
from qwen_ray.data.questions import multiple_choice, pick_distractors
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import Found

LONGEST_ANSWER = 1200
"""Characters of an answer taken from running text; it is cut at the last sentence that fits."""
POOL = 60
"""Candidates that the wrong choices of one question are drawn from."""
SHORTEST_ANSWER = 80
"""Characters below which a passage says too little to be an answer."""

_ABBREVIATION = (
    r"(?<!e\.g\.)(?<!i\.e\.)(?<!\bvs\.)(?<!etc\.)(?<!Inc\.)(?<!U\.S\.)(?<!\bv\.)(?<!aka\.)(?<!cf\.)"
)
_STOP = re.compile(rf"(?<=[.!?]){_ABBREVIATION}[\"'”)\]`]*(?=\s+[^a-z\s]|\s*$)|\n+")
_LEANING = re.compile(
    r"(?:This|That|These|Those|It|Its|They|Their|Such|He|She|Here|However|Therefore|Thus|Also|Additionally|"
    r"Furthermore|Moreover|Another|Both|Then|In (?:this|these|that|such)|For (?:this|these))\b",
    re.I,
)


T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One object of a catalogue: ``key`` is ``source/topic/item``, ``where`` the place it was read at."""

    key: str
    where: str
    domain: str
    licence: str

    def records(self, pairs: Iterable[tuple[str, str] | None]) -> Iterator[Found]:
        """A Record for each question and answer, numbered from 1; those that are ``None`` are passed over."""
        for number, (question, answer) in enumerate((pair for pair in pairs if pair), start=1):
            messages = (Message("user", question), Message("assistant", answer))
            source = self.key.split("/", 1)[0]
            yield Found(
                Record(f"{self.key}/{number}", messages, self.domain, source, self.licence), self.where
            )


def four_choices(question: str, answer: str, pool: Sequence[str], *, key: str) -> tuple[str, str] | None:
    """``question`` with ``answer`` and three of ``pool``, nearest first; ``None`` if they are too few."""
    wrong = pick_distractors(answer, pool[:POOL], key=f"{key}/wrong") if answer else []
    return multiple_choice(question, answer, wrong, key=f"{key}/order")


def turned(items: Sequence[T], key: str) -> list[T]:
    """``items`` in a ring, from a place that ``key`` decides: questions draw on all of a long list."""
    start = integer(key) % max(1, len(items))
    return [*items[start:], *items[:start]]


def whole_sentences(text: str, most: int = LONGEST_ANSWER) -> str:
    """As many whole sentences and lines of ``text``, from its start, as ``most`` characters hold; else empty.

    What would dangle at the end goes too: a code block left open, a line that announces what was cut.
    """
    if len(text) > most:
        ends = [match.end() for match in _STOP.finditer(text, 0, most + 1) if match.end() <= most]
        text = text[: ends[-1]] if ends else ""
    if text.count("```") % 2:
        text = text[: text.rindex("```")]
    while (text := text.rstrip()).rstrip("*_").endswith(":"):
        ends = [match.end() for match in _STOP.finditer(text) if match.end() < len(text)]
        text = text[: ends[-1]] if ends else ""
    return text


def leans(text: str) -> bool:
    """Whether a passage starts by pointing at what stands before it ("This ...", "However, ...")."""
    return bool(_LEANING.match(text))


def slug(text: str) -> str:
    """Lower-case words joined by hyphens, for an id."""
    return re.sub(r"[^\w.]+", "-", text.casefold()).strip("-") or "other"


def joined(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def string(value: Any) -> str:
    """``value`` if it is text, without outer spaces; else empty."""
    return value.strip() if isinstance(value, str) else ""


def strings(value: Any) -> list[str]:
    """The non-empty texts of a list, or a single text as a list of one."""
    return [text for item in (value if isinstance(value, list) else [value]) if (text := string(item))]


def objects(value: Any) -> list[dict[str, Any]]:
    """The JSON objects of a list, or a single one as a list of one."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
