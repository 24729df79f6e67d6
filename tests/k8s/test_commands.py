"""What the rendered manifests of dev-cpu run, on a Ray cluster of this machine: the jobs' entry points in
a shell, the scheduled jobs' commands, the Serve config by Ray's own command.

They run as written, but for

- the paths of mounts, which are folders here, and a pod's variables that name a folder;
- the service's name and port, which are those of a server here;
- the numbers of steps and items in the mounted configurations, which are smaller.

What Kubernetes and the operator do around them (pods, Secrets, the submitter, retries) is not run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from qwen_ray.config import put
from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK
from qwen_ray.fsio import read_json
from qwen_ray.registry import PRODUCTION, Registry
from qwen_ray.serving.auth import create_key
from tests.cluster.nodes import Cluster, free_ports, kill_all
from tests.k8s.rendered import cluster_spec, objects

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
BIN = str(Path(sys.executable).parent)
OVERLAY = "dev-cpu"
SERVICE = "http://adapters-serve-svc:8000"


@dataclass(frozen=True)
class Endpoint:
    """The service, as its clients know it."""

    url: str
    key: str


class Pod:
    """The mounts of a pod as folders below ``root``, with what its ConfigMaps put there."""

    def __init__(self, root: Path, template: dict[str, Any], service: str = SERVICE) -> None:
        container, volumes = template["spec"]["containers"][0], template["spec"]["volumes"]
        # HOME has the cluster's token, and there is no hub here.
        own = {row["name"]: row["value"] for row in container["env"] if "value" in row}
        self.environment = {name: value for name, value in own.items() if not value.startswith("/")}
        self._here = {SERVICE: service}
        sources = {volume["name"]: volume for volume in volumes}
        for mount in container["volumeMounts"]:
            path = mount["mountPath"]
            if not path.startswith(("/storage", "/etc")):  # /tmp and /dev/shm are as good here
                continue
            folder = root / path.strip("/").replace("/", "-")
            folder.mkdir(exist_ok=True)
            self._here[path] = str(folder)
        for mount in container["volumeMounts"]:
            if source := sources[mount["name"]].get("configMap"):
                for name, text in objects(OVERLAY)["ConfigMap", source["name"]]["data"].items():
                    (self.folder(mount["mountPath"]) / name).write_text(self.here(text))

    def here(self, text: str) -> str:
        """``text`` with the paths of mounts, and the service, as they are here."""
        there = sorted(self._here, key=len, reverse=True)
        pattern = "|".join(re.escape(one) + r"(?=[/\s'\",}]|$)" for one in there)
        return re.sub(pattern, lambda found: self._here[found[0]], text)

    def folder(self, path: str) -> Path:
        return Path(self.here(path))

    def configure(self, path: str, settings: dict[str, int]) -> None:
        """Change keys of a mounted configuration."""
        file = self.folder(path)
        tree = yaml.safe_load(file.read_text())
        for key, value in settings.items():
            put(tree, key, value, where=path)
        file.write_text(yaml.safe_dump(tree))

    def run(
        self, command: str, environment: dict[str, str], **variables: str
    ) -> subprocess.CompletedProcess[str]:
        argv = ["bash", "-ec", self.here(command)]
        environment = environment | self.environment | variables
        return subprocess.run(
            argv, env=environment, cwd=self.folder("/storage"), capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("home"))
    try:
        made.add_node(4)
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def environment(cluster: Cluster) -> dict[str, str]:
    return cluster.client | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where mounts are. All pods mount one volume."""
    return tmp_path_factory.mktemp("pods")


@pytest.fixture(scope="module")
def endpoint(environment: dict[str, str], root: Path) -> Iterator[Endpoint]:
    """The RayService's applications, started with its Serve config."""
    service = objects(OVERLAY)["RayService", "adapters"]
    pod = Pod(root, _head(service))
    key = create_key(pod.folder("/etc/qwen-ray-keys/keys.json"), "me")
    (port,) = free_ports(1)
    config = yaml.safe_load(pod.here(service["spec"]["serveConfigV2"]))
    config["http_options"]["port"] = int(port)
    path, log = root / "serve.yaml", root / "serve.log"
    path.write_text(yaml.safe_dump(config))
    with open(log, "w") as out:
        argv = [f"{BIN}/serve", "run", str(path), "--address", environment["RAY_ADDRESS"]]
        server = subprocess.Popen(argv, env=environment | pod.environment, cwd=root, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        _until_healthy(url, server, log)
        yield Endpoint(url, key)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            kill_all(server)


def test_training_job_runs_and_a_retry_finds_it_done(environment: dict[str, str], root: Path) -> None:
    job = objects(OVERLAY)["RayJob", "train"]
    pod = Pod(root, _head(job))
    pod.configure("/etc/qwen-ray/train.yaml", {"optim.max_steps": 4})
    for _ in range(2):
        done = pod.run(job["spec"]["entrypoint"], environment)
        assert done.returncode == 0, done.stderr[-3000:]
    out = pod.folder("/storage/runs/train")
    assert read_json(out / "run.json")["state"] == "done"
    assert (out / "adapter/adapter_model.safetensors").is_file()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]


