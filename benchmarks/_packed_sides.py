"""One part of packed_sweep.py in a process of its own: ``python benchmarks/_packed_sides.py TASK``, JSON.

What is measured within the process goes to ``TASK["folder"]/measured.json``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from _train_sides import memory

from qwen_ray.config import RunConfig
from qwen_ray.fsio import write_json
from qwen_ray.sweeps.spec import SweepConfig, trial_config

if TYPE_CHECKING:
    import torch

TRIALS = 8
CONTROL = 0
"""The trial that is run once more: the reference, at the highest rate."""
HIGHEST_RATE = 1e-3
"""At higher ones a trial of so few tokens a step is chaotic: rounding alone decides where it ends."""


@dataclass(frozen=True)
class Task:
    """What a process is told."""

    part: str
    model: str
    data: str
    folder: str
    length: int
    """Tokens of a row."""
    rows: int
    """Rows a step."""
    steps: int
    threads: int
    values: list[dict[str, Any]]
    """What each trial has in place of the base run's, by dotted key."""
    reuse: bool = False
    """Of trials one after another: whether Tune keeps a trial's process for the next."""

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def sweep(self) -> SweepConfig:
        """Trials without early stopping, that evaluate and save at their end."""
        return SweepConfig.model_validate(
            {
                "name": "benchmark",
                "out": str(Path(self.folder) / "sweep"),
                "run": {
                    "model": {"name": self.model},
                    # Dropout only takes time from what is compared.
                    "method": {"dropout": 0.0, "r": 16, "alpha": 32},
                    "data": {"train": [self.data], "max_length": self.length},
                    "optim": {
                        "max_steps": self.steps,
                        "learning_rate": HIGHEST_RATE,
                        "batch_size": self.rows,
                        "gradient_accumulation": 1,
                        "warmup_steps": 10,
                    },
                    "cluster": {"workers": 0, "cpus_per_worker": self.threads},
                    "evaluate": {"every_steps": self.steps},
                    "checkpoint": {"every_steps": self.steps},
                    "tracking": {"wandb": "off"},
                    "precision": "fp32",
                },
                "space": {
                    "optim.learning_rate": {
                        "distribution": "log_uniform",
                        "low": HIGHEST_RATE / 10,
                        "high": HIGHEST_RATE,
                    },
                    "method.r": {"distribution": "choice", "values": [8, 16, 32]},
                },
                "search": {"name": "random", "trials": TRIALS},
                "stopping": {"name": "none"},
                "trials": {"kind": "packed", "slots": TRIALS, "cpus": self.threads, "max_failures": 0},
            }
        )

    def config(self, index: int) -> RunConfig:
        """Of a trial."""
        out = Path(self.folder) / "sweep" / "trials" / f"{index:04d}"
        return trial_config(self.sweep, self.values[index], out=out)


def packed(task: Task) -> None:
    """The sweep in Ray Tune by qwen-ray's engine, from start to end."""
    from qwen_ray import cluster
    from qwen_ray.sweeps.driver import prepared, with_data
    from qwen_ray.sweeps.ledger import Ledger
    from qwen_ray.sweeps.proposals import Proposals

    spec = prepared(task.sweep)
    spec.trials.gpus = 0
    out = Path(spec.out)
    spec, _ = with_data(spec)
    cluster.connect("local", num_cpus=task.threads + 1)
    from qwen_ray.sweeps.searcher import TuneSearcher
    from qwen_ray.sweeps.trial import tune_packed

    ledger = Ledger(out)
    grid = tune_packed(spec, out, searcher=TuneSearcher(Proposals(spec, ledger)), ledger=ledger, group="")
    check(grid, [trial.values for trial in ledger.trials()], task.values)
    cluster.disconnect()


