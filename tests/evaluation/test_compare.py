"""Paired comparison and the gate."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.evaluation.compare import Gate, compare
from qwen_ray.evaluation.report_text import comparison_table
from qwen_ray.evaluation.statistics import (
    detectable_difference,
    holm,
    mcnemar,
    paired_difference,
    paired_p,
    smallest_difference,
    wilson,
)

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


def test_mcnemar_is_the_exact_binomial_test() -> None:
    from scipy.special import bdtr

    for gained, lost in [(6, 0), (0, 6), (12, 2), (1, 9), (60, 85), (400, 340)]:
        assert mcnemar(gained, lost) == pytest.approx(2 * bdtr(min(gained, lost), gained + lost, 0.5))
    assert mcnemar(12, 2) == (1 + 14 + 91) / 2**13
    assert mcnemar(7, 7) == mcnemar(0, 0) == 1
    assert 0.008 < mcnemar(3000, 2800) < 0.0094  # beyond what a float of 2^5800 would hold; z = 2.61


def test_paired_p_of_right_and_wrong_and_of_other_scores() -> None:
    assert paired_p([1.0] * 5 + [0.0] * 15, [1.0] * 13 + [0.0] * 7) == 2 / 2**8
    before, after = [0.1, 0.2, 0.3, 0.9], [0.2, 0.3, 0.5, 0.8]
    x = 0.075 / math.sqrt(0.0475 / 3 / 4) / math.sqrt(3)  # of the differences 0.1, 0.1, 0.2, -0.1
    closed = 1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x))  # Student's t with 3 degrees of freedom
    assert paired_p(before, after) == pytest.approx(closed)
    assert paired_p(after, before) == pytest.approx(closed)
    assert paired_p([0.3, 0.5], [0.3, 0.5]) == paired_p([0.3], [0.9]) == 1


def test_holm_against_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_rows_have_tests_corrected_for_their_number() -> None:
    before = {"biology": right(25, 100), "arithmetic": right(99, 100), "untaught": right(5, 100)}
    after = {"biology": right(80, 100), "arithmetic": right(93, 100), "untaught": right(20, 100)}
    comparison = compare(result(before), result(after))
    biology, arithmetic = comparison["categories"]
    assert biology["p"] == mcnemar(55, 0)
    assert biology["p_corrected"] == 2 * biology["p"]
    assert arithmetic["p"] == arithmetic["p_corrected"] == 2 / 2**6
    assert arithmetic["changed"] == 0.06
    (control,) = comparison["controls"]
    assert control["p"] == mcnemar(15, 0)
    assert "p_corrected" not in control


def test_a_hundred_items_do_not_show_five_points() -> None:
    assert 0.08 < smallest_difference(100, changed=0.1) < smallest_difference(100, changed=0.3) < 0.2
    assert smallest_difference(100, changed=0.01) > 0.05  # five points need five changed items
    assert smallest_difference(5) == 1.0  # five of five by chance: p = 0.0625
    assert smallest_difference(500, power=0.9) > smallest_difference(500, power=0.8)
    assert smallest_difference(500, confidence=0.99) > smallest_difference(500, confidence=0.95)
    changed = [1.0, 0.0] * 10
    assert detectable_difference(
        right(80, 100) + changed, right(80, 100) + changed[1:] + [1.0], at_least=0.05
    ) == smallest_difference(120, changed=20 / 120)
    same = right(80, 100)
    assert detectable_difference(same, same, at_least=0.05) == smallest_difference(100, changed=0.05)
    assert detectable_difference([0.5] * 9, [0.5] * 8 + [0.6], at_least=0) == pytest.approx(
        2.8016 / 90, abs=1e-5
    )


def test_the_table_says_what_so_few_items_miss() -> None:
    before = {"biology": right(25, 100), "arithmetic": right(99, 100)}
    comparison = compare(result(before), result({**before, "biology": right(28, 100)}))
    said, least = comparison_table(comparison), 100 * comparison["categories"][0]["detectable"]
    assert 7.6 < least < 7.7
    assert f"biology: with 100 items you cannot see a change of 5 points; one of {least:.1f} shows" in said
    assert "arithmetic: with 100 items you cannot see a change of 4 points" in said
    said = comparison_table(compare(result(before), result({**before, "biology": right(80, 100)})))
    assert "biology: with 100 items" not in said  # the gain is plain
    many = {"biology": right(2500, 10000)}
    assert "cannot see" not in comparison_table(compare(result(many), result(many)))


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
    assert row["changed"] == 0


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


@pytest.mark.parametrize(("setting", "other"), [("num_fewshot", 5), ("seed", 2)])
def test_different_settings_cannot_be_compared(setting: str, other: int) -> None:
    scores, settings = {"biology": right(5, 10)}, {"limit": 10, "num_fewshot": None, "seed": 1}
    with pytest.raises(UserError, match=f"different settings: {setting} {settings[setting]} and {other}"):
        compare(result(scores, settings=settings), result(scores, settings=settings | {setting: other}))
    # The same items, however many were asked for, and on a server or not.
    compare(
        result(scores, settings=settings), result(scores, settings=settings | {"limit": None, "endpoint": 1})
    )


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.5, 80.0, None])
def test_a_score_that_is_none_is_refused_by_item(score: Any) -> None:
    before, after = ({"biology": right(5, 10), "arithmetic": right(9, 10)} for _ in range(2))
    after["arithmetic"][3] = score
    with pytest.raises(UserError, match=f"a score of {score}") as e:
        compare(result(before), result(after))
    assert e.value.where == "suite 'tiny', category 'arithmetic', item 'arithmetic-3'"
    with pytest.raises(UserError, match=f"a score of {score}"):
        compare(result(after), result(before))
