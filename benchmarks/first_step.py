"""Time from the command to the end of the first training step: ``qwen-ray train`` against a bare script.

    python benchmarks/first_step.py --out benchmarks/first_step.json

Both sides start from nothing (no cluster is running), train LoRA on the embedded model with the same
records, rows and number of workers, and are timed from the start of the process until the first step is
done: Ray's start is our side's. Runs take turns; the ratio is of medians. The bare side is
bare_torchrun.py under ``torchrun``.
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

RUNS, RECORDS, ROWS, LENGTH = 5, 2000, 2, 320
TIMEOUT = 300.0


def main() -> None:
    arguments = _common.arguments(__doc__ or "")
    runs = 1 if arguments.quick else RUNS
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    before = _common.machine()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        write_records(data, [_record(i) for i in range(200 if arguments.quick else RECORDS)])
        for workers in (1,) if arguments.quick else (1, 2):
            for run in range(runs + 1):  # the first fills the page cache
                out = Path(folder) / f"run-{workers}-{run}"
                for side in ("bare", "ours") if run % 2 else ("ours", "bare"):
                    if side == "bare":
                        took = _bare(data, workers, environment)
                    else:
                        took = _ours(data, workers, out, environment)
                    if run:
                        seconds.setdefault(f"{side}, {workers} workers", []).append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        workers: medians[f"ours, {workers} workers"] / medians[f"bare, {workers} workers"]
        for workers in (1, 2)
        if f"ours, {workers} workers" in medians
    }
    result: dict[str, Any] = {
        "name": "first_step",
        "headline": {
            "ratio": max(ratios.values()),
            "what": "the time of a bare torchrun script from the command to the first step (lower is better)",
        },
        "ratio_by_workers": ratios,
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


def _bare(data: Path, workers: int, environment: dict[str, str]) -> float:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    script = Path(__file__).with_name("bare_torchrun.py")
    argv += [str(script), models.resolve("tiny").location, str(data), str(ROWS), str(LENGTH)]
    started = time.perf_counter()
    process = subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("first step"):
            took = time.perf_counter() - started
            process.communicate(timeout=TIMEOUT)
            return took
    raise RuntimeError(f"the bare script failed: {process.communicate()[1][-2000:]}")


def _ours(data: Path, workers: int, out: Path, environment: dict[str, str]) -> float:
    argv = [sys.executable, "-m", "qwen_ray.cli", "train", "--model", "tiny", "--data", str(data)]
    argv += ["--workers", str(workers), "--steps", "100000", "--out", str(out)]
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
