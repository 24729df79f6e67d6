"""The report of a sweep: one page from what lies in its folder. See :func:`write_sweep_report`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qwen_ray.fsio import read_json, write_text
from qwen_ray.report import sweep_curves as curves
from qwen_ray.report import sweep_plots as draw
from qwen_ray.report.html import HERE, environment, markup
from qwen_ray.report.plots import before_after
from qwen_ray.report.rows import Row, category_rows
from qwen_ray.report.sweep_rows import (
    TrialRow,
    base_losses,
    domains,
    keys,
    mix_text,
    nats,
    points,
    short,
    shown,
    trial_rows,
    verdict,
)

RESULT, PAGE = "result.json", "report.html"


def write_sweep_report(out: Path) -> Path:
    """Write ``out/report.html`` from ``out/result.json`` and the trials' metrics; returns its path.

    The page holds no script and asks for nothing: light and dark, and the table of trials is sorted by the
    style sheet. The same folder gives the same bytes. Raises :class:`UserError` without a result.
    """
    result = read_json(out / RESULT)
    rows = trial_rows(result, out)
    objective, cost, winner = result["objective"], result["cost"], result["winner"]
    base = base_losses(out)
    columns = _columns(rows, winner)
    scores = _scores(result, out)
    drawn = {
        "held_out": curves.held_out_curves(
            rows, winner, result["reference"], base.get("eval_loss"), "held-out"
        ),
        "panels": curves.panels(rows, winner, "panels"),
        "parallel": draw.parallel(rows, winner, "parallel"),
        "simplex": draw.simplex(rows, winner, "simplex"),
        "pareto": draw.pareto(rows, result["pareto"], objective.get("tolerance", 0.0), "front"),
        "proxy": draw.proxy(_proxy_pairs(result), "proxy"),
    }
    page = environment().get_template("sweep.html.j2")
    text = page.render(
        css=Markup(
            "\n".join((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "sweep.css"))
        ),
        name=result["name"],
        lead=_lead(result, rows),
        verdict=verdict(result, rows),
        confirmed=[_confirmed(entry, result["reference"]) for entry in result["confirmed"]],
        scores=scores,
        score_plot=markup(before_after(scores, "scores")) if scores else None,
        columns=columns,
        trials=_table(rows, columns, winner),
        errors={row.index: row.error for row in rows if row.error},
        plots={name: markup(svg) for name, svg in drawn.items()},
        panels_text=_panels_text(len([row for row in rows if row.train or row.held_out])),
        domains=domains(rows),
        mix_search=_mix_search(result),
        cost_text=_cost_text(cost),
        cost=_cost(cost),
        commands=_commands(result, out),
        objective=_objective(objective),
        versions=result["versions"],
    )
    write_text(out / PAGE, text.lstrip())  # macros leave blank lines before the doctype
    return out / PAGE


@dataclass(frozen=True)
class _Cell:
    text: str
    note: str = ""


@dataclass(frozen=True)
class _Column:
    """A column of the table of trials: its cells, and the value it sorts by, least first."""

    title: str
    cell: Callable[[TrialRow], _Cell]
    by: Callable[[TrialRow], Any]
    kind: str = "num"
    """Its class."""
    sorted: bool = False


def _columns(rows: list[TrialRow], winner: int | None) -> list[_Column]:
    among = keys(rows)

    def trial(row: TrialRow) -> _Cell:
        return _Cell(f"{row.index}", "winner" if row.index == winner else row.origin)

    def swept(key: str) -> _Column:
        def cell(row: TrialRow) -> _Cell:
            return _Cell(shown(row.values[key]) if key in row.values else "–")

        return _Column(short(key, among), cell, lambda row: _order(row.values.get(key)))

    def violation(row: TrialRow) -> _Cell:
        return _Cell("–" if row.violation is None else f"{row.violation:.3f}")

    columns = [
        _Column("trial", trial, lambda row: row.index, ""),
        _Column("gain", lambda row: _Cell(nats(row.gain)), lambda row: row.order, sorted=True),
        _Column("violation", violation, lambda row: _order(row.violation), "num violation"),
        *map(swept, among),
        _Column("trained", lambda row: _Cell(f"{100 * row.share:.0f} %", row.state), lambda row: -row.share),
    ]
    if domains(rows):
        mix = _Column(
            "mix, %", lambda row: _Cell(mix_text(row.mix) or "–"), lambda row: mix_text(row.mix), "mix"
        )
        columns.insert(-1, mix)
    return columns


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers, then other values, then none."""
    if isinstance(value, (int, float)):
        return 0, float(value), ""
    return (2, 0.0, "") if value is None else (1, 0.0, shown(value))


