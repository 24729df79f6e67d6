"""The gate's limits, over several suites, and how it is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.evaluation.compare import Gate, compare
from qwen_ray.evaluation.gate import adapter_size, given_gate, judge
from tests.evaluation.test_compare import result, right

GAINED = compare(
    result({"biology": right(25, 100), "arithmetic": right(99, 100)}),
    result({"biology": right(80, 100), "arithmetic": right(97, 100)}),
)


def of_suite(name: str, before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, Any]:
    return compare(result(before, suite=name), result(after, suite=name))


def reason(judged: dict[str, Any], word: str) -> str:
    (found,) = [text for text in judged["reasons"] if word in text]
    return str(found)


def test_what_was_shown_is_promoted() -> None:
    judged = judge(Gate(), [GAINED])
    assert judged["verdict"] == "promote"
    assert judged["gate"] == Gate().model_dump()
    assert judged["regressions"] == []
    assert len(judged["reasons"]) == 2


def test_suites_are_judged_together() -> None:
    other = of_suite("other", {"arithmetic": right(90, 100)}, {"arithmetic": right(80, 100)})
    judged = judge(Gate(), [GAINED, other])
    assert judged["verdict"] == "regress"
    assert "lost more" in reason(judged, "other/arithmetic -10.0")
    assert "kept" in reason(judged, "tiny/arithmetic -2.0")
    held = of_suite("other", {"arithmetic": right(90, 100)}, {"arithmetic": right(90, 100)})
    assert judge(Gate(), [GAINED, held])["verdict"] == "promote"
    with pytest.raises(UserError, match="two comparisons of the suite 'tiny'"):
        judge(Gate(), [GAINED, GAINED])


def test_a_required_suite_must_be_there() -> None:
    judged = judge(Gate(required_suites=["tiny", "guide"]), [GAINED])
    assert judged["verdict"] == "hold"
    assert "'guide' is required" in judged["reasons"][-1]
    assert judge(Gate(required_suites=["tiny"]), [GAINED])["verdict"] == "promote"


def test_few_items_hold() -> None:
    judged = judge(Gate(min_items=101), [GAINED])
    assert judged["verdict"] == "hold"
    assert "tiny/biology has 100 items of the 101 asked for" in judged["reasons"]
    assert judge(Gate(min_items=100), [GAINED])["verdict"] == "promote"


@pytest.mark.parametrize("name", ["arithmetic", "tiny/arithmetic"])
def test_a_tolerance_of_its_own(name: str) -> None:
    judged = judge(Gate(tolerances={name: 0.01}), [GAINED])
    assert judged["verdict"] == "regress"
    assert "tolerance of 1 points" in reason(judged, "arithmetic -2.0")
    assert judge(Gate(tolerance=0, tolerances={name: 0.02}), [GAINED])["verdict"] == "promote"


def test_a_tolerance_for_nothing_is_not_passed_over() -> None:
    judged = judge(Gate(tolerances={"arithmatic": 0.01}), [GAINED])
    assert judged["verdict"] == "hold"
    assert "did you mean 'arithmetic'?" in judged["reasons"][-1]
    assert judge(Gate(tolerances={"biology": 0.01}), [GAINED])["verdict"] == "hold"  # a target


def test_latency_and_size_are_limits() -> None:
    gate = Gate(max_latency_ratio=1.2, max_adapter_bytes=1000)
    judged = judge(gate, [GAINED], latency=(0.5, 0.6), size=1000)
    assert judged["verdict"] == "promote"
    assert judged["reasons"][-2:] == [
        "latency 600 ms at p95, 1.20 times 500 ms before: within the 1.2 times that are allowed",
        "the adapter has 1,000 bytes: within the 1,000 bytes allowed",
    ]
    judged = judge(gate, [GAINED], latency=(0.5, 0.61), size=1001)
    assert judged["verdict"] == "hold"
    assert all("above the" in text for text in judged["reasons"][-2:])


@pytest.mark.parametrize("latency", [(0.8, math.nan), (math.nan, 0.8), (math.inf, 0.8), (0.8, -1), (0, 0.8)])
def test_a_latency_that_is_none_holds(latency: tuple[float, float]) -> None:
    judged = judge(Gate(max_latency_ratio=1.2), [GAINED], latency=latency)
    assert judged["verdict"] == "hold"
    assert "are no measurements" in judged["reasons"][-1]


def test_a_limit_that_was_not_measured_holds() -> None:
    judged = judge(Gate(max_latency_ratio=1.2, max_adapter_bytes=1000), [GAINED])
    assert judged["verdict"] == "hold"
    assert "was not measured" in judged["reasons"][-2]
    assert "is not known" in judged["reasons"][-1]


def test_worse_is_more_than_unmet() -> None:
    lost = of_suite("lost", {"arithmetic": right(90, 100)}, {"arithmetic": right(80, 100)})
    assert judge(Gate(max_adapter_bytes=1), [GAINED, lost])["verdict"] == "regress"


def test_a_gain_that_the_exact_test_doubts_holds() -> None:
    """Five of twenty gained and none lost: the interval is above 0, and chance does so once in sixteen."""
    before, after = right(10, 20), right(15, 20)
    row = compare(result({"biology": before}), result({"biology": after}))["categories"][0]
    assert row["delta_ci"][0] > 0
    assert row["p"] == 0.0625
    judged = compare(result({"biology": before}), result({"biology": after}))
    assert judged["verdict"] == "hold"
    assert "may be chance (exact p=0.062)" in judged["reasons"][0]


def test_regressions_are_listed_within_the_tolerance_too() -> None:
    before = {"biology": right(250, 1000), "arithmetic": right(990, 1000)}
    after = {"biology": right(800, 1000), "arithmetic": right(970, 1000)}
    judged = compare(result(before), result(after))
    assert judged["verdict"] == "promote"
    (row,) = judged["regressions"]
    assert (row["suite"], row["name"]) == ("tiny", "arithmetic")
    assert row["p_corrected"] == pytest.approx(0.5**19)  # 20 lost, none gained; the larger of two p-values
    assert "the fall is no chance" in reason(judged, "arithmetic")


def test_the_correction_counts_the_categories_of_every_suite() -> None:
    """Six of 100 lost is certain alone (p=0.031) and not as one of two."""
    lost = {"arithmetic": right(99, 100)}, {"arithmetic": right(93, 100)}
    alone = judge(Gate(), [of_suite("a", *lost)])
    assert [row["suite"] for row in alone["regressions"]] == ["a"]
    kept = of_suite("b", {"arithmetic": right(99, 100)}, {"arithmetic": right(99, 100)})
    both = judge(Gate(), [of_suite("a", *lost), kept])
    assert both["verdict"] == "regress"
    assert both["regressions"] == []
    assert "may be chance" in reason(both, "a/arithmetic")


def test_a_gate_is_read_from_a_file_and_options(tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(
        "min_gain: 0.1\ntolerances: {gsm8k: 0.02}\nrequired_suites: [guide]\nmax_latency_ratio: 1.5\n"
    )
    gate = given_gate(str(file), tolerance=3)
    assert gate == Gate(
        min_gain=0.1,
        tolerance=0.03,
        tolerances={"gsm8k": 0.02},
        required_suites=["guide"],
        max_latency_ratio=1.5,
    )
    assert given_gate(None) == Gate()
    file.write_text("min_gian: 0.1\n")
    with pytest.raises(UserError, match="unknown key 'min_gian'") as e:
        given_gate(str(file))
    assert e.value.fix == "did you mean 'min_gain'?"
    file.write_text("min_gain: 5\n")
    with pytest.raises(UserError, match="less than or equal to 1") as e:
        given_gate(str(file))
    assert e.value.where == str(file)


def test_the_size_of_an_adapter_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(300))
    (tmp_path / "deep" / "more").write_bytes(bytes(7))
    assert adapter_size(tmp_path) == 307
