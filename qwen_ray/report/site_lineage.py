"""What the site and the model card say of a version's lineage: graph, data, settings, hashes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qwen_ray.registry import PRODUCTION
from qwen_ray.registry.version import parents_of, parse_ref
from qwen_ray.report.html import flat
from qwen_ray.report.lineage_graph import Node, lineage_svg
from qwen_ray.report.registry_history import NameHistory, VersionHistory
from qwen_ray.report.site_pages import word_of


def graph(history: NameHistory, names: Iterable[str]) -> Markup | None:
    """The lineage of a name's versions; ``names`` have pages to link to. None without versions."""
    if not history.versions:
        return None
    have, versions, origins = set(names), [], dict[str, Node]()
    for version in history.versions.values():
        made_of = [ref for ref in parents_of(version.lineage) if ref != version.ref]
        for ref in made_of:
            name, at = parse_ref(ref) or ("", 0)
            if not (name == history.name and at in history.versions):
                href = f"../{name}/{at}.html" if name in have else None
                origins.setdefault(ref, Node(ref, ref, href=href, tone="origin"))
        if not made_of:
            base = version.lineage.get("base") or {}
            ident = str(base.get("id") or "base not recorded")
            key = f"base {ident} {base.get('fingerprint')}"
            origins.setdefault(key, Node(key, ident, tone="origin", marks=[("quiet", "base model")]))
            made_of = [key]
        versions.append(_node(version, made_of))
    said = (
        f"Lineage of {history.name}, the newest version on top: "
        f"{len(versions)} versions from {', '.join(node.label for node in origins.values())}"
    )
    return lineage_svg(list(origins.values()), versions, said)


def _node(version: VersionHistory, made_of: list[str]) -> Node:
    verdict = version.verdict
    word, tone = word_of(verdict)
    marks = [("alias", alias) for alias in version.aliases]
    marks += [("date", version.published.at[:10]), (tone, word.lower())]
    if version.archived or version.removed:
        marks.append(("quiet", "files removed" if version.removed else "archived"))
    return Node(
        key=version.ref,
        label=f"v{version.number}",
        parents=made_of,
        href=f"{version.number}.html",
        tone=tone,
        marks=marks,
        strong=PRODUCTION in version.aliases,
    )


@dataclass(frozen=True)
class DataRow:
    """What a version was trained on, of one domain. None, or nothing: not recorded."""

    name: str
    records: int | None
    share: float | None
    sources: list[str]
    licences: dict[str, int]
    sha256: str | None


def training_data(lineage: dict[str, Any]) -> list[DataRow]:
    """By domain, from the manifests in a lineage."""
    data, prepared = lineage.get("data") or {}, lineage.get("prepared") or {}
    records, shares = data.get("train_records") or {}, data.get("shares") or {}
    files = {Path(path).stem: sha256 for path, sha256 in (data.get("files") or {}).items()}
    rows = []
    for name in sorted(records.keys() | shares.keys() | prepared.keys()):
        made = prepared.get(name) or {}
        rows.append(
            DataRow(
                name,
                records.get(name),
                shares.get(name),
                list(made.get("sources") or []),
                dict(made.get("licenses") or {}),
                made.get("data") or files.get(name),
            )
        )
    return rows


def settings(lineage: dict[str, Any]) -> dict[str, str]:
    """The configuration of the run, flat."""
    return flat(lineage.get("config") or {})


def identity(version: VersionHistory) -> dict[str, str]:
    """The hashes and versions of what made it."""
    published, lineage = version.published.value, version.lineage
    found = {
        "digest of files and lineage": str(published.get("digest") or "not recorded"),
        "base fingerprint": str((lineage.get("base") or {}).get("fingerprint") or "not recorded"),
        "bytes": f"{published['bytes']:,}" if "bytes" in published else "not recorded",
    }
    return found | {str(name): str(number) for name, number in (lineage.get("versions") or {}).items()}


def lineage_text(lineage: dict[str, Any]) -> str:
    return json.dumps(lineage, indent=2, ensure_ascii=False, sort_keys=True)
