"""Reader of an OpenStax book in the kramdown layout of the philschatz repositories.

The book is a repository checkout, its ``.tar.gz``, or a folder with that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qwen_ray.data.questions import LETTERS, as_sentence, lay_out
from qwen_ray.data.sources import textbook
from qwen_ray.data.sources.archive import text_files
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.kramdown import marked_terms, paragraphs, plain_text
from qwen_ray.data.sources.textbook import Section, Text
from qwen_ray.errors import UserError

LICENCE = "CC-BY-3.0"

FIGURE = "refers to a figure"
BOOK = "refers to another place in the book"
UNSOLVED = "exercise without a solution"
VARY = "the solution only says that answers vary"
LAYOUT = "exercise of a layout that is not understood"

_PAGE = re.compile(r"(?:^|[/:])contents/([\w-]+)\.md$")
_EXERCISE = re.compile(
    r'<div data-type="exercise"[^>]*>(.*?)(?=<div data-type="exercise"|<div data-type="glossary"|\Z)', re.S
)
_PROBLEM = re.compile(r'<div data-type="problem"[^>]*>\n(.*?)\n</div>', re.S)
_SOLUTION = re.compile(r'<div data-type="solution"[^>]*>\n(.*?)\n</div>', re.S)
_OPTION = re.compile(r"^\d+\.  (.*?)(?=^\d+\.  |^\{:|^\^$|\Z)", re.S | re.M)
_LETTER = re.compile(r"\(?([A-Ha-h])[).]?")
_FIGURE = re.compile(
    r"\[?\[\\?\[?link|!\[|\b(?:this|the|following) (?:figure|diagram|image|graph|map|table)\b", re.I
)
_BOOK = re.compile(
    r"\bSection \d|\b(?:in|from|of) (?:the|this|your) (?:text|textbook|book|chapter|section|passage)\b", re.I
)
_VARY = re.compile(r"^Answers (?:will|may) vary\.\s*", re.I)
_ONLY_VARY = re.compile(r"^Answers? .*\bvary\b", re.I)
_GLOSSARY = re.compile(r'<div data-type="glossary"[^>]*>(.*?)\n</div>', re.S)
_HEADING = re.compile(r"^(?:#+ .*|\{:.*|\^)$", re.M)
_ENTRY = re.compile(r"^(?P<term>[^\s:].*?)\n+: (?P<definition>.*?)(?=\n\n(?! )|\Z)", re.S | re.M)


def book(
    name: str,
    *,
    title: str,
    domain_hint: str,
    repository: str,
    commit: str,
    size: str,
    narrative: bool = False,
) -> Source:
    """The catalogue entry of one book. ``narrative``: of :func:`textbook.records`."""
    where_to_get = f"GitHub repository {repository}, commit {commit}: a checkout or its .tar.gz"

    def read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
        summary, pages = _load(path, drops, where_to_get)
        sections = [
            _section(*pages[page], page, chapter, drops) for page, chapter in _contents(summary, pages)
        ]
        yield from textbook.records(
            sections, source=name, licence=LICENCE, domain=domain, narrative=narrative, drops=drops
        )

    return Source(
        name=name,
        title=title,
        licence=LICENCE,
        domain_hint=domain_hint,
        where_to_get=where_to_get,
        reader=read,
        size=size,
    )


_Pages = dict[str, tuple[str, str]]


def _load(path: Path, drops: Drops, fix: str) -> tuple[str, _Pages]:
    """``SUMMARY.md`` (the table of contents, may be missing); by its name, each page's place and text."""
    summary, pages = "", _Pages()
    for where, text in text_files(path, ".md", drops=drops, fix=fix):
        if match := _PAGE.search(where):
            pages[match[1]] = where, text
        elif where.endswith("SUMMARY.md"):
            summary = text
    if not pages:
        raise UserError("no contents/*.md here", where=str(path), fix=fix)
    return summary, dict(sorted(pages.items()))


def _section(place: str, page: str, name: str, chapter: int, drops: Drops) -> Section:
    return Section(
        id=f"ch{chapter:02d}/{name}",
        place=place,
        exercises=list(_exercises(page, place, drops)),
        glossary=list(_glossary(page)),
        names=marked_terms(page),
        # What belongs to no chapter is the preface, an appendix, the table of contents.
        passages=paragraphs(page) if chapter else [],
    )


def _contents(summary: str, pages: _Pages) -> Iterator[tuple[str, int]]:
    """``(page, chapter number)`` in the order of the book; what is in no chapter, or not listed, has 0."""
    chapters, chapter, listed = 0, 0, set()
    for line in summary.splitlines():
        if "{: .chapter}" in line:
            chapter = chapters = chapters + 1
        elif "{: ." in line:
            chapter = 0
        if (match := re.search(r"\(contents/([\w-]+)\.md\)", line)) and match[1] in pages:
            listed.add(match[1])
            yield match[1], chapter
    yield from ((page, 0) for page in pages if page not in listed)


# --- exercises -------------------------------------------------------------------------------------


def _exercises(page: str, place: str, drops: Drops) -> Iterator[tuple[str, Text]]:
    for number, block in enumerate(_EXERCISE.findall(page), start=1):
        problem, solution = _PROBLEM.search(block), _SOLUTION.search(block)
        where = f"{place}/exercise-{number}"
        if problem is None:
            drops.add(LAYOUT, plain_text(block), where=where)
            continue
        shown = plain_text(problem[1])
        if solution is None or not solution[1].strip():
            drops.add(UNSOLVED, shown, where=where)
        elif _FIGURE.search(problem[1]) or _FIGURE.search(solution[1]):
            drops.add(FIGURE, shown, where=where)
        elif _BOOK.search(problem[1]) or _BOOK.search(solution[1]):
            drops.add(BOOK, shown, where=where)
        elif _OPTION.search(problem[1]):
            text = _multiple_choice(problem[1], solution[1].strip())
            if text is None:
                drops.add(LAYOUT, shown, where=where)
            else:
                yield f"choice-{number}", text
        else:
            answer = as_sentence(_VARY.sub("", plain_text(solution[1])))
            if not answer or _ONLY_VARY.match(answer):
                drops.add(VARY, shown, where=where)
            else:
                yield f"question-{number}", Text(plain_text(problem[1]), answer)


def _multiple_choice(problem: str, solution: str) -> Text | None:
    """The stem and its lettered options; the answer is the letter with its option's text."""
    options = [plain_text(option) for option in _OPTION.findall(problem)]
    first = _OPTION.search(problem)
    letter = _LETTER.fullmatch(solution)
    # Two lists in one exercise would run into one another.
    two_lists = len(re.findall(r"^1\.  ", problem, re.M)) > 1
    if first is None or letter is None or two_lists or not 2 <= len(options) <= len(LETTERS):
        return None
    stem, right = plain_text(problem[: first.start()]), LETTERS.index(letter[1].upper())
    if not stem or right >= len(options) or not all(options):
        return None
    return Text(lay_out(stem, options), f"{LETTERS[right]}. {options[right]}")


def _glossary(page: str) -> Iterator[tuple[str, str]]:
    for glossary in _GLOSSARY.findall(page):
        for entry in _ENTRY.finditer(_HEADING.sub("", glossary)):
            name = plain_text(entry["term"]).rstrip(":>").strip()
            yield name, plain_text(entry["definition"]).lstrip("-–; ")
