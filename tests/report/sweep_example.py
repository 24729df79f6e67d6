"""Made-up results of sweeps for the tests of their page, by the schema of result.json."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from qwen_ray.fsio import write_json, write_jsonl

RUNGS = (0.11, 0.33, 1.0)
STEPS = 90
BASE = 3.0
TARGETS = ("biology", "history", "security")


def sweep(
    out: Path,
    *,
    trials: int = 12,
    domains: tuple[str, ...] = (*TARGETS, "replay"),
    failed: tuple[int, ...] = (),
    feasible: bool = True,
    confirmed: bool = True,
    versus: tuple[float, float] = (0.02, 0.12),
    **changes: Any,
) -> Path:
    """Write the folder of a sweep of ``trials``; ``domains`` empty: no mixture. Returns ``out``."""
    rng = random.Random(7)
    rows = [_trial(out, i, rng, domains, failed=i in failed, feasible=feasible) for i in range(trials)]
    whole = [row for row in rows if row["state"] == "done" and row["reports"][-1]["feasible"]]
    winner = max(whole, key=lambda row: row["reports"][-1]["gain"], default=None)
    strengths = [name for name in domains if name == "replay"]
    result: dict[str, Any] = {
        "schema": "qwen-ray/sweep/1",
        "name": "demo",
        "created_at": "2026-01-02T03:04:05Z",
        "versions": {"qwen-ray": "0.1.0", "torch": "2.13.0"},
        "objective": {
            "targets": [name for name in domains if name != "replay"],
            "strengths": strengths,
            "tolerance": 0.05,
            "confirm": {"suite": "tiny", "top": 2, "tolerance": 0.04} if confirmed else None,
        },
        "trials": rows,
        "winner": winner and winner["index"],
        "reference": 0,
        "pareto": [row["index"] for row in sorted(whole, key=lambda r: -r["reports"][-1]["gain"])[:3]],
        "confirmed": [],
        "versus_reference": None,
        "cost": {
            "seconds": 212.0,
            "sequential_seconds": 1260.0,
            "gpu_hours": 0.0,
            "trial_steps": sum(row["reports"][-1]["step"] for row in rows if row["reports"]),
            "full_trial_steps": trials * STEPS,
        },
        "mix_search": None,
        "best_config": "best.yaml",
        "registered": "demo@1" if winner else None,
    }
    if winner and confirmed:
        shown = {winner["index"]: 0.31} | ({0: 0.24} if winner["index"] else {})
        result["confirmed"] = [
            {"index": i, "result": f"eval/{i:04d}.json", "gain": gain, "interval": [gain - 0.06, gain + 0.06],
             "feasible": True, "reasons": []}
            for i, gain in shown.items()
        ]  # fmt: skip
        result["versus_reference"] = {"delta": sum(versus) / 2, "interval": list(versus), "n": 300}
        for name, scores in {"base": (0.2, 0.7), f"{winner['index']:04d}": (0.51, 0.69)}.items():
            write_json(out / "eval" / f"{name}.json", _eval(scores, seed=len(name)))
    write_json(
        out / "base_losses.json", {"eval_loss": BASE} | {f"eval_loss/{name}": BASE for name in domains}
    )
    write_json(out / "result.json", result | changes)
    return out


def _trial(
    out: Path, index: int, rng: random.Random, domains: tuple[str, ...], *, failed: bool, feasible: bool
) -> dict[str, Any]:
    rate, rank = 2e-3 if index == 0 else 10 ** rng.uniform(-3, -1.7), rng.choice([8, 16, 32])
    draws = [1.0 if index == 0 else rng.expovariate(1) + 0.05 for _ in domains]
    values: dict[str, Any] = {"optim.learning_rate": rate, "method.r": rank}
    if domains:
        values["data.weights"] = {d: x / sum(draws) for d, x in zip(domains, draws, strict=True)}
    reached = 0 if failed else len(RUNGS) if index % 3 == 0 else 1 + index % 2
    goal = 1.2 - abs(math.log10(rate) + 2.2)
    reports = []
    for rung, share in enumerate(RUNGS[:reached]):
        step = round(share * STEPS)
        gain = goal * (1 - math.exp(-3 * share))
        violation = 0.0 if feasible and index % 4 != 1 else 0.02 + 0.01 * index
        losses = {f"eval_loss/{name}": BASE - gain for name in domains if name != "replay"}
        if "replay" in domains:
            losses["eval_loss/replay"] = BASE + (violation + 0.05 if violation else 0.004 * index)
        reports.append(
            {"step": step, "total_steps": STEPS, "share": share, "loss": BASE - gain,
             "eval_loss": BASE - gain, **losses, "gain": gain, "violation": violation,
             "feasible": violation == 0,
             "score": gain if violation == 0 else -100 - violation, "rung": rung if share < 1 else None,
             "tokens": 600 * step, "seconds": 0.3 * step, "decision": "continue"}
        )  # fmt: skip
    folder = out / "trials" / f"{index:04d}"
    state = "failed" if failed else "done" if reached == len(RUNGS) else "stopped"
    steps = reports[-1]["step"] if reports else 2
    write_jsonl(
        folder / "metrics.jsonl",
        ({"step": s, "loss": BASE - goal * (1 - math.exp(-3 * s / STEPS)) + rng.gauss(0, 0.08)}
         for s in range(1, steps + 1)),
    )  # fmt: skip
    return {
        "index": index,
        "values": values,
        "origin": "reference" if index == 0 else "optuna",
        "state": state,
        "error": "the loss is nan at step 3; lower optim.learning_rate" if failed else None,
        "reports": reports,
        "seconds": 0.3 * steps,
        "adapter": None if failed else f"trials/{index:04d}/adapter",
    }


def _eval(scores: tuple[float, float], seed: int) -> dict[str, Any]:
    """An EvalResult of a target and a strength with 60 items each."""
    rng = random.Random(seed)
    categories, items = {}, []
    for name, role, score in (("biology", "target", scores[0]), ("arithmetic", "strength", scores[1])):
        right = [float(rng.random() < score) for _ in range(60)]
        mean = sum(right) / 60
        categories[name] = {
            "role": role,
            "n": 60,
            "score": mean,
            "ci": [mean - 0.1, mean + 0.1],
            "metric": "acc",
        }
        items += [{"id": f"{name}-{i}", "category": name, "score": x} for i, x in enumerate(right)]
    return {
        "schema": "qwen-ray/eval-result/1", "model": "tiny", "adapter": None, "suite": "tiny",
        "suite_version": "1", "settings": {"seed": 0}, "created_at": "2026-01-02T03:04:05Z",
        "categories": categories, "controls": {}, "items": items,
    }  # fmt: skip
