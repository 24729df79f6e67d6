"""Whether what is in production still answers as well as it did when it was judged fit."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.evaluation.statistics import ROUNDING
from qwen_ray.fsio import sha256_json
from qwen_ray.lifecycle.triggers import Fired
from qwen_ray.lifecycle.watch_spec import AccuracyTrigger, WatchSpec
from qwen_ray.storage import Missing, create_document, is_uri, open_storage

if TYPE_CHECKING:
    from qwen_ray.registry import AdapterVersion, Event, Registry
    from qwen_ray.storage import Storage

FOLDER = "evaluations"
Benchmark = Callable[[WatchSpec, AccuracyTrigger, int], dict[str, Any]]
"""Gives the EvalResult of a version."""


def check(
    spec: WatchSpec,
    rule: AccuracyTrigger,
    registry: Registry,
    storage: Storage,
    benchmark: Benchmark,
) -> tuple[str, list[Fired]]:
    """Benchmark production, record it in the registry, and compare it with the baseline.

    Returns what was found in words, and what fell. Raises :class:`UserError` where there is no production
    version, or no server.
    """
    from qwen_ray.registry.records import record_evaluation

    version = registry.resolve(spec.adapter)
    before = baseline(registry, version, rule)
    result = benchmark(spec, rule, version.version)
    location = f"{storage.location}/{_keep(storage, version.ref, result)}"
    record_evaluation(registry, version, result, location=location)
    if before is None:
        return f"{version.ref} was benchmarked: the baseline from now on", []
    rows = compared(before.value, result, _complete(before.value))
    fallen = [row for row in rows if row["now"] < rule.share * row["baseline"] - ROUNDING]
    against = f"{spec.adapter}@{before.version}"
    if not fallen:
        return f"{version.ref} answers as well as {against} did: {_list(rows)}", []
    certain = any(row["significant"] for row in fallen)
    run = rule.retrain == "always" or (rule.retrain == "significant" and certain)
    told = f"{version.ref} is below {rule.share:.0%} of the baseline of {against}: {_list(fallen)}. " + (
        "This is more than chance." if certain else "The intervals allow for chance."
    )
    about = "accuracy/" + ",".join(sorted(row["category"] for row in fallen))
    facts: dict[str, Any] = {
        "version": version.ref,
        "baseline": against,
        "result": location,
        "categories": rows,
    }
    facts |= {"significant": certain, "share": rule.share}
    return told, [Fired("accuracy", about, told, run, facts=facts)]


def baseline(registry: Registry, version: AdapterVersion, rule: AccuracyTrigger) -> Event | None:
    """The evaluation that ``version``, which is in production, is held to.

    Its own first one by this suite if it was judged fit (a verdict of promote, or an override); else that of
    the version judged fit last; else its own all the same.
    """
    first: dict[int, Event] = {}
    for event in registry.events(version.name, kind="evaluation"):
        if event.version is not None and _alike(event.value, rule):
            first.setdefault(event.version, event)
    fit = [
        event.version
        for event in registry.events(version.name)
        if event.kind == "override" or (event.kind == "verdict" and event.value["verdict"] == "promote")
    ]
    if version.version not in fit:
        for number in reversed(fit):
            if number in first:
                return first[number]
    return first.get(version.version)


def compared(
    before: Mapping[str, Any], now: Mapping[str, Any], complete: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """A row for each category of two EvalResults: scores, their difference with its interval, and whether
    that excludes 0.

    Paired by item with ``complete``, the earlier result with its items; without it the interval is that for
    two independent proportions (Newcombe, Statistics in Medicine 17:873, 1998, method 10).
    """
    paired = _paired(complete, now) if complete is not None else {}
    rows = []
    for name, was in before["categories"].items():
        if (is_now := now["categories"].get(name)) is None:
            continue
        lo, hi = paired.get(name) or _independent(was, is_now)
        rows.append(
            {
                "category": name,
                "n": is_now["n"],
                "baseline": was["score"],
                "now": is_now["score"],
                "delta": is_now["score"] - was["score"],
                "delta_ci": [lo, hi],
                "paired": name in paired,
                "significant": hi < 0,
            }
        )
    return rows


def _paired(before: dict[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    from qwen_ray.evaluation.compare import compare

    try:
        rows = compare(before, dict(now))["categories"]
    except UserError:  # other items
        return {}
    return {row["name"]: tuple(row["delta_ci"]) for row in rows}


def _independent(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[float, float]:
    delta = now["score"] - before["score"]
    (was_lo, was_hi), (lo, hi) = before["ci"], now["ci"]
    below = math.hypot(now["score"] - lo, was_hi - before["score"])
    above = math.hypot(hi - now["score"], before["score"] - was_lo)
    return delta - below, delta + above


def _alike(event: Mapping[str, Any], rule: AccuracyTrigger) -> bool:
    from qwen_ray.evaluation import suites

    suite = suites.load(rule.suite)
    settings = event["settings"]
    return (event["suite"], event["suite_version"], settings["limit"], settings["num_fewshot"]) == (
        suite.name,
        suite.version,
        rule.limit,
        rule.num_fewshot,
    )


def evaluate_production(spec: WatchSpec, rule: AccuracyTrigger, version: int) -> dict[str, Any]:
    """The EvalResult of a version, asked for by its number: production may move meanwhile."""
    from qwen_ray.evaluation.run import evaluate_endpoint

    assert spec.endpoint is not None
    with tempfile.TemporaryDirectory() as folder:
        return evaluate_endpoint(
            spec.endpoint,
            f"{spec.model}@{version}",
            rule.suite,
            out=Path(folder) / "result.json",
            concurrency=rule.concurrency,
            limit=rule.limit,
            num_fewshot=rule.num_fewshot,
            data_dir=rule.data_dir,
        )


def _keep(storage: Storage, ref: str, result: dict[str, Any]) -> str:
    """Write the complete result; the key under which it is."""
    key = f"{FOLDER}/{ref}-{sha256_json(result)[:16]}.json"
    create_document(storage, key, result)
    return key


def _complete(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """The evaluation's file, if it is still there as it was."""
    location = str(event.get("location", ""))
    folder, _, key = location.rpartition("/")
    try:
        data = open_storage(folder).read(key).data if is_uri(location) else Path(location).read_bytes()
    except (Missing, OSError, UserError):
        return None
    result = json.loads(data)
    return dict(result) if sha256_json(result) == event.get("sha256") else None


def _list(rows: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{row['category']} {row['now']:.1%}, was {row['baseline']:.1%} "
        f"({row['delta_ci'][0] * 100:+.1f} to {row['delta_ci'][1] * 100:+.1f} points, n={row['n']})"
        for row in rows
    )
