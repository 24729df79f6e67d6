"""Before and after: paired by item, category by category, with the gate's verdict on them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.evaluation.gate import Gate, judge
from qwen_ray.evaluation.statistics import detectable_difference, holm, paired_difference, paired_p

__all__ = ["SCHEMA", "Gate", "compare", "keyed_items"]

SCHEMA = "qwen-ray/comparison/1"

Items = dict[tuple[str, int], dict[str, Any]]
"""Items by what pairs them: (item id, which occurrence of that id)."""


def compare(
    baseline: dict[str, Any],
    candidate: dict[str, Any],
    gate: Gate | None = None,
    *,
    targets: list[str] | None = None,
) -> dict[str, Any]:
    """Compare two EvalResults of one suite. ``targets`` overrides the suite's roles: the rest are strengths.

    A row of ``categories`` (and of ``controls``, which decide nothing) has, as shares of 1: ``baseline``,
    ``candidate``, ``delta`` with ``delta_ci``, ``changed`` (of the items), ``p`` of the paired test,
    ``p_corrected`` for the number of categories (Holm), and ``detectable``: the smallest true difference that
    so many items show in four of five comparisons. With the keys of :func:`judge` over this one suite.

    Raises :class:`UserError` when the two did not answer the same items with the same settings, and for a
    score that is not from 0 to 1.
    """
    gate = gate or Gate()
    for key in ("suite", "suite_version"):
        if baseline[key] != candidate[key]:
            raise UserError(
                f"the results are of different suites: {key} {baseline[key]} and {candidate[key]}",
                fix="evaluate both with the same --suite and version of qwen-ray",
            )
    for key in ("num_fewshot", "seed"):
        one, other = (result["settings"].get(key) for result in (baseline, candidate))
        if one != other:
            raise UserError(
                f"the results are of different settings: {key} {one} and {other}",
                fix="evaluate both with the same --fewshot and version of qwen-ray",
            )
    before, after = keyed_items(baseline), keyed_items(candidate)
    if {c: i.keys() for c, i in before.items()} != {c: i.keys() for c, i in after.items()}:
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
    corrected = holm([row["p"] for row in rows])
    for row, p in zip(rows, corrected, strict=True):
        row["p_corrected"] = p
    sides = {
        side: {key: result[key] for key in ("model", "adapter", "suite", "suite_version", "settings")}
        for side, result in (("baseline", baseline), ("candidate", candidate))
    }
    whole = {"schema": SCHEMA, **sides, "categories": rows, "controls": controls}
    return {**judge(gate, [whole]), **whole}


def keyed_items(result: dict[str, Any]) -> dict[str, Items]:
    """Category to its items. An id that occurs twice is told apart by its occurrence.

    Raises :class:`UserError` for a score that is not from 0 to 1: NaN would pass every gate.
    """
    keyed: dict[str, Items] = defaultdict(dict)
    for item in result["items"]:
        if not (isinstance(item["score"], (int, float)) and 0 <= item["score"] <= 1):
            raise UserError(
                f"a score of {item['score']}, which is not from 0 to 1",
                where=f"suite '{result['suite']}', category '{item['category']}', item '{item['id']}'",
                fix="evaluate it again",
            )
        category, occurrence = keyed[item["category"]], 0
        while (item["id"], occurrence) in category:
            occurrence += 1
        category[item["id"], occurrence] = item
    return dict(keyed)


def _row(name: str, role: str, before: Items, after: Items, gate: Gate) -> dict[str, Any]:
    first = [item["score"] for item in before.values()]
    second = [after[key]["score"] for key in before]
    n = len(first)
    delta, lo, hi = paired_difference(first, second, gate.confidence)
    return {
        "name": name,
        "role": role,
        "n": n,
        "baseline": sum(first) / n,
        "candidate": sum(second) / n,
        "delta": delta,
        "delta_ci": [lo, hi],
        "changed": sum(a != b for a, b in zip(first, second, strict=True)) / n,
        "p": paired_p(first, second),
        "detectable": detectable_difference(
            first, second, at_least=gate.min_gain, confidence=gate.confidence
        ),
    }
