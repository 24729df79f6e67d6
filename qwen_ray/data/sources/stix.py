"""STIX 2 bundles of MITRE's catalogues: their objects, and their text without citations and links."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_ray.data.sources.archive import load_json
from qwen_ray.data.sources.base import Drops
from qwen_ray.data.sources.entries import objects, string
from qwen_ray.errors import UserError

Object = dict[str, Any]

REVOKED, DEPRECATED = "revoked by its publisher", "deprecated by its publisher"
INCOMPLETE = "no name, id or description"

# In the order they are applied.
_RULES = [
    (re.compile(r"\s*\(Citation:[^)]*\)"), ""),
    (re.compile(r"<br\s*/?>|</xhtml:(?:p|li|div|tr)>", re.I), "\n"),
    (re.compile(r"<(?:xhtml:)?li>", re.I), "- "),
    (re.compile(r"</?code>", re.I), "`"),
    (re.compile(r"</?[a-zA-Z][\w:]*(?:\s[^<>]*)?/?>"), ""),
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),
    (re.compile(r"\[([^\]]+)\]\((?:https?:|/|#)[^)]*\)"), r"\1"),
    (re.compile(r"`\s*([^`\n]*?)\s*`"), r"`\1`"),
    (re.compile(r"[ \t\u00a0]+"), " "),
    (re.compile(r" *\n *"), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
    (re.compile(r" +([.,;])(?=\s|$)"), r"\1"),
]


def plain_text(text: str) -> str:
    """Text without citations, links and tags; paragraphs stay apart by an empty line."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return html.unescape(text).strip()


def load_bundle(path: Path, names: tuple[str, ...], *, fix: str) -> tuple[Path, list[Object]]:
    """The file and the objects of the bundle at ``path``; raises :class:`UserError` if it is none."""
    file, bundle = load_json(path, names, fix=fix)
    found = objects(bundle.get("objects")) if isinstance(bundle, dict) else []
    if not found:
        raise UserError("not a STIX bundle: it has no 'objects'", where=str(file), fix=fix)
    return file, found


def usable(
    found: list[Object], kind: str, *, source: str, file: Path, drops: Drops
) -> Iterator[tuple[str, Object]]:
    """``(catalogue id, object)`` of every object of type ``kind`` that is in force and complete.

    ``source`` is the catalogue's name in ``external_references``; an object without an id there (CAPEC's
    mitigations) goes by its name.
    """
    for item in found:
        if item.get("type") != kind:
            continue
        ids = (
            string(reference.get("external_id"))
            for reference in objects(item.get("external_references"))
            if reference.get("source_name") == source
        )
        name = " ".join(string(item.get("name")).split())
        key = next(filter(None, ids), name)
        where = f"{file}:{key or string(item.get('id')) or kind}"
        if item.get("revoked") is True:
            drops.add(REVOKED, name, where=where)
        elif item.get("x_mitre_deprecated") is True or item.get("x_capec_status") in (
            "Deprecated",
            "Obsolete",
        ):
            drops.add(DEPRECATED, name, where=where)
        elif not (key and name and string(item.get("description"))):
            drops.add(INCOMPLETE, name or key, where=where)
        else:
            yield key, {**item, "name": name}
