"""Items of a held-out set: four-choice questions taken out of Records, and what makes one unfit.

An item must be answerable from what one knows and not from how it is written: see :data:`CUES`, and
Gururangan et al., Annotation Artifacts in Natural Language Inference Data (NAACL 2018).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwen_ray.data.decontamination.wording import content, words
from qwen_ray.data.heldout.subjects import belongs
from qwen_ray.data.quality import turns
from qwen_ray.data.questions import BLANK
from qwen_ray.data.records import Record
from qwen_ray.data.sources.base import Drops, Found

CHOICES = 4

NOT_FOUR = "not a question with four choices"
SUBJECT = "not about the subject"
OTHERS = "a choice refers to the other choices"
UNCLEAR = "no clear answer"
DATED = "the answer depends on when it is asked"
ALIKE = "two choices are nearly the same"
LONG = "the answer is longer than the others by far"
TOLD = "the question holds its answer"
BLANKED = "a choice has a blank, or the question more blanks than words"
REPEATED = "same question and answer as an earlier item"
CONTRADICTION = "same question and choices with another answer"
CUED = "left out so that a guess from the wording stays near chance"

MAX_CUE = 0.33
"""Share of items that a guess by one cue may get right; 0.25 is chance."""
MUCH_LONGER, A_WORD = 1.6, 8
"""An answer longer than 1.6 times the next longest choice, and a word, gives itself away. Characters."""

_OTHERS = re.compile(
    r"\b(?i:all|none|any|both|neither|each|either|some) (?i:of (?:these|them|those|the (?:above|other)))"
    r"|^(?i:all|none|both|any|neither)(?i: (?:answers|options|choices))?\.?$|\b[A-D] (?:and|or|&) [A-D]\b"
    r"|\b(?i:(?:these|the other) (?:three|two|answers|options|choices))\b"
)
_UNCLEAR = re.compile(
    r"(?:it )?(?:varies|depends|unknown|uncertain|undecided|not known)\b.*"
    r"|(?:nobody|no[ -]one) (?:really )?knows\b.*"
    r"|(?:yes|no|true|false|maybe|no way|(?:partly|somewhat) (?:true|false))\W*|\W*",
    re.I,
)
_DATED = re.compile(
    r"\b(?:currently|nowadays|presently|at present|right now|so far|to date|until now|today|last year"
    r"|as of (?:\d{4}|now|today)|(?:still|now) (?:alive|living|holds)|recently|up to now)\b",
    re.I,
)
_NUMBER = re.compile(r"[\d ]+|one|two|three|four|five|six|seven|eight|nine|ten")
_DESCRIPTION = re.compile(r"(?<=\?) (?=\S+(?: \S+){7})")
"""Between a question and the text of eight words or more that it asks about."""
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Item:
    """A question, its four choices, and which is right."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    source: str
    license: str
    topic: str


def read_item(record: Record) -> Item | None:
    """The item that a one-turn record is: a question that ends in four lettered choices, and which is right.

    In a text that the question asks about, "Which attack is this? An attacker ...", the words that it shares
    with any of the choices become blanks: whoever only looks for the same words finds nothing.
    """
    if [m.role for m in record.messages] != ["user", "assistant"]:
        return None
    listed = turns.choices(record.messages[0].content)
    if listed is None or len(listed.texts) != CHOICES or not listed.stem.strip():
        return None
    right = listed.picked(record.messages[1].content)
    if right is None:
        return None
    choices = tuple(" ".join(text.split()) for text in listed.texts)
    topic = "/".join(record.id.split("/")[1:-1])
    asked = " ".join(listed.stem.split())
    return Item(record.id, _blanked(asked, choices), choices, right, record.source, record.license, topic)


def _blanked(question: str, choices: Sequence[str]) -> str:
    asked, *description = _DESCRIPTION.split(question, maxsplit=1)
    if not description:
        return question
    shared = {stem for choice in choices for stem in _stems(choice)}
    text = _WORD.sub(lambda word: BLANK if _stems(word[0]) & shared else word[0], description[0])
    return f"{asked} {re.sub(rf'{BLANK}(?:[ -]{BLANK})+', BLANK, text)}"


