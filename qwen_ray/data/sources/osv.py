"""Security advisories about packages: what the flaw is, which kind of weakness, which version mends it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from qwen_ray.data.questions import choose
from qwen_ray.data.sources.base import Drops, Found
from qwen_ray.data.sources.entries import Entry, joined, whole_sentences
from qwen_ray.data.sources.markdown import plain_text
from qwen_ray.data.sources.weakness_kinds import kind_question

WITHDRAWN, REJECTED = "withdrawn by its publisher", "the CVE was rejected or is disputed"
MALFORMED, SHORT = "not an advisory of this layout", "the description is too short"
SAME = "the same text stands with another package"
_LEAST, _DESCRIPTION, _CLUE = 40, 1000, 400  # characters
_REJECTED = re.compile(r"\b(?:REJECT(?:ED)?|DISPUTED|UNSUPPORTED WHEN ASSIGNED)\b|^Rejected reason")
_URL = re.compile(r"(?<!\])\s*\(\s*https?://[^\s)]*\s*\)|\s*<https?://[^>]*>")
_AFTER = re.compile(
    r"#{1,6}\s*(?:Credits?|Acknowledge?ments?|References?|Timeline|For more information|Resources)\b", re.I
)
_LINK = re.compile(r"^\[[^\]\n]+\]: .*$", re.M)
# A line of its own, or, where line breaks were lost, one of the usual words.
_HEADING = re.compile(
    r"^#{1,6}\s+.{0,60}$|#{2,6}\s+(?:Impact|Patches|Workarounds?|Summary|Details|Description)\b:?", re.M
)
_RELEASE = re.compile(r"v?\d+(?:\.\d+)*[\w.+-]*")

_FLAW = (
    "What is the flaw in the {kind} “{package}” ({id})?",
    "Describe the vulnerability {id} in the {kind} “{package}”.",
    "What does the security advisory {id} say about the {kind} “{package}”?",
)
_FIXED = (
    "Which version of the {kind} “{package}” fixes {id}?",
    "To which version must the {kind} “{package}” be upgraded to be safe from {id}?",
)


@dataclass(frozen=True)
class Advisory:
    """One advisory. ``name`` is its CVE or, where it has none, its own ``id``; ``text`` is Markdown."""

    id: str
    name: str
    package: str
    kind: str
    """What the package is: "Python package", "Rust crate"."""
    text: str
    fixed: tuple[str, ...] = ()
    ask: tuple[str, ...] = _FLAW
    """How to ask what it says: with ``{kind}``, ``{package}`` and ``{id}``."""


def ask(advisories: Iterable[tuple[Advisory, Entry]], drops: Drops) -> Iterator[Found]:
    """Questions about each: what the flaw is, and its kind of weakness or the version that fixes it.

    Where it has both of the latter, one is asked, by turns. Where the same text stands with several
    packages (tensorflow, tensorflow-cpu), the one with the shortest name is asked about.
    """
    groups: dict[str, list[tuple[Advisory, Entry]]] = {}
    for advisory, entry in advisories:
        groups.setdefault(_text(advisory), []).append((advisory, entry))
    asked: set[tuple[str, str]] = set()
    for text, group in groups.items():
        kept = min(range(len(group)), key=lambda i: (len(group[i][0].package), i))
        for i, (advisory, entry) in enumerate(group):
            if i != kept:
                drops.add(SAME, f"{advisory.package}: {text}", where=entry.where)
        advisory, entry = group[kept]
        if (advisory.name, advisory.package) in asked:  # two advisories about one CVE
            advisory = replace(advisory, name=advisory.id)
        asked.add((advisory.name, advisory.package))
        description = whole_sentences(text, _DESCRIPTION)
        if _REJECTED.search(text):
            drops.add(REJECTED, text, where=entry.where)
        elif len(description) < _LEAST:
            drops.add(SHORT, text, where=entry.where)
        else:
            kind, fixed = _kind(advisory, text), _fixed(advisory)
            if kind and fixed:
                kind, fixed = (
                    (kind, None) if choose(("kind", "fixed"), advisory.name) == "kind" else (None, fixed)
                )
            yield from entry.records([(_ask(advisory, advisory.ask), description), kind, fixed])


def _text(advisory: Advisory) -> str:
    """The text without headings, addresses and what follows it: thanks, references, dates."""
    after = _AFTER.search(advisory.text)
    text = advisory.text[: after.start()] if after else advisory.text
    links = _LINK.findall(advisory.text[len(text) :])  # what the text refers to is defined at its end
    return plain_text(_URL.sub("", _HEADING.sub("", "\n".join([text, "", *links]))))


def _kind(advisory: Advisory, text: str) -> tuple[str, str] | None:
    clue = " ".join(whole_sentences(text, _CLUE).split())
    flaw = f"{advisory.name} in the {advisory.kind} “{advisory.package}”"
    return kind_question(flaw, clue, key=f"{advisory.name}/{advisory.package}")


def _fixed(advisory: Advisory) -> tuple[str, str] | None:
    versions = [version for version in dict.fromkeys(advisory.fixed) if _RELEASE.fullmatch(version)]
    return (_ask(advisory, _FIXED), f"{advisory.package} {joined(versions)}") if versions else None


def _ask(advisory: Advisory, forms: tuple[str, ...]) -> str:
    form = choose(forms, f"{advisory.name}/{advisory.package}/{forms[0]}")
    return form.format(kind=advisory.kind, package=advisory.package, id=advisory.name)
