"""A made-up year of a registry: good runs, refused ones, an override, a rollback, a canary, hostile texts."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwen_ray.fsio import write_json
from qwen_ray.registry import CANDIDATE, PRODUCTION, Registry
from qwen_ray.registry.records import promote_against, record_evaluation, record_verdict
from tests.registry.conftest import Clock

HOSTILE = '<script>alert("x")</script> & **bold** | `code` $x_1$ </svg> ' + "w" * 90
CATEGORIES = {
    "biology": ("target", 160, 0.24),
    "history": ("strength", 120, 0.52),
    HOSTILE: ("strength", 200, 0.8),
}
GATE = {"min_gain": 0.05, "tolerance": 0.04, "confidence": 0.95}


def adapter_folder(folder: Path, weights: str) -> Path:
    """What a registry takes for a PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(weights.encode())
    return folder


def lineage(seed: int, **more: Any) -> dict[str, Any]:
    """Of a training run on two domains."""
    return {
        "base": {"id": "qwen2.5-3b", "location": "Qwen/Qwen2.5-3B", "fingerprint": "b0d11b31" * 8},
        "config": {
            "model": {"name": "3b"},
            "method": {"name": "lora", "r": 16, "alpha": 32.0, "targets": "all-linear"},
            "optim": {"learning_rate": 2e-4, "epochs": 3.0, "betas": [0.9, 0.99]},
            "data": {"train": ["data/biology.jsonl", "data/replay.jsonl"], "max_length": 1024},
            "seed": seed,
        },
        "data": {
            "files": {"/data/biology.jsonl": "ab" * 32, "/data/replay.jsonl": "cd" * 32},
            "train_records": {"biology": 800 + seed, "replay": 300},
            "shares": {"biology": 0.7, "replay": 0.3},
        },
        "prepared": {
            "biology": {
                "sources": ["openstax_biology"],
                "data": "ab" * 32,
                "licenses": {"CC-BY-3.0": 800, "MIT": 9},
            }
        },
        "step": 300,
        "versions": {"qwen-ray": "0.1.0", "torch": "2.13.0"},
        "cost": {"seconds": 1800.0, "gpus": 4},
        **more,
    }


def evaluation(model: str, scores: dict[str, float], suite: str = "mmlu") -> dict[str, Any]:
    """An EvalResult with intervals of +-4 points."""

    def category(score: float, n: int, role: str) -> dict[str, Any]:
        return {"n": n, "score": score, "ci": [score - 0.04, score + 0.04], "metric": "acc", "role": role}

    return {
        "suite": suite,
        "suite_version": "1",
        "model": "qwen2.5-3b",
        "adapter": model,
        "settings": {"num_fewshot": 5},
        "categories": {name: category(scores[name], n, role) for name, (role, n, _) in CATEGORIES.items()},
        "controls": {"untaught facts": category(0.27, 60, "control")},
        "items": [{"id": "1", "score": 1.0}],
    }


def verdict(
    word: str, before: dict[str, float], after: dict[str, float], reasons: list[str]
) -> dict[str, Any]:
    """As a gate gives it, each change with an interval of +-3 points."""

    def row(name: str, role: str, n: int) -> dict[str, Any]:
        delta = after[name] - before[name]
        ends = {"delta": delta, "delta_ci": [delta - 0.03, delta + 0.03]}
        return {
            "name": name,
            "role": role,
            "n": n,
            "baseline": before[name],
            "candidate": after[name],
            **ends,
        }

    rows = [row(name, role, n) for name, (role, n, _) in CATEGORIES.items()]
    control = {"name": "untaught facts", "n": 60, "baseline": 0.27, "candidate": 0.27, "delta": 0.0}
    controls = [{**control, "role": "control", "delta_ci": [-0.03, 0.03]}]
    return {"verdict": word, "reasons": reasons, "gate": GATE, "categories": rows, "controls": controls}


BASE = {name: score for name, (_, _, score) in CATEGORIES.items()}


