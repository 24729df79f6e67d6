"""The gate: what a candidate must show before it replaces what is served, and the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from qwen_ray.config import Section, read_settings, validate
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.evaluation.statistics import ROUNDING, holm
from qwen_ray.fsio import files_under

Share = Annotated[float, Field(ge=0, le=1)]


class Gate(Section):
    """When a candidate may replace what is served. Scores are fractions of 1, so 5 points are 0.05."""

    page: ClassVar[str] = "docs/protocol.md"
    min_gain: Share = 0.05
    """Every target must gain more than this, and certainly gain: interval above 0 and exact test."""
    tolerance: Share = 0.04
    """No strength may lose more than this, in the point estimate."""
    tolerances: dict[str, Share] = Field(default_factory=dict)
    """Another tolerance for some strengths, by CATEGORY or SUITE/CATEGORY."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the intervals and tests. Without a true gain, at most (1 - confidence) / 2 are promoted."""
    min_items: Annotated[int, Field(ge=1)] = 1
    """Items that every target and strength must have."""
    required_suites: list[str] = Field(default_factory=list)
    """Suites that must have been compared, by the name in their results."""
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = None
    """Most seconds a request (p95) of the candidate over those of the baseline."""
    max_adapter_bytes: Annotated[int, Field(ge=1)] | None = None
    """Largest size of the candidate's adapter folder."""

    def tolerance_of(self, suite: str, category: str) -> float:
        """How much this strength may lose."""
        return self.tolerances.get(f"{suite}/{category}", self.tolerances.get(category, self.tolerance))


def given_gate(file: str | None, *, min_gain: float | None = None, tolerance: float | None = None) -> Gate:
    """The gate of a file, or the default one, with options of a command over it (points of 100)."""
    given = {"min_gain": min_gain, "tolerance": tolerance}
    flags = {key: points / 100 for key, points in given.items() if points is not None}
    tree, origin = read_settings(Path(file) if file else None, flags=flags)
    return validate(Gate, tree, where=file or "", origin=origin)


Effect = Literal["", "hold", "regress"]
Finding = tuple[Effect, str]
"""A reason, and what it does to the verdict: nothing, forbid promotion, or say that something got worse."""