def _table(rows: list[TrialRow], columns: list[_Column], winner: int | None) -> list[dict[str, Any]]:
    places = []
    for column in columns:
        ordered = sorted(range(len(rows)), key=lambda i: column.by(rows[i]))
        places.append({i: place for place, i in enumerate(ordered)})
    return [
        {
            "kind": " ".join(_kinds(row, winner)),
            "cells": [column.cell(row) for column in columns],
            "places": [place[i] for place in places],
        }
        for i, row in enumerate(rows)
    ]


def _kinds(row: TrialRow, winner: int | None) -> list[str]:
    outside = row.violation is not None and not row.feasible
    return [row.state, *(["won"] if row.index == winner else []), *(["outside"] if outside else [])]


def _lead(result: dict[str, Any], rows: list[TrialRow]) -> str:
    among = keys(rows)
    swept = [short(key, among) for key in among] + (["the mix"] if domains(rows) else [])
    over = f" over {', '.join(swept)}" if swept else ""
    states = {
        state: len([row for row in rows if row.state == state]) for state in ("done", "stopped", "failed")
    }
    ended = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    return f"{len(rows)} {'trial' if len(rows) == 1 else 'trials'}{over}: {ended}. {result['created_at']}."


def _confirmed(entry: dict[str, Any], reference: int) -> dict[str, str]:
    low, high = entry["interval"]
    return {
        "name": f"{entry['index']}{', the reference' if entry['index'] == reference else ''}",
        "gain": points(entry["gain"]),
        "interval": f"{points(low)} to {points(high)}",
        "strengths": "kept" if entry["feasible"] else "; ".join(entry.get("reasons", [])) or "lost",
        "tone": "good" if entry["feasible"] and low > 0 else "unsure" if entry["feasible"] else "bad",
    }


def _scores(result: dict[str, Any], out: Path) -> list[Row]:
    """Base and winner by category; empty where no benchmark was run on both."""
    from qwen_ray.evaluation.compare import compare

    found = {entry["index"]: out / entry["result"] for entry in result["confirmed"]}
    before, after = out / "eval" / "base.json", found.get(result["winner"])
    if after is None or not after.is_file() or not before.is_file():
        return []
    baseline, candidate = read_json(before), read_json(after)
    return category_rows(compare(baseline, candidate), baseline, candidate)


def _panels_text(count: int) -> str:
    text = "Each trial by itself: training loss (running mean) and, with points, held-out loss."
    return text if count <= curves.PANELS else f"{text} The best {curves.PANELS} of {count}."


def _proxy_pairs(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    search = result["mix_search"] or {}
    return [(str(mix["index"]), mix["proxy"], mix["real"]) for mix in search.get("verified", [])]


def _mix_search(result: dict[str, Any]) -> str | None:
    search = result["mix_search"]
    if not search:
        return None
    verdict = search["verdict"]
    text = (
        f"{search['candidates']} mixes were scored by merging the experts of the domains, and "
        f"{len(search['verified'])} of them were really trained. "
        f"{verdict[0].upper()}{verdict[1:]}."
    )
    if search["fallback"]:
        text += f" {search['fallback']} more mixes were found by real runs only."
    return text


def _cost_text(cost: dict[str, Any]) -> str:
    spent, full = cost["seconds"], cost["sequential_seconds"]
    if not spent or not full:
        return "The time was not measured."
    if full >= spent:
        compared = f"{full / spent:.1f} times what this sweep took"
    else:
        compared = f"less than this sweep took, {full / spent:.2f} of it"
    return (
        f"The same trials at full length, one after another, would take about {_seconds(full)}: {compared}. "
        "That is an estimate: the steps of all, at the pace of a trial by itself."
    )


def _cost(cost: dict[str, Any]) -> dict[str, str]:
    shown_as = {
        "time of this sweep": _seconds(cost["seconds"]),
        "one after another, at full length": _seconds(cost["sequential_seconds"]),
        "steps of trials": f"{cost['trial_steps']:,} of {cost['full_trial_steps']:,} without early stopping",
    }
    if cost.get("gpu_hours"):
        shown_as["GPU-hours"] = f"{cost['gpu_hours']:.2f}"
    return shown_as


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _commands(result: dict[str, Any], out: Path) -> list[str]:
    if result["winner"] is None:
        return []
    return [f"qwen-ray train --config {out / result['best_config']}  # trains the winner again"]


def _objective(objective: dict[str, Any]) -> dict[str, str]:
    parts = {
        "targets": ", ".join(objective.get("targets") or []) or "none",
        "strengths": ", ".join(objective.get("strengths") or []) or "none",
        "tolerance": f"{objective.get('tolerance', 0.0):g} nats a token",
    }
    if confirm := objective.get("confirm"):
        parts["confirmed by"] = f"{confirm['suite']}, tolerance {100 * confirm['tolerance']:g} points"
    return parts
