"""Nodes come and go while a run trains: it shrinks, grows, and sees every example exactly as planned."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import models
from qwen_ray.config import read_config
from qwen_ray.data.dataset import build_dataset
from qwen_ray.training.checkpoint import complete, step_of
from qwen_ray.training.tracking import read_examples, read_metrics
from tests.cluster.nodes import Cluster
from tests.training.test_driver import command, finish, start

pytestmark = [pytest.mark.cluster, pytest.mark.long]
STEPS = 240


def wait(process: subprocess.Popen[str], what: str, ready: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 180
    while not ready():
        assert process.poll() is None, f"the run ended before {what}:\n{process.communicate()[1][-3000:]}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.1)


def test_nodes_come_and_go_and_no_example_is_lost_or_repeated(
    cluster: Cluster, tmp_path: Path, data_file: Path
) -> None:
    """Two workers; a node dies: one; another node joins: two."""
    out = tmp_path / "run"
    sets = [
        "cluster.min_workers=1",
        "cluster.resize_seconds=2",
        "checkpoint.every_steps=20",
        "tracking.examples=true",
        "optim.batch_size=8",
        "optim.gradient_accumulation=2",
    ]
    more = [part for item in sets for part in ("--set", item)]
    environment = cluster.client
    process = start(command(data_file, out, *more, workers=2, steps=STEPS), environment)

    def workers() -> list[int]:
        return [row["workers"] for row in read_metrics(out)]

    at = 22 + os.urandom(1)[0] % 30  # any step from 22 to 51
    print(f"the node dies at step {at}")
    wait(process, f"step {at} on two workers", lambda: len(workers()) >= at)
    assert workers()[-1] == 2
    cluster.kill_node(cluster.workers[-1])
    # Past the next checkpoint, so that steps of one worker are part of the result.
    wait(process, "going on with one worker", lambda: workers().count(1) > 25)
    cluster.add_node()
    wait(process, "growing back to two", lambda: workers()[-1] == 2)
    result = finish(process)
    assert result["steps"] == STEPS
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["workers"] for row in rows} == {1, 2}

    config = read_config(out / "config.yaml")
    ref = models.resolve("tiny")
    data = build_dataset(
        config.data, models.load_tokenizer(ref), seed=config.seed, context=models.context_length(ref)
    )
    rows_a_step = 8 * 2 * 2
    data.stream.plan(rows=STEPS * rows_a_step)
    seen = read_examples(out)
    for step in range(1, STEPS + 1):
        planned = [i for _ in range(rows_a_step) for i in data.stream.next_row().ids]
        assert seen[step] == sorted(planned), f"step {step} with {rows[step - 1]['workers']} workers"


def test_notice_of_preemption_writes_a_checkpoint_at_once(
    cluster: Cluster, tmp_path: Path, data_file: Path
) -> None:
    """No checkpoint is due for a long time, but a node is to be taken away."""
    out = tmp_path / "run"
    sets = ["checkpoint.every_steps=1000", "optim.batch_size=8", "optim.gradient_accumulation=2"]
    more = [part for item in sets for part in ("--set", item)]
    process = start(command(data_file, out, *more, workers=2, steps=400), cluster.client)
    wait(process, "step 5", lambda: len(read_metrics(out)) >= 5)
    number = cluster.workers[-1]
    drain = (
        f"node = [n for n in ray.nodes() if n['Alive'] and n['Resources'].get('node-{number}')][0]\n"
        "from ray._private.worker import global_worker as w\n"
        "from ray._raylet import GcsClient\n"
        "from ray.core.generated import autoscaler_pb2 as pb\n"
        "import time\n"
        "gcs = GcsClient(address=w.node.gcs_address)\n"
        "print(gcs.drain_node(node['NodeID'], pb.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, 'test',"
        " int((time.time() + 600) * 1000)))"
    )
    assert cluster.run(drain).startswith("(True")
    try:
        wait(process, "checkpoint", lambda: complete(out / "checkpoints"))
        assert step_of(complete(out / "checkpoints")[-1]) % 1000
    finally:
        process.terminate()
        process.communicate(timeout=60)
        cluster.kill_node(number)
        cluster.add_node()
