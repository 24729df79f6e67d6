"""Ctrl-C ends a sweep at once: it leaves the cluster and stays away, and no trial of it has failed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_ray.data.records import write_records
from qwen_ray.errors import EXIT_INTERRUPTED
from qwen_ray.sweeps.ledger import Ledger
from qwen_ray.training.tracking import read_metrics
from tests.cluster.nodes import Cluster
from tests.conftest import sums

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
JOINED_AGAIN = 99
LINGERS = f"""
import sys, time
from qwen_ray.cli import main
try:
    main(sys.argv[1:])
except SystemExit as e:
    import ray
    time.sleep(2)  # for what still runs in this process
    sys.exit({JOINED_AGAIN} if ray.is_initialized() else e.code)
"""
KINDS: dict[str, dict[str, Any]] = {
    "packed": {"trials": {"slots": 2, "cpus": 0.5}},
    "plain": {"trials": {"kind": "plain"}, "run": {"cluster": {"workers": 0}}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_ends_a_sweep_at_once(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    write_records(tmp_path / "data.jsonl", [*sums(40), *sums(40, seed=1, domain="more")])
    run = {
        "model": {"name": "tiny"},
        "data": {"train": [str(tmp_path / "data.jsonl")], "validation_fraction": 0.1, "max_length": 96},
        "optim": {"max_steps": 2000},
        "tracking": {"wandb": "off"},
    }
    rates = {"distribution": "log_uniform", "low": 1e-4, "high": 1e-3}
    sweep = {
        "name": "example",
        "space": {"optim.learning_rate": rates},
        "objective": {"targets": ["sums"], "strengths": ["more"], "tolerance": 50.0},
        "search": {"trials": 2},
        "stopping": {"name": "none"},
        **KINDS[kind],
        "run": {**run, **KINDS[kind].get("run", {})},
    }
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(sweep))
    process = subprocess.Popen(
        [sys.executable, "-c", LINGERS, "sweep", str(file), "--out", str(out)],
        env=cluster.client,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(read_metrics(folder) for folder in out.glob("trials/*")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_INTERRUPTED, stderr[-3000:]
    assert "interrupted; the same command with --resume goes on" in stderr
    # What Ray relays of its own processes stands behind their names.
    own = [line for line in stderr.splitlines() if "pid=" not in line]
    assert not any("Traceback" in line for line in own), stderr[-3000:]
    trials = Ledger(out).trials()
    assert trials
    assert {(trial.state, trial.error) for trial in trials} <= {("new", None), ("running", None)}
