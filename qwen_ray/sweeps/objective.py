"""What a sweep looks for: gain on the targets, while no strength loses more than the tolerance.

By held-out loss while training, in nats a supervised token; by lm-eval items at the end. Feasible trials are
ordered by gain, all others after them by how far they violate the constraint (Deb, Computer Methods in
Applied Mechanics and Engineering 186:311, 2000): no weight has to be chosen between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_ray.evaluation.statistics import ROUNDING

if TYPE_CHECKING:
    from qwen_ray.sweeps.spec import ObjectiveConfig

INFEASIBLE = -100.0
"""Scores of trials that violate the constraint start here: no gain in nats is as low."""
PREFIX = "eval_loss/"


@dataclass(frozen=True)
class Judged:
    """``gain`` and ``violation`` in nats a token; ``score`` is the one number to maximise."""

    gain: float
    violation: float
    feasible: bool
    score: float


FAILED = Judged(gain=-1e9, violation=1e9, feasible=False, score=-1e9)
"""Of a trial whose loss is not a number."""


def judge(losses: Mapping[str, float], base: Mapping[str, float], objective: ObjectiveConfig) -> Judged:
    """Judge held-out losses (keys ``eval_loss/DOMAIN``, others are ignored) against those of the base.

    Gain: the mean over the targets of base - trial. Violation: the most by which a strength's loss rose more
    than the tolerance. Targets that are not named are all domains but the strengths.
    """
    strengths = [PREFIX + d for d in objective.strengths]
    targets = [PREFIX + d for d in objective.targets]
    targets = targets or [key for key in sorted(base) if key.startswith(PREFIX) and key not in strengths]
    gain = math.fsum(base[d] - losses[d] for d in targets) / len(targets)
    rises = [losses[d] - base[d] - objective.tolerance for d in strengths]
    if not math.isfinite(gain) or not all(map(math.isfinite, rises)):
        return FAILED
    violation = max(0.0, *rises) if rises else 0.0
    feasible = violation == 0
    return Judged(gain, violation, feasible, gain if feasible else INFEASIBLE - violation)


def ranking(reports: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[int]:
    """Trials by their last report, best first; of equals the lower index. Only trials that came as far as
    any did are compared: those at their full length, or before there are any, at the highest rung."""
    last = {trial: rows[-1] for trial, rows in reports.items() if rows}
    furthest = max((row["share"] for row in last.values()), default=0.0)
    there = [trial for trial, row in last.items() if row["share"] >= furthest - 1e-9]
    return sorted(there, key=lambda trial: (-last[trial]["score"], trial))


def best(reports: Mapping[int, Sequence[Mapping[str, Any]]]) -> int | None:
    """The first of :func:`ranking`; feasible only if any of those is. None without reports."""
    return next(iter(ranking(reports)), None)


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other dominates: as high in every coordinate, and higher in one.

    Higher is better in all: give ``(gain, -rise of the strengths' loss, -cost)``.
    """

    def dominated(a: Sequence[float]) -> bool:
        return any(b != a and all(y >= x for x, y in zip(a, b, strict=True)) for b in map(tuple, points))

    return [i for i, point in enumerate(points) if not dominated(tuple(point))]


@dataclass(frozen=True)
class Confirmed:
    """lm-eval's word. ``gain``: mean over all items of the targets, shares of 1, with its interval over
    ``n`` pairs. ``reasons``: a sentence for each strength that lost more than the tolerance."""

    gain: float
    interval: tuple[float, float]
    n: int
    feasible: bool
    reasons: list[str]


def confirmed_gain(rows: Sequence[Mapping[str, Any]], tolerance: float) -> Confirmed:
    """Judge the ``categories`` of a comparison (:func:`qwen_ray.evaluation.compare.compare`).

    The gain is the paired difference over the items of all targets. Its interval joins those of the
    categories by square-and-add (MOVER: Zou and Donner, Statistics in Medicine 27:1693, 2008), with each
    category's share of the items as its weight; so it keeps the properties of the paired intervals it is
    made of. Raises :class:`ValueError` where no category is a target.
    """
    targets = [row for row in rows if row["role"] == "target"]
    n = sum(row["n"] for row in targets)
    if not n:
        raise ValueError("no category is a target, so there is no gain to measure")
    gain = math.fsum(row["n"] * row["delta"] for row in targets) / n
    below = math.hypot(*(row["n"] / n * (row["delta"] - row["delta_ci"][0]) for row in targets))
    above = math.hypot(*(row["n"] / n * (row["delta_ci"][1] - row["delta"]) for row in targets))
    reasons = [
        f"{row['name']} lost {-100 * row['delta']:.1f} points (interval {100 * row['delta_ci'][0]:+.1f} to "
        f"{100 * row['delta_ci'][1]:+.1f}, n={row['n']}), more than the tolerance of {100 * tolerance:g}"
        for row in rows
        if row["role"] == "strength" and row["delta"] < -(tolerance + ROUNDING)
    ]
    return Confirmed(gain, (gain - below, gain + above), n, not reasons, reasons)
