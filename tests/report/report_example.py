"""Made-up results for the report's tests: one target that gained, strengths that held, one control."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qwen_ray.report.html import ExtraComparison, MixturePart, NoteSection, RunCurve, write_report

CATEGORIES = {"biology": ("target", 160), "history": ("strength", 120), "arithmetic": ("strength", 200)}
EXPLANATION = (
    "These facts were in no training file. A model that was taught others should know them no better."
)


def result(adapter: str | None, scores: dict[str, float]) -> dict[str, Any]:
    """An EvalResult with a plausible interval of +-7 points around every score."""

    def category(score: float, n: int, **more: str) -> dict[str, Any]:
        return {"n": n, "score": score, "ci": [score - 0.07, score + 0.07], "metric": "acc", **more}

    return {
        "schema": "qwen-ray/eval-result/1",
        "model": "tiny",
        "adapter": adapter,
        "suite": "tiny",
        "suite_version": "1",
        "settings": {"seed": 0, "num_fewshot": 0, "batch": {"size": 16}, "dtype": "float32"},
        "created_at": "2026-01-02T03:04:05Z",
        "versions": {"lm-eval": "0.4.13"},
        "categories": {
            name: category(scores[name], n, role=role)
            for name, (role, n) in CATEGORIES.items()
            if name in scores
        },
        "controls": {"untaught facts": category(scores["untaught facts"], 60, explanation=EXPLANATION)},
        "items": [],
    }


def comparison(
    before: dict[str, Any], after: dict[str, Any], verdict: str = "promote", reasons: list[str] | None = None
) -> dict[str, Any]:
    """The comparison of two results, each change with an interval of +-5 points."""

    def row(name: str, key: str, **more: str) -> dict[str, Any]:
        first, second = before[key][name]["score"], after[key][name]["score"]
        delta = second - first
        ci = [delta - 0.05, delta + 0.05]
        n = before[key][name]["n"]
        return {
            "name": name,
            "n": n,
            "baseline": first,
            "candidate": second,
            "delta": delta,
            "delta_ci": ci,
            **more,
        }

    return {
        "schema": "qwen-ray/comparison/1",
        "verdict": verdict,
        "reasons": reasons or ["biology +38.0 (interval +33.0 to +43.0, n=160): gained more than 5 points"],
        "gate": {"min_gain": 0.05, "tolerance": 0.04, "confidence": 0.95},
        "baseline": {"model": before["model"], "adapter": before["adapter"], "suite": "tiny"},
        "candidate": {"model": after["model"], "adapter": after["adapter"], "suite": "tiny"},
        "categories": [row(name, "categories", role=c["role"]) for name, c in before["categories"].items()],
        "controls": [row(name, "controls") for name in before["controls"]],
    }


def curve(name: str, steps: int = 120) -> RunCurve:
    """A loss that falls, with a wobble, a validation loss every 20 steps, and a warm-up and decay."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 1.2 + 2 * math.exp(-step / 30) + 0.15 * math.sin(step * 1.7)
        rate = 2e-4 * min(1, step / 10) * (1 - step / (steps + 1))
        rows.append({"step": step, "loss": loss, "learning_rate": rate, "tokens_per_second": 900.0})
        if step % 20 == 0:
            rows.append({"step": step, "eval_loss": loss + 0.1, "eval_loss/biology": loss})
    return RunCurve(name, rows)


BASE = {"biology": 0.24, "history": 0.52, "arithmetic": 0.81, "untaught facts": 0.27}
GOOD = {"biology": 0.62, "history": 0.51, "arithmetic": 0.815, "untaught facts": 0.28}
FORGOT = {"biology": 0.66, "history": 0.31, "arithmetic": 0.64, "untaught facts": 0.25}


def example(out: Path, **changes: Any) -> Path:
    """Write the example report to ``out``; ``changes`` replace arguments of write_report."""
    before, after, forgot = result(None, BASE), result("facts@1", GOOD), result("facts-no-replay@1", FORGOT)
    lost = comparison(before, forgot, "regress", ["history -21.0: lost more than the tolerance of 4 points"])
    arguments: dict[str, Any] = {
        "title": "Facts for the tiny model",
        "comparison": comparison(before, after),
        "baseline": before,
        "candidate": after,
        "runs": [curve("facts"), curve("facts, without replay", steps=40)],
        "sections": [NoteSection("Why these categories", "Biology was weak.\n\nThe others were strong.")],
        "commands": [
            "qwen-ray train configs/facts.yaml --out runs/facts",
            "qwen-ray evaluate --suite tiny --adapter facts@1",
        ],
        "versions": {"qwen-ray": "0.1.0", "torch": "2.9.1", "transformers": "5.20.0"},
        "extra": ExtraComparison("Without replay", "The same training without the replay mix.", lost, forgot),
        "mixture": [
            MixturePart("biology", "target", 1000, 0.7, ["CC-BY-3.0"]),
            MixturePart("arithmetic", "replay", 300, 0.3, ["MIT", "unknown"]),
        ],
    }
    write_report(out, **{**arguments, **changes})
    return out
