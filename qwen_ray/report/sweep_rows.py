"""From the files of a sweep to what its page shows: one row a trial, the verdict, the words for numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_ray.fsio import read_json
from qwen_ray.sweeps.ledger import BASE_LOSSES
from qwen_ray.training.tracking import read_metrics

MIXTURE = "data.weights"
"""In a sweep's folder: the held-out losses without any adapter, where it was written."""
FAILED = -1e9
"""Score of a report whose loss is not a number."""


@dataclass(frozen=True)
class TrialRow:
    """One trial. Losses are nats a supervised token, by step; what is not known is None."""

    index: int
    origin: str
    state: str
    values: dict[str, Any]
    """Swept key -> value, without the mixture."""
    mix: dict[str, float]
    gain: float | None
    violation: float | None
    feasible: bool
    share: float
    """How much of its own length was trained, 0 to 1."""
    seconds: float
    held_out: list[tuple[float, float]] = field(default_factory=list)
    train: list[tuple[float, float]] = field(default_factory=list)
    rise: float | None = None
    """Largest rise of a strength's held-out loss over the base; negative where all fell."""
    error: str = ""

    @property
    def order(self) -> tuple[bool, bool, float, float, int]:
        """Best first: whole trials before stopped ones, and of these the feasible ones, by gain."""
        found = self.gain if self.feasible else None if self.violation is None else -self.violation
        at = -math.inf if found is None else found
        return (self.gain is None, not self.feasible, -self.share, -at, self.index)


@dataclass(frozen=True)
class Verdict:
    """What came out. ``tone`` is a class of report.css."""

    tone: str
    word: str
    sentence: str
    reasons: list[str]


def base_losses(out: Path) -> dict[str, float]:
    """Held-out losses without any adapter (``eval_loss``, ``eval_loss/DOMAIN``); empty if not known."""
    return dict(read_json(out / BASE_LOSSES)) if (out / BASE_LOSSES).is_file() else {}


def trial_rows(result: dict[str, Any], out: Path) -> list[TrialRow]:
    """The trials, best first."""
    base, strengths = base_losses(out), result["objective"].get("strengths") or []
    return sorted((_row(trial, strengths, base, out) for trial in result["trials"]), key=lambda r: r.order)


def _row(trial: dict[str, Any], strengths: list[str], base: dict[str, float], out: Path) -> TrialRow:
    last = trial["reports"][-1] if trial["reports"] else {}
    judged = last if (finite(last.get("score")) or FAILED) > FAILED else {}
    losses = [f"eval_loss/{name}" for name in strengths]
    rises = [last[key] - base[key] for key in losses if key in base and finite(last.get(key)) is not None]
    metrics = read_metrics(out / "trials" / f"{trial['index']:04d}")
    return TrialRow(
        index=trial["index"],
        origin=trial["origin"],
        state=trial["state"],
        values={key: value for key, value in trial["values"].items() if key != MIXTURE},
        mix=trial["values"].get(MIXTURE) or {},
        gain=finite(judged.get("gain")),
        violation=finite(judged.get("violation")),
        feasible=bool(last.get("feasible")),
        share=last.get("share", 0.0),
        seconds=trial.get("seconds") or 0.0,
        held_out=_series([*metrics, *trial["reports"]], "eval_loss"),
        train=_series(metrics, "loss"),
        rise=max(rises, default=None),
        error=trial.get("error") or "",
    )


