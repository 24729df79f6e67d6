"""A Ray cluster of several raylets on this machine, started by ``ray start`` as an operator does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(n: int) -> list[str]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """A head without CPUs and whatever nodes are added. ``client`` is the environment of its users."""

    def __init__(self, home: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        self.workers: list[int] = []
        """Numbers of the nodes that can work."""
        self._home, self._environment, self._nodes = home, environment, list[subprocess.Popen[bytes]]()
        subprocess.run(
            [RAY, "get-auth-token", "--generate"], env=environment, capture_output=True, check=True
        )
        port, dashboard, client = free_ports(3)
        # Ray's sockets have paths of at most 107 characters.
        self._temp = Path("/tmp") / f"qr-{os.getpid()}-{port}"
        self.address = f"127.0.0.1:{port}"
        self._start(
            *("--head", "--num-cpus", "0", "--port", port, "--dashboard-port", dashboard),
            *("--ray-client-server-port", client, "--temp-dir", str(self._temp)),
        )
        # A client has the token but need not know the mode.
        self.client = {k: v for k, v in environment.items() if k != "RAY_AUTH_MODE"}
        self.client |= {"RAY_ADDRESS": self.address}

    def add_node(self, cpus: int = 1) -> int:
        """Start a node and wait until the cluster has it; returns its number, and it has a resource
        ``node-NUMBER`` to be known by."""
        number = len(self._nodes)
        mark = json.dumps({f"node-{number}": 1})
        self._start("--address", self.address, "--num-cpus", str(cpus), "--resources", mark)
        self.workers.append(number)
        return number

    def kill_node(self, number: int) -> None:
        """Take a node away as a power cut does: the raylet and its workers at once."""
        kill_all(self._nodes[number])
        self.workers.remove(number)

    def run(self, script: str) -> str:
        """What ``script`` prints in a driver that is connected as ``ray``."""
        script = f"import ray; ray.init('{self.address}', log_to_driver=False)\n{script}"
        argv = [sys.executable, "-c", script]
        done = subprocess.run(argv, env=self._environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else f"failed: {done.stderr[-1000:]}"

    def alive(self) -> int:
        """Nodes that are up."""
        count = self.run("print(sum(node['Alive'] for node in ray.nodes()))")
        return int(count) if count.isdigit() else 0

    def _start(self, *options: str) -> None:
        (agent,) = free_ports(1)
        argv = [RAY, "start", "--block", "--dashboard-agent-listen-port", agent, *options]
        before = self.alive() if self._nodes else 0
        with open(self._home / f"node{len(self._nodes)}.log", "w") as log:
            self._nodes.append(subprocess.Popen(argv, env=self._environment, stdout=log, stderr=log))
        deadline = time.monotonic() + 90
        while self.alive() <= before:
            assert time.monotonic() < deadline, "the node did not join"
            time.sleep(0.5)

    def close(self) -> None:
        for node in reversed(self._nodes):
            kill_all(node)
        shutil.rmtree(self._temp, ignore_errors=True)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and everything below it."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    for member in [*family, process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(10)
    psutil.wait_procs(family, timeout=10)
