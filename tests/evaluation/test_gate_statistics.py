"""The gate on simulated models: how often it promotes without a gain, with one, and with a strength lost."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qwen_ray.evaluation.compare import Gate, compare
from qwen_ray.evaluation.gate import judge
from tests.evaluation.simulated import cells, outcomes, results, same_model_twice

TIMES = 2000


def verdicts(scores: dict[str, np.ndarray], roles: dict[str, str], gate: Gate | None = None) -> Counter[str]:
    return Counter(compare(before, after, gate)["verdict"] for before, after in results(scores, roles))


@pytest.mark.parametrize(
    ("targets", "n", "confidence"),
    [(1, 30, 0.95), (1, 100, 0.95), (1, 200, 0.95), (1, 400, 0.95), (3, 100, 0.95), (1, 200, 0.8)],
)
def test_without_a_true_difference_no_more_are_promoted_than_stated(
    targets: int, n: int, confidence: float
) -> None:
    """At most (1 - confidence) / 2: by the exact test on the changed items, so at any number of them. Several
    targets must all gain, which chance does less often. The other verdicts happen, so the test tests.
    """
    rng = np.random.default_rng(n + targets)
    names = [f"target {i}" for i in range(targets)]
    found = verdicts(
        {name: same_model_twice(rng, n, TIMES) for name in names},
        dict.fromkeys(names, "target"),
        Gate(confidence=confidence),
    )
    assert found["promote"] <= (1 - confidence) / 2 * TIMES
    assert found["hold"] > 0
    assert found["regress"] > 0


def test_without_a_minimum_gain_the_rate_is_kept_too() -> None:
    """The tests alone keep it: nothing here is owed to the five points."""
    rng = np.random.default_rng(0)
    found = verdicts({"t": same_model_twice(rng, 400, TIMES)}, {"t": "target"}, Gate(min_gain=0))
    assert 0.01 * TIMES < found["promote"] <= 0.025 * TIMES


def test_eight_points_of_500_items_are_promoted() -> None:
    """Where a fifth of the answers change (14% gained, 6% lost), beside a strength that stays."""
    rng = np.random.default_rng(0)
    scores = {
        "biology": outcomes(rng, cells(0.08, 0.2, 0.4), 500, 800),
        "arithmetic": outcomes(rng, cells(0, 0.1, 0.8), 500, 800),
    }
    found = verdicts(scores, {"biology": "target", "arithmetic": "strength"})
    assert found["promote"] >= 0.9 * 800


def test_a_strength_that_lost_eight_points_is_not_promoted() -> None:
    """At 200 items, a tenth of the answers changing (9% lost, 1% gained), whatever the target gained."""
    rng = np.random.default_rng(0)
    scores = {
        "biology": outcomes(rng, cells(0.4, 0.5, 0.3), 200, 1000),
        "arithmetic": outcomes(rng, cells(-0.08, 0.1, 0.8), 200, 1000),
    }
    found = verdicts(scores, {"biology": "target", "arithmetic": "strength"})
    assert found["regress"] >= 0.95 * 1000


def test_regressions_are_listed_wrongly_in_no_more_than_one_comparison_of_twenty() -> None:
    """Of six categories without a difference; without the correction it would be more than one in eight."""
    rng = np.random.default_rng(0)
    roles = {f"c{i}": "strength" for i in range(6)}
    scores = {name: same_model_twice(rng, 80, 500) for name in roles}
    wrong = uncorrected = 0
    for before, after in results(scores, roles):
        comparison = compare(before, after)
        wrong += bool(comparison["regressions"])
        uncorrected += any(row["p"] <= 0.05 and row["delta"] < 0 for row in comparison["categories"])
    assert wrong <= 0.05 * 500
    assert uncorrected > 2 * wrong


def test_two_suites_are_judged_with_the_rate_of_one() -> None:
    rng = np.random.default_rng(0)
    first = results({"t": same_model_twice(rng, 100, 1000)}, {"t": "target"})
    second = results({"t": same_model_twice(rng, 100, 1000)}, {"t": "target"})
    promoted = 0
    for one, other in zip(first, second, strict=True):
        comparisons = [compare(*one), compare(*other)]
        comparisons[1]["baseline"]["suite"] = "other"
        promoted += judge(Gate(), comparisons)["verdict"] == "promote"
    assert promoted <= 0.025 * 1000
