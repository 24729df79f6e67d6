"""A small sweep of packed trials on the embedded model, and a driver without Ray."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from qwen_ray.data.records import write_records
from qwen_ray.sweeps.engine import EngineCore
from qwen_ray.sweeps.ledger import Ledger
from qwen_ray.sweeps.spec import SweepConfig
from qwen_ray.training.checkpoint import complete, step_of
from tests.conftest import sums

STEPS = 18
POINTS = [2, 6, 18]
RATES = [2e-3, 3e-4, 1e-2, 1e30, 5e-3, 4e-3]
"""Learning rates of the trials; the fourth ends in NaN."""
NAN = 3
Values = list[dict[str, Any]]
VALUES: Values = [{"optim.learning_rate": rate, "method.r": 4 + 4 * (i % 2)} for i, rate in enumerate(RATES)]


def example(out: Path, *, values: Values = VALUES, slots: int = 4, **sections: Any) -> SweepConfig:
    """The sweep whose trials are ``values``, which are opened in the ledger of ``out``."""
    data = out / "data.jsonl"
    if not data.is_file():
        write_records(data, [*sums(120), *sums(60, seed=1, domain="more")])
    ledger = Ledger(out)
    for index, each in enumerate(values):
        ledger.open(index, each, "reference" if index == 0 else "random")
    return SweepConfig.model_validate(
        {
            "name": "example",
            "out": str(out),
            "run": {
                "model": {"name": "tiny"},
                "data": {"train": [str(data)], "max_length": 96, "validation_fraction": 0.1},
                "optim": {
                    "max_steps": STEPS,
                    "batch_size": 1,
                    "gradient_accumulation": 1,
                    "warmup_steps": 1,
                },
                "method": {"targets": "qv", "dropout": 0.1},
                "cluster": {"workers": 0},
                "tracking": {"wandb": "off"},
            },
            "space": {
                "optim.learning_rate": {"distribution": "log_uniform", "low": 1e-4, "high": 1e-2},
                "method.r": {"distribution": "choice", "values": [4, 8]},
            },
            "objective": {"targets": ["sums"], "strengths": ["more"], "tolerance": 5.0},
            "search": {"trials": len(values)},
            "trials": {"slots": slots, "cpus": 1},
            **sections,
        }
    )


def drive(core: EngineCore, count: int, slots: int) -> dict[int, Any]:
    """What Ray Tune does: ``slots`` at a time, each asks for its reports until it is told to end. A trial
    that raises ends with its exception."""
    todo, lock = list(range(count)), threading.Lock()
    ended: dict[int, Any] = {}

    def run(index: int) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] = []
        while not reports or reports[-1]["decision"] == "continue":
            reports.append(core.advance(index, len(reports)))
        return reports

    def actor() -> None:
        while True:
            with lock:
                if not todo:
                    return
                index = todo.pop(0)
            try:
                core.join(index)
                ended[index] = run(index)
            except Exception as e:
                ended[index] = e
            core.leave(index)

    actors = [threading.Thread(target=actor) for _ in range(slots)]
    for thread in actors:
        thread.start()
    for thread in actors:
        thread.join()
    return dict(sorted(ended.items()))


def timeless(reports: dict[int, Any]) -> dict[int, Any]:
    """Reports without what depends on the clock; an exception as its text."""
    clock = {"seconds", "tokens"}  # tokens are counted by their rate
    return {
        index: [{k: v for k, v in report.items() if k not in clock} for report in rows]
        if isinstance(rows, list)
        else str(rows)
        for index, rows in reports.items()
    }


def saved_steps(out: Path) -> dict[int, int]:
    """The step of each trial's newest checkpoint, of those that have one."""
    ledger = Ledger(out)
    found = {t.index: complete(t.folder / "checkpoints") for t in ledger.trials()}
    return {index: step_of(folders[-1]) for index, folders in found.items() if folders}


def times_trained(out: Path, index: int) -> Counter[int]:
    """How often each step of a trial was trained. A step that was evaluated has a second row."""
    lines = (Ledger(out).folder(index) / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return Counter(row["step"] for row in map(json.loads, lines) if "eval_loss" not in row)
