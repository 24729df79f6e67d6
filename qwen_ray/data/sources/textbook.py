"""What a textbook gives: its solved exercises, and questions made of its glossary and its running text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from qwen_ray.data.lots import digest
from qwen_ray.data.passages import proper_nouns
from qwen_ray.data.questions import (
    Term,
    as_sentence,
    choose,
    cloze_questions,
    masked_definition,
    multiple_choice,
    pick_distractors,
    term_questions,
    year_questions,
)
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import Drops, Found
from qwen_ray.data.sources.entries import slug
from qwen_ray.data.terms import occurrences, written

AGAIN = "term defined before in the book"
SHORT = "glossary entry without a definition"
CROWDED = "more questions made of a section's text than are taken"

MOST_CLOZE, MOST_YEARS = 14, 16
"""Questions made of one section's text, so that none floods its chapter."""

_OTHER_NAME = re.compile(r"\(((?:also|plural|singular|abbreviated|abbreviation)\b[^)]*)\)[,:]?\s*")
_USES = {
    **dict.fromkeys(("the", "a", "an"), "article"),
    **dict.fromkeys(("in", "at", "near", "into", "throughout", "across", "toward"), "place"),
}
_TITLES = "President|Vice|Senator|General|Secretary|Governor|Chief|Prime|Justice|Colonel|Captain|King|Queen"
_NAME = re.compile(  # not "President Wilson", who is Woodrow Wilson by another name
    rf"(?<=[a-z,] )(?!{_TITLES})[A-Z][a-z]+(?: (?:of )?[A-Z][a-z]+){{1,3}}\b(?![’-]| [A-Z]| of [A-Z])"
)
_ADJECTIVE = re.compile(r"[A-Z]\w+(?:an|ese|ish|ic|ist)$")
_OFTEN = 2  # paragraphs of a chapter that say a name
_COMMON = 50  # uses in the book of a name that tells too little
_NEAR = 12  # names of the chapter below which those of the whole book are candidates too


class Text(NamedTuple):
    """A question and its answer, before they become a Record."""

    question: str
    answer: str


class Section(NamedTuple):
    """One page of a book, as read."""

    id: str
    """``ch05/m44424``: chapter and page."""
    place: str
    """Where it was read."""
    exercises: list[tuple[str, Text]]
    """The solved ones by their item's name."""
    glossary: list[tuple[str, str]]
    """Names and definitions."""
    names: list[str]
    """What the text marks as a term or for the index."""
    passages: list[str]
    """Its paragraphs, a figure's mention in brackets left out and any other marked with ``~``."""

    @property
    def chapter(self) -> str:
        return self.id.split("/")[0]


class _Entry(NamedTuple):
    term: Term
    other: str
    """Another name, as the glossary puts it: "also, thighbone"."""


def records(
    sections: Sequence[Section], *, source: str, licence: str, domain: str, narrative: bool, drops: Drops
) -> Iterator[Found]:
    """Everything that can be asked of a book, in its order.

    ``narrative``: it is one of persons, places and years, and they are asked for too.
    """
    glossary = _glossary(sections, drops)
    by_chapter: dict[str, list[Term]] = defaultdict(list)
    for section in sections:
        by_chapter[section.chapter] += [entry.term for entry in glossary[section.id]]
    for chapter, names in _names(sections, narrative).items():
        defined = {term.name.casefold() for term in by_chapter[chapter]}
        by_chapter[chapter] += [Term(name, "", chapter) for name in names if name.casefold() not in defined]
    uses = _uses(sections, [term for terms in by_chapter.values() for term in terms])
    for chapter, terms in by_chapter.items():
        by_chapter[chapter] = [
            term._replace(usage=_usage(uses[term.name]))
            for term in terms
            if term.definition or not narrative or uses[term.name].total() <= _COMMON
        ]
    book = [entry for entries in glossary.values() for entry in entries]
    for section in sections:
        entries = glossary[section.id]
        for item, text in [
            *section.exercises,
            *_ask_terms(entries, [e for e in book if e.term.topic == section.chapter], book),
            *_ask_passages(section, by_chapter[section.chapter], narrative=narrative, drops=drops),
        ]:
            messages = (Message("user", text.question), Message("assistant", text.answer))
            record = Record(f"{source}/{section.id}/{item}", messages, domain, source, licence)
            yield Found(record, f"{section.place}/{item}")


# --- glossary --------------------------------------------------------------------------------------


def _glossary(sections: Iterable[Section], drops: Drops) -> dict[str, list[_Entry]]:
    """The terms of each section; one that the book defines twice stays where it is first."""
    defined: set[str] = set()
    glossary: dict[str, list[_Entry]] = {}
    for section in sections:
        entries = glossary.setdefault(section.id, [])
        for name, definition in section.glossary:
            where = f"{section.place}/{slug(name)}"
            if len(definition.split()) < 2:
                drops.add(SHORT, f"{name}: {definition}", where=where)
            elif name.casefold() in defined:
                # Two wordings of one definition would be two answers to one question.
                drops.add(AGAIN, f"{name}: {definition}", where=where)
            else:
                defined.add(name.casefold())
                # "(also, thighbone) longest bone in the body": the other name is told last, if at all.
                other = _OTHER_NAME.match(definition)
                said = definition[other.end() :] if other else definition
                entries.append(_Entry(Term(name, said, section.chapter), other[1] if other else ""))
    return glossary