def fault(item: Item, domain: str) -> str | None:
    """Why an item is unfit: one of the constants of this module; None if it is fit."""
    answer = item.choices[item.answer]
    others = [choice for i, choice in enumerate(item.choices) if i != item.answer]
    category = item.topic.split("/")[0]
    checks = {
        SUBJECT: not belongs(domain, item.source, category, item.question, answer),
        OTHERS: any(_OTHERS.search(choice) for choice in item.choices),
        UNCLEAR: any(_UNCLEAR.fullmatch(choice) for choice in item.choices),
        DATED: _DATED.search(item.question),
        ALIKE: any(_alike(a, b) for i, a in enumerate(item.choices) for b in item.choices[:i]),
        BLANKED: any(BLANK in choice for choice in item.choices) or _mostly_blank(item.question),
        LONG: len(answer) > MUCH_LONGER * max(map(len, others)) + A_WORD,
        TOLD: _told(answer, item.question) and not any(_told(other, item.question) for other in others),
    }
    return next((reason for reason, failed in checks.items() if failed), None)


def _mostly_blank(question: str) -> bool:
    """Whether of the words that say something fewer are left than blanks."""
    return len(_stems(question)) < question.count(BLANK)


def _alike(a: str, b: str) -> bool:
    """The same but for case, marks, plurals and an article in front."""
    return [word.rstrip("s") for word in _plain(a).split()] == [
        word.rstrip("s") for word in _plain(b).split()
    ]


def _told(choice: str, question: str) -> bool:
    """Whether the question has the words of a choice that is more than a number."""
    return not _NUMBER.fullmatch(_plain(choice)) and f" {_plain(choice)} " in f" {_plain(question)} "


def _plain(text: str) -> str:
    """Lower case, no marks, no article in front."""
    first, *rest = words(text) or [text]
    return " ".join(rest if rest and first in ("a", "an", "the") else [first, *rest])


# --- what a guess can go by ------------------------------------------------------------------------


def _stems(text: str) -> set[str]:
    """The beginnings of words that say something: "inject" for injection and injected."""
    return {stem[:6] for stem in content(text)}


def _overlap(item: Item) -> list[float]:
    asked = _stems(item.question)
    return [float(len(asked & _stems(choice))) for choice in item.choices]


CUES: dict[str, Callable[[Item], Sequence[float]]] = {
    "longest": lambda item: [float(len(choice)) for choice in item.choices],
    "shortest": lambda item: [-float(len(choice)) for choice in item.choices],
    "most words of the question": _overlap,
}
"""Ways to guess without knowing: each rates the choices, and the highest is taken."""


def guessed(item: Item, cue: str) -> float:
    """Chance to be right by taking the choice that ``cue`` rates highest, any of them where several are."""
    ratings = CUES[cue](item)
    best = [i for i, rating in enumerate(ratings) if rating == max(ratings)]
    return (item.answer in best) / len(best)


class Placed(NamedTuple):
    """An item, the record it is from and where that was read, and the name of the source in the catalogue."""

    item: Item
    found: Found
    origin: str


def without_repeats(items: Sequence[Placed], drops: Drops) -> list[Placed]:
    """One item a question and answer; none of those that contradict each other on the same choices."""
    by_choices: dict[tuple[str, ...], set[str]] = {}
    for item, *_ in items:
        by_choices.setdefault(_asked(item), set()).add(_plain(item.choices[item.answer]))
    kept, seen = [], set[tuple[str, str]]()
    for one in items:
        answer = _plain(one.item.choices[one.item.answer])
        if len(by_choices[_asked(one.item)]) > 1:
            drops.add(CONTRADICTION, shown(one.item), where=one.found.where)
        elif (_plain(one.item.question), answer) in seen:
            drops.add(REPEATED, shown(one.item), where=one.found.where)
        else:
            seen.add((_plain(one.item.question), answer))
            kept.append(one)
    return kept


def _asked(item: Item) -> tuple[str, ...]:
    return _plain(item.question), *sorted(map(_plain, item.choices))


def without_cues(items: Iterable[Placed], drops: Drops) -> list[Placed]:
    """Leave items out so that in every beginning of the list each cue is right for few (:data:`MAX_CUE`)."""
    kept: list[Placed] = []
    right = dict.fromkeys(CUES, 0.0)
    for one in items:
        gained = {cue: guessed(one.item, cue) for cue in CUES}
        allowed = MAX_CUE * (len(kept) + 1) + 1  # one more, or no first item could ever be guessed
        over = [cue for cue in CUES if gained[cue] > MAX_CUE and right[cue] + gained[cue] > allowed]
        if over:
            drops.add(CUED, f"{', '.join(over)}: {shown(one.item)}", where=one.found.where)
            continue
        kept.append(one)
        right = {cue: right[cue] + gained[cue] for cue in CUES}
    return kept


def shown(item: Item) -> str:
    """The item in a line."""
    return f"{item.id}: {item.question} → {item.choices[item.answer]}"