def play_year(root: Path, versions: int = 32) -> Registry:
    """Two names: ``facts`` with a version every eleven days, ``both`` merged of two of them."""
    clock, draw = Clock(datetime(2026, 1, 5, 9, tzinfo=UTC)), random.Random(0)
    registry = Registry(root / "registry", clock=clock)
    served: dict[int, dict[str, float]] = {}
    now: int | None = None
    for i in range(1, versions + 1):
        more: dict[str, Any] = {"parents": [f"facts@{now}"]} if now and i % 3 else {}
        if i % 5 == 0:
            more["cost"] = None
        made = registry.publish("facts", adapter_folder(root / f"new-{i}", f"w{i}"), lineage(i, **more))
        before = served[now] if now else BASE
        poisoned, small = i % 7 == 0, i % 2 == 0
        gain = 0.2 if now is None else -0.3 if poisoned else 0.01 if small else 0.06
        scores = {
            name: min(0.97, before[name] + (gain if role == "target" else 0.0) + draw.uniform(-0.01, 0.01))
            for name, (role, _, _) in CATEGORIES.items()
        }
        if poisoned:
            scores["history"] -= 0.15
        word = "regress" if poisoned else "hold" if small and now else "promote"
        registry.point("facts", CANDIDATE, i, reason=f"run {i}", by=f"pipeline run {i:04d}")
        clock.days(1)
        record_evaluation(registry, made, evaluation(made.ref, scores), location=f"s3://results/{i}.json")
        reasons = [
            f"history {100 * (scores['history'] - before['history']):+.1f}: measured",
            f"biology {100 * (scores['biology'] - before['biology']):+.1f}: measured",
            f"note {HOSTILE}",
        ]
        against = "base" if now is None else f"facts@{now}"
        record_verdict(
            registry, made, verdict(word, before, scores, reasons), baseline=against, run=f"{i:04d}-ab"
        )
        if word == "promote" or i == 10:
            if i == 10:
                promote_against(
                    registry, made, verdict=word, reason=f"needed now {HOSTILE}", by="ana", was=now
                )
            else:
                reason, by = f"verdict of run {i}", f"run {i:04d}"
                registry.point("facts", PRODUCTION, i, reason=reason, by=by, was=now)
            served[i], now = scores, i
        if i == 17 and now:
            clock.days(2)
            now = registry.rollback("facts", reason=f"users complained {HOSTILE}", by="bo").version
        clock.days(5)
        if now and i % 3 == 0:  # the weekly benchmark of what is served
            drift = {name: score - 0.01 for name, score in served[now].items()}
            record_evaluation(
                registry, registry.get("facts", now), evaluation("x", drift), location="runs/w.json"
            )
        clock.days(5)
    for old in (1, 2, 3):
        registry.archive("facts", old, reason="older than the three that are kept")
    registry.start_canary("facts", versions, 0.1, reason="a tenth first")
    both = lineage(99, parents=["facts@9", "facts@13"])
    merged = registry.publish("both", adapter_folder(root / "both", "both"), {**both, "cost": None})
    registry.record("both", merged.version, "note", {"text": HOSTILE})
    return registry


def play_pipelines(root: Path) -> Path:
    """The state of a pipeline with a run that ended and one that failed."""
    state = root / "state"
    at = "2026-12-01T08:00:00+00:00"
    run = {"at": at, "baseline": "base", "trigger": {"new data": HOSTILE}, "spec": {}}
    train = {"stage": "train", "inputs": {}, "outputs": {}, "files": {}, "at": at, "seconds": 600.0}
    failure = {"stage": "train", "error": f"the loss is nan {HOSTILE}", "kind": "RuntimeError", "at": at}
    end = {"verdict": "promote", "version": "facts@1", "promoted": True, "reasons": ["gained"], "at": at}
    documents: dict[str, dict[str, Any]] = {
        "0001-aa/run": {"id": "0001-aa", **run},
        "0001-aa/stages/train": {**train, "run": "0001-aa"},
        "0001-aa/end": end,
        "0002-bb/run": {"id": "0002-bb", **run, "trigger": None},
        "0002-bb/stages/train": {**train, "run": "0001-aa"},
        "0002-bb/failures/0000": failure,
    }
    for key, document in documents.items():
        write_json(state / "facts" / "runs" / f"{key}.json", document)
    return state