def _ask_terms(
    entries: Sequence[_Entry], chapter: Sequence[_Entry], book: Sequence[_Entry]
) -> Iterator[tuple[str, Text]]:
    """What a term means, which term is meant, and one of the two with four choices."""
    tiers = (entries, chapter, book if len(chapter) < _NEAR else ())
    for term, other in entries:
        # What is near comes first, and within that no term before others for its initial.
        pool = [e for tier in tiers for e in sorted(tier, key=lambda e: digest(f"{term.name}/{e.term.name}"))]
        define, *name = term_questions(term, kind="term", seed_text=term.name)
        told = f"{term.definition.rstrip('.')} ({other})" if other else term.definition
        yield f"define-{slug(term.name)}", Text(define[0], as_sentence(told))
        if name:
            yield f"name-{slug(term.name)}", Text(*name[0])
        if asked := _choose_term(term, other, pool):
            yield f"choose-{slug(term.name)}", Text(*asked)


def _choose_term(term: Term, other: str, pool: Sequence[_Entry]) -> tuple[str, str] | None:
    """Four terms to a definition, or four definitions to a term where the right one does not name it."""
    masked = masked_definition(term)
    said = f"{term.definition} {other}".casefold()
    others = [e for e in pool if e.term.name.casefold() not in said]
    others = [e for e in others if term.name.casefold() not in f"{e.term.definition} {e.other}".casefold()]
    if masked == as_sentence(term.definition) and choose(("name", "definition"), term.name) == "definition":
        definition = as_sentence(term.definition)
        wrong = pick_distractors(definition, [as_sentence(e.term.definition) for e in others], key=term.name)
        return multiple_choice(
            f"Which of these is meant by the term “{term.name}”?", definition, wrong, key=term.name
        )
    if not masked:
        return None
    names = sorted((e.term.name for e in others), key=lambda name: written(name) != written(term.name))
    wrong = pick_distractors(term.name, names, key=term.name)
    return multiple_choice(
        f"Which of these terms is described here? {masked}", term.name, wrong, key=term.name
    )


# --- running text ----------------------------------------------------------------------------------


def _ask_passages(
    section: Section, terms: Sequence[Term], *, narrative: bool, drops: Drops
) -> Iterator[tuple[str, Text]]:
    kinds = [("cloze", MOST_CLOZE, lambda text, key: cloze_questions(text, terms, key=key))]
    if narrative:
        kinds.append(("year", MOST_YEARS, lambda text, key: year_questions(text, key=key)))
    for kind, most, ask in kinds:
        found = [
            (f"{kind}-{place}-{number}", Text(*pair))
            for place, passage in enumerate(section.passages, start=1)
            for number, pair in enumerate(ask(passage, f"{section.id}/{kind}"), start=1)
        ]
        taken = {item for item, _ in sorted(found, key=_preference)[:most]}
        for item, text in found:
            if item in taken:
                yield item, text
            else:
                drops.add(CROWDED, text.question, where=f"{section.place}/{item}")


def _preference(asked: tuple[str, Text]) -> tuple[int, bytes]:
    """What names up to three more things first, as it tells most; then by SHA-256."""
    sentence = asked[1].question.split("\n")[0]
    return -min(3, len(proper_nouns(sentence))), digest(sentence)


def _names(sections: Iterable[Section], narrative: bool) -> dict[str, list[str]]:
    """By chapter, what its text marks as a term; in a narrative, the names it marks or repeats.

    A name that is said all over the book stands in many sentences for which others would do as well.
    """
    marked: dict[str, list[str]] = defaultdict(list)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for section in sections:
        marked[section.chapter] += section.names
        if narrative:
            for passage in section.passages:
                counts[section.chapter].update({m[0] for m in _NAME.finditer(passage)})
    if narrative:
        for chapter, found in counts.items():
            marked[chapter] = [name for name in marked[chapter] if name[:1].isupper()]
            marked[chapter] += [name for name, n in found.items() if n >= _OFTEN]
    return {
        chapter: sorted({name for name in names if not _ADJECTIVE.search(name)})
        for chapter, names in marked.items()
    }


def _uses(sections: Iterable[Section], terms: Sequence[Term]) -> dict[str, Counter[str]]:
    """How often the book's paragraphs use each name after an article, as a place is (in Kilwa), otherwise."""
    uses: dict[str, Counter[str]] = defaultdict(Counter)
    for passage in (passage for section in sections for passage in section.passages):
        for start, _, term in occurrences(passage, tuple(terms)):
            before = passage[max(0, start - 15) : start].casefold().split(" ")  # the last is empty
            uses[term.name][_USES.get(before[-2] if len(before) > 1 and not before[-1] else "", "bare")] += 1
    return uses


def _usage(counts: Counter[str]) -> str:
    if counts["place"] * 5 >= counts.total() > 0:
        return "place"
    return max(sorted(counts), key=lambda use: counts[use], default="")
