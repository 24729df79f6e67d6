"""What the events of a registry add up to: what was in production when, how good it was, what it cost.

Nothing here is HTML; the site and the model card are both made from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from qwen_ray.registry import PRODUCTION, Event, Registry
from qwen_ray.report.registry_facts import (
    BASE,
    Change,
    Cost,
    Evaluation,
    Verdict,
    cost_of,
    evaluation_of,
    verdict_of,
)


@dataclass(frozen=True)
class Period:
    """A time in which ``version`` was in production; ``until`` is None for what is there now."""

    version: int
    since: str
    until: str | None
    reason: str
    by: str | None


@dataclass(frozen=True)
class Measure:
    """What the version in production scored at a time. Shares of 1."""

    at: str
    version: int
    score: float
    ci: tuple[float, float] | None


@dataclass(frozen=True)
class Series:
    """A category while something was in production, oldest first. ``base`` is the base model's score."""

    suite: str
    name: str
    role: str
    measures: list[Measure]
    base: float | None


@dataclass(frozen=True)
class VersionHistory:
    """One version. ``removed``: its files are gone, its lineage and events are not."""

    name: str
    number: int
    lineage: dict[str, Any]
    events: list[Event]
    aliases: list[str]
    archived: bool
    removed: bool

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.number}"

    def kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    @property
    def published(self) -> Event:
        return self.kind("published")[0]

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict_of(event) for event in self.kind("verdict")]

    @property
    def verdict(self) -> Verdict | None:
        """The last one."""
        verdicts = self.verdicts
        return verdicts[-1] if verdicts else None

    @property
    def evaluations(self) -> list[Evaluation]:
        return [evaluation_of(event) for event in self.kind("evaluation")]

    @property
    def costs(self) -> list[Cost]:
        """What was recorded of its cost: in the lineage, and in notes."""
        values = [self.lineage.get("cost"), *(event.value.get("cost") for event in self.kind("note"))]
        return [cost for value in values if (cost := cost_of(value)) is not None]


@dataclass(frozen=True)
class NameHistory:
    """Everything of one adapter name."""

    name: str
    versions: dict[int, VersionHistory]
    events: list[Event]
    aliases: dict[str, int]
    periods: list[Period]
    canary: tuple[int, float] | None

    @property
    def production(self) -> VersionHistory | None:
        number = self.aliases.get(PRODUCTION)
        return None if number is None else self.versions.get(number)

    @property
    def waiting(self) -> list[VersionHistory]:
        """Versions newer than production, not archived, that no gate has refused; the newest first."""
        now = self.aliases.get(PRODUCTION, 0)
        return [
            version
            for number, version in sorted(self.versions.items(), reverse=True)
            if number > now
            and not version.archived
            and not version.removed
            and (version.verdict is None or version.verdict.word == "promote")
        ]


def read_history(registry: Registry, name: str) -> NameHistory:
    """All of one name, from its events and the lineages of its versions, removed ones too."""
    events = registry.events(name)
    aliases, archived, there = registry.aliases(name), registry.archived(name), registry.versions(name)
    versions = {
        number: VersionHistory(
            name,
            number,
            registry.lineage(name, number),
            [event for event in events if event.concerns(number)],
            sorted(alias for alias, version in aliases.items() if version == number),
            archived=number in archived,
            removed=number not in there,
        )
        for number in registry.history(name)
    }
    canary = registry.canary(name)
    return NameHistory(
        name,
        versions,
        events,
        aliases,
        _periods(events),
        None if canary is None else (canary.version, canary.share),
    )


def _periods(events: Iterable[Event]) -> list[Period]:
    periods: list[Period] = []
    for event in events:
        if event.kind != "alias" or event.value.get("alias") != PRODUCTION:
            continue
        if periods and periods[-1].until is None:
            periods[-1] = replace(periods[-1], until=event.at)
        version = event.value.get("version")
        if version is not None:
            reason, by = str(event.value.get("reason") or ""), event.value.get("by")
            periods.append(Period(version, event.at, None, reason, by))
    return periods


def against_base(history: NameHistory, number: int) -> list[Change]:
    """How a version compares with the base model, category by category; empty where nothing tells.

    By the last verdict against the base itself if there is one. Otherwise the scores are from the version's
    last verdict, the base's from the last verdict of any version against it, and there are no intervals.
    """
    verdicts = history.versions[number].verdicts
    direct = next((v for v in reversed(verdicts) if v.baseline == BASE), None)
    if direct is not None:
        return [change for change in direct.changes if change.role != "control"]
    if not verdicts:
        return []
    base = _base_scores(history)
    return [
        replace(change, before=base[change.name], interval=None)
        for change in verdicts[-1].changes
        if change.name in base and change.role != "control"
    ]


def _base_scores(history: NameHistory) -> dict[str, float]:
    verdicts = (v for version in history.versions.values() for v in version.verdicts if v.baseline == BASE)
    return {change.name: change.before for v in sorted(verdicts, key=lambda v: v.at) for change in v.changes}


def _of_base(base: dict[str, float], suite: str, category: str) -> float | None:
    return base.get(category, base.get(f"{suite}/{category}"))


def production_series(history: NameHistory) -> list[Series]:
    """Each category's scores of what was in production: when it got there, and at every later evaluation.

    Targets come first.
    """
    base = _base_scores(history)
    measures: dict[tuple[str, str], list[Measure]] = {}
    roles: dict[tuple[str, str], str] = {}
    for period in history.periods:
        known = history.versions[period.version].evaluations
        started = {e.suite: e for e in known if e.at <= period.since}  # the last of each suite
        later = [e for e in known if e.at > period.since and (period.until is None or e.at < period.until)]
        for at, evaluation in [*((period.since, e) for e in started.values()), *((e.at, e) for e in later)]:
            for score in evaluation.scores:
                if score.role == "control":
                    continue
                key = (evaluation.suite, score.name)
                measures.setdefault(key, []).append(Measure(at, period.version, score.score, score.ci))
                roles[key] = score.role
    found = [Series(*key, roles[key], listed, _of_base(base, *key)) for key, listed in measures.items()]
    return sorted(found, key=lambda series: series.role != "target")
