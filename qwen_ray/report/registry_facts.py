"""What single events of a registry hold, with types: verdicts, evaluations, costs.

What an event lacks is left out: events are for ever, so pages must be made of those that older or other
programs wrote, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen_ray.registry import Event

BASE = "base"
"""What a verdict's ``baseline`` says where the base model without an adapter was compared with."""


@dataclass(frozen=True)
class Change:
    """One category before and after, as shares of 1.

    ``interval`` of the difference is None where the two were not answered together, only compared with a
    version between them.
    """

    name: str
    role: str
    n: int
    before: float
    after: float
    interval: tuple[float, float] | None

    @property
    def delta(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Verdict:
    """What a gate said of a version against a baseline: ``base``, or a version as ``name@n``.

    With several suites a change is named SUITE/CATEGORY.
    """

    at: str
    word: str
    reasons: list[str]
    gate: dict[str, Any]
    changes: list[Change]
    baseline: str
    run: str | None


@dataclass(frozen=True)
class Score:
    """One category of an evaluation, as a share of 1."""

    name: str
    role: str
    n: int
    score: float
    ci: tuple[float, float] | None
    metric: str


@dataclass(frozen=True)
class Evaluation:
    """A suite's scores of a version; ``location`` and ``sha256`` are of the complete result."""

    at: str
    suite: str
    suite_version: str
    scores: list[Score]
    location: str
    sha256: str


@dataclass(frozen=True)
class Cost:
    """Seconds of wall clock, and how many GPUs were held meanwhile."""

    seconds: float
    gpus: float

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


def cost_of(value: object) -> Cost | None:
    """``{"seconds", "gpus"}`` as a :class:`Cost`; None for anything else."""
    if not isinstance(value, dict):
        return None
    seconds, gpus = _number(value.get("seconds")), _number(value.get("gpus"))
    return None if seconds is None or gpus is None else Cost(seconds, gpus)


def verdict_of(event: Event) -> Verdict:
    value = event.value
    rows = [
        *_rows(value.get("categories")),
        *({"role": "control", **r} for r in _rows(value.get("controls"))),
    ]
    several = len({row["suite"] for row in rows if "suite" in row}) > 1
    run = value.get("run")
    return Verdict(
        event.at,
        str(value.get("verdict") or "unknown"),
        [str(reason) for reason in value.get("reasons") or []],
        value.get("gate") or {},
        [change for row in rows if (change := _change(row, several=several)) is not None],
        str(value.get("baseline") or "not recorded"),
        None if run is None else str(run),
    )


def evaluation_of(event: Event) -> Evaluation:
    value = event.value
    parts = [("strength", value.get("categories")), ("control", value.get("controls"))]
    return Evaluation(
        event.at,
        str(value.get("suite") or "suite not recorded"),
        str(value.get("suite_version") or "not recorded"),
        [
            score
            for role, categories in parts
            for name, facts in (categories or {}).items()
            if isinstance(facts, dict) and (score := _score(str(name), {"role": role, **facts})) is not None
        ],
        str(value.get("location") or "not recorded"),
        str(value.get("sha256") or "not recorded"),
    )


def _score(name: str, facts: dict[str, Any]) -> Score | None:
    score = _number(facts.get("score"))
    if score is None:
        return None
    metric, ci = str(facts.get("metric") or "score"), _pair(facts.get("ci"))
    return Score(name, str(facts["role"]), int(facts.get("n") or 0), score, ci, metric)


def _rows(value: Any) -> Iterator[dict[str, Any]]:
    yield from (row for row in value or [] if isinstance(row, dict))


def _change(row: dict[str, Any], *, several: bool) -> Change | None:
    before, after = _number(row.get("baseline")), _number(row.get("candidate"))
    if before is None or after is None or "name" not in row:
        return None
    role = str(row.get("role") or "strength")
    name = f"{row['suite']}/{row['name']}" if several and "suite" in row else str(row["name"])
    return Change(name, role, int(row.get("n") or 0), before, after, _pair(row.get("delta_ci")))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _pair(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = map(_number, value)
    return None if low is None or high is None else (low, high)
