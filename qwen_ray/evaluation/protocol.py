"""The evaluation protocol: what is written down before a training, watched during it and shown after it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.evaluation.compare import compare, keyed_items
from qwen_ray.evaluation.failures import representatives
from qwen_ray.evaluation.gate import Gate, judge
from qwen_ray.evaluation.questions import Question
from qwen_ray.evaluation.statistics import ROUNDING, smallest_difference, wilson

BEFORE, AFTER = "qwen-ray/protocol-before/1", "qwen-ray/protocol-after/1"
CHANGES = (0.05, 0.1, 0.2, 0.3)
"""Shares of changed items for which it is said beforehand what so many items show."""
WEAK = "weak"
"""As ``--targets``: the categories that were found weak before."""

Questions = dict[tuple[str, str], Question]


@dataclass(frozen=True)
class Part:
    """The result of one suite. ``held_out``: nobody is to see its items, only its scores.

    ``suite``: what ``--suite`` named, to run it again. ``questions``: what its items ask, where known.
    """

    suite: str
    result: dict[str, Any]
    held_out: bool
    questions: Questions


# -- before


def before(
    parts: Sequence[Part], gate: Gate, *, below: float | None = None, failures: int = 10
) -> dict[str, Any]:
    """Baseline by category, which categories are weak, representative failures, and what the items can show.

    A category is weak if it is certainly below ``below``, a share of 1 (default: the mean of the suite's
    categories): the upper end of its interval is, at a level corrected for the number of categories
    (Bonferroni), so that about 1 - ``gate.confidence`` of runs name any category wrongly. Where only the
    score is below it, it is ``perhaps`` weak. ``failures``: wrong answers shown of a weak category.
    """
    suites = [_baseline(part, gate, below) for part in parts]
    shown = [
        _failures(part, row["name"], failures)
        for part, suite in zip(parts, suites, strict=True)
        for row in suite["categories"]
        if row["standing"] == "weak" and not part.held_out
    ]
    first = parts[0].result
    return {
        "schema": BEFORE,
        "model": first["model"],
        "adapter": first["adapter"],
        "gate": gate.model_dump(),
        "suites": suites,
        "weak": [
            f"{s['suite']}/{row['name']}"
            for s in suites
            for row in s["categories"]
            if row["standing"] == "weak"
        ],
        "failures": shown,
    }


def _baseline(part: Part, gate: Gate, below: float | None) -> dict[str, Any]:
    result = part.result
    categories = result["categories"]
    threshold = below
    if threshold is None:
        threshold = sum(c["score"] for c in categories.values()) / len(categories)
    level = 1 - (1 - gate.confidence) / len(categories)
    rows = []
    for name, c in {**categories, **result["controls"]}.items():
        lo, hi = wilson(c["n"] * c["score"], c["n"], level)
        standing = "control"
        if name in categories:
            standing = "weak" if hi < threshold else "perhaps" if c["score"] < threshold else "not weak"
        rows.append(
            {
                "name": name,
                **{key: c[key] for key in ("role", "metric", "n", "score", "ci")},
                "corrected_ci": [lo, hi],
                "standing": standing,
                "detectable": {
                    f"{share:g}": smallest_difference(c["n"], changed=share, confidence=gate.confidence)
                    for share in CHANGES
                },
            }
        )
    return {
        **{key: result[key] for key in ("suite", "suite_version", "settings")},
        "asked_for": part.suite,
        "held_out": part.held_out,
        "file": result_file(result["suite"]),
        "threshold": threshold,
        "threshold_is": "mean of the categories" if below is None else "given",
        "categories": rows,
    }


def _failures(part: Part, category: str, count: int) -> dict[str, Any]:
    wrong = sorted(
        (item for item in wrong_items(part.result) if item["category"] == category),
        key=lambda item: (item["score"], item["id"]),
    )
    texts = [shown(part, item)["question"] or "" for item in wrong]
    return {
        "suite": part.result["suite"],
        "category": category,
        "failed": len(wrong),
        "items": [
            {**shown(part, wrong[index]), "stands_for": count}
            for index, count in representatives(texts, count)
        ],
    }


def wrong_items(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Items that were not fully right."""
    return [item for item in result["items"] if item["score"] < 1]


def shown(part: Part, item: dict[str, Any]) -> dict[str, Any]:
    """An item for people: question (None where not known) and, in words, the answer and the right one."""
    asked = part.questions.get((item["task"], item["id"]))
    choices = asked.choices if asked else ()

    def words(answer: Any) -> str:
        is_choice = isinstance(answer, int) and 0 <= answer < len(choices)
        return choices[answer] if is_choice else str(answer)

    return {
        **{key: item[key] for key in ("id", "task", "score")},
        "question": asked.text if asked else None,
        "choices": list(choices),
        "answer": words(item["answer"]),
        "target": words(item["target"]),
    }


