"""Before and after: paired by item, category by category, and the gate's verdict with its reasons."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.evaluation.statistics import ROUNDING, paired_difference

SCHEMA = "qwen-ray/comparison/1"

Scores = dict[tuple[str, int], float]
"""Score of each item, by (item id, which occurrence of that id)."""


class Gate(BaseModel):
    """When a candidate may replace what is served. Fractions of 1."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Every target must gain more than this, with the interval's lower end above 0."""
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.04
    """No strength may lose more than this."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the intervals."""


def compare(
    baseline: dict[str, Any],
    candidate: dict[str, Any],
    gate: Gate | None = None,
    *,
    targets: list[str] | None = None,
) -> dict[str, Any]:
    """Compare two EvalResults of one suite. ``targets`` overrides the suite's roles: the rest are strengths.

    Raises :class:`UserError` when the two did not answer the same items.
    """
    gate = gate or Gate()
    for key in ("suite", "suite_version"):
        if baseline[key] != candidate[key]:
            raise UserError(
                f"the results are of different suites: {key} {baseline[key]} and {candidate[key]}",
                fix="evaluate both with the same --suite and version of qwen-ray",
            )
    before, after = _scores(baseline), _scores(candidate)
    if {c: set(i) for c, i in before.items()} != {c: set(i) for c, i in after.items()}:
        raise UserError(
            "the results are of different items, so they cannot be paired",
            fix="evaluate both with the same --limit and --data-dir",
        )
    roles = {name: c["role"] for name, c in baseline["categories"].items()}
    if targets is not None:
        for name in targets:
            if name not in roles:
                raise UserError(
                    f"unknown category '{name}'", where="--targets", fix=did_you_mean(name, roles)
                )
        roles = {name: "target" if name in targets else "strength" for name in roles}
    rows = [_row(name, role, before[name], after[name], gate) for name, role in roles.items()]
    controls = [_row(name, "control", before[name], after[name], gate) for name in baseline["controls"]]
    verdict, reasons = _verdict(rows, gate)
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "reasons": reasons,
        "gate": gate.model_dump(),
        "baseline": {
            key: baseline[key] for key in ("model", "adapter", "suite", "suite_version", "settings")
        },
        "candidate": {
            key: candidate[key] for key in ("model", "adapter", "suite", "suite_version", "settings")
        },
        "categories": rows,
        "controls": controls,
    }


def _scores(result: dict[str, Any]) -> dict[str, Scores]:
    """Category to item to score. An item that occurs twice is told apart by its occurrence."""
    scores: dict[str, Scores] = defaultdict(dict)
    for item in result["items"]:
        category, occurrence = scores[item["category"]], 0
        while (item["id"], occurrence) in category:
            occurrence += 1
        category[(item["id"], occurrence)] = item["score"]
    return dict(scores)


def _row(
    name: str,
    role: str,
    before: dict[tuple[str, int], float],
    after: dict[tuple[str, int], float],
    gate: Gate,
) -> dict[str, Any]:
    keys = sorted(before)
    first, second = [before[k] for k in keys], [after[k] for k in keys]
    delta, lo, hi = paired_difference(first, second, gate.confidence)
    return {
        "name": name,
        "role": role,
        "n": len(keys),
        "baseline": sum(first) / len(keys),
        "candidate": sum(second) / len(keys),
        "delta": delta,
        "delta_ci": [lo, hi],
    }


def _verdict(rows: list[dict[str, Any]], gate: Gate) -> tuple[str, list[str]]:
    """``regress`` if something got worse, ``promote`` if every target gained enough, else ``hold``."""
    worse, short, reasons = False, False, []
    if not any(row["role"] == "target" for row in rows):
        short = True
        reasons.append("no category is a target, so there is nothing to gain")
    for row in rows:
        lo, hi = row["delta_ci"]
        change = (
            f"{row['name']} {_points(row['delta'])} (interval {_points(lo)} to {_points(hi)}, n={row['n']})"
        )
        if row["role"] == "strength":
            if row["delta"] < -(gate.tolerance + ROUNDING):
                worse = True
                reasons.append(f"{change}: lost more than the tolerance of {gate.tolerance * 100:g} points")
            else:
                reasons.append(f"{change}: kept, within the tolerance of {gate.tolerance * 100:g} points")
        elif hi < 0:
            worse = True
            reasons.append(f"{change}: a target got worse")
        elif row["delta"] <= gate.min_gain:
            short = True
            reasons.append(f"{change}: gained no more than the {gate.min_gain * 100:g} points asked for")
        elif lo <= 0:
            short = True
            reasons.append(f"{change}: the interval includes no gain; more items would tell")
        else:
            reasons.append(f"{change}: gained more than {gate.min_gain * 100:g} points")
    return ("regress" if worse else "hold" if short else "promote"), reasons


def _points(share: float) -> str:
    return f"{share * 100:+.1f}"
