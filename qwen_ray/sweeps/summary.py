"""The outcome of a sweep as text for a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any


def summary(out: Path, result: dict[str, Any], *, model: str, registry: Path | str) -> str:
    """Trials, what was confirmed, the winner, and how to serve it. ``model``: the base, as it is named."""
    lines = [*_trials(result), "", *_confirmed(result), *_verdict(result)]
    lines += [f"report:   {out / 'report.html'}"]
    if result["best_config"]:
        lines.append(f"again:    qwen-ray train --config {shlex.quote(str(out / result['best_config']))}")
    if result["registered"]:
        lines.append(
            f"serve it: qwen-ray serve --model {shlex.quote(model)} --registry {shlex.quote(str(registry))}"
            f"  (as {result['registered']})"
        )
    return "\n".join(lines)


def _trials(result: dict[str, Any]) -> list[str]:
    """A row a trial: the winner is marked with a star."""
    lines = [f"  {'trial':>6}  {'state':<8}{'steps':>6}{'gain':>8}{'violation':>11}  values"]
    for trial in result["trials"]:
        last = trial["reports"][-1] if trial["reports"] else None
        star = "*" if trial["index"] == result["winner"] else " "
        figures = f"{0:>6}{'':>8}{'':>11}"
        if last:
            measured = trial["state"] != "failed"
            gain, violation = (f"{last[k]:.3f}" if measured else "-" for k in ("gain", "violation"))
            figures = f"{last['step']:>6}{gain:>8}{violation:>11}"
        said = f"  ({trial['error'].splitlines()[0]})" if trial["error"] else ""
        lines.append(
            f"{star} {trial['index']:>6}  {trial['state']:<8}{figures}  {values(trial['values'])}{said}"
        )
    return [*lines, "  gain: held-out nats a token over the base; violation: beyond the tolerance"]


def values(tried: dict[str, Any]) -> str:
    """Values of a trial on one line: ``learning_rate=0.002 r=16 biology=0.25 ...``."""
    parts = []
    for key, value in tried.items():
        if isinstance(value, dict):
            parts += [f"{domain}={share:.2f}" for domain, share in value.items()]
        else:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            parts.append(f"{key.rpartition('.')[2]}={shown}")
    return " ".join(parts)


def _confirmed(result: dict[str, Any]) -> list[str]:
    lines = []
    for row in result["confirmed"]:
        name = "reference" if row["index"] == result["reference"] else f"trial {row['index']}"
        kept = "strengths kept" if row["feasible"] else "; ".join(row["reasons"])
        lines.append(f"lm-eval, {name} over the base: {_points(row['gain'], row['interval'])}, {kept}")
    return lines


def _verdict(result: dict[str, Any]) -> list[str]:
    winner, versus = result["winner"], result["versus_reference"]
    if winner is None:
        return [least_violating(result)]
    lines = [f"winner:   trial {winner}"]
    if winner == result["reference"]:
        lines.append("no trial beat the reference: the uniform mix at the run's own settings")
    elif versus is not None:
        low, high = versus["interval"]
        lines.append(
            f"against the reference, on the targets: {_points(versus['delta'], (low, high))}, n={versus['n']}"
        )
        if low <= 0 <= high:
            lines.append(
                "the interval includes 0: no evidence that it beats the uniform mix at default settings"
            )
    return lines


def least_violating(result: dict[str, Any]) -> str:
    """Which trial came nearest, where none kept the strengths."""
    if lost := [row for row in result["confirmed"] if row["index"] != result["reference"]]:
        reasons = "; ".join(lost[0]["reasons"])
        return f"no trial kept the strengths: of the benchmarked, trial {lost[0]['index']}: {reasons}"
    ended = [t for t in result["trials"] if t["state"] == "done"]
    if not ended:
        return "no trial came to its end"
    least = min(ended, key=lambda t: (t["reports"][-1]["violation"], t["index"]))
    return (
        f"no trial kept the strengths: the nearest is trial {least['index']}, whose strengths lost "
        f"{least['reports'][-1]['violation']:.3f} nats a token more than the tolerance"
    )


def _points(share: float, interval: tuple[float, float]) -> str:
    low, high = (100 * v for v in interval)
    return f"{100 * share:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"
