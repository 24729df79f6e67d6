"""OWASP Cheat Sheet Series: what a sheet recommends under each of its headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from qwen_ray.data.questions import choose
from qwen_ray.data.sources.archive import text_files
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.entries import SHORTEST_ANSWER, Entry, slug, whole_sentences
from qwen_ray.data.sources.markdown import Section, plain_text, prose_words, sections

NAME, LICENCE = "owasp_cheatsheets", "CC-BY-SA-4.0"
APPARATUS, SHORT = "references, contents or authors, not advice", "the section has too little text of its own"
ELSEWHERE, AGAIN = "the section only points elsewhere", "a heading that the sheet has twice"
_POINTER = re.compile(
    r"\b(?:see|refer to|check out|read|visit|consult) (?:the|this|these|that|our|also|section)\b|"
    r"\b(?:described|discussed|detailed) (?:in|below|above)\b|beyond the scope",
    re.I,
)
_POINTING = 200  # characters, below which an answer that points elsewhere says little besides
_WORDS = 12  # of prose that an answer has: code alone says little
_FILE = re.compile(r"(.+)_Cheat_?Sheet\.md")
_APPARATUS = re.compile(
    r"(?:references?|related|table of contents|contents|authors?|contributors?|license|further (?:reading|"
    r"information)|(?:additional |other )?resources|see also|mapping to|external|sources?|bibliography|note|"
    r"conclusions?|acknowledge?ments?|change ?log|version|links?|tools?)\b",
    re.I,
)
_NUMBER = re.compile(
    r"^(?:(?:rule|step|section)?\s*#?\d+(?:\.\d+)*[.):]?\s*[-–:]?\s+|rule #\d+\S*\s*[-–:]\s*|[a-z][.)]\s+)",
    re.I,
)
_INTRODUCTION = re.compile(r"(?:introduction|overview|about|purpose|background|objective|goals?)$", re.I)
_QUESTION = re.compile(r"(?:how|what|why|when|who|where|which|is|are|can|should|do|does)\b.*\?$", re.I)

_ABOUT = (
    "What is the OWASP {sheet} Cheat Sheet about?",
    "What does the OWASP {sheet} Cheat Sheet cover, and why?",
)
_ADVICE = (
    "What does the OWASP {sheet} Cheat Sheet say about “{topic}”?",
    "According to the OWASP {sheet} Cheat Sheet, what should one know about “{topic}”?",
    "Summarise what the OWASP {sheet} Cheat Sheet says on “{topic}”.",
    "Explain “{topic}” as the OWASP {sheet} Cheat Sheet does.",
)
_HOW = (
    "How does one {rest}, according to the OWASP {sheet} Cheat Sheet{under}?",
    "How should a developer {rest}? See the OWASP {sheet} Cheat Sheet{under}.",
)


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    for where, text in text_files(path, "Sheet.md", drops=drops, fix=SOURCE.where_to_get):
        match = _FILE.fullmatch(PurePosixPath(where.replace(":", "/")).name)
        if not match:
            continue
        sheet = match[1].replace("_", " ")
        seen: set[str] = set()
        for section in sections(text):
            if not section.heading or not section.text:
                continue
            here = f"{where}:{section.line}"
            answer = whole_sentences(plain_text(section.text))
            if any(_APPARATUS.match(_NUMBER.sub("", name)) for name in (section.heading, *section.above[1:])):
                drops.add(APPARATUS, section.heading, where=here)
            elif len(answer) < SHORTEST_ANSWER or prose_words(answer) < _WORDS:
                drops.add(SHORT, f"{section.heading}: {answer}", where=here)
            elif len(answer) < _POINTING and _POINTER.search(answer):
                drops.add(ELSEWHERE, f"{section.heading}: {answer}", where=here)
            elif (question := _question(sheet, section)) in seen:
                drops.add(AGAIN, question, where=here)
            else:
                seen.add(question)
                item = slug(" ".join([*section.above[1:], section.heading]))
                entry = Entry(f"{NAME}/{slug(sheet)}/{item}.{section.line}", here, domain, LICENCE)
                yield from entry.records([(question, answer)])


def _question(sheet: str, section: Section) -> str:
    """A question made of the heading and those above it, but for the sheet's title."""
    heading = _NUMBER.sub("", section.heading).rstrip(" :.").strip() or section.heading
    above = [_NUMBER.sub("", name).rstrip(" :.") for name in section.above[1:]]
    under = f" under “{': '.join(above)}”" if above else ""
    key = f"{sheet}/{section.above}/{section.heading}"
    if _INTRODUCTION.match(heading) and not above:
        return (
            choose(_ABOUT, key).format(sheet=sheet)
            if heading.casefold() == "introduction"
            else (choose(_ADVICE, key).format(sheet=sheet, topic=heading))
        )
    if _QUESTION.match(heading):
        return f"{heading} (OWASP {sheet} Cheat Sheet{under})"
    if match := re.match(r"how to (.+)", heading, re.I):
        rest = match[1][0].lower() + match[1][1:]
        return choose(_HOW, key).format(sheet=sheet, rest=rest, under=under)
    return choose(_ADVICE, key).format(sheet=sheet, topic=": ".join([*above, heading]))


SOURCE = Source(
    name=NAME,
    title="OWASP Cheat Sheet Series",
    licence=LICENCE,
    domain_hint="security",
    where_to_get=(
        "GitHub repository OWASP/CheatSheetSeries, commit 6b8819da79e0537d072e04296ffa3adfc94ba881: "
        "the folder cheatsheets, or an archive of it"
    ),
    reader=_read,
    size="about 2,500 questions from 120 sheets",
)
