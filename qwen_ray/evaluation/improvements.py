"""The table of expected improvements as measured: one suite, many models, each against the first."""

from __future__ import annotations

from typing import Any

from qwen_ray.evaluation.compare import compare
from qwen_ray.serving.model_id import parse

SCHEMA = "qwen-ray/improvements/1"


def improvements(results: dict[str, dict[str, Any]], *, targets: list[str] | None = None) -> dict[str, Any]:
    """EvalResults of one suite by model id, side by side (JSON-ready).

    The first is the base: every other cell has its difference to it, paired by item, with its interval.
    ``rag`` compares each ``ID+rag`` with the same ID without. ``targets`` as :func:`compare` takes.
    """
    base, *others = results
    comparisons = {model: compare(results[base], results[model], targets=targets) for model in others}
    itself = compare(results[base], results[base], targets=targets)
    first = results[base]
    return {
        "schema": SCHEMA,
        **{key: first[key] for key in ("suite", "suite_version", "settings", "created_at", "versions")},
        "base": base,
        "gate": itself["gate"],
        "models": [{"title": title(model), **result["served"]} for model, result in results.items()],
        "rows": [
            {
                "name": row["name"],
                "role": row["role"],
                "n": row["n"],
                "cells": {
                    model: _cell(result, row["name"], comparisons.get(model))
                    for model, result in results.items()
                },
            }
            for row in _rows(itself)
        ],
        "verdicts": {
            model: {"verdict": comparison["verdict"], "reasons": comparison["reasons"]}
            for model, comparison in comparisons.items()
        },
        "rag": [
            _reading(results, model, targets)
            for model in results
            if parse(model).rag and _unread(model) in results
        ],
    }


def title(model: str) -> str:
    """What a column is called: base, +adapter, +RAG, both, auto."""
    known = parse(model)
    name = "" if known.adapter is None else known.adapter + ("" if known.at is None else f"@{known.at}")
    if known.auto:
        return "auto +RAG" if known.rag else "auto"
    if not name:
        return "+RAG" if known.rag else "base"
    return f"both: {name} +RAG" if known.rag else f"+{name}"


def _rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    return [*comparison["categories"], *comparison["controls"]]


def _cell(result: dict[str, Any], category: str, comparison: dict[str, Any] | None) -> dict[str, Any]:
    summary = {**result["categories"], **result["controls"]}[category]
    cell = {key: summary[key] for key in ("score", "ci", "n")}
    if comparison is not None:
        (row,) = (row for row in _rows(comparison) if row["name"] == category)
        cell |= {"delta": row["delta"], "delta_ci": row["delta_ci"]}
    return cell


def _unread(model: str) -> str:
    return model.rpartition("+")[0]


def _reading(results: dict[str, dict[str, Any]], model: str, targets: list[str] | None) -> dict[str, Any]:
    """What reading passages changed for one model, category by category."""
    served = results[model]["served"]
    rows = _rows(compare(results[_unread(model)], results[model], targets=targets))
    return {
        "model": model,
        "without": _unread(model),
        "answers": served["answers"],
        "with_passages": served["with_passages"],
        "categories": [
            {**{key: row[key] for key in ("name", "role", "n", "delta", "delta_ci")}, "effect": _effect(row)}
            for row in rows
        ],
    }


def _effect(row: dict[str, Any]) -> str:
    lo, hi = row["delta_ci"]
    return "helps" if lo > 0 else "harms" if hi < 0 else "not shown"