# -- during


def during(rows: Sequence[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """The forgetting monitor's evaluations, from a run's metrics (rows by step, see
    :func:`qwen_ray.training.tracking.read_metrics`): scores by SUITE/CATEGORY and the worst fall of a
    strength at each, and the steps at which it was more than ``tolerance``, a share of 1.
    """
    steps = []
    for row in rows:
        scores = {key.removeprefix("suite/"): v for key, v in row.items() if key.startswith("suite/")}
        if scores:
            steps.append({"step": row["step"], "worst": row.get("forgetting/worst"), "scores": scores})
    broken = [s["step"] for s in steps if s["worst"] is not None and s["worst"] > tolerance + ROUNDING]
    return {"tolerance": tolerance, "steps": steps, "broken": broken}


# -- after


def after(
    document: dict[str, Any],
    baselines: Sequence[Part],
    candidates: Sequence[dict[str, Any]],
    gate: Gate,
    *,
    targets: Sequence[str] | None = None,
    latency: tuple[float, float] | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """Every suite of before compared, judged together, and the items that flipped.

    ``document``: of :func:`before`; ``baselines`` are its suites and ``candidates`` the results of the same,
    in any order. ``targets``: categories (or SUITE/CATEGORY) that must gain, or ``["weak"]`` for those found
    weak before; the others must not lose (default: the suites' roles). Of a held-out suite no item is shown.
    """
    by_suite = {result["suite"]: result for result in candidates}
    names = [part.result["suite"] for part in baselines]
    missing = [name for name in names if name not in by_suite]
    if missing or len(by_suite) > len(names):
        raise UserError(
            f"results of {', '.join(by_suite) or 'no suite'}, but before had {', '.join(names)}",
            where="--result",
            fix="give one result for each suite of before",
        )
    if targets is not None and list(targets) == [WEAK]:
        targets = document["weak"]
        if not targets:
            raise UserError(
                "no category was weak before", where="--targets weak", fix="name the targets by category"
            )
    chosen = _targets(baselines, targets)
    compared, flips = [], []
    for part, of_suite in zip(baselines, chosen, strict=True):
        candidate = by_suite[part.result["suite"]]
        comparison = compare(part.result, candidate, gate, targets=of_suite)
        kept = ("baseline", "candidate", "categories", "controls")
        compared.append({"held_out": part.held_out, **{key: comparison[key] for key in kept}})
        flipped = flipped_items(part.result, candidate)
        flips += [_flips(part, flipped, row) for row in comparison["categories"]]
    return {
        "schema": AFTER,
        **judge(gate, compared, latency=latency, size=size),
        "suites": compared,
        "flips": flips,
    }


def _targets(parts: Sequence[Part], targets: Sequence[str] | None) -> list[list[str] | None]:
    """Those of each suite; None: the suite's own roles."""
    if targets is None:
        return [None for _ in parts]
    known = {
        name
        for part in parts
        for c in part.result["categories"]
        for name in (c, f"{part.result['suite']}/{c}")
    }
    for name in targets:
        if name not in known:
            raise UserError(f"unknown category '{name}'", where="--targets", fix=did_you_mean(name, known))
    return [
        [c for c in part.result["categories"] if c in targets or f"{part.result['suite']}/{c}" in targets]
        for part in parts
    ]


Flip = tuple[dict[str, Any], dict[str, Any]]


def flipped_items(before: dict[str, Any], after: dict[str, Any]) -> list[Flip]:
    """Items whose score is another in ``after``, with those of ``after``."""
    new = keyed_items(after)
    pairs = [
        (item, new.get(name, {}).get(key, item))
        for name, items in keyed_items(before).items()
        for key, item in items.items()
    ]
    return [(old, now) for old, now in pairs if old["score"] != now["score"]]


def _flips(part: Part, flipped: Sequence[Flip], row: dict[str, Any]) -> dict[str, Any]:
    """Those of a category, the lost ones first, in words with both answers."""
    ways: dict[str, list[Flip]] = {"lost": [], "won": []}
    for old, now in flipped:
        if old["category"] == row["name"]:
            ways["won" if now["score"] > old["score"] else "lost"].append((old, now))
    items = [
        {**shown(part, old), "after": shown(part, now)["answer"], "score_after": now["score"]}
        for pairs in ways.values()
        for old, now in pairs
    ]
    return {
        "suite": part.result["suite"],
        "category": row["name"],
        "role": row["role"],
        **{way: len(pairs) for way, pairs in ways.items()},
        "items": [] if part.held_out else items,
    }


def result_file(suite: str) -> str:
    """Where the result of a suite is in the folder of before or after."""
    return f"results/{re.sub(r'[^A-Za-z0-9_.-]', '-', suite)}.json"
