"""MITRE ATT&CK (Enterprise): techniques, tactics and mitigations, asked about by templates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qwen_ray.data.questions import Term, choose, masked_definition, term_questions
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.entries import (
    POOL,
    SHORTEST_ANSWER,
    Entry,
    four_choices,
    joined,
    leans,
    objects,
    slug,
    string,
    strings,
    turned,
    whole_sentences,
)
from qwen_ray.data.sources.stix import Object, load_bundle, plain_text, usable

NAME, LICENCE = "mitre_attack", "LicenseRef-MITRE-ATTACK"
_FILES = ("enterprise-attack.json", "enterprise-attack.json.gz", "enterprise-attack-subset.json.gz")
NO_TACTIC = "a technique without a tactic"
_DEFINITION, _CHOICE = 600, 260  # characters, at most
_TERSE = 100  # characters of a first paragraph, below which the second belongs to the definition
_BEFORE = "PRE"  # the platform of what is done before there is a system to do it on

_TACTIC = (
    "Which ATT&CK tactics does {technique} serve?",
    "In MITRE ATT&CK, what tactics is {technique} listed under?",
    "What ends does {technique} serve? Name the ATT&CK tactics.",
)
_PLATFORMS = (
    "On which platforms can adversaries use {technique}?",
    "Which platforms does MITRE ATT&CK list for {technique}?",
)
_DETAILS = (
    "How do adversaries use {technique} in practice?",
    "Tell me more about how {technique} works.",
    "How does {technique} work in detail?",
)
_PARENT = (
    "Which ATT&CK technique is “{name}” ({id}) a sub-technique of?",
    "“{name}” ({id}) is a sub-technique in MITRE ATT&CK. What is its parent technique?",
)
_CHILDREN = (
    "Which sub-techniques of “{name}” does MITRE ATT&CK list?",
    "Name the sub-techniques of the ATT&CK technique “{name}”.",
)
_MITIGATED = ("How can {technique} be mitigated?", "What mitigates {technique}?")
_DETECTED = ("How can {technique} be detected?", "What should one look for to detect {technique}?")
_IMPLEMENTED = (
    "How is the ATT&CK mitigation “{name}” implemented?",
    "What measures implement the ATT&CK mitigation “{name}”?",
)


@dataclass(frozen=True)
class _Technique:
    id: str
    name: str
    tactics: tuple[str, ...]
    text: str
    item: Object
    parent: str = ""

    @cached_property
    def definition(self) -> str:
        paragraphs = self.text.split("\n\n")
        first = paragraphs[:2] if len(paragraphs[0]) < _TERSE else paragraphs[:1]
        return whole_sentences(" ".join(first), _DEFINITION)

    @cached_property
    def described(self) -> str:
        """As much of the definition as a choice holds; the name, which would give it away, is blanked out."""
        return masked_definition(Term(self.name, whole_sentences(self.definition, _CHOICE), ""))

    @property
    def called(self) -> str:
        return f"“{self.name}” ({self.id}{f', {self.parent}' if self.parent else ''})"


@dataclass
class _Catalogue:
    file: Path
    domain: str
    techniques: dict[str, _Technique] = field(default_factory=dict)
    tactics: dict[str, str] = field(default_factory=dict)
    """Short name to name."""
    mitigations: dict[str, list[str]] = field(default_factory=dict)
    """STIX id of a technique to its mitigations, where the bundle relates them."""

    def entry(self, topic: str, key: str) -> Entry:
        return Entry(f"{NAME}/{topic}/{key}", f"{self.file}:{key}", self.domain, LICENCE)


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    file, found = load_bundle(path, _FILES, fix=SOURCE.where_to_get)
    catalogue = _Catalogue(file, domain)
    tactics = list(usable(found, "x-mitre-tactic", source="mitre-attack", file=file, drops=drops))
    measures = list(usable(found, "course-of-action", source="mitre-attack", file=file, drops=drops))
    catalogue.tactics = {string(item.get("x_mitre_shortname")): item["name"] for _, item in tactics}
    catalogue.mitigations = _mitigations(
        found, {string(item.get("id")): item["name"] for _, item in measures}
    )
    _techniques(found, catalogue, drops)
    for technique in catalogue.techniques.values():
        entry = catalogue.entry(slug(technique.tactics[0]), technique.id)
        yield from entry.records(_about_technique(technique, catalogue))
    for key, item in tactics:
        text = plain_text(item["description"]).split("\n\n", 1)
        if definition := whole_sentences(text[-1], _DEFINITION):
            pairs = term_questions(Term(item["name"], definition, ""), kind="ATT&CK tactic", seed_text=key)
            yield from catalogue.entry("tactics", key).records(pairs)
    for key, item in measures:
        yield from catalogue.entry("mitigations", key).records(_about_mitigation(key, item))


def _techniques(found: list[Object], catalogue: _Catalogue, drops: Drops) -> None:
    listed = dict(usable(found, "attack-pattern", source="mitre-attack", file=catalogue.file, drops=drops))
    for key, item in listed.items():
        names = [string(phase.get("phase_name")) for phase in objects(item.get("kill_chain_phases"))]
        tactics = tuple(catalogue.tactics.get(name, name.replace("-", " ").title()) for name in names if name)
        if not tactics:
            drops.add(NO_TACTIC, item["name"], where=f"{catalogue.file}:{key}")
            continue
        above = listed.get(key.split(".")[0], {}) if "." in key else {}
        catalogue.techniques[key] = _Technique(
            key, item["name"], tactics, plain_text(item["description"]), item, string(above.get("name"))
        )


def _mitigations(found: list[Object], names: dict[str, str]) -> dict[str, list[str]]:
    related: dict[str, list[str]] = {}
    for item in found:
        name = names.get(string(item.get("source_ref")))
        if item.get("relationship_type") == "mitigates" and name and item.get("revoked") is not True:
            text = " ".join(plain_text(string(item.get("description"))).split())
            related.setdefault(string(item.get("target_ref")), []).append(f"- {name}: {text}".rstrip(": "))
    return related


def _about_technique(technique: _Technique, catalogue: _Catalogue) -> Iterator[tuple[str, str] | None]:
    key, item, called = technique.id, technique.item, technique.called
    if definition := technique.definition:
        kind = f"{technique.parent} sub-technique" if technique.parent else "ATT&CK technique"
        yield from term_questions(Term(technique.name, definition, ""), kind=kind, seed_text=key)
        yield _choose_description(technique, catalogue)
    yield choose(_TACTIC, f"{key}/tactic").format(technique=called), joined(list(technique.tactics))
    others = [name for name in catalogue.tactics.values() if name not in technique.tactics]
    tactic = choose(technique.tactics, f"{key}/one tactic")
    ask = f"Which of these ATT&CK tactics does {called} serve?"
    yield four_choices(ask, tactic, others, key=f"{key}/tactic")
    platforms = sorted(strings(item.get("x_mitre_platforms")), key=str.casefold)
    if platforms and _BEFORE not in platforms:
        yield choose(_PLATFORMS, f"{key}/platforms").format(technique=called), joined(platforms)
    details = whole_sentences(technique.text.partition("\n\n")[2])
    if len(details) >= SHORTEST_ANSWER and not leans(details):
        yield choose(_DETAILS, f"{key}/details").format(technique=called), details
    if technique.parent:
        ask = choose(_PARENT, f"{key}/parent").format(name=technique.name, id=key)
        yield ask, f"{technique.parent} ({key.split('.')[0]})"
    elif children := [t.name for t in catalogue.techniques.values() if t.id.startswith(f"{key}.")]:
        yield choose(_CHILDREN, f"{key}/children").format(name=technique.name), joined(children)
    if measures := catalogue.mitigations.get(string(item.get("id"))):
        lines = whole_sentences("\n".join(measures))
        yield choose(_MITIGATED, f"{key}/mitigated").format(technique=called), lines or measures[0]
    if detection := whole_sentences(plain_text(string(item.get("x_mitre_detection")))):
        yield choose(_DETECTED, f"{key}/detected").format(technique=called), detection


def _choose_description(technique: _Technique, catalogue: _Catalogue) -> tuple[str, str] | None:
    """Which of four first sentences describes the technique: those of others of its tactic, no relatives."""
    key = technique.id
    family = key.split(".")[0]
    others = [
        other
        for other in catalogue.techniques.values()
        if other.tactics[0] == technique.tactics[0] and other.id.split(".")[0] != family
    ]
    pool = [other.described for other in turned(others, key)[:POOL]]
    ask = f"Which of these describes the ATT&CK technique {technique.called}?"
    return four_choices(ask, technique.described, pool, key=f"{key}/description")


def _about_mitigation(key: str, item: Object) -> Iterator[tuple[str, str] | None]:
    first, _, rest = plain_text(item["description"]).partition("\n")
    first = re.sub(r"\s*This mitigation can be implemented[^.:]*:?$", "", first.strip())
    if definition := whole_sentences(first, _DEFINITION):
        term = Term(item["name"], definition, "")
        yield from term_questions(term, kind="ATT&CK mitigation", seed_text=key)
    measures = whole_sentences(rest.split("*Tools for Implementation*")[0].strip())
    if len(measures) >= SHORTEST_ANSWER:
        yield choose(_IMPLEMENTED, key).format(name=item["name"]), measures


SOURCE = Source(
    name=NAME,
    title="MITRE ATT&CK (Enterprise): techniques, tactics, mitigations",
    licence=LICENCE,
    domain_hint="security",
    where_to_get=(
        "GitHub repository mitre/cti, commit 421deacb77191b38bdd1bf63268954e93da91365: "
        "enterprise-attack/enterprise-attack.json (keep its LICENSE.txt with what you make of it)"
    ),
    reader=_read,
    size="about 5,400 questions about 691 techniques",
)
