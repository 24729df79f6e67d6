"""The CWE dictionary in JSON: its weaknesses with their place in the hierarchy, and its text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ray.data.sources.base import Drops
from qwen_ray.data.sources.entries import objects, string
from qwen_ray.errors import UserError

DEPRECATED, NO_WEAKNESS = "deprecated by its publisher", "a category or view, not a weakness"
INCOMPLETE = "no name or description"
_RESEARCH = "1000"  # the view in which every weakness has its place
_REFERENCE = re.compile(r"\s*\[\s*REF-\d+\s*\](?:\s*,)?")
_LISTS = ("xhtml:ul", "xhtml:ol")


@dataclass(frozen=True)
class Weakness:
    """One weakness. ``above`` are the ids of all it is a child of, nearest first, up to its pillar."""

    id: str
    name: str
    text: str
    item: dict[str, Any]
    above: tuple[str, ...]
    related: frozenset[str]
    """Ids of all weaknesses it names as related, in any view."""
    pillar: str
    """Name of the most general weakness above it."""

    @property
    def parent(self) -> str:
        return self.above[0] if self.above else ""

    @property
    def pillar_id(self) -> str:
        return self.above[-1] if self.above else self.id

    @property
    def called(self) -> str:
        return f"“{self.name}” ({self.id})"


def weaknesses(raw: Any, file: Path, drops: Drops, *, fix: str) -> dict[str, Weakness]:
    """Every weakness in force of a dictionary ``{number: weakness}``, by id (``CWE-79``)."""
    if not isinstance(raw, dict) or not any(
        isinstance(item, dict) and "attr" in item for item in raw.values()
    ):
        raise UserError("not a CWE dictionary: no weaknesses by number", where=str(file), fix=fix)
    kept: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for number, item in raw.items():
        where, attributes = f"{file}:CWE-{number}", item.get("attr") if isinstance(item, dict) else None
        if not isinstance(attributes, dict):
            drops.add(INCOMPLETE, str(item), where=where)
            continue
        name, text = string(attributes.get("@_Name")), passage(item.get("Description"))
        if attributes.get("@_Status") in ("Deprecated", "Obsolete") or name.upper().startswith("DEPRECATED"):
            drops.add(DEPRECATED, name, where=where)
        elif "@_Abstraction" not in attributes:
            drops.add(NO_WEAKNESS, name, where=where)
        elif not (name and text):
            drops.add(INCOMPLETE, name or text, where=where)
        else:
            kept[f"CWE-{number}"] = (name, text, item)
    parents = {key: _parents(item) for key, (_, _, item) in kept.items()}
    found = {}
    for key, (name, text, item) in kept.items():
        above = _above(key, parents)
        pillar = kept[above[-1]][0] if above else name
        found[key] = Weakness(key, name, text, item, above, frozenset(_related(item)), pillar)
    return found


def passage(value: Any) -> str:
    """Text of a field: paragraphs apart by an empty line, lists as lines with a hyphen.

    The dictionary was made from XHTML and has lost the order of unlike elements. A list is put after the
    paragraph that announces it with a colon; where it cannot be told which, the text ends before it.
    """
    if isinstance(value, str):
        return _clean(value)
    if not isinstance(value, dict):
        return ""
    paragraphs = [_clean(text) for text in _texts(value.get("xhtml:p"))]
    announced = [i for i, text in enumerate(paragraphs) if text.endswith(":")]
    lists = [lines for tag in _LISTS for box in objects(value.get(tag)) if (lines := _list_lines(box))]
    if announced and (len(announced) != len(lists) or len(lists) > 1):
        paragraphs, lists = paragraphs[: announced[0]], []
    elif announced:
        paragraphs[announced[0]] += f"\n{lists[0]}"
    return "\n\n".join(filter(None, paragraphs))


def _list_lines(box: dict[str, Any]) -> str:
    items = box.get("xhtml:li")
    texts = [_clean(text) for text in _texts(items)]
    # An item with elements inside has lost their order: a list with one is no use.
    whole = texts and len(texts) == (len(items) if isinstance(items, list) else 1)
    return "\n".join(f"- {text}" for text in texts) if whole else ""


def _texts(value: Any) -> list[str]:
    return [
        text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text
    ]


def _clean(text: str) -> str:
    return " ".join(_REFERENCE.sub("", text).split())


def _related(item: dict[str, Any], *, nature: str = "", view: str = "") -> list[str]:
    box = item.get("Related_Weaknesses")
    found = [
        relation["attr"]
        for relation in (objects(box.get("Related_Weakness")) if isinstance(box, dict) else [])
        if isinstance(relation.get("attr"), dict)
    ]
    found.sort(key=lambda attributes: attributes.get("@_Ordinal") != "Primary")
    return [
        f"CWE-{attributes.get('@_CWE_ID')}"
        for attributes in found
        if nature in ("", attributes.get("@_Nature")) and view in ("", attributes.get("@_View_ID"))
    ]


def _parents(item: dict[str, Any]) -> list[str]:
    return _related(item, nature="ChildOf", view=_RESEARCH)


def _above(key: str, parents: dict[str, list[str]]) -> tuple[str, ...]:
    """The primary parents of ``key`` up to the pillar; a ring, which a damaged file may hold, is cut."""
    line: list[str] = []
    while above := [parent for parent in parents[key][:1] if parent in parents and parent not in line]:
        key = above[0]
        line.append(key)
    return tuple(line)
