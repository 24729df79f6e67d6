"""Training on a running cluster of three nodes: a head without CPUs, and two workers of one CPU each.

The nodes are raylets on this machine, started by ``ray start`` as an operator does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.training.test_driver import command

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(n: int) -> list[str]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of the cluster."""
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, capture_output=True, check=True)
    port, dashboard, client, *agents = free_ports(6)
    # Ray's sockets have paths of at most 107 characters.
    temp = Path("/tmp") / f"qr-{os.getpid()}"
    head = [
        *("--head", "--num-cpus", "0", "--port", port, "--dashboard-port", dashboard),
        *("--ray-client-server-port", client, "--temp-dir", str(temp)),
    ]
    nodes = []
    try:
        for i, options in enumerate([head, *[["--address", f"127.0.0.1:{port}", "--num-cpus", "1"]] * 2]):
            argv = [RAY, "start", "--block", "--dashboard-agent-listen-port", agents[i], *options]
            log = open(home / f"node{i}.log", "w")  # noqa: SIM115 - the node writes to it
            nodes.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=log))
            wait_for_nodes(i + 1, f"127.0.0.1:{port}", environment)
        # A client has the token but need not know the mode.
        del environment["RAY_AUTH_MODE"]
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}", "HOME": str(home)}
    finally:
        family = [p for node in nodes for p in psutil.Process(node.pid).children(recursive=True)]
        for node in nodes:
            node.terminate()
        psutil.wait_procs(family, timeout=15)
        for process in [*family, *map(psutil.Process, [n.pid for n in nodes if n.poll() is None])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in nodes:
            node.wait(10)
        shutil.rmtree(temp, ignore_errors=True)


def wait_for_nodes(count: int, address: str, environment: dict[str, str]) -> None:
    script = f"import ray; ray.init('{address}', log_to_driver=False); print(len(ray.nodes()))"
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        if done.stdout.strip() == str(count):
            return
        assert time.monotonic() < deadline, done.stderr[-2000:]
        time.sleep(1)


def test_workers_run_on_the_nodes_and_the_cluster_stays(
    cluster: dict[str, str], tmp_path: Path, data_file: Path
) -> None:
    argv = command(data_file, tmp_path / "run", steps=6)
    done = subprocess.run(argv, env=cluster, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 6
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    wait_for_nodes(3, cluster["RAY_ADDRESS"], cluster | {"RAY_AUTH_MODE": "token"})


def test_no_cluster_at_the_address_is_bad_input(tmp_path: Path, data_file: Path) -> None:
    (port,) = free_ports(1)
    argv = command(data_file, tmp_path / "run", "--set", f"cluster.address=127.0.0.1:{port}")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "no Ray cluster answers" in done.stderr
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
