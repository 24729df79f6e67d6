"""Packed trials in Ray Tune: every trial is there, and kill -9 of anything changes nothing of the result."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen_ray.errors import EXIT_INTERRUPTED
from qwen_ray.sweeps.ledger import Ledger
from tests.conftest import ROOT
from tests.sweeps.packed_example import NAN, POINTS, VALUES, example, saved_steps, timeless, times_trained

ALL_STEPS = 2 * POINTS[-1] + 4 * POINTS[0]
"""Of all trials of the example, if none is trained twice."""


def steps_trained(out: Path) -> int:
    """Steps in the metrics of all trials."""
    return sum(
        len(times_trained(out, t.index))
        for t in Ledger(out).trials()
        if (t.folder / "metrics.jsonl").exists()
    )


@contextmanager
def driver(out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver process. It ends with the block."""
    with open(out / "log.txt", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.sweeps.packed_driver", str(out)], cwd=ROOT, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(out: Path, process: subprocess.Popen[bytes], steps: int) -> dict[int, list[int]]:
    """Until so many steps have been trained. Returns, of each trial with a checkpoint, how often each step
    up to it had been trained by then."""
    deadline = time.monotonic() + 240
    while steps_trained(out) < steps:
        assert process.poll() is None, (out / "log.txt").read_text()[-5000:]
        assert time.monotonic() < deadline, f"step {steps} was not reached"
        time.sleep(0.02)
    return {index: times_up_to(out, index, step) for index, step in saved_steps(out).items()}


def times_up_to(out: Path, index: int, step: int) -> list[int]:
    """How often each of the first ``step`` steps of a trial has been trained."""
    times = times_trained(out, index)
    return [times[s] for s in range(1, step + 1)]


TRIAL, ENGINE = ("ray::PackedTrial", "ray::ResourceTrainable"), ("ray::Engine",)
"""How the titles of their processes begin."""


def child(process: subprocess.Popen[bytes], titles: tuple[str, ...]) -> psutil.Process:
    """The first child with such a title."""
    for found in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if found.cmdline()[0].startswith(titles):
                return found
    raise AssertionError(f"no process is called {titles[0]}")


@pytest.mark.cluster
@pytest.mark.long
def test_killed_anywhere_it_ends_as_if_nobody_had_touched_it(
    undisturbed: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    example(tmp_path)
    rng, saved = random.Random(5), []
    moments = sorted(rng.sample(range(2, ALL_STEPS // 2), 4))
    with driver(tmp_path) as process:
        wait_for(tmp_path, process, moments[0])
        child(process, TRIAL).kill()
        saved.append(wait_for(tmp_path, process, moments[1]))
        child(process, ENGINE).kill()
        saved.append(wait_for(tmp_path, process, moments[2]))
        engine = child(process, ENGINE)
        os.kill(process.pid, signal.SIGKILL)
        engine.kill()  # else it trains on until Ray has noticed, perhaps to the end
        engine.wait(60)
    with driver(tmp_path) as process:
        # New steps, so that it is at work, however far the last one came before it was dead.
        saved.append(wait_for(tmp_path, process, max(moments[3], steps_trained(tmp_path) + 1)))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == EXIT_INTERRUPTED
    with driver(tmp_path) as process:
        assert process.wait(240) == 0, (tmp_path / "log.txt").read_text()[-5000:]

    _, reports = undisturbed
    ledger = Ledger(tmp_path)
    assert timeless({i: ledger.reports(i) for i in reports}) == timeless(reports)
    states = {i: Ledger(undisturbed[0]).trial(i).state for i in reports}
    assert {t.index: t.state for t in ledger.trials()} == states
    assert any(saved)
    for known in saved:
        for index, times in known.items():
            assert times_up_to(tmp_path, index, len(times)) == times, "a saved step was trained again"

    grid = json.loads((tmp_path / "grid.json").read_text())
    assert grid["best"] == max(reports, key=lambda i: reports[i][-1]["score"])
    assert sorted(row["trial"] for row in grid["trials"]) == list(range(len(VALUES)))
    for row in grid["trials"]:
        rows = reports[row["trial"]]
        assert (row["iterations"], row["reported"]) == (len(rows), len(rows))
        assert (row["score"], row["step"]) == (rows[-1]["score"], rows[-1]["step"])
        assert row["error"] is None
        assert Path(row["path"]) == tmp_path / "tune" / f"trial-{row['trial']:04d}"
        if row["trial"] != NAN:
            check_adapter(Path(row["checkpoint"]), VALUES[row["trial"]]["method.r"])


def check_adapter(folder: Path, rank: int) -> None:
    """PEFT puts it on the base, and it changes what the base says."""
    import torch
    from peft import PeftModel

    from qwen_ray import models

    base = models.load_model(models.resolve("tiny"), dtype=torch.float32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = PeftModel.from_pretrained(base, str(folder))
        assert not torch.equal(model(input_ids=ids).logits, before)
    assert model.peft_config["default"].r == rank
