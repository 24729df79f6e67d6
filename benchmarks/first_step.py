"""Time from the command to the end of the first training step: ``qwen-ray train`` against a bare script.

    python benchmarks/first_step.py --out benchmarks/first_step.json

Every side starts from nothing (no cluster is running), trains LoRA on the embedded model with the same
records, rows and number of workers, and is timed from the start of the process until the first step is
done. ``qwen-ray train`` runs as it is typed, in its own process where there is no cluster, and with Ray Train
workers (Ray's start counts); the bare script runs under ``torchrun`` and under plain Ray Train
(bare_first_step.py), which shows what of the time is Ray's own. Runs take turns; ratios are of medians.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common

from qwen_ray import models
from qwen_ray.data.records import Message, Record, write_records
from qwen_ray.training.tracking import read_metrics

RUNS, RECORDS, ROWS, LENGTH = 3, 2000, 2, 320
TIMEOUT = 300.0
OURS, TORCHRUN, RAY_TRAIN = "qwen-ray train", "bare torchrun", "bare Ray Train"


def main() -> None:
    arguments = _common.arguments(__doc__ or "")
    runs = 1 if arguments.quick else RUNS
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    before = _common.machine()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        write_records(data, [_record(i) for i in range(200 if arguments.quick else RECORDS)])
        sides = [(side, workers) for workers in (1, 2) for side in (TORCHRUN, RAY_TRAIN, OURS)]
        sides = [(OURS, 0), *(sides[:1] if arguments.quick else sides)]
        for run in range(runs + 1):  # the first fills the page cache
            for side, workers in sides if run % 2 else reversed(sides):
                out = Path(folder) / f"run-{workers}-{run}"
                took = (
                    _ours(data, workers, out, environment)
                    if side == OURS
                    else _bare(data, workers, environment, ray=side == RAY_TRAIN)
                )
                print(f"{side}, {workers} workers: {took:.1f} s", file=sys.stderr)
                if run:
                    seconds.setdefault(f"{side}, {workers} workers", []).append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        f"{OURS}, {workers} workers, over {other}": medians[f"{OURS}, {workers} workers"] / medians[against]
        for workers in (0, 1, 2)
        for other in (TORCHRUN, RAY_TRAIN)
        if (against := f"{other}, {max(1, workers)} workers") in medians
        and f"{OURS}, {workers} workers" in medians
    }
    result: dict[str, Any] = {
        "name": "first_step",
        "headline": {
            "ratio": medians[f"{OURS}, 0 workers"] / medians[f"{TORCHRUN}, 1 workers"],
            "what": "`qwen-ray train` as it is typed: the time of a bare torchrun script from the command to "
            "the first step (lower is better)",
        },
        "ratios": ratios,
        "median_seconds": medians,
        "seconds": seconds,
        "quick": arguments.quick,
        "machine": before,
        "versions": _common.versions("torch", "ray", "transformers", "peft", "qwen-ray"),
        "commit": _common.commit(),
    }
    _common.write(arguments.out, result)


def _record(i: int) -> Record:
    messages = (Message("user", f"What is {i} + {i % 97}?"), Message("assistant", str(i + i % 97)))
    return Record(f"sum-{i}", messages, "sums", "generated", "CC0-1.0")


def _bare(data: Path, workers: int, environment: dict[str, str], *, ray: bool) -> float:
    argv = [sys.executable]
    if not ray:
        argv += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    argv += [str(Path(__file__).with_name("bare_first_step.py")), models.resolve("tiny").location, str(data)]
    argv += [str(ROWS), str(LENGTH), *(["--ray", str(workers)] if ray else [])]
    started = time.perf_counter()
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "first step" in line:  # Ray puts the worker's name before it
            took = time.perf_counter() - started
            process.communicate(timeout=TIMEOUT)
            return took
    raise RuntimeError(f"the bare script failed: {process.communicate()[1][-2000:]}")


def _ours(data: Path, workers: int, out: Path, environment: dict[str, str]) -> float:
    argv = [sys.executable, "-m", "qwen_ray.cli", "train", "--model", "tiny", "--data", str(data)]
    argv += ["--steps", "100000", "--out", str(out), *(["--workers", str(workers)] if workers else [])]
    argv += ["--set", f"data.max_length={LENGTH}", "--set", f"optim.batch_size={ROWS}"]
    started = time.perf_counter()
    process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        while not read_metrics(out):
            if process.poll() is not None or time.perf_counter() - started > TIMEOUT:
                assert process.stderr is not None
                raise RuntimeError(f"no first step: {process.stderr.read()[-2000:]!r}")
            time.sleep(0.01)
        return time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT)


if __name__ == "__main__":
    main()
