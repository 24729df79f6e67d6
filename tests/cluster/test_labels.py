"""Training on nodes with given labels only, on a running cluster of three nodes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.nodes import Cluster
from tests.training.test_driver import command

pytestmark = [pytest.mark.cluster, pytest.mark.long]
# Prints the id of a node, and what is said of a label that none has.
SCRIPT = """
from qwen_ray.errors import UserError
from qwen_ray.training.nodes import check_labels
print(*(node["NodeID"] for node in ray.nodes() if node["Resources"].get(f"node-{NUMBER}")))
try:
    check_labels({"gpu": "h100"}, 5)
except UserError as e:
    print(e)
"""


def test_a_run_takes_nodes_with_its_labels_and_no_others(
    cluster: Cluster, tmp_path: Path, data_file: Path
) -> None:
    """Two nodes have room for a worker each; the label is that of one of them."""
    said = cluster.run(f"NUMBER = {cluster.workers[0]}\n{SCRIPT}")
    node, _, refusal = said.partition("\n")
    assert "no node of the cluster has gpu=h100" in refusal, said

    def train(workers: int) -> subprocess.CompletedProcess[str]:
        sets = ("--set", f"cluster.labels={{ray.io/node-id: '{node}'}}", "--set", "cluster.start_seconds=5")
        argv = command(data_file, tmp_path / str(workers), *sets, workers=workers, steps=2)
        return subprocess.run(
            argv, env=cluster.client, capture_output=True, text=True, timeout=240, check=False
        )

    done = train(1)
    assert done.returncode == 0, done.stderr[-3000:]
    done = train(2)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "the cluster had no room" in done.stderr
