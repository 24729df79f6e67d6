"""MITRE CWE: weaknesses of software and hardware, asked about by templates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from qwen_ray.data.questions import Term, as_sentence, choose, term_questions
from qwen_ray.data.sources.archive import load_json
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.cwe_text import Weakness, passage, weaknesses
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

NAME, LICENCE = "mitre_cwe", "LicenseRef-MITRE-CWE"
_FILES = ("cwe-dictionary.json", "cwe-dictionary.json.gz")
BOILERPLATE = "the same text stands with three other weaknesses"
_SAME_TEXT = 3  # weaknesses that one text of a mitigation or a detection method is given for
_PHASES, _EXAMPLES = 3, 2  # at most, of a weakness

_CONSEQUENCES = (
    "What can follow from the weakness {weakness}?",
    "What are the common consequences of {weakness}?",
    "What can an attacker achieve through {weakness}?",
)
_MITIGATIONS = (
    "How can {weakness} be prevented or mitigated{phase}?",
    "What should be done against {weakness}{phase}?",
)
_DETECTION = (
    "How can {weakness} be detected?",
    "Which methods find {weakness} in a product?",
)
_PARENT = (
    "Which more general weakness is {weakness} a child of?",
    "In the CWE hierarchy, what is the parent of {weakness}?",
)
_MORE = (
    "Explain the background of the weakness {weakness}.",
    "Why is {weakness} a problem?",
    "Tell me more about {weakness}.",
)
_EXAMPLE = (
    "Which weakness does this flaw show? {flaw} ({cve})",
    "{cve}: {flaw} Which weakness is this an example of?",
)


@dataclass
class _Catalogue:
    weaknesses: dict[str, Weakness]
    where: str
    drops: Drops
    said: dict[str, int] = field(default_factory=dict)
    """How often a text has been given."""

    @cached_property
    def also_called(self) -> Counter[str]:
        """How many weaknesses go by an alternate term."""
        terms = (
            string(term.get("Term")).casefold()
            for weakness in self.weaknesses.values()
            for term in _inside(weakness.item, "Alternate_Terms", "Alternate_Term")
        )
        return Counter(terms)

    @cached_property
    def by_pillar(self) -> dict[str, list[Weakness]]:
        found: dict[str, list[Weakness]] = {}
        for weakness in self.weaknesses.values():
            found.setdefault(weakness.pillar, []).append(weakness)
        return found

    def fresh(self, text: str, weakness: Weakness) -> bool:
        """Whether ``text`` may be given once more; if not, it is a drop."""
        self.said[text] = self.said.get(text, 0) + 1
        if self.said[text] > _SAME_TEXT:
            self.drops.add(BOILERPLATE, text, where=f"{self.where}:{weakness.id}")
        return self.said[text] <= _SAME_TEXT


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    file, raw = load_json(path, _FILES, fix=SOURCE.where_to_get)
    catalogue = _Catalogue(weaknesses(raw, file, drops, fix=SOURCE.where_to_get), str(file), drops)
    for weakness in catalogue.weaknesses.values():
        entry = Entry(
            f"{NAME}/{slug(weakness.pillar)}/{weakness.id}", f"{file}:{weakness.id}", domain, LICENCE
        )
        yield from entry.records(_about(weakness, catalogue))


def _about(weakness: Weakness, catalogue: _Catalogue) -> Iterator[tuple[str, str] | None]:
    key, called, item = weakness.id, weakness.called, weakness.item
    yield from term_questions(Term(weakness.name, weakness.text, ""), kind="weakness", seed_text=key)
    names = [other.name for other in _strangers(weakness, catalogue)]
    ask = f"Which CWE weakness is this? {as_sentence(weakness.text)}"
    yield four_choices(ask, weakness.name, names, key=f"{key}/name")
    if consequences := _consequences(item):
        yield choose(_CONSEQUENCES, f"{key}/consequences").format(weakness=called), consequences
    yield from _mitigations(weakness, catalogue)
    if methods := _detection(weakness, catalogue):
        yield choose(_DETECTION, f"{key}/detection").format(weakness=called), methods
    if likelihood := string(item.get("Likelihood_Of_Exploit")):
        yield f"How likely is it that {called} is exploited?", as_sentence(likelihood)
    if parent := catalogue.weaknesses.get(weakness.parent):
        yield choose(_PARENT, f"{key}/parent").format(weakness=called), f"{parent.name} ({parent.id})"
    more = whole_sentences(passage(item.get("Extended_Description")))
    if len(more) >= SHORTEST_ANSWER and not leans(more):
        yield choose(_MORE, f"{key}/more").format(weakness=called), more
    for term in _inside(item, "Alternate_Terms", "Alternate_Term"):
        name = string(term.get("Term"))
        if name and catalogue.also_called[name.casefold()] == 1:
            yield f"Which weakness is also called “{name}”?", f"{weakness.name} ({key})"
    yield from _examples(weakness, names)


def _consequences(item: dict[str, Any]) -> str:
    lines = []
    for consequence in _inside(item, "Common_Consequences", "Consequence"):
        impacts, note = strings(consequence.get("Impact")), " ".join(passage(consequence.get("Note")).split())
        scopes = [scope for scope in strings(consequence.get("Scope")) if scope != "Other"]
        impacts = [impact for impact in impacts if impact not in ("Other", "Varies by Context")]
        impact = "; ".join(impacts)  # some hold a comma
        said = f"{joined(scopes)}: {impact}" if scopes and impacts else impact or joined(scopes or [""])
        if line := ". ".join(part.rstrip(".") for part in (said, note) if part):
            lines.append(f"- {line}.")
    return whole_sentences("\n".join(lines))


def _mitigations(weakness: Weakness, catalogue: _Catalogue) -> Iterator[tuple[str, str]]:
    """An answer for each phase of development that the catalogue advises on."""
    phases: dict[str, list[str]] = {}
    for mitigation in _inside(weakness.item, "Potential_Mitigations", "Mitigation"):
        text = passage(mitigation.get("Description"))
        if text and catalogue.fresh(text, weakness):
            phases.setdefault(joined(strings(mitigation.get("Phase")) or [""]), []).append(text)
    for phase, texts in list(phases.items())[:_PHASES]:
        answer = whole_sentences("\n\n".join(texts))
        if answer:
            told = f" in the phase {phase}" if phase else ""
            ask = choose(_MITIGATIONS, f"{weakness.id}/{phase}")
            yield ask.format(weakness=weakness.called, phase=told), answer


def _detection(weakness: Weakness, catalogue: _Catalogue) -> str:
    texts = []
    for method in _inside(weakness.item, "Detection_Methods", "Detection_Method"):
        name, text = string(method.get("Method")), passage(method.get("Description"))
        if name and text and catalogue.fresh(text, weakness):
            texts.append(f"{name}: {text}")
    return whole_sentences("\n\n".join(texts))


def _examples(weakness: Weakness, names: list[str]) -> Iterator[tuple[str, str] | None]:
    """Real flaws that show this weakness alone, with four weaknesses to choose from."""
    flaws = [
        (cve, as_sentence(" ".join(flaw.split())))
        for example in _inside(weakness.item, "Observed_Examples", "Observed_Example")
        if (cve := string(example.get("Reference"))) and (flaw := passage(example.get("Description")))
        if cve.startswith("CVE-") and not re.search(r"CWE-\d|\bchain\b|composite", flaw, re.I)
        if 40 <= len(flaw) <= 400 and not leans(flaw)
    ]
    for cve, flaw in flaws[:_EXAMPLES]:
        key = f"{weakness.id}/{cve}"
        ask = choose(_EXAMPLE, key).format(flaw=flaw, cve=cve)
        yield four_choices(ask, weakness.name, names, key=key)


def _strangers(weakness: Weakness, catalogue: _Catalogue) -> list[Weakness]:
    """Weaknesses that could be taken for this one and are not: of the same pillar first, no kin.

    What describes a weakness describes those above it too, and often those beside and below it.
    """
    kin = {weakness.id, *weakness.above} - {weakness.pillar_id}

    def strange(other: Weakness) -> bool:
        return (
            other.id not in {weakness.id, weakness.pillar_id, *weakness.related}
            and weakness.id not in other.related
            and not kin & {other.id, *other.above}
        )

    near = turned(catalogue.by_pillar[weakness.pillar], weakness.id)
    far = turned(list(catalogue.weaknesses.values()), weakness.id)
    return list(islice((other for other in (*near, *far) if strange(other)), POOL))


def _inside(item: dict[str, Any], outer: str, inner: str) -> list[dict[str, Any]]:
    """The list that the dictionary wraps twice: ``{"Mitigations": {"Mitigation": [...]}}``."""
    box = item.get(outer)
    return objects(box.get(inner)) if isinstance(box, dict) else []


SOURCE = Source(
    name=NAME,
    title="MITRE CWE: weaknesses of software and hardware",
    licence=LICENCE,
    domain_hint="security",
    where_to_get=(
        "npm package cwe-sdk 1.1.19: raw/cwe-dictionary.json "
        "(© The MITRE Corporation, CWE™; keep that notice with what you make of it)"
    ),
    reader=_read,
    size="about 7,400 questions about 939 weaknesses",
)