def judge(
    gate: Gate,
    comparisons: Sequence[dict[str, Any]],
    *,
    latency: tuple[float, float] | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """The verdict over the comparisons of one candidate, one a suite (JSON-ready).

    ``latency``: seconds a request at p95, of the baseline and the candidate. ``size``: bytes of the adapter,
    see :func:`adapter_size`. Returns ``verdict``, ``reasons`` (one a category and one a limit), ``gate``, and
    ``regressions``: what certainly fell, after correction for the number of categories judged together
    (Holm, Scandinavian Journal of Statistics 6:65, 1979), within the tolerance or not.

    ``regress``: something got worse. ``hold``: a target gained too little, or a limit is not met or was not
    measured. ``promote``: everything asked for was shown.
    """
    rows = list(_rows(comparisons))
    corrected = holm([row["p"] for _, row in rows])
    several = len(comparisons) > 1
    findings: list[Finding] = []
    regressions: list[dict[str, Any]] = []
    for (suite, row), p in zip(rows, corrected, strict=True):
        certain = p <= 1 - gate.confidence
        name = f"{suite}/{row['name']}" if several else row["name"]
        lo, hi = row["delta_ci"]
        change = f"{name} {_points(row['delta'])} (interval {_points(lo)} to {_points(hi)}, n={row['n']})"
        if row["role"] == "strength":
            effect, text = _strength(gate.tolerance_of(suite, row["name"]), row["delta"], p, certain)
        else:
            effect, text = _target(gate, row)
        findings.append((effect, f"{change}: {text}"))
        if certain and row["delta"] < 0:
            kept = {key: row[key] for key in ("name", "role", "n", "delta", "delta_ci", "p")}
            regressions.append({"suite": suite, **kept, "p_corrected": p})
    if not any(row["role"] == "target" for _, row in rows):
        findings.insert(0, ("hold", "no category is a target, so there is nothing to gain"))
    findings += _items(gate, rows)
    findings += _suites(gate, rows, [comparison["baseline"]["suite"] for comparison in comparisons])
    findings += _limits(gate, latency, size)
    effects = {effect for effect, _ in findings}
    return {
        "verdict": "regress" if "regress" in effects else "hold" if "hold" in effects else "promote",
        "reasons": [text for _, text in findings],
        "gate": gate.model_dump(),
        "regressions": regressions,
    }


def adapter_size(folder: Path) -> int:
    """Bytes of all files of an adapter folder, for ``max_adapter_bytes``."""
    return sum((folder / file).stat().st_size for file in files_under(folder))


def _rows(comparisons: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(suite, row) of every target and strength."""
    seen: list[str] = []
    for comparison in comparisons:
        suite = comparison["baseline"]["suite"]
        if suite in seen:
            raise UserError(f"two comparisons of the suite '{suite}'", fix="give one comparison a suite")
        seen.append(suite)
        for row in comparison["categories"]:
            yield suite, row


def _strength(tolerance: float, delta: float, p: float, certain: bool) -> Finding:
    allowed = f"the tolerance of {tolerance * 100:g} points"
    if delta < -(tolerance + ROUNDING):
        chance = "" if certain else f" (corrected p={p:.2g}: may be chance, more items would tell)"
        return "regress", f"lost more than {allowed}{chance}"
    if certain and delta < 0:
        return "", f"kept, within {allowed}, though the fall is no chance (corrected p={p:.2g})"
    return "", f"kept, within {allowed}"


def _target(gate: Gate, row: Mapping[str, Any]) -> Finding:
    lo, hi = row["delta_ci"]
    if hi < 0:
        return "regress", "a target got worse"
    if row["delta"] <= gate.min_gain + ROUNDING:
        return "hold", f"gained no more than the {gate.min_gain * 100:g} points asked for"
    if lo <= 0:
        return "hold", "the interval includes no gain; more items would tell"
    if row["p"] > 1 - gate.confidence:
        return "hold", f"the gain may be chance (exact p={row['p']:.2g}); more items would tell"
    return "", f"gained more than {gate.min_gain * 100:g} points"


def _items(gate: Gate, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Finding]:
    for suite, row in rows:
        if row["n"] < gate.min_items:
            yield "hold", f"{suite}/{row['name']} has {row['n']} items of the {gate.min_items} asked for"


def _suites(
    gate: Gate, rows: Sequence[tuple[str, Mapping[str, Any]]], given: Sequence[str]
) -> Iterator[Finding]:
    for suite in gate.required_suites:
        if suite not in given:
            yield "hold", f"the suite '{suite}' is required and was not compared"
    strengths = [
        name
        for suite, row in rows
        if row["role"] == "strength"
        for name in (row["name"], f"{suite}/{row['name']}")
    ]
    for name in gate.tolerances:
        if name not in strengths:
            hint = did_you_mean(name, strengths) if strengths else "there is none"
            yield "hold", f"the gate has a tolerance for '{name}', which is no strength here ({hint})"


def _limits(gate: Gate, latency: tuple[float, float] | None, size: int | None) -> Iterator[Finding]:
    if gate.max_latency_ratio is not None:
        limit = f"the {gate.max_latency_ratio:g} times that are allowed"
        if latency is None:
            yield "hold", f"latency was not measured, so {limit} cannot be checked"
        else:
            yield _latency(*latency, gate.max_latency_ratio, limit)
    if gate.max_adapter_bytes is not None:
        limit = f"the {gate.max_adapter_bytes:,} bytes allowed"
        if size is None:
            yield "hold", f"the adapter's size is not known, so {limit} cannot be checked"
        else:
            over = size > gate.max_adapter_bytes
            said = f"the adapter has {size:,} bytes"
            yield ("hold", f"{said}: above {limit}") if over else ("", f"{said}: within {limit}")


def _latency(before: float, after: float, most: float, limit: str) -> Finding:
    if not all(math.isfinite(seconds) and seconds > 0 for seconds in (before, after)):
        said = f"latencies of {before:g} s before and {after:g} s after are no measurements"
        return "hold", f"{said}, so {limit} cannot be checked"
    ratio = after / before
    said = f"latency {1000 * after:.0f} ms at p95, {ratio:.2f} times {1000 * before:.0f} ms before"
    if ratio > most + ROUNDING:
        return "hold", f"{said}: above {limit}"
    return "", f"{said}: within {limit}"


def _points(share: float) -> str:
    return f"{share * 100:+.1f}"
