"""PyPA's advisory database: flaws of Python packages, as OSV records in YAML."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_ray.data.sources.archive import text_files
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.entries import Entry, objects, slug, string, strings
from qwen_ray.data.sources.osv import MALFORMED, WITHDRAWN, Advisory, ask

NAME, LICENCE = "pypa_advisories", "CC-BY-4.0"


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    yield from ask(_advisories(path, domain, drops), drops)


def _advisories(path: Path, domain: str, drops: Drops) -> Iterator[tuple[Advisory, Entry]]:
    for where, text in text_files(path, ".yaml", drops=drops, fix=SOURCE.where_to_get):
        row = _load(text)
        advisory = _advisory(row)
        if advisory is None:
            drops.add(MALFORMED, text, where=where)
        elif row.get("withdrawn"):
            drops.add(WITHDRAWN, advisory.text, where=where)
        else:
            yield advisory, Entry(f"{NAME}/{slug(advisory.package)}/{row['id']}", where, domain, LICENCE)


def _load(text: str) -> dict[str, Any]:
    import yaml

    try:
        row = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _advisory(row: dict[str, Any]) -> Advisory | None:
    """The record as an advisory about the first package it names; ``None`` where it is none."""
    affected = objects(row.get("affected"))
    package = affected[0].get("package") if affected else None
    name = string(package.get("name")) if isinstance(package, dict) else ""
    text = string(row.get("details"))
    if not (name and text and string(row.get("id"))):
        return None
    cves = [alias for alias in strings(row.get("aliases")) if alias.startswith("CVE-")]
    fixed = [
        string(event.get("fixed"))
        for part in objects(affected[0].get("ranges"))
        if part.get("type") == "ECOSYSTEM"  # a range of type GIT names commits
        for event in objects(part.get("events"))
    ]
    return Advisory(
        row["id"], [*cves, row["id"]][0], name, "Python package", text, tuple(filter(None, fixed))
    )


SOURCE = Source(
    name=NAME,
    title="PyPA advisory database: vulnerabilities of Python packages",
    licence=LICENCE,
    domain_hint="security",
    where_to_get=(
        "GitHub repository pypa/advisory-database, commit 3ccb612573e2511ab5cad7dafecd838605c80cda: "
        "the folder vulns, or an archive of it"
    ),
    reader=_read,
    size="about 4,000 questions about 2,030 advisories",
)
