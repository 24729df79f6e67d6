"""The protocol's documents: weak categories, the failures shown, forgetting seen, items flipped."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.evaluation.compare import Gate
from qwen_ray.evaluation.failures import MOST, representatives
from qwen_ray.evaluation.protocol import Part, after, before, during
from qwen_ray.evaluation.protocol_text import after_text, before_text, during_text
from qwen_ray.evaluation.questions import Question
from qwen_ray.evaluation.statistics import wilson

ROLES = {"biology": "target", "law": "target", "arithmetic": "strength", "untaught": "control"}
CHOICES = ("yes", "no")


def eval_result(
    right: dict[str, int], n: int = 100, *, suite: str = "school", **changes: Any
) -> dict[str, Any]:
    """The first ``right`` items of each category are right: answer 0, as the target is."""
    items = [
        {
            "category": c,
            "task": c,
            "id": f"{c}-{i}",
            "score": float(i < k),
            "answer": int(i >= k),
            "target": 0,
        }
        for c, k in right.items()
        for i in range(n)
    ]
    summaries = {
        c: {"role": ROLES[c], "metric": "acc", "n": n, "score": k / n, "ci": list(wilson(k, n))}
        for c, k in right.items()
    }
    return {
        "schema": "qwen-ray/eval-result/1",
        "model": "tiny",
        "adapter": None,
        "suite": suite,
        "suite_version": "1",
        "settings": {"limit": None, "num_fewshot": None},
        "categories": {c: s for c, s in summaries.items() if s["role"] != "control"},
        "controls": {c: {**s, "explanation": ""} for c, s in summaries.items() if s["role"] == "control"},
        "items": items,
        **changes,
    }


def part(result: dict[str, Any], *, held_out: bool = False) -> Part:
    asked = {
        (item["task"], item["id"]): Question(f"Is number {item['id']} true?", CHOICES)
        for item in result["items"]
    }
    return Part(result["suite"], result, held_out, {} if held_out else asked)


BASE = {"biology": 30, "law": 58, "arithmetic": 98, "untaught": 25}


def test_weak_is_certainly_below_the_mean() -> None:
    document = before([part(eval_result(BASE))], Gate())
    (suite,) = document["suites"]
    assert suite["threshold"] == pytest.approx(0.62)  # the control does not count
    standing = {row["name"]: row["standing"] for row in suite["categories"]}
    assert standing == {"biology": "weak", "law": "perhaps", "arithmetic": "not weak", "untaught": "control"}
    assert document["weak"] == ["school/biology"]
    assert [found["category"] for found in document["failures"]] == ["biology"]


def test_weak_below_what_is_given_at_a_level_for_their_number() -> None:
    """40 of 100 is below 50 by its own interval, and not by that of one of three."""
    result = eval_result({**BASE, "law": 40})
    assert wilson(40, 100)[1] < 0.5
    (suite,) = before([part(result)], Gate(), below=0.5)["suites"]
    law = next(row for row in suite["categories"] if row["name"] == "law")
    assert law["corrected_ci"][1] > 0.5
    assert law["standing"] == "perhaps"
    assert before([part(result)], Gate(), below=0.52)["weak"] == ["school/biology", "school/law"]
    assert before([part(result)], Gate(), below=0)["weak"] == []


def test_failures_are_in_words() -> None:
    document = before([part(eval_result(BASE))], Gate(), failures=3)
    (found,) = document["failures"]
    assert found["failed"] == 70
    assert len(found["items"]) == 3
    assert sum(item["stands_for"] for item in found["items"]) == 70
    item = found["items"][0]
    assert item["question"] == f"Is number {item['id']} true?"
    assert (item["answer"], item["target"], item["choices"]) == ("no", "yes", ["yes", "no"])


def test_nothing_of_a_held_out_suite_is_shown() -> None:
    hidden = eval_result(BASE, suite="hidden")
    document = before([part(hidden, held_out=True)], Gate())
    assert document["weak"] == ["hidden/biology"]
    assert document["failures"] == []
    now = eval_result({**BASE, "biology": 80}, suite="hidden")
    later = after(document, [part(hidden, held_out=True)], [now], Gate())
    assert later["flips"][0] == {
        "suite": "hidden", "category": "biology", "role": "target", "won": 50, "lost": 0, "items": [],
    }  # fmt: skip


def test_the_text_says_beforehand_what_cannot_be_seen() -> None:
    said = before_text(before([part(eval_result(BASE))], Gate()))
    assert "with 100 items you cannot see 5 points" in said
    assert "school/biology: 70 wrong answers, 10 chosen" in said
    large = {c: 50 * k for c, k in BASE.items()}
    assert "cannot see" not in before_text(before([part(eval_result(large, 5000))], Gate()))
    even = before([part(eval_result({"biology": 50, "law": 50}))], Gate())
    assert before_text(even).endswith("no category is certainly weak")


def test_after_lists_what_flipped() -> None:
    base, now = eval_result(BASE), eval_result({**BASE, "biology": 80, "arithmetic": 90})
    now["items"][0] |= {"score": 0.0, "answer": 1}
    now["items"].reverse()
    document = before([part(base)], Gate())
    later = after(document, [part(base)], [now], Gate(tolerances={"arithmetic": 0.1}), targets=["weak"])
    flips = {flip["category"]: flip for flip in later["flips"]}
    assert (flips["biology"]["won"], flips["biology"]["lost"]) == (50, 1)
    first = flips["biology"]["items"][0]
    assert (first["id"], first["answer"], first["after"], first["target"]) == (
        "biology-0",
        "yes",
        "no",
        "yes",
    )
    assert [len(flips[c]["items"]) for c in ("biology", "law", "arithmetic")] == [51, 0, 8]
    assert later["verdict"] == "promote"  # law is no target: it was not weak
    assert [(row["name"], row["role"]) for row in later["regressions"]] == [("arithmetic", "strength")]
    said = after_text(later)
    assert "regression: school/arithmetic -8.0" in said
    assert "school/biology: 50 items won, 1 lost" in said


def test_after_judges_every_suite_of_before() -> None:
    pair = [eval_result(BASE, suite=name) for name in ("first", "second")]
    parts = [part(result) for result in pair]
    document = before(parts, Gate())
    better = [eval_result({**BASE, "biology": 80, "law": 90}, suite=name) for name in ("second", "first")]
    later = after(document, parts, better, Gate())
    assert later["verdict"] == "promote"
    assert len(later["reasons"]) == 6
    chosen = after(document, parts, better, Gate(), targets=["first/biology"])
    assert sum(row["role"] == "target" for s in chosen["suites"] for row in s["categories"]) == 1
    with pytest.raises(UserError, match="results of second, but before had first, second"):
        after(document, parts, better[:1], Gate())
    with pytest.raises(UserError, match="unknown category 'biolgy'"):
        after(document, parts, better, Gate(), targets=["biolgy"])
    with pytest.raises(UserError, match="no category was weak"):
        after({**document, "weak": []}, parts, better, Gate(), targets=["weak"])


def test_latency_and_size_reach_the_gate() -> None:
    base, now = eval_result(BASE), eval_result({**BASE, "biology": 80, "law": 90})
    gate = Gate(max_latency_ratio=1.5, max_adapter_bytes=100)
    document = before([part(base)], gate)
    assert after(document, [part(base)], [now], gate)["verdict"] == "hold"
    assert after(document, [part(base)], [now], gate, latency=(1, 1.4), size=100)["verdict"] == "promote"


def test_during_finds_the_steps_beyond_the_tolerance() -> None:
    rows = [
        {"step": 0, "suite/tiny/arithmetic": 0.98, "suite/tiny/biology": 0.25},
        {"step": 1, "loss": 3.0},
        {
            "step": 5,
            "suite/tiny/arithmetic": 0.94,
            "suite/tiny/biology": 0.5,
            "forgetting/worst": 0.98 - 0.94,
        },
        {"step": 9, "suite/tiny/arithmetic": 0.9, "suite/tiny/biology": 0.8, "forgetting/worst": 0.08},
    ]
    seen = during(rows, 0.04)
    assert [row["step"] for row in seen["steps"]] == [0, 5, 9]
    assert seen["broken"] == [9]  # exactly the tolerance is allowed
    lines = during_text(seen).splitlines()
    assert lines[0].split() == ["step", "fall", "arithmetic", "biology"]
    assert lines[3].split() == ["9", "8.0", "90.0", "80.0", "beyond", "the", "tolerance"]
    assert lines[-1] == "a strength fell more than 4 points at step 9"
    assert during_text(during(rows[:3], 0.04)).endswith(
        "every strength stayed within 4 points of the baseline"
    )
    assert "no forgetting can be seen" in during_text(during(rows[:1], 0.04))


# -- which failures


GROUPS = [*(f"how many chambers has the heart of a frog {i}" for i in range(6)),
          *(f"which enzyme cuts the bond of starch {i}" for i in range(3)),
          "where do cacti store water"]  # fmt: skip


def test_the_chosen_stand_for_all_groups_the_largest_first() -> None:
    chosen = representatives(GROUPS, 3)
    assert [0 <= chosen[0][0] < 6, 6 <= chosen[1][0] < 9, chosen[2][0] == 9] == [True] * 3
    assert [count for _, count in chosen] == [6, 3, 1]


def test_the_choice_is_the_same_again_and_bounded() -> None:
    assert representatives(GROUPS, 4) == representatives(GROUPS, 4)
    assert len(representatives(GROUPS, 50)) == len(GROUPS)
    assert len({index for index, _ in representatives(GROUPS, 50)}) == len(GROUPS)
    assert representatives([], 3) == representatives(GROUPS, 0) == []
    assert [index for index, _ in representatives(["", ""], 2)] == [0, 1]


def test_of_very_many_texts_an_even_part_is_looked_at() -> None:
    texts = [f"question {i}" for i in range(2 * MOST)]
    chosen = representatives(texts, 5)
    assert sum(count for _, count in chosen) == MOST
    assert all(index % 2 == 0 for index, _ in chosen)
