"""What the rendered manifests of dev-cpu run, as written, on a Ray cluster of this machine: the entry points
through a shell, the Serve config by Ray's own command. Only paths differ: what a pod mounts is a folder here,
and every path of a mount is rewritten to it; and the endpoint's port."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from qwen_ray.serving.auth import create_key
from tests.cluster.nodes import Cluster, free_ports, kill_all
from tests.k8s.rendered import cluster_spec, objects

BIN = str(Path(sys.executable).parent)
OVERLAY = "dev-cpu"


class Pod:
    """The mounts of a pod as folders below ``root``, with what its ConfigMaps put there."""

    def __init__(self, root: Path, template: dict[str, Any]) -> None:
        container, volumes = template["spec"]["containers"][0], template["spec"]["volumes"]
        self.environment = {row["name"]: row["value"] for row in container["env"] if "value" in row}
        sources = {volume["name"]: volume for volume in volumes}
        self._folders = {}
        for mount in container["volumeMounts"]:
            if not mount["mountPath"].startswith(("/storage", "/etc")):  # /tmp and /dev/shm are as good here
                continue
            folder = root / mount["mountPath"].strip("/").replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            self._folders[mount["mountPath"]] = folder
        for mount in container["volumeMounts"]:
            for source in sources[mount["name"]].get("projected", {}).get("sources", ()):
                for name, text in objects(OVERLAY)["ConfigMap", source["configMap"]["name"]]["data"].items():
                    (self._folders[mount["mountPath"]] / name).write_text(self.here(text))

    def here(self, text: str) -> str:
        """``text`` with the paths of mounts as they are here."""
        paths = sorted(self._folders, key=len, reverse=True)
        pattern = "|".join(re.escape(path) + r"(?=[/\s'\",}]|$)" for path in paths)
        return re.sub(pattern, lambda found: str(self._folders[found[0]]), text)

    def folder(self, path: str) -> Path:
        return Path(self.here(path))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("home"))
    try:
        made.add_node(2)
        yield made
    finally:
        made.close()


@pytest.fixture
def environment(cluster: Cluster) -> dict[str, str]:
    return cluster.client | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}


def pod_of(tree: dict[str, Any], root: Path) -> Pod:
    return Pod(root, cluster_spec(tree)["headGroupSpec"]["template"])


@pytest.mark.cluster
def test_training_job_runs_and_a_retry_finds_it_done(environment: dict[str, str], tmp_path: Path) -> None:
    job = objects(OVERLAY)["RayJob", "train"]
    pod = pod_of(job, tmp_path)
    settings = pod.folder("/etc/qwen-ray/train.yaml")
    settings.write_text(settings.read_text().replace("max_steps: 40", "max_steps: 4"))
    for _ in range(2):
        done = _shell(pod.here(job["spec"]["entrypoint"]), environment | _own(pod), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((pod.folder("/storage/runs/train") / "run.json").read_text())
    assert state["state"] == "done"
    assert (pod.folder("/storage/runs/train") / "adapter/adapter_model.safetensors").is_file()
    lines = (pod.folder("/storage/runs/train") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]


@pytest.mark.cluster
def test_service_config_serves_with_keys(environment: dict[str, str], tmp_path: Path) -> None:
    service = objects(OVERLAY)["RayService", "adapters"]
    pod = pod_of(service, tmp_path)
    key = create_key(pod.folder("/etc/qwen-ray-keys/keys.json"), "me")
    (port,) = free_ports(1)
    config = yaml.safe_load(pod.here(service["spec"]["serveConfigV2"]))
    config["http_options"]["port"] = int(port)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    with open(tmp_path / "log", "w") as log:
        argv = [f"{BIN}/serve", "run", str(path), "--address", environment["RAY_ADDRESS"]]
        server = subprocess.Popen(argv, env=environment | _own(pod), cwd=tmp_path, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _until_healthy(url, server, tmp_path / "log")
        assert httpx.get(f"{url}/v1/models", timeout=30).status_code == 401
        headers = {"Authorization": f"Bearer {key}"}
        question = {"model": "tiny", "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
        reply = httpx.post(f"{url}/v1/chat/completions", json=question, headers=headers, timeout=60)
        assert reply.json()["choices"][0]["message"]["content"] == "5"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            kill_all(server)


@pytest.mark.parametrize(("there", "resumes"), [(False, False), (True, True)])
def test_sweep_script_goes_on_with_a_sweep_that_is_there(there: bool, resumes: bool, tmp_path: Path) -> None:
    job = objects(OVERLAY)["RayJob", "sweep"]
    pod = pod_of(job, tmp_path)
    out = pod.folder("/storage/runs/sweep")
    if there:
        out.mkdir(parents=True)
        (out / "sweep.json").write_text("{}")
    program = tmp_path / "bin" / "qwen-ray"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = _shell(pod.here(job["spec"]["entrypoint"]), environment, tmp_path)
    words = done.stdout.split()
    assert words[0] == "sweep"
    assert Path(words[1]) == pod.folder("/etc/qwen-ray/sweep.yaml")
    assert ("--resume" in words) is resumes
    assert done.returncode == 0


def _own(pod: Pod) -> dict[str, str]:
    """The pod's environment, but for folders: HOME has the cluster's token, and there is no hub here."""
    return {name: value for name, value in pod.environment.items() if not value.startswith("/")}


def _shell(command: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    argv = ["bash", "-ec", command]
    return subprocess.run(
        argv, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def _until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.TransportError:
            pass
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