def sequential(task: Task) -> None:
    """The same trials one after another in Ray Tune, each by our loop: a function that is tuned."""
    from qwen_ray import cluster

    cluster.connect("local", num_cpus=task.threads + 1)
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        tune.report({"eval_loss": run_trial(task, config["trial"])})

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": task.threads}),
        param_space={"trial": tune.grid_search(list(range(TRIALS)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=task.reuse),
        run_config=tune.RunConfig(name="tune", storage_path=str(Path(task.folder) / "sweep")),
    )
    check(tuner.fit(), task.values, task.values)
    cluster.disconnect()


def run_trial(task: Task, index: int) -> float:
    """Train, evaluate, save and export one trial; returns its held-out loss."""
    import torch

    from qwen_ray.training.tracking import Tracker
    from qwen_ray.training.worker import run_rank

    torch.set_num_threads(task.threads)
    config = task.config(index)
    Path(config.out).mkdir(parents=True)
    tracker = Tracker(Path(config.out), config, "")
    rows: list[dict[str, Any]] = []

    def on_metrics(row: dict[str, Any]) -> None:
        rows.append(row)
        tracker(row)

    run_rank("ddp", torch.device("cpu"), config, Path(config.out), on_metrics=on_metrics)
    tracker.close()
    return float(rows[-1]["eval_loss"])


def control(task: Task) -> None:
    """One trial without Ray: with another number of threads than in the sweep, it rounds otherwise."""
    run_trial(task, CONTROL)


def check(grid: Any, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Ends the process unless every trial ran, with the values that it was to have."""
    if len(grid) != TRIALS or grid.errors or found != wanted:
        raise SystemExit(f"{len(grid)} trials, errors {grid.errors}, values {found}")


# ---------------------------------------------------------------- without Ray


class Solo:
    """One trial in our loop, step by step."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        from qwen_ray.training import loop, run, strategy

        self._take, self._notice = loop.take_step, loop.Notice(None)
        self._run = run.set_up(config, strategy.make("ddp", device))
        self.total = run.plan(config, self._run.data)
        self._steps = self._run.feed.steps(
            self._run.data.stream, rows=self._run.rows_a_step, count=self.total
        )
        self.done = 0

    def step(self) -> dict[str, Any]:
        self.done += 1
        self._run.clock = time.perf_counter()
        return self._take(self._run, self.done, self.total, next(self._steps), self._notice)


def loop_turns(task: Task) -> None:
    """A pack of all trials and one trial alone take turns in this process, with 1 thread and with more."""
    import torch

    from qwen_ray.training.packed import Pack

    solo = Solo(task.config(0), torch.device("cpu"))
    pack = Pack(task.config(0))
    for i in range(TRIALS):
        pack.add(str(i), task.config(i))
    threads = sorted({1, task.threads})
    sides: list[tuple[str, Callable[[], Any]]] = [("solo", solo.step), ("pack", pack.step)]
    wall: dict[str, dict[int, list[float]]] = {name: {n: [] for n in threads} for name, _ in sides}
    cpu: dict[str, dict[int, list[float]]] = {name: {n: [] for n in threads} for name, _ in sides}
    losses: dict[str, list[float]] = {"solo": [], "pack": []}
    tokens = 0
    turn = max(1, task.steps // 12)
    order = [(n, name, step) for n in threads for name, step in sides]
    while len(losses["solo"]) + turn * len(threads) <= task.steps:
        for n, name, step in order:
            torch.set_num_threads(n)
            began, busy = time.perf_counter(), time.process_time()
            rows = [step() for _ in range(turn)]
            wall[name][n].append((time.perf_counter() - began) / turn)
            cpu[name][n].append((time.process_time() - busy) / turn)
            losses[name] += [(row if name == "solo" else row["0"])["loss"] for row in rows]
            tokens += sum(row["tokens"] for row in rows) if name == "solo" else 0
        order.reverse()
    write_json(
        Path(task.folder) / "measured.json",
        {
            "seconds": wall,
            "cpu_seconds": cpu,
            "losses": losses,
            "steps": len(losses["solo"]),
            "tokens_a_step": tokens / len(losses["solo"]),
        },
    )


def peak_pack(task: Task) -> None:
    """The memory of a process that trains all trials in a pack and evaluates them."""
    from qwen_ray.training.packed import Pack

    def work() -> None:
        pack = Pack(task.config(0))
        for i in range(TRIALS):
            pack.add(str(i), task.config(i))
        for _ in range(task.steps):
            pack.step()
        pack.validation()

    measure_peak(task, work)


def peak_solo(task: Task) -> None:
    """The memory of a process that trains one trial, of the largest rank, and evaluates it."""
    largest = max(range(TRIALS), key=lambda i: task.values[i]["method.r"])
    measure_peak(task, lambda: run_trial(task, largest))


def measure_peak(task: Task, work: Callable[[], Any]) -> None:
    import qwen_ray.training.packed  # noqa: F401 - what both sides import

    before = memory("VmRSS")
    work()
    found = {"peak_bytes": memory("VmHWM"), "imports_bytes": before}
    write_json(Path(task.folder) / "measured.json", found)


PARTS = {
    "packed": packed,
    "sequential": sequential,
    "control": control,
    "loop": loop_turns,
    "peak_pack": peak_pack,
    "peak_solo": peak_solo,
}

if __name__ == "__main__":
    given = Task(**json.loads(sys.argv[1]))
    PARTS[given.part](given)
