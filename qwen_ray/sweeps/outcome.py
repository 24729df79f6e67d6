"""How a sweep ends: the winner, confirmed by benchmarks, its configuration, its place in the registry.

The best trials by held-out loss and the reference are benchmarked with lm-eval beside the base. Of those
that keep every strength within the tolerance, the one that gained most wins.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen_ray.config import RunConfig
from qwen_ray.evaluation.compare import Gate, compare
from qwen_ray.evaluation.harness import read_result
from qwen_ray.fsio import read_json, write_json, write_text
from qwen_ray.registry import LINEAGE, Registry
from qwen_ray.sweeps.ledger import Ledger, TrialRecord
from qwen_ray.sweeps.objective import PREFIX, Confirmed, confirmed_gain, pareto, ranking
from qwen_ray.sweeps.once import on_cluster
from qwen_ray.sweeps.spec import REFERENCE, ConfirmConfig, SweepConfig, reference, trial_config

_PACE_STEPS = 10
SCHEMA = "qwen-ray/sweep/1"
RESULT, BEST, EVAL = "result.json", "best.yaml", "eval"
CANDIDATE = "candidate"
"""The registry's alias of a sweep's winner."""

Job = tuple[str, str, str | None]
"""Name of an EvalResult, the model it is of, and the PEFT folder that is put on it."""


def conclude(spec: SweepConfig, out: Path, *, sweep_id: str, registry: Path | str) -> dict[str, Any]:
    """Choose and register the winner of the trials in ``OUT/trials``; returns what goes into result.json.

    Goes on where an earlier call was interrupted.
    """
    ledger = Ledger(out)
    trials = {t.index: t for t in ledger.trials()}
    reports = {i: ledger.reports(i) for i in trials}
    finished = [i for i in ranking(reports) if reports[i][-1]["decision"] == "done" and artifact(trials[i])]
    feasible = [i for i in finished if reports[i][-1]["feasible"]]
    winner = feasible[0] if feasible else None
    confirmed: dict[int, Confirmed] = {}
    against: Confirmed | None = None
    confirm = spec.objective.confirm
    if confirm is not None and feasible:
        chosen = [i for i in finished if i in feasible[: confirm.top] or i == REFERENCE]
        benchmark(spec, out, [trials[i] for i in chosen])
        confirmed = {i: _compared(out, "base", _name(i), confirm.tolerance) for i in chosen}
        kept = [i for i in chosen if confirmed[i].feasible]  # the reference too, whatever its loss
        winner = max(kept, key=lambda i: (confirmed[i].gain, -chosen.index(i)), default=None)
        if winner not in (None, REFERENCE) and REFERENCE in chosen:
            against = _compared(out, _name(REFERENCE), _name(winner), confirm.tolerance)
    result = {
        "schema": SCHEMA,
        "name": spec.name,
        "id": sweep_id,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("qwen-ray", "ray", "torch", "optuna")},
        "objective": spec.objective.model_dump(mode="json"),
        "trials": [_trial(out, t, reports[i]) for i, t in trials.items()],
        "winner": winner,
        "reference": REFERENCE,
        "pareto": _front(spec, reports),
        "confirmed": [
            {"index": i, "result": f"{EVAL}/{_name(i)}.json", **asdict(c)} for i, c in confirmed.items()
        ],
        "versus_reference": against and {"delta": against.gain, "interval": against.interval, "n": against.n},
        "cost": _cost(spec, reports),
        "mix_search": _mix_search(spec, ledger),
        "best_config": None,
        "registered": None,
    }
    if winner is not None:
        result["best_config"] = BEST
        best = trial_config(spec, trials[winner].values, out=f"{out}-best")
        write_text(out / BEST, best.to_yaml())
        result["registered"] = _register(spec, out, trials[winner], result, registry)
    write_json(out / RESULT, result)
    return result


def artifact(trial: TrialRecord) -> Path | None:
    """The adapter (LoRA) or model (full fine-tuning) that a trial left, if it came to its end."""
    return next((f for f in (trial.folder / "adapter", trial.folder / "model") if f.is_dir()), None)


def _name(index: int) -> str:
    return "reference" if index == REFERENCE else f"{index:04d}"


def _trial(out: Path, trial: TrialRecord, reports: list[dict[str, Any]]) -> dict[str, Any]:
    left = artifact(trial)
    return {
        "index": trial.index,
        "values": trial.values,
        "origin": trial.origin,
        "state": trial.state,
        "error": trial.error,
        "reports": reports,
        "seconds": reports[-1]["seconds"] if reports else 0.0,
        "adapter": str(left.relative_to(out)) if left else None,
    }


def _front(spec: SweepConfig, reports: dict[int, list[dict[str, Any]]]) -> list[int]:
    """Trials at their full length that no other beats in gain, in the strengths' loss and in tokens."""
    last = {i: rows[-1] for i, rows in reports.items() if rows and rows[-1]["decision"] == "done"}
    kept = {i: -sum(row[PREFIX + d] for d in spec.objective.strengths) for i, row in last.items()}
    front = pareto([(row["gain"], kept[i], -row["tokens"]) for i, row in last.items()])
    return [list(last)[k] for k in front]


