"""OpenStax *World History*, volumes 1 and 2, in CNXML: the book format of OpenStax.

A checkout of its repository, its ``.tar.gz``, or a folder with that. No document type is accepted, so an
XML file can neither name other files nor blow itself up.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from qwen_ray.data.sources import textbook
from qwen_ray.data.sources.archive import text_files
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.textbook import Section
from qwen_ray.errors import UserError

NAME, LICENCE = "openstax_world_history", "CC-BY-4.0"
UNSOLVED = "exercise whose text and solution are not in the book's files"
DAMAGED = "not well-formed XML"
DOCTYPE = "XML with a document type"

_CNXML, _COLLECTION = "{http://cnx.rice.edu/cnxml}", "{http://cnx.rice.edu/collxml}"
_MODULE = re.compile(r"/([\w-]+)/index\.cnxml$")
_APART = {f"{_CNXML}{tag}" for tag in ("note", "figure", "table", "quote", "exercise", "glossary", "list")}
_NOT_TEXT = {"learning-objectives", "review-questions", "check-understanding", "reflection-questions"}
_SILENT = {f"{_CNXML}footnote", f"{_CNXML}media"}
_ASIDE = re.compile(r"\s*\((?:[Ss]ee )?~(?: and ~)?\)")


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    modules, collections = dict[str, tuple[str, ET.Element]](), dict[str, ET.Element]()
    for where, text in text_files(path, "xml", drops=drops, fix=SOURCE.where_to_get):
        module = _MODULE.search(where)
        if not (module or where.endswith(".collection.xml")):
            continue
        if (root := _parse(text, where, drops)) is not None:
            if module:
                modules[module[1]] = where, root
            else:
                collections[where] = root
    if not modules:
        raise UserError("no modules/*/index.cnxml here", where=str(path), fix=SOURCE.where_to_get)
    sections = [
        _section(*modules[module], f"{chapter}/{module}", drops)
        for module, chapter in _contents(collections, sorted(modules))
    ]
    yield from textbook.records(
        sections, source=NAME, licence=LICENCE, domain=domain, narrative=True, drops=drops
    )


def _parse(text: str, where: str, drops: Drops) -> ET.Element | None:
    if "<!DOCTYPE" in text:
        drops.add(DOCTYPE, text, where=where)
        return None
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as e:
        drops.add(DAMAGED, str(e), where=where)
        return None


def _contents(collections: dict[str, ET.Element], modules: list[str]) -> Iterator[tuple[str, str]]:
    """``(module, "v1-ch02")`` in the order of the volumes; what stands in no chapter is in "front".

    A chapter is the innermost part that holds modules; chapters are counted through each volume.
    """
    seen: set[str] = set()
    for volume, (_, root) in enumerate(sorted(collections.items()), start=1):
        chapter = 0
        for part in root.iter(f"{_COLLECTION}subcollection"):
            listed = part.findall(f"{_COLLECTION}content/{_COLLECTION}module")
            chapter += bool(listed)
            for name in (module.get("document", "") for module in listed):
                if name in modules and name not in seen:
                    seen.add(name)
                    yield name, f"v{volume}-ch{chapter:02d}"
    yield from ((module, "front") for module in modules if module not in seen)


def _section(place: str, root: ET.Element, section: str, drops: Drops) -> Section:
    for number, _ in enumerate(root.iter(f"{_CNXML}exercise"), start=1):
        drops.add(UNSOLVED, f"exercise {number}", where=f"{place}/exercise-{number}")
    content = root.find(f"{_CNXML}content")
    paragraphs = [] if content is None or section.startswith("front/") else list(_paragraphs(content))
    return Section(
        id=section,
        place=place,
        exercises=[],
        glossary=[
            (_text(definition.find(f"{_CNXML}term")), _text(definition.find(f"{_CNXML}meaning")))
            for definition in root.iter(f"{_CNXML}definition")
        ],
        names=list(
            dict.fromkeys(name for p in paragraphs for t in p.iter(f"{_CNXML}term") if (name := _text(t)))
        ),
        passages=[_ASIDE.sub("", _text(p)) for p in paragraphs],
    )


def _paragraphs(element: ET.Element) -> Iterator[ET.Element]:
    """The paragraphs of the running text: none of a note, a list, a quotation, a caption or the exercises."""
    for child in element:
        if child.tag == f"{_CNXML}para":
            yield child
        elif child.tag not in _APART and child.get("class") not in _NOT_TEXT:
            yield from _paragraphs(child)


def _text(element: ET.Element | None) -> str:
    """Words in reading order on one line; a link without words of its own (to a figure) is ``~``."""
    return " ".join("".join(_words(element)).split()) if element is not None else ""


def _words(element: ET.Element) -> Iterator[str]:
    if element.tag == f"{_CNXML}link" and not "".join(element.itertext()).strip():
        yield "~"
    elif element.tag not in _SILENT:
        yield element.text or ""
        for child in element:
            yield from _words(child)
            yield child.tail or ""


SOURCE = Source(
    name=NAME,
    title="OpenStax World History, volumes 1 and 2: glossary and running text",
    licence=LICENCE,
    domain_hint="history",
    where_to_get=(
        "GitHub repository openstax/osbooks-world-history, commit 3e17beda9130380d24be881e6d1942dfcc1be845 "
        "(later ones are under CC BY-NC-SA 4.0, which is another licence): a checkout or its .tar.gz"
    ),
    reader=_read,
    size="3,400 records: 1,200 of the glossary, 2,200 sentences with a name or year left out",
)
