"""MITRE CAPEC: attack patterns, asked about by templates. Meant for held-out sets, apart from training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qwen_ray.data.questions import Term, as_sentence, choose, masked_definition, term_questions
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.entries import (
    POOL,
    Entry,
    four_choices,
    slug,
    string,
    strings,
    turned,
    whole_sentences,
)
from qwen_ray.data.sources.stix import Object, load_bundle, plain_text, usable

NAME, LICENCE = "mitre_capec", "LicenseRef-MITRE-CAPEC"
_FILES = ("stix-capec.json", "stix-capec.json.gz", "capec-2.1-subset.json.gz")
_DEFINITION, _CHOICE = 600, 260  # characters
_MITIGATION = re.compile(r"coa-(\d+)-\d+")  # the name of a mitigation holds its pattern's number

_PREREQUISITES = (
    "What are the prerequisites of the attack pattern “{name}” ({id})?",
    "What must hold for the attack “{name}” ({id}) to be possible?",
)
_MITIGATIONS = (
    "How can the attack pattern “{name}” ({id}) be mitigated?",
    "What protects against the attack “{name}” ({id})?",
)


@dataclass(frozen=True)
class _Pattern:
    id: str
    name: str
    text: str
    item: Object
    domains: frozenset[str]
    up: frozenset[str]
    """STIX ids of what it is a child of; ``down`` of what it is a parent of."""
    down: frozenset[str]

    @cached_property
    def described(self) -> str:
        """As much of the definition as a choice holds, with the name blanked out."""
        return masked_definition(Term(self.name, whole_sentences(self.text, _CHOICE), ""))


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    file, found = load_bundle(path, _FILES, fix=SOURCE.where_to_get)
    patterns = [
        _pattern(key, item)
        for key, item in usable(found, "attack-pattern", source="capec", file=file, drops=drops)
    ]
    mitigations: dict[str, list[str]] = {}
    for name, item in usable(found, "course-of-action", source="capec", file=file, drops=drops):
        if match := _MITIGATION.fullmatch(name):
            mitigations.setdefault(f"CAPEC-{match[1]}", []).append(_line(item["description"]))
    for pattern in patterns:
        topic = slug(next(iter(strings(pattern.item.get("x_capec_domains"))), ""))
        entry = Entry(f"{NAME}/{topic}/{pattern.id}", f"{file}:{pattern.id}", domain, LICENCE)
        yield from entry.records(_about(pattern, patterns, mitigations.get(pattern.id, [])))


def _pattern(key: str, item: Object) -> _Pattern:
    text = plain_text(item["description"]).split("\n\n")[0].replace("\n", " ")
    domains, up, down = (
        frozenset(strings(item.get(f"x_capec_{name}")))
        for name in ("domains", "child_of_refs", "parent_of_refs")
    )
    return _Pattern(key, item["name"], whole_sentences(text, _DEFINITION), item, domains, up, down)


def _about(
    pattern: _Pattern, patterns: list[_Pattern], mitigations: list[str]
) -> Iterator[tuple[str, str] | None]:
    key, name, item = pattern.id, pattern.name, pattern.item
    if pattern.text:
        term = Term(name, pattern.text, "")
        yield from term_questions(term, kind="attack pattern", seed_text=key)
        others = _nearest_first(pattern, patterns)
        if masked := masked_definition(term):
            ask = f"Which attack pattern is described here? {masked}"
            yield four_choices(ask, name, [other.name for other in others], key=f"{key}/name")
        ask = f"Which of these describes the attack pattern “{name}”?"
        pool = [other.described for other in others]
        yield four_choices(ask, pattern.described, pool, key=f"{key}/description")
    if severity := string(item.get("x_capec_typical_severity")):
        yield f"How severe is the attack pattern “{name}” ({key}) typically?", as_sentence(severity)
    if likelihood := string(item.get("x_capec_likelihood_of_attack")):
        yield f"How likely is the attack pattern “{name}” ({key})?", as_sentence(likelihood)
    if needs := [line for text in strings(item.get("x_capec_prerequisites")) if (line := _line(text))]:
        yield choose(_PREREQUISITES, f"{key}/prerequisites").format(name=name, id=key), _listed(needs)
    if mitigations:
        yield choose(_MITIGATIONS, f"{key}/mitigations").format(name=name, id=key), _listed(mitigations)


def _nearest_first(pattern: _Pattern, patterns: list[_Pattern]) -> list[_Pattern]:
    """Patterns that could be taken for this one: those of its parent, of its domains, the rest.

    Its own parents and children are left out: what describes a pattern describes its kin as well.
    """
    kin = pattern.up | pattern.down
    near: tuple[list[_Pattern], list[_Pattern], list[_Pattern]] = [], [], []
    for other in turned(patterns, pattern.id):
        if other is not pattern and other.item.get("id") not in kin and other.text:
            near[0 if pattern.up & other.up else 1 if pattern.domains & other.domains else 2].append(other)
    return [*near[0][: POOL // 2], *near[1], *near[2]][:POOL]


def _line(text: str) -> str:
    return " ".join(plain_text(text).split())


def _listed(lines: list[str]) -> str:
    if len(lines) == 1:
        return whole_sentences(lines[0]) or lines[0]
    text = "\n".join(f"- {line}" for line in lines)
    return whole_sentences(text) or text


SOURCE = Source(
    name=NAME,
    title="MITRE CAPEC: attack patterns (for held-out sets)",
    licence=LICENCE,
    domain_hint="security",
    where_to_get=(
        "GitHub repository mitre/cti, commit 421deacb77191b38bdd1bf63268954e93da91365: "
        "capec/2.1/stix-capec.json (keep its LICENSE.txt with what you make of it)"
    ),
    reader=_read,
    size="about 3,900 questions about 556 attack patterns, 1,074 of them multiple choice",
)
