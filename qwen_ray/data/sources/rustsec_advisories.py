"""RustSec's advisory database: flaws of Rust crates, as Markdown with TOML front matter."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_ray.data.questions import as_sentence
from qwen_ray.data.sources.archive import text_files
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.entries import Entry, slug, string, strings
from qwen_ray.data.sources.osv import MALFORMED, WITHDRAWN, Advisory, ask

NAME, LICENCE = "rustsec_advisories", "CC0-1.0"
_FRONT = re.compile(r"\s*```toml\n(.*?)\n```\s*\n", re.S)
_TITLE = re.compile(r"#\s+(.+)\n*")
# What stands in place of a text that is kept elsewhere.
_ELSEWHERE = re.compile(r"This is an entry in the RustSec database for .*", re.S)
_PATCHED = re.compile(r"(?:>=|\^|=|~)?\s*(\d[\w.+-]*)")

_UNMAINTAINED = (
    "Why does RustSec advise against the Rust crate “{package}”, which is unmaintained ({id})?",
    "The Rust crate “{package}” is unmaintained ({id}). What should its users know?",
)
_MALICIOUS = ("What is known about the malicious Rust crate “{package}” ({id})?",)
_UNSOUND = (
    "What is unsound in the Rust crate “{package}” ({id})?",
    "Why is the Rust crate “{package}” unsound ({id})?",
)


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    yield from ask(_advisories(path, domain, drops), drops)


def _advisories(path: Path, domain: str, drops: Drops) -> Iterator[tuple[Advisory, Entry]]:
    for where, text in text_files(path, ".md", drops=drops, fix=SOURCE.where_to_get):
        front = _FRONT.match(text)
        head = _load(front[1]) if front else {}
        advisory = _advisory(head, text[front.end() :]) if front else None
        if advisory is None:
            drops.add(MALFORMED, text, where=where)
        elif head["advisory"].get("withdrawn"):
            drops.add(WITHDRAWN, advisory.text, where=where)
        else:
            own = head["advisory"]
            licence = string(own.get("license")) or LICENCE
            yield advisory, Entry(f"{NAME}/{slug(advisory.package)}/{own['id']}", where, domain, licence)


def _load(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def _advisory(head: dict[str, Any], body: str) -> Advisory | None:
    own, versions = head.get("advisory"), head.get("versions")
    title = _TITLE.match(body.lstrip())
    if not isinstance(own, dict) or not title or not (string(own.get("id")) and string(own.get("package"))):
        return None
    rest = _ELSEWHERE.sub("", body.lstrip()[title.end() :])
    patched = strings(versions.get("patched")) if isinstance(versions, dict) else []
    fixed = tuple(match[1] for version in patched if (match := _PATCHED.match(version)))
    cves = [alias for alias in strings(own.get("aliases")) if alias.startswith("CVE-")]
    forms: dict[str, Any] = {}
    if "malicious" in strings(own.get("categories")):
        forms["ask"] = _MALICIOUS
    elif own.get("informational") in ("unmaintained", "unsound"):
        forms["ask"] = _UNMAINTAINED if own["informational"] == "unmaintained" else _UNSOUND
    text = f"{as_sentence(title[1].strip())}\n\n{rest}"
    return Advisory(own["id"], [*cves, own["id"]][0], own["package"], "Rust crate", text, fixed, **forms)


SOURCE = Source(
    name=NAME,
    title="RustSec advisory database: vulnerabilities of Rust crates",
    licence=f"{LICENCE}; some advisories CC-BY-4.0, as each record says",
    domain_hint="security",
    where_to_get=(
        "GitHub repository rustsec/advisory-db, commit bf5c0d245a92671908518d7e765914d437954ed6: "
        "the folder crates, or an archive of it"
    ),
    reader=_read,
    size="about 1,950 questions about 1,190 advisories",
)