def _series(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Step and value; of a step that occurs twice the last counts."""
    found = {row["step"]: finite(row.get(key)) for row in rows if key in row}
    return [(float(step), value) for step, value in sorted(found.items()) if value is not None]


def finite(value: Any) -> float | None:
    """The number, or None for what is none."""
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if known else None


def keys(rows: list[TrialRow]) -> list[str]:
    """The swept keys, without the mixture, in the order in which trials name them."""
    return list(dict.fromkeys(key for row in sorted(rows, key=lambda r: r.index) for key in row.values))


def domains(rows: list[TrialRow]) -> list[str]:
    """The domains of the mixtures, in the order in which trials name them."""
    return list(dict.fromkeys(name for row in sorted(rows, key=lambda r: r.index) for name in row.mix))


def short(key: str, among: list[str]) -> str:
    """The last part of a dotted key, where no other swept key has the same."""
    tail = key.rpartition(".")[2]
    return tail if sum(other.rpartition(".")[2] == tail for other in among) == 1 else key


def shown(value: Any) -> str:
    """A value of a swept key in a few characters."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def mix_text(mix: dict[str, float]) -> str:
    """``biology 40, replay 60``: shares in percent."""
    total = sum(mix.values()) or 1.0
    return ", ".join(f"{name} {100 * share / total:.0f}" for name, share in mix.items())


def values_text(row: TrialRow, among: list[str]) -> str:
    """A trial's values in a line of prose."""
    parts = [f"{short(key, among)} {shown(value)}" for key, value in row.values.items()]
    return (
        ", ".join(parts + ([f"mix {mix_text(row.mix)} %"] if row.mix else [])) or "the base run's own values"
    )


def nats(value: float | None) -> str:
    """A difference of losses, signed; a dash for what is not known."""
    return "–" if value is None else signed(value, 3)


def points(value: float) -> str:
    """A share of 1 as signed points of 100."""
    return signed(100 * value, 1)


def signed(value: float, digits: int) -> str:
    """With its sign, and a true minus; a rounded zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _interval(pair: list[float]) -> str:
    return f"interval {points(pair[0])} to {points(pair[1])}"


def verdict(result: dict[str, Any], rows: list[TrialRow]) -> Verdict:
    """The winner and what is known of it, in plain words; or why there is none."""
    if result["winner"] is None:
        return _nobody(result, rows)
    among = keys(rows)
    winner = next(row for row in rows if row.index == result["winner"])
    word = "The reference" if winner.index == result["reference"] else f"Trial {winner.index}"
    values = values_text(winner, among)
    loss = f"{_gained(winner.gain)} than without an adapter{_strengths(result, winner)}"
    reasons = [f"Held-out loss of the targets: {loss}."]
    confirmed = next((c for c in result["confirmed"] if c["index"] == winner.index), None)
    if confirmed is None:
        reasons.append("No benchmark was run on it, so there is no interval.")
        return Verdict("hold", word, f"Won by held-out loss alone, with {values}.", reasons)
    low = confirmed["interval"][0]
    reasons.append(
        f"Benchmark against the base: {points(confirmed['gain'])} points on the targets "
        f"({_interval(confirmed['interval'])}){'' if low > 0 else ': no evidence that it is better'}."
    )
    reasons += [f"Benchmark: {reason}." for reason in confirmed.get("reasons", [])]
    if winner.index == result["reference"]:
        return Verdict(
            "hold", word, f"No trial did better than the base run's own values: {values}.", reasons
        )
    versus = result["versus_reference"]
    better = bool(versus) and versus["interval"][0] > 0
    if versus:
        reasons.insert(
            2,
            f"Benchmark against the reference, which has the base run's own values and the uniform mix: "
            f"{points(versus['delta'])} points ({_interval(versus['interval'])}, n={versus['n']})"
            f"{'' if better else ': no evidence that it is better'}.",
        )
    sentence = f"Won with {values}."
    if versus and not better:
        sentence += " There is no evidence that it beats the reference."
    return Verdict("promote" if low > 0 and better else "hold", word, sentence, reasons)


def _nobody(result: dict[str, Any], rows: list[TrialRow]) -> Verdict:
    judged = [row for row in rows if row.violation is not None]
    failed = [row for row in rows if row.state == "failed"]
    reasons = [f"{len(failed)} of {len(rows)} trials failed."] if failed else []
    if not judged:
        return Verdict("regress", "No winner", "No trial got as far as a report.", reasons)
    if any(row.feasible for row in judged):
        reasons += [f"Trial {c['index']}: {reason}." for c in result["confirmed"] for reason in c["reasons"]]
        return Verdict("regress", "No winner", "No trial was confirmed by the benchmark.", reasons)
    nearest = min(judged, key=lambda row: (row.violation or 0.0, row.index))
    reasons.insert(
        0,
        f"Nearest: trial {nearest.index} ({values_text(nearest, keys(rows))}), whose worst strength lost "
        f"{nearest.violation:.3f} nats more than the tolerance, with a gain of {nats(nearest.gain)}.",
    )
    return Verdict("regress", "No winner", "No trial kept every strength within the tolerance.", reasons)


def _gained(gain: float | None) -> str:
    return (
        "not known" if gain is None else f"{abs(gain):.3f} nats a token {'lower' if gain >= 0 else 'higher'}"
    )


def _strengths(result: dict[str, Any], row: TrialRow) -> str:
    names = result["objective"].get("strengths") or []
    if not names:
        return ""
    if row.feasible:
        tolerance = result["objective"].get("tolerance", 0.0)
        return f"; strengths ({', '.join(names)}) kept within the tolerance of {tolerance:g} nats"
    return f"; a strength lost {row.violation or 0:.3f} nats more than the tolerance"
