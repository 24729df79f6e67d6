"""Training on a running cluster of three nodes, as its users submit it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.nodes import Cluster, free_ports
from tests.training.test_driver import command

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_workers_run_on_the_nodes_and_the_cluster_stays(
    cluster: Cluster, tmp_path: Path, data_file: Path
) -> None:
    argv = command(data_file, tmp_path / "run", steps=6)
    done = subprocess.run(argv, env=cluster.client, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 6
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert cluster.alive() == 3


@pytest.mark.long
def test_on_a_partly_occupied_cluster_the_room_that_is_left_is_used(
    cluster: Cluster, tmp_path: Path, data_file: Path
) -> None:
    """One of two CPUs is somebody else's: one worker trains, two wait and then say so."""
    holder = (
        "import time\n@ray.remote(num_cpus=1)\nclass Hold:\n    def ping(self): return 1\n"
        "h = Hold.options(name='hold', namespace='n', lifetime='detached').remote()\n"
        "print(ray.get(h.ping.remote()))"
    )
    assert cluster.run(holder) == "1"
    try:
        argv = command(data_file, tmp_path / "one", steps=3, workers=1)
        done = subprocess.run(
            argv, env=cluster.client, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        argv = command(data_file, tmp_path / "two", "--set", "cluster.start_seconds=10", steps=3, workers=2)
        done = subprocess.run(
            argv, env=cluster.client, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 1, done.stderr[-3000:]
        assert "the cluster had no room" in done.stderr
    finally:
        cluster.run("ray.kill(ray.get_actor('hold', namespace='n'))")
        time.sleep(1)


def test_no_cluster_at_the_address_is_bad_input(tmp_path: Path, data_file: Path) -> None:
    (port,) = free_ports(1)
    argv = command(data_file, tmp_path / "run", "--set", f"cluster.address=127.0.0.1:{port}")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "no Ray cluster answers" in done.stderr
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
