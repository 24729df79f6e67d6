"""Names of things: in a text, in singular and plural, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

_WORD = re.compile(r"\w+(?:-\w+)*")
_ENDING = "(?:ies|es|s|y|ae|a|us|um|i)"
_KINDS = (
    ("quality", re.compile(r"(?:ic|al|ous|ive|ble|oid|ary|ated|ent|ant|ar|ile|ional)$")),
    ("process", re.compile(r"(?:tion|sion|sis|ing|ment|ism|ity|lysis|ance|ence|ture|graphy|logy)$")),
)


class Term(NamedTuple):
    """A named thing and what it is. ``topic`` groups the terms that are plausible for one another."""

    name: str
    definition: str
    topic: str
    usage: str = ""
    """How sentences use the name, where that is known: choices of one blank are all used the same way."""


_Index = dict[str, list[tuple[tuple[str, ...], Term]]]


@lru_cache(maxsize=4)
def _by_first_word(terms: tuple[Term, ...]) -> _Index:
    """Terms by the first of their words, the longest first; the last word goes without its ending."""
    index: _Index = {}
    for words, term in {_folded(_WORD.findall(term.name)): term for term in reversed(terms)}.items():
        if words:
            index.setdefault(words[0], []).append((words, term))
    for found in index.values():
        found.sort(key=lambda entry: -len(entry[0]))
    return index


def _folded(words: Sequence[str]) -> tuple[str, ...]:
    folded = [word.casefold() for word in words]
    return (*folded[:-1], _stem(folded[-1])) if folded else ()


def occurrences(text: str, terms: tuple[Term, ...]) -> list[tuple[int, int, Term]]:
    """Start and end of ``terms`` in a text, in any number: the longest at its place, none within another."""
    index = _by_first_word(terms)
    matches = list(_WORD.finditer(text))
    words = [match[0].casefold() for match in matches]
    found, i = [], 0
    while i < len(words):
        for key, term in (*index.get(words[i], ()), *index.get(_stem(words[i]), ())):
            last = i + len(key) - 1
            if last < len(words) and (*words[i:last], _stem(words[last])) == key:
                found.append((matches[i].start(), matches[last].end(), term))
                i = last
                break
        i += 1
    return found


@lru_cache(maxsize=1 << 17)
def _stem(name: str) -> str:
    """A name without the ending of its number: gene and genes, alga and algae, are one."""
    return re.sub(rf"{_ENDING}$", "", name) if len(name) > 3 else name


def inflected(name: str) -> str:
    """A pattern for a name in singular or plural."""
    stem = _stem(name)
    return rf"{re.escape(stem)}{_ENDING}?" if stem != name or len(name) > 3 else rf"{re.escape(name)}s?"


@lru_cache(maxsize=1 << 14)
def written(name: str) -> tuple[bool, bool, str]:
    """How a name is written: with a capital, in the plural, as what kind of word.

    A choice that differs in these gives itself away.
    """
    kind = next((kind for kind, ending in _KINDS if ending.search(name)), "thing")
    return name[:1].isupper(), name.endswith("s") and not name.endswith(("is", "us", "ss")), kind
