"""A stage of a pipeline as a Ray job: killed while it waits, the pipeline joins the job that goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_ray.data.records import write_records
from qwen_ray.jobs.api import JobsApi
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.lifecycle.telling import status
from tests.cluster.nodes import Cluster
from tests.cluster.test_submit import CLI, User, ended, wait
from tests.conftest import sums

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_stage_is_a_job_that_outlives_the_pipeline(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = User(cluster, tmp_path / "user")
    write_records(tmp_path / "sums.jsonl", sums(60))
    spec = tmp_path / "pipeline.yaml"
    tree = {
        "name": "sums",
        "work": str(tmp_path / "work"),
        "registry": str(tmp_path / "registry"),
        "data": {
            "sums": {"sources": {"file": str(tmp_path / "sums.jsonl")}, "decontaminate": {"enabled": False}}
        },
        "train": {
            "model": {"name": "tiny"},
            "cluster": {"workers": 1},
            "optim": {"max_steps": 10},
            "tracking": {"wandb": "off"},
        },
        "run_on": {"address": user.address, "stages": ["train"], "python": sys.executable},
        "benchmark": {"suites": ["tiny"]},
    }
    spec.write_text(yaml.safe_dump(tree))

    def start() -> subprocess.Popen[str]:
        argv = [*CLI, "pipeline", "run", str(spec), "--until", "train", "--json"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(argv, cwd=user.folder, env=user.environment, **pipes)

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(user.token))
    with JobsApi(user.address) as api:
        name = "sums-train-"
        first = start()
        wait(lambda: [job for job in api.jobs() if job.name.startswith(name)], first)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        _, said = ended(start())
        (job,) = [job for job in api.jobs() if job.name.startswith(name)]
    assert job.status == "SUCCEEDED"
    assert job.id in said
    (row,) = status(PipelineSpec.read(spec))["runs"]
    assert row["done"] == ["collect", "prepare", "train"]
