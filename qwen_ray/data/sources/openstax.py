"""Reader of an OpenStax book in the kramdown layout of the philschatz repositories.

Exercises that have a solution become question and answer; glossary terms become a definition asked
for, or a term asked for. The book is a repository checkout, its ``.tar.gz``, or a folder with that.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import Drops, Source
from qwen_ray.data.sources.kramdown import plain_text
from qwen_ray.errors import UserError

LICENCE = "CC-BY-3.0"
LETTERS = "ABCDEFGH"

FIGURE = "refers to a figure"
BOOK = "refers to another place in the book"
UNSOLVED = "exercise without a solution"
VARY = "the solution only says that answers vary"
LAYOUT = "exercise of a layout that is not understood"
AGAIN = "term defined before in the book"
SHORT = "glossary entry without a definition"

_PAGE = re.compile(r"(?:^|/)contents/([\w-]+)\.md$")
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
_OTHER_NAME = re.compile(r"\(((?:also|plural|singular|abbreviated|abbreviation)\b[^)]*)\)[,:]?\s*")


class _Text(NamedTuple):
    """A question and its answer, before they become a Record."""

    question: str
    answer: str


def book(name: str, *, title: str, domain_hint: str, repository: str, commit: str) -> Source:
    """The catalogue entry of one book."""

    def read(path: Path, *, domain: str, drops: Drops) -> Iterator[Record]:
        return _read(name, path, domain, drops)

    return Source(
        name=name,
        title=title,
        licence=LICENCE,
        domain_hint=domain_hint,
        where_to_get=f"GitHub repository {repository}, commit {commit}: a checkout or its .tar.gz",
        reader=read,
    )


def _read(name: str, path: Path, domain: str, drops: Drops) -> Iterator[Record]:
    summary, pages = _load(path)
    defined: set[str] = set()
    for section, chapter in _contents(summary, pages):
        where = f"{name}/ch{chapter:02d}/{section}"
        page = pages[section]
        found = [*_exercises(page, where, drops), *_terms(page, where, defined, drops)]
        for item, (question, answer) in found:
            messages = (Message("user", question), Message("assistant", answer))
            yield Record(f"{where}/{item}", messages, domain, name, LICENCE)


# --- the files -------------------------------------------------------------------------------------


def _load(path: Path) -> tuple[str, dict[str, str]]:
    """``SUMMARY.md`` (the table of contents, may be missing) and the text of every page by its name."""
    if path.is_dir():
        archives = sorted(path.glob("*.tar.gz"))
        if not (path / "contents").is_dir() and len(archives) == 1:
            path = archives[0]
    try:
        files = _from_folder(path) if path.is_dir() else _from_archive(path)
    except FileNotFoundError:
        raise UserError("no such file or folder", where=str(path), fix="check the path") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error, UnicodeDecodeError) as e:
        raise UserError(
            f"not a readable .tar.gz of the book ({e})", where=str(path), fix="get it again"
        ) from None
    pages = {match[1]: text for name, text in sorted(files.items()) if (match := _PAGE.search(name))}
    if not pages:
        raise UserError(
            "no contents/*.md here",
            where=str(path),
            fix="give the checkout of the book's repository, its .tar.gz, or the folder that holds it",
        )
    return next((text for name, text in files.items() if name.endswith("SUMMARY.md")), ""), pages


def _from_folder(root: Path) -> dict[str, str]:
    paths = [root / "SUMMARY.md", *(root / "contents").glob("*.md")]
    return {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in paths if p.is_file()}


def _from_archive(path: Path) -> dict[str, str]:
    files = {}
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".md") and (data := archive.extractfile(member)):
                files[member.name] = data.read().decode("utf-8")
    return files


def _contents(summary: str, pages: dict[str, str]) -> Iterator[tuple[str, int]]:
    """``(page, chapter number)`` in the order of the book; pages it does not list come last, as chapter 0."""
    chapter, listed = 0, set()
    for line in summary.splitlines():
        if "{: .chapter}" in line:
            chapter += 1
        if (match := re.search(r"\(contents/([\w-]+)\.md\)", line)) and match[1] in pages:
            listed.add(match[1])
            yield match[1], chapter
    yield from ((page, 0) for page in pages if page not in listed)


# --- exercises -------------------------------------------------------------------------------------


def _exercises(page: str, where: str, drops: Drops) -> Iterator[tuple[str, _Text]]:
    for number, block in enumerate(_EXERCISE.findall(page), start=1):
        problem, solution = _PROBLEM.search(block), _SOLUTION.search(block)
        if problem is None:
            drops.add(LAYOUT, f"{where}: exercise {number}")
            continue
        shown = f"{where}: {plain_text(problem[1])}"
        if solution is None or not solution[1].strip():
            drops.add(UNSOLVED, shown)
        elif _FIGURE.search(problem[1]) or _FIGURE.search(solution[1]):
            drops.add(FIGURE, shown)
        elif _BOOK.search(problem[1]) or _BOOK.search(solution[1]):
            drops.add(BOOK, shown)
        elif _OPTION.search(problem[1]):
            text = _multiple_choice(problem[1], solution[1].strip())
            if text is None:
                drops.add(LAYOUT, shown)
            else:
                yield f"choice-{number}", text
        else:
            answer = _sentence(_VARY.sub("", plain_text(solution[1])))
            if not answer or _ONLY_VARY.match(answer):
                drops.add(VARY, shown)
            else:
                yield f"question-{number}", _Text(plain_text(problem[1]), answer)


def _multiple_choice(problem: str, solution: str) -> _Text | None:
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
    lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(options)]
    return _Text("\n".join([stem, *lines]), lines[right])


# --- glossary --------------------------------------------------------------------------------------


def _terms(page: str, where: str, defined: set[str], drops: Drops) -> Iterator[tuple[str, _Text]]:
    for glossary in _GLOSSARY.findall(page):
        for entry in _ENTRY.finditer(_HEADING.sub("", glossary)):
            term = plain_text(entry["term"]).rstrip(":>").strip()
            definition = plain_text(entry["definition"]).lstrip("-–; ")
            if len(definition.split()) < 2:
                drops.add(SHORT, f"{where}: {term}: {definition}")
            elif term.casefold() in defined:
                # Two wordings of one definition would be two answers to one question.
                drops.add(AGAIN, f"{where}: {term}: {definition}")
            else:
                defined.add(term.casefold())
                yield f"term-{_slug(term)}", _ask_term(term, definition)


def _ask_term(term: str, definition: str) -> _Text:
    """One of two phrasings, chosen by the term alone, so that a term is always asked the same way."""
    # "(also, thighbone) longest bone in the body": the other name is told last, and not when asked for.
    if other := _OTHER_NAME.match(definition):
        definition = definition[other.end() :]
    names_itself = re.sub(r"\s*\(.*?\)", "", term).casefold() in definition.casefold()
    if names_itself or hashlib.sha256(term.encode()).digest()[0] % 2:
        return _Text(
            f"What does the term “{term}” mean?",
            _sentence(f"{definition.rstrip('.')} ({other[1]})" if other else definition),
        )
    return _Text(f"Which term means: {definition.rstrip('.')}?", term)


def _sentence(text: str) -> str:
    """Start with a capital and end with a stop, except where the first word has a fixed spelling (mRNA)."""
    if re.match(r"(?:a|[a-z]{2,})(?=[\s,;-])", text):
        text = text[0].upper() + text[1:]
    return text if not text or text.rstrip('”")')[-1:] in (".", "?", "!") else f"{text}."


def _slug(term: str) -> str:
    return re.sub(r"[^\w]+", "-", term.casefold()).strip("-")