def _cost(spec: SweepConfig, reports: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the trials took, and what all of them at full length would have, one after another: of plain
    trials by their own pace, of packed ones by that of the reference alone (:func:`_pace`)."""
    last = [rows[-1] for rows in reports.values() if rows]
    seconds, steps = sum(row["seconds"] for row in last), sum(row["total_steps"] for row in last)
    run = trial_config(spec, reference(spec), out=spec.out)
    gpus = spec.trials.gpus or 0.0
    if spec.trials.kind == "packed":
        sequential = steps * on_cluster(spec, _pace, run)
    else:
        each = run.cluster.gpus_per_worker
        gpus = (gpus if each is None else each) * max(1, run.cluster.workers or 0)
        sequential = sum(row["seconds"] * row["total_steps"] / max(1, row["step"]) for row in last)
    return {
        "seconds": seconds,
        "sequential_seconds": sequential,
        "gpu_hours": gpus * seconds / 3600,
        "trial_steps": sum(row["step"] for row in last),
        "full_trial_steps": steps,
    }


def _pace(config: RunConfig) -> float:
    """Seconds a step of one trial that has an engine to itself; the median of a few."""
    from qwen_ray.training.packed import Pack

    pack = Pack(config)
    pack.add("alone", config)
    took = []
    for _ in range(_PACE_STEPS):
        began = time.perf_counter()
        pack.step()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def _mix_search(spec: SweepConfig, ledger: Ledger) -> dict[str, Any] | None:
    if spec.mix_search is None:
        return None
    from qwen_ray.sweeps.mixsearch import MixSearch

    return MixSearch(spec, ledger).summary()


# -- benchmarks


def benchmark(spec: SweepConfig, out: Path, trials: list[TrialRecord]) -> None:
    """Run lm-eval on the base and on what ``trials`` left, into ``OUT/eval``; skips what is there."""
    confirm = spec.objective.confirm
    assert confirm is not None
    jobs: list[Job] = [("base", trial_config(spec, {}, out=out).model.name, None)]
    for trial in trials:
        left = artifact(trial)
        whole = left is not None and left.name == "model"
        base = trial_config(spec, trial.values, out=out).model.name
        jobs.append((_name(trial.index), str(left) if whole else base, None if whole else str(left)))
    jobs = [job for job in jobs if not (out / EVAL / f"{job[0]}.json").is_file()]
    if jobs:
        on_cluster(spec, _evaluate, jobs, confirm, out / EVAL)


def _evaluate(jobs: list[Job], confirm: ConfirmConfig, folder: Path) -> None:
    """Each job's EvalResult into ``folder``; a base is loaded once for all its adapters."""
    from qwen_ray import models
    from qwen_ray.evaluation.run import evaluate_local
    from qwen_ray.serving.engines.torch import TorchEngine

    engines: dict[str, TorchEngine] = {}
    for name, model, adapter in jobs:
        if model not in engines:
            engines = {model: TorchEngine.load(models.resolve(model))}
        evaluate_local(
            model,
            Path(adapter) if adapter else None,
            confirm.suite,
            out=folder / f"{name}.json",
            engine=engines[model],
            limit=confirm.limit,
            data_dir=Path(confirm.data_dir) if confirm.data_dir else None,
        )


def _compared(out: Path, before: str, after: str, tolerance: float) -> Confirmed:
    first, second = (read_result(out / EVAL / f"{name}.json") for name in (before, after))
    rows = compare(first, second, Gate(min_gain=0, tolerance=tolerance))["categories"]
    return confirmed_gain(rows, tolerance)


# -- the registry


def _register(
    spec: SweepConfig, out: Path, trial: TrialRecord, result: dict[str, Any], root: Path | str
) -> str | None:
    """Publish the winner's adapter, once, as the name's candidate; None where it trained every weight."""
    left = artifact(trial)
    if left is None or left.name != "adapter":
        return None
    registry = Registry(root)
    for number in registry.versions(spec.name):  # of an earlier call that was interrupted
        if registry.get(spec.name, number).lineage.get("sweep", {}).get("id") == result["id"]:
            found = registry.get(spec.name, number)
            break
    else:
        lineage = read_json(left / LINEAGE)
        sweep = {
            "id": result["id"],
            "trial": trial.index,
            "values": trial.values,
            "objective": result["objective"],
            "confirmed": next((c for c in result["confirmed"] if c["index"] == trial.index), None),
            "versus_reference": result["versus_reference"],
        }
        found = registry.publish(spec.name, left, {**lineage, "sweep": sweep})
    reason = f"winner of the sweep {result['id']}"
    if registry.aliases(spec.name).get(CANDIDATE) != found.version:
        registry.point(spec.name, CANDIDATE, found.version, reason=reason)
    return found.ref
