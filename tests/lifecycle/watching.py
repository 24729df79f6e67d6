"""What tests of the watch share: a clock that is set by hand, results and versions made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_ray.evaluation import suites
from qwen_ray.evaluation.harness import summarise
from qwen_ray.registry import AdapterVersion, Registry

BASE = {"id": "tiny", "fingerprint": "made up"}
ITEMS = 100


class Clock:
    """Seconds since 1970, as ``now`` says; sleeping sets it on."""

    def __init__(self, now: float = 1_772_625_600.0) -> None:  # 2026-03-04, a Wednesday, 12:00 UTC
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def evaluation(**scores: float) -> dict[str, Any]:
    """An EvalResult of the embedded suite with these scores; every other category has 0.5."""
    suite = suites.load("tiny")
    items: list[dict[str, Any]] = []
    for category in suite.categories:
        right = round(scores.get(category.name, 0.5) * ITEMS)
        items += [{"category": category.name, "id": str(i), "score": float(i < right)} for i in range(ITEMS)]
    summaries = {category.name: summarise(category, items) for category in suite.categories}
    controls = {category.name for category in suite.categories if category.role == "control"}
    return {
        "schema": "qwen-ray/eval-result/1",
        "model": "tiny",
        "adapter": "facts",
        "suite": suite.name,
        "suite_version": suite.version,
        "settings": {"limit": None, "num_fewshot": None, "seed": 1234, "confidence": 0.95},
        "created_at": "2026-03-04T12:00:00+00:00",
        "categories": {name: one for name, one in summaries.items() if name not in controls},
        "controls": {name: summaries[name] for name in controls},
        "items": items,
    }


def publish(registry: Registry, folder: Path, name: str, number: int) -> AdapterVersion:
    """A version that has the form of an adapter, and is none."""
    adapter = folder / f"{name}-{number}"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_text(f"{name} {number}")
    return registry.publish(name, adapter, {"base": BASE})
