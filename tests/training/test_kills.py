"""kill -9 of a rank at 20 random steps: the run goes on each time and ends as the one nobody touched."""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qwen_ray.config import RunConfig
from qwen_ray.training.checkpoint import complete, step_of
from tests.training.ranks import processes, run, start_rank
from tests.training.test_loop import config

STEPS, KILLS = 50, 20
STRATEGIES = {
    "ddp": (["strategy.name=ddp"], 0.0),
    "fsdp": (["strategy.name=fsdp"], 1e-6),
    "deepspeed": (["strategy.name=deepspeed", "strategy.zero_stage=2"], 1e-6),
}


LOST = 75
"""Exit code of a rank that waited in vain for a message of a rank that is there."""


def work(given: dict[str, Any], out: Path) -> None:
    def note(row: dict[str, Any]) -> None:
        with open(out / "rows.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    try:
        run(RunConfig.model_validate(given), out, on_metrics=note)
    except RuntimeError as e:
        if "gloo" in str(e) and "Timed out waiting" in str(e):
            os._exit(LOST)
        raise


def last_step(out: Path) -> int:
    path = out / "rows.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # a row may be seen before all of it is written
    return int(json.loads(lines[-1])["step"]) if lines else 0


class _Lost(Exception):
    """The group failed by itself: gloo lost a message."""


def go(given: dict[str, Any], out: Path, *, until: int | None, victim: int = 0, breaks: int = 0) -> int:
    """Start two ranks; at step ``until`` kill one as an operator's kernel would, and then the other, as Ray
    does with a group that lost a member. Returns how often the group failed by itself, at most ``breaks``.

    In one of some hundred starts on a busy machine gloo loses a message of fsdp's, and both ranks give up
    after its time-out (as in pytorch/pytorch#16295). Ray Train starts such a group again, and so does this;
    any other end of a rank is a failure.
    """
    try:
        _go(given, out, until=until, victim=victim)
    except _Lost:
        if not breaks:
            raise
        return 1 + go(given, out, until=until, victim=victim, breaks=breaks - 1)
    return 0


def _go(given: dict[str, Any], out: Path, *, until: int | None, victim: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            processes.Process(target=start_rank, args=(rank, 2, folder, work, (given, out)))
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + 200
        while until is not None and last_step(out) < until:
            assert time.monotonic() < deadline, f"step {until} was not reached"
            if any(rank.exitcode is not None for rank in ranks):
                for rank in ranks:
                    rank.join(200)
                assert {rank.exitcode for rank in ranks} == {LOST}, f"a rank ended before step {until}"
                raise _Lost(f"before step {until}")
            time.sleep(0.002)
        if until is not None:
            for rank in (ranks[victim], ranks[1 - victim]):
                assert rank.pid is not None
                os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.join(200)
            assert rank.exitcode == (0 if until is None else -signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_20_times_is_the_run_nobody_touched(strategy: str, tmp_path: Path, data_file: Path) -> None:
    sets, tolerance = STRATEGIES[strategy]
    settings = config(data_file, tmp_path, *sets, f"optim.max_steps={STEPS}", "checkpoint.every_steps=3")
    settings.cluster.workers = 2
    given = settings.model_dump(mode="json")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    go(given, tmp_path / "whole", until=None)
    rng = random.Random(20)
    resumed, breaks = set(), 1
    for step in sorted(rng.sample(range(2, STEPS), KILLS)):
        breaks -= go(given, tmp_path / "killed", until=step, victim=rng.randrange(2), breaks=breaks)
        resumed |= {step_of(path) for path in complete(tmp_path / "killed" / "checkpoints")}
    go(given, tmp_path / "killed", until=None)
    assert len(resumed) > 5  # they went on from where they were, not from the start
    (expected,), (got,) = ((tmp_path / n / "trained").glob("*.safetensors") for n in ("whole", "killed"))
    if tolerance == 0:
        assert got.read_bytes() == expected.read_bytes()
    weights, mine = load_file(expected), load_file(got)
    assert max(float((weights[k] - mine[k]).abs().max()) for k in weights) <= tolerance
    rows = {
        name: {r["step"]: r["loss"] for r in map(json.loads, (tmp_path / name / "rows.jsonl").open())}
        for name in ("whole", "killed")
    }
    assert rows["killed"] == pytest.approx(rows["whole"], abs=1e-9 if tolerance == 0 else 1e-6)
