"""The objective: gain under a constraint, the order of trials, the front, lm-eval's word."""

from __future__ import annotations

import math
import random
from itertools import chain

import pytest

from qwen_ray.evaluation.statistics import paired_difference
from qwen_ray.sweeps.objective import FAILED, best, confirmed_gain, judge, pareto, ranking
from qwen_ray.sweeps.spec import ObjectiveConfig

BASE = {"eval_loss": 2.5, "eval_loss/biology": 3.0, "eval_loss/history": 2.0, "eval_loss/replay": 1.0}
OBJECTIVE = ObjectiveConfig(targets=["biology", "history"], strengths=["replay"], tolerance=0.05)


def losses(biology: float, history: float, replay: float) -> dict[str, float]:
    return {"eval_loss/biology": biology, "eval_loss/history": history, "eval_loss/replay": replay}


def test_gain_is_the_mean_over_the_targets() -> None:
    judged = judge(losses(2.0, 1.8, 0.9), BASE, OBJECTIVE)
    assert judged.gain == pytest.approx((1.0 + 0.2) / 2)
    assert (judged.violation, judged.feasible, judged.score) == (0.0, True, judged.gain)


def test_a_strength_may_rise_by_the_tolerance_and_no_more() -> None:
    assert judge(losses(2.0, 1.8, 1.0499), BASE, OBJECTIVE).feasible
    judged = judge(losses(0.0, 0.0, 1.25), BASE, OBJECTIVE)
    assert not judged.feasible
    assert judged.violation == pytest.approx(0.2)
    assert judged.score == pytest.approx(-100.2)
    assert judged.gain == pytest.approx(2.5)


def test_the_worst_strength_decides() -> None:
    objective = ObjectiveConfig(targets=["biology"], strengths=["history", "replay"], tolerance=0.0)
    assert judge(losses(2.0, 2.1, 1.3), BASE, objective).violation == pytest.approx(0.3)


def test_targets_are_all_but_the_strengths_unless_named() -> None:
    unnamed = ObjectiveConfig(strengths=["replay"])
    assert judge(losses(2.0, 1.8, 0.9), BASE, unnamed).gain == pytest.approx(0.6)


@pytest.mark.parametrize("where", ["biology", "replay"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_the_worst_of_all(where: str, value: float) -> None:
    made = {**losses(2.0, 1.8, 0.9), f"eval_loss/{where}": value}
    assert judge(made, BASE, OBJECTIVE) == FAILED
    assert FAILED.score < judge(losses(90.0, 90.0, 90.0), BASE, OBJECTIVE).score


def report(share: float, score: float) -> dict[str, float]:
    return {"share": share, "score": score}


def test_only_trials_at_full_length_win() -> None:
    reports = {
        0: [report(0.1, 0.1), report(1.0, 0.2)],
        1: [report(0.1, 0.9)],
        2: [report(0.1, 0.2), report(1.0, -100.3)],
        3: [report(0.1, 0.3), report(1.0, 0.2)],
        4: [],
    }
    assert ranking(reports) == [0, 3, 2]
    assert best(reports) == 0


def test_before_any_is_done_the_highest_rung_decides() -> None:
    reports = {0: [report(0.1, 0.9)], 1: [report(0.1, 0.1), report(0.3, 0.2)], 2: [report(0.1, 0.5)]}
    assert ranking(reports) == [1]
    assert best({0: []}) is None


def test_front_of_two_and_three_objectives() -> None:
    assert pareto([(1, 1), (2, 0), (0, 2), (1, 0), (0, 0), (1, 1)]) == [0, 1, 2, 5]
    assert pareto([(1, 1, 5), (1, 1, 4), (0, 0, 9)]) == [0, 2]
    points = [[random.Random(i).random() for _ in range(3)] for i in range(40)]
    front = pareto(points)
    assert front
    for i, point in enumerate(points):  # by the definition, point by point
        beaten = any(
            all(a >= b for a, b in zip(other, point, strict=True)) and other != point for other in points
        )
        assert (i in front) != beaten


def row(name: str, role: str, before: list[float], after: list[float]) -> dict[str, object]:
    delta, lo, hi = paired_difference(before, after)
    return {"name": name, "role": role, "n": len(before), "delta": delta, "delta_ci": [lo, hi]}


def scores(n: int, share: float, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [float(rng.random() < share) for _ in range(n)]


def test_confirmed_gain_is_that_of_all_target_items() -> None:
    sizes = {"biology": 60, "history": 90, "security": 120}
    before = {d: scores(n, 0.3, i) for i, (d, n) in enumerate(sizes.items())}
    after = {d: scores(n, 0.6, 9 + i) for i, (d, n) in enumerate(sizes.items())}
    rows = [row(d, "target", before[d], after[d]) for d in sizes]
    rows.append(row("arithmetic", "strength", [1.0] * 50, [1.0] * 49 + [0.0]))
    found = confirmed_gain(rows, tolerance=0.04)
    pooled = paired_difference([*chain(*before.values())], [*chain(*after.values())])
    assert found.gain == pytest.approx(pooled[0])
    assert found.n == 270
    assert found.interval == pytest.approx(pooled[1:], abs=0.015)  # another, equally valid interval
    assert found.interval[0] < found.gain < found.interval[1]
    assert found.feasible
    assert found.reasons == []


def test_one_target_keeps_its_interval() -> None:
    only = row("biology", "target", scores(80, 0.3, 1), scores(80, 0.5, 2))
    assert confirmed_gain([only], 0.0).interval == pytest.approx(tuple(only["delta_ci"]))  # type: ignore[arg-type]


def test_a_strength_that_fell_is_named() -> None:
    rows = [
        row("biology", "target", [0.0] * 20, [1.0] * 20),
        row("arithmetic", "strength", [1.0] * 20, [1.0] * 18 + [0.0] * 2),
    ]
    found = confirmed_gain(rows, tolerance=0.04)
    assert not found.feasible
    assert "arithmetic lost 10.0 points" in found.reasons[0]
    assert confirmed_gain(rows, tolerance=0.1).feasible
    with pytest.raises(ValueError, match="target"):
        confirmed_gain(rows[1:], 0.04)
