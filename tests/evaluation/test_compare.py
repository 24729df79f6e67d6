"""Paired comparison and the gate."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.evaluation.compare import Gate, compare
from qwen_ray.evaluation.statistics import paired_difference, wilson

ROLES = {"biology": "target", "arithmetic": "strength"}


def result(scores: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    items = [
        {"category": c, "task": c, "id": f"{c}-{i}", "score": s}
        for c, values in scores.items()
        for i, s in enumerate(values)
    ]
    categories = {c: {"role": ROLES[c]} for c in scores if c in ROLES}
    controls = {c: {} for c in scores if c not in ROLES}
    whole = {"model": "tiny", "adapter": None, "suite": "tiny", "suite_version": "1", "settings": {}}
    return {**whole, "categories": categories, "controls": controls, "items": items, **changes}


def right(n: int, of: int) -> list[float]:
    return [1.0] * n + [0.0] * (of - n)


def test_wilson_against_published_values() -> None:
    # Newcombe, Statistics in Medicine 17:857 (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_paired_interval_against_published_value() -> None:
    # Newcombe, Statistics in Medicine 17:2635 (1998), table II, method 10, row (a, b, c, d) = (36, 12, 2, 0).
    candidate = [1.0] * 36 + [1.0] * 12 + [0.0] * 2
    baseline = [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    delta, lo, hi = paired_difference(baseline, candidate)
    assert delta == pytest.approx(0.2)
    assert (lo, hi) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_no_change_is_not_certainty() -> None:
    delta, lo, hi = paired_difference(right(20, 20), right(20, 20))
    assert delta == 0
    assert lo < -0.05 < 0.05 < hi


def test_paired_interval_covers_the_truth() -> None:
    """Over 400 simulated comparisons the 95% interval holds the true difference about 95% of the time."""
    rng = random.Random(0)
    hits = 0
    for _ in range(400):
        baseline, candidate = [], []
        for _ in range(100):
            known = rng.random() < 0.5
            baseline.append(float(known))
            candidate.append(float(rng.random() < (0.9 if known else 0.3)))
        _, lo, hi = paired_difference(baseline, candidate)
        hits += lo <= 0.1 <= hi
    assert 0.92 <= hits / 400 <= 0.99


def test_scores_between_zero_and_one_use_students_t() -> None:
    delta, lo, hi = paired_difference([0.1, 0.2, 0.3], [0.2, 0.3, 0.5])
    assert delta == pytest.approx(0.4 / 3)
    assert (lo, hi) == pytest.approx((0.4 / 3 - 4.3027 / 30, 0.4 / 3 + 4.3027 / 30), abs=1e-4)


def verdict(
    before: dict[str, list[float]], after: dict[str, list[float]], **kwargs: Any
) -> tuple[str, list[str]]:
    comparison = compare(result(before), result(after), **kwargs)
    return comparison["verdict"], comparison["reasons"]


def test_promote() -> None:
    word, reasons = verdict(
        {"biology": right(25, 100), "arithmetic": right(99, 100)},
        {"biology": right(80, 100), "arithmetic": right(97, 100)},
    )
    assert word == "promote"
    assert len(reasons) == 2


def test_hold_without_enough_gain() -> None:
    assert verdict({"biology": right(50, 100)}, {"biology": right(54, 100)})[0] == "hold"


def test_hold_when_the_interval_includes_nothing() -> None:
    """Six points, but of twenty-odd changed items: could be chance."""
    before = [1.0, 0.0] * 50
    after = [1 - s for s in before[:56]] + before[56:]
    after[1::14] = [1.0] * len(after[1::14])
    after[:56:2] = [float(i % 9 != 0) for i in range(28)]
    delta = sum(after) / 100 - sum(before) / 100
    comparison = compare(
        result({"biology": before}), result({"biology": after}), Gate(min_gain=0.01, confidence=0.9999999)
    )
    assert delta > 0.01
    assert comparison["verdict"] == "hold"
    assert "includes no gain" in comparison["reasons"][0]


def test_regress_when_a_strength_is_lost() -> None:
    word, reasons = verdict(
        {"biology": right(25, 100), "arithmetic": right(99, 100)},
        {"biology": right(80, 100), "arithmetic": right(90, 100)},
    )
    assert word == "regress"
    assert any("arithmetic" in r and "lost more" in r for r in reasons)


def test_regress_when_a_target_gets_worse() -> None:
    assert verdict({"biology": right(80, 100)}, {"biology": right(40, 100)})[0] == "regress"


def test_targets_can_be_named() -> None:
    before = {"biology": right(25, 100), "arithmetic": right(50, 100)}
    after = {"biology": right(25, 100), "arithmetic": right(90, 100)}
    assert verdict(before, after, targets=["arithmetic"])[0] == "promote"
    with pytest.raises(UserError, match="unknown category 'biolgy'") as e:
        verdict(before, after, targets=["biolgy"])
    assert "biology" in e.value.fix


def test_pairs_by_item_not_by_order() -> None:
    before = result({"biology": right(50, 100)})
    after = result({"biology": right(50, 100)})
    after["items"].reverse()
    row = compare(before, after)["categories"][0]
    assert row["delta"] == 0
    assert set(row) == {"name", "role", "n", "baseline", "candidate", "delta", "delta_ci"}


def test_controls_are_apart_and_decide_nothing() -> None:
    before = {"biology": right(20, 100), "untaught": right(25, 100)}
    after = {"biology": right(90, 100), "untaught": right(5, 100)}
    comparison = compare(result(before), result(after))
    assert comparison["verdict"] == "promote"
    assert [c["name"] for c in comparison["categories"]] == ["biology"]
    assert comparison["controls"][0]["delta"] == pytest.approx(-0.2)


def test_different_items_or_suites_cannot_be_paired() -> None:
    with pytest.raises(UserError, match="different items"):
        compare(result({"biology": right(5, 10)}), result({"biology": right(5, 11)}))
    with pytest.raises(UserError, match="different suites"):
        compare(result({"biology": right(5, 10)}), result({"biology": right(5, 10)}, suite_version="2"))
