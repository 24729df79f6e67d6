"""What the pages of the registry's site say: from histories to the words and rows that templates print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qwen_ray.registry import PRODUCTION, Event
from qwen_ray.report.registry_facts import BASE, Change, Verdict, verdict_of
from qwen_ray.report.registry_history import NameHistory, VersionHistory, against_base
from qwen_ray.report.rows import BAD, GOOD, STEADY, UNSURE, meaning_of

WORDS = {"promote": ("Promote", GOOD), "hold": ("Hold", UNSURE), "regress": ("Regress", BAD)}
"""What a gate may say: the word on the page, and its tone."""


@dataclass(frozen=True)
class ChangeRow:
    """A :class:`Change` with what it means, in words and as a tone."""

    change: Change
    meaning: str
    tone: str


@dataclass(frozen=True)
class Decision:
    """Something that was decided of a version. ``why``: what decided it comes first."""

    at: str
    name: str
    version: int | None
    word: str
    tone: str
    why: list[str]
    against: str = ""


@dataclass(frozen=True)
class Standing:
    """How what is in production compares with the base model, for someone who reads one line."""

    word: str
    tone: str
    sentence: str
    rows: list[ChangeRow] = field(default_factory=list)


@dataclass(frozen=True)
class Spent:
    """The cost of some versions, of which ``unknown`` recorded none. ``dollars`` is None without a price."""

    versions: int
    unknown: int
    hours: float
    gpu_hours: float
    dollars: float | None


def word_of(verdict: Verdict | None) -> tuple[str, str]:
    """What a gate said, as a word and its tone."""
    if verdict is None:
        return "Not judged", "none"
    return WORDS.get(verdict.word, (verdict.word, UNSURE))


def change_rows(changes: Iterable[Change], gate: dict[str, Any]) -> list[ChangeRow]:
    """``gate`` says how much is enough (``min_gain``) and how much is too much (``tolerance``)."""
    rows = []
    for change in changes:
        limits = {**gate, "tolerance": _tolerance(change, gate)}
        if change.interval is not None:
            meaning, tone = meaning_of(change.role, change.delta, list(change.interval), limits)
        elif change.role == "strength" and change.delta < -limits["tolerance"]:
            meaning, tone = "lower", BAD  # strengths are judged without an interval, too
        else:
            meaning = "higher" if change.delta > 0 else "lower" if change.delta < 0 else "the same"
            tone = STEADY
        rows.append(ChangeRow(change, meaning, tone))
    return rows


def _tolerance(change: Change, gate: dict[str, Any]) -> float:
    """Its own in ``tolerances``, by CATEGORY or SUITE/CATEGORY, or that of all."""
    own = gate.get("tolerances") or {}
    for name in (change.name, change.name.rpartition("/")[2]):
        if name in own:
            return float(own[name])
    alike = [value for name, value in own.items() if name.endswith(f"/{change.name}")]
    return float(alike[0] if alike else gate.get("tolerance", 0.0))


def standing(history: NameHistory) -> Standing:
    """Of the version in production, against the base."""
    version = history.production
    if version is None:
        return Standing("Nothing in production", UNSURE, "No version answers under this name yet.")
    rows = standing_of(history, version)
    targets = [row for row in rows if row.change.role == "target"]
    lost = [row.change.name for row in rows if row.tone == BAD]
    if not targets:
        return Standing(
            "Not compared with the base",
            UNSURE,
            "No benchmark of a target is recorded that both this version and the base model answered.",
            rows,
        )
    gains = "; ".join(_gain(row.change) for row in targets)
    if lost:
        return Standing("Worse than the base somewhere", BAD, f"{gains}. Worse: {', '.join(lost)}.", rows)
    if all(row.change.interval is not None and row.change.interval[0] > 0 for row in targets):
        return Standing("Better than the base", GOOD, f"{gains}.", rows)
    if all(row.change.interval is None and row.change.delta > 0 for row in targets):
        return Standing(
            "Higher than the base",
            STEADY,
            f"{gains}. The two were not measured together, so there is no interval.",
            rows,
        )
    return Standing("Not shown to be better than the base", UNSURE, f"{gains}.", rows)


def standing_of(history: NameHistory, version: VersionHistory) -> list[ChangeRow]:
    """A version against the base, by the limits of the gate that judged it last."""
    gate = version.verdict.gate if version.verdict else {}
    return change_rows(against_base(history, version.number), gate)


def _gain(change: Change) -> str:
    text = (
        f"{change.name} {signed_points(change.delta)} points "
        f"({100 * change.before:.1f} to {100 * change.after:.1f}"
    )
    if change.interval is not None:
        low, high = change.interval
        text += f"; interval {signed_points(low)} to {signed_points(high)}, n={change.n}"
    return text + ")"


def signed_points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def decided(verdict: Verdict) -> list[str]:
    """The reasons of a verdict; those that decided it (losses, or the targets' gains) come first."""
    rows = [row for row in change_rows(verdict.changes, verdict.gate) if row.change.role != "control"]

    def place(reason: str) -> int:
        about = [row for row in rows if f"/{row.change.name} " in f"/{reason.partition(' (interval')[0]} "]
        if verdict.word == "promote":
            return 0 if any(row.change.role == "target" for row in about) else 1
        if not about:
            return 1  # a limit of the gate
        return 0 if any(row.tone in (BAD, UNSURE) for row in about) else 2

    return sorted(verdict.reasons, key=place)


def decisions(history: NameHistory) -> list[Decision]:
    """Verdicts, overrides and what came into production, oldest first."""
    found: list[Decision] = []
    for event in history.events:
        value = event.value
        if event.kind == "verdict":
            verdict = verdict_of(event)
            word, tone = word_of(verdict)
            found.append(_decision(event, f"Gate: {word.lower()}", tone, decided(verdict), verdict.baseline))
        elif event.kind == "override":
            said = f"against the gate, which said {value.get('verdict') or 'nothing'}"
            why = f"{value.get('reason')} (by {value.get('by') or 'somebody'}, {said})"
            found.append(_decision(event, "Override", UNSURE, [why]))
        elif event.kind == "alias" and value.get("alias") == PRODUCTION:
            to = value.get("version")
            if to is None:
                word, tone = "Out of production", UNSURE
            elif value.get("rollback"):
                word, tone = "Rolled back to this", BAD
            else:
                word, tone = "Into production", GOOD
            by = f" (by {value['by']})" if value.get("by") else ""
            found.append(_decision(event, word, tone, [f"{value.get('reason') or 'no reason given'}{by}"]))
    return found


def _decision(event: Event, word: str, tone: str, why: list[str], against: str = "") -> Decision:
    against = "the base" if against == BASE else against
    version = event.value.get("was") if event.version is None else event.version
    return Decision(event.at, event.name, version, word, tone, why, against)


def alias_log(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Rows of every move of an alias, the newest first."""
    return [
        {
            "at": event.at,
            "alias": event.value.get("alias"),
            "was": event.value.get("was"),
            "version": event.value.get("version"),
            "reason": event.value.get("reason") or "no reason given",
            "by": event.value.get("by"),
        }
        for event in events
        if event.kind == "alias"
    ][::-1]


def spent(versions: Iterable[VersionHistory], price: float | None) -> Spent:
    """``price`` is of a GPU-hour, in dollars."""
    recorded = [version.costs for version in versions]
    costs = [cost for of_one in recorded for cost in of_one]
    gpu_hours = sum(cost.gpu_hours for cost in costs)
    return Spent(
        versions=len(recorded),
        unknown=sum(not of_one for of_one in recorded),
        hours=sum(cost.seconds for cost in costs) / 3600,
        gpu_hours=gpu_hours,
        dollars=None if price is None else price * gpu_hours,
    )