@pytest.mark.long
def test_sweep_job_runs_and_a_retry_goes_on_with_it(environment: dict[str, str], root: Path) -> None:
    job = objects(OVERLAY)["RayJob", "sweep"]
    pod = Pod(root, _head(job))
    fewer = {"run.optim.max_steps": 10, "search.trials": 2, "objective.confirm.limit": 2}
    pod.configure("/etc/qwen-ray/sweep.yaml", fewer)
    first, again = (pod.run(job["spec"]["entrypoint"], environment) for _ in range(2))
    out = pod.folder("/storage/runs/sweep")
    result = read_json(out / "result.json")
    assert result["trials"][0]["state"] == "done"
    # So few steps may teach nothing; then nothing is registered, and the job says so.
    code = EXIT_GATE_SAID_NO if result["winner"] is None else EXIT_OK
    assert first.returncode == code, first.stderr[-3000:]
    assert again.returncode == code
    assert "this sweep is done" in again.stderr
    registry = Registry(pod.folder("/storage/registry"))
    assert bool(registry.versions("facts")) == (result["winner"] is not None)


def test_service_answers_those_who_have_a_key(endpoint: Endpoint) -> None:
    assert httpx.get(f"{endpoint.url}/v1/models", timeout=30).status_code == 401
    headers = {"Authorization": f"Bearer {endpoint.key}"}
    question = {"model": "tiny", "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
    url = f"{endpoint.url}/v1/chat/completions"
    reply = httpx.post(url, json=question, headers=headers, timeout=60)
    assert reply.json()["choices"][0]["message"]["content"] == "5"


def test_benchmark_job_scores_what_the_service_serves(
    environment: dict[str, str], root: Path, endpoint: Endpoint
) -> None:
    job = objects(OVERLAY)["RayJob", "benchmark"]
    pod = Pod(root, _head(job), endpoint.url)
    refused = pod.run(job["spec"]["entrypoint"], environment)
    assert refused.returncode == 2
    assert "key" in refused.stderr
    done = pod.run(job["spec"]["entrypoint"], environment, QWEN_RAY_API_KEY=endpoint.key)
    assert done.returncode == 0, done.stderr[-3000:]
    result = read_json(pod.folder("/storage/runs/benchmark") / "tiny.json")
    assert result["settings"]["limit"] == 20
    assert result["categories"]["arithmetic"]["score"] > 0.9


def test_weekly_pipeline_trains_asks_the_service_and_obeys_the_gate(
    environment: dict[str, str], root: Path, endpoint: Endpoint
) -> None:
    """So few steps and items show no gain: the gate says no, and the job ends with 3."""
    template, command = _scheduled("pipeline-weekly")
    pod = Pod(root, template, endpoint.url)
    pod.configure("/etc/qwen-ray/pipeline.yaml", {"train.optim.max_steps": 10, "benchmark.limit": 5})
    outside = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    done = pod.run(command, outside, QWEN_RAY_API_KEY=endpoint.key)
    assert done.returncode == EXIT_GATE_SAID_NO, done.stderr[-3000:]
    registry = Registry(pod.folder("/storage/registry"))
    version = registry.versions("facts")[-1]
    assert f"tiny: tiny and tiny:facts@{version}" in done.stderr  # what the service was asked for
    assert registry.events("facts", kind="verdict")[-1].version == version
    assert PRODUCTION not in registry.aliases("facts")


@pytest.mark.long
def test_monthly_update_reads_the_knowledge_bases_sources_again(
    environment: dict[str, str], root: Path
) -> None:
    template, command = _scheduled("knowledge-monthly")
    pod = Pod(root, template)
    notes = pod.folder("/storage/notes")
    notes.mkdir()
    (notes / "birds.md").write_text("# The common swift\n\nSwifts sleep on the wing.\n")
    build = "qwen-ray kb build biology --source text=/storage/notes --root /storage/knowledge"
    made = pod.run(build, environment)
    assert made.returncode == 0, made.stderr[-3000:]
    (notes / "fish.md").write_text("# Eels\n\nEels spawn in the Sargasso Sea.\n")
    done = pod.run(command, environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "version 2 (update" in done.stdout


def _head(tree: dict[str, Any]) -> dict[str, Any]:
    """The pod where entry points are run."""
    template: dict[str, Any] = cluster_spec(tree)["headGroupSpec"]["template"]
    return template


def _scheduled(name: str) -> tuple[dict[str, Any], str]:
    """The pod of a CronJob, and what it runs."""
    template = objects(OVERLAY)["CronJob", name]["spec"]["jobTemplate"]["spec"]["template"]
    return template, shlex.join(template["spec"]["containers"][0]["command"])


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
