"""From the JSON of a comparison to the rows of a table: points, intervals, and what a change means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen_ray.errors import UserError

# Meaning of a change -> its colour (a class of report.css). The word is always shown with it.
GOOD, BAD, UNSURE, STEADY = "good", "bad", "unsure", "steady"


@dataclass(frozen=True)
class Row:
    """One category of a comparison, in points (share x 100)."""

    name: str
    role: str
    n: int
    baseline: float
    baseline_ci: tuple[float, float]
    candidate: float
    candidate_ci: tuple[float, float]
    delta: float
    delta_ci: tuple[float, float]
    meaning: str
    tone: str
    explanation: str = ""


def category_rows(
    comparison: dict[str, Any], baseline: dict[str, Any], candidate: dict[str, Any]
) -> list[Row]:
    """Targets and strengths, in the order of the comparison."""
    return _rows(comparison, "categories", baseline, candidate)


def control_rows(
    comparison: dict[str, Any], baseline: dict[str, Any], candidate: dict[str, Any]
) -> list[Row]:
    """The never-taught facts."""
    return _rows(comparison, "controls", baseline, candidate)


def _rows(
    comparison: dict[str, Any], key: str, baseline: dict[str, Any], candidate: dict[str, Any]
) -> list[Row]:
    gate, suite = comparison.get("gate", {}), comparison.get("baseline", {}).get("suite", "")
    return [
        _row(row, gate_of(gate, suite, row["name"]), baseline[key], candidate[key])
        for row in comparison.get(key, [])
    ]


def gate_of(gate: dict[str, Any], suite: str, category: str) -> dict[str, Any]:
    """The gate with this category's own tolerance."""
    own = gate.get("tolerances", {})
    default = gate.get("tolerance", 0.0)
    return {**gate, "tolerance": own.get(f"{suite}/{category}", own.get(category, default))}


def _row(row: dict[str, Any], gate: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> Row:
    name = row["name"]
    for which, result in (("baseline", before), ("candidate", after)):
        if name not in result:
            raise UserError(
                f"the {which} result has no category '{name}', which the comparison names",
                fix="make the report from the two results that were compared",
            )
    # Controls carry their role by where they stand.
    role = row.get("role", "control")
    meaning, tone = meaning_of(role, row["delta"], row["delta_ci"], gate)
    return Row(
        name=name,
        role=role,
        n=row["n"],
        baseline=100 * row["baseline"],
        baseline_ci=_points(before[name]["ci"]),
        candidate=100 * row["candidate"],
        candidate_ci=_points(after[name]["ci"]),
        delta=100 * row["delta"],
        delta_ci=_points(row["delta_ci"]),
        meaning=meaning,
        tone=tone,
        explanation=after[name].get("explanation", ""),
    )


def _points(interval: list[float]) -> tuple[float, float]:
    return 100 * interval[0], 100 * interval[1]


def meaning_of(role: str, delta: float, interval: list[float], gate: dict[str, Any]) -> tuple[str, str]:
    """What a change means depends on the role: a target must gain, a strength and a control must not move."""
    low, high = interval
    if role == "target":
        if high < 0:
            return "got worse", BAD
        if low <= 0:
            return "no clear gain", UNSURE
        return ("gained", GOOD) if delta > gate.get("min_gain", 0.0) else ("gained too little", UNSURE)
    if role == "control":
        return ("unchanged, as it should be", STEADY) if low <= 0 <= high else ("moved, ask why", UNSURE)
    if delta < -gate.get("tolerance", 0.0):
        return "lost", BAD
    return ("gained as well", GOOD) if low > 0 else ("kept", STEADY)
