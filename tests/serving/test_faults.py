"""What breaks on the real server: a replica, Serve's controller, the registry. It mends itself, and only what
nobody could have answered fails."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from qwen_ray import cluster
from qwen_ray.registry import Registry
from qwen_ray.serving import launch
from qwen_ray.serving.handles import HandleClient
from qwen_ray.serving.protocol import CompletionRequest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SCORE = {"model": "rand:geo", "items": [{"context": [1, 2, 3], "continuations": [[4, 5]]}]}

# The base is answered by both replicas, and slowly, so that each has requests at any moment.
REQUESTS = [
    ("/v1/completions", {"model": "rand", "prompt": [1, 2], "max_tokens": 40}),
    ("/v1/score", SCORE),
]


@pytest.fixture(scope="module")
def root(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that may be moved away."""
    return Path(shutil.copytree(registry.root, tmp_path_factory.mktemp("faults") / "registry"))


@pytest.fixture(scope="module")
def url(model_dir: Path, root: Path) -> Iterator[str]:
    cluster.connect("local", num_cpus=2)
    yield launch.start(str(model_dir), registry=root, pinned=["geo"], replicas=2, port=0)
    launch.stop()
    cluster.disconnect()


def processes(of: str) -> list[psutil.Process]:
    """Those of this test's cluster that Ray named so."""
    family = psutil.Process().children(recursive=True)
    return [p for p in family if p.is_running() and "".join(p.cmdline()[:1]).startswith(f"ray::{of}")]


def engines() -> list[psutil.Process]:
    return processes("ServeReplica:qwen-ray:engine")


def both_run() -> bool:
    """Whether both replicas take requests."""
    from ray import serve

    states = serve.status().applications[launch.APP].deployments["engine"].replica_states
    return states == {"RUNNING": 2}


def wait_until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not recover"
        time.sleep(0.2)


def under_load(url: str, event: Callable[[], object], *, each: int = 25, clients: int = 16) -> Counter[int]:
    """Statuses of requests that were sent before, during and after ``event``."""
    statuses: Counter[int] = Counter()

    async def client(http: httpx.AsyncClient, start: asyncio.Event) -> None:
        for i in range(each):
            path, body = REQUESTS[i % 2]
            reply = await http.post(path, json=body)
            statuses[reply.status_code] += 1
            if i == 1:
                start.set()

    async def run() -> None:
        start = asyncio.Event()
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            load = asyncio.gather(*(client(http, start) for _ in range(clients)))
            await start.wait()
            await asyncio.to_thread(event)
            await load

    asyncio.run(run())
    return statuses


def test_killed_replica_fails_nobody_that_another_can_answer(url: str) -> None:
    wait_until(lambda: len(engines()) == 2)
    victim = engines()[0]
    statuses = under_load(url, lambda: os.kill(victim.pid, signal.SIGKILL))
    print(f"a replica killed: {dict(statuses)}")
    assert statuses == {200: 400}
    wait_until(lambda: len(engines()) == 2 and victim.pid not in [p.pid for p in engines()])


def test_stream_that_had_begun_on_a_killed_replica_ends_with_an_error(url: str) -> None:
    """Its text cannot be taken back, so this one is not answered by another."""
    import ray
    from ray import serve

    client = HandleClient(serve.get_deployment_handle("engine", launch.APP))
    body = CompletionRequest.model_validate(
        {"model": "rand:law", "prompt": [1, 2], "max_tokens": 250, "n": 8, "temperature": 0, "stream": True}
    )

    async def run() -> list[dict[str, Any]]:
        stream = client.stream("completion", body)
        envelopes = [await anext(stream)]
        name = f"SERVE_REPLICA::{launch.APP}#engine#{envelopes[0]['replica']['id']}"
        ray.kill(ray.get_actor(name, namespace="serve"))
        envelopes += [envelope async for envelope in stream]
        return envelopes

    envelopes = asyncio.run(run())
    assert envelopes[-1]["error"]["status"] == 503
    assert envelopes[-1]["error"]["retry_after"]
    assert all("ok" in envelope for envelope in envelopes[:-1])
    assert httpx.post(f"{url}/v1/score", json=SCORE, timeout=120).is_success


def test_requests_go_on_without_the_controller(url: str) -> None:
    from ray import serve

    wait_until(lambda: len(engines()) == 2)
    (controller,) = processes("ServeController")
    statuses = under_load(url, lambda: os.kill(controller.pid, signal.SIGKILL))
    print(f"the controller killed: {dict(statuses)}")
    assert statuses == {200: 400}
    wait_until(lambda: [p.pid for p in processes("ServeController")] not in ([], [controller.pid]))
    wait_until(lambda: serve.status().applications[launch.APP].status == "RUNNING")


@pytest.mark.parametrize("seconds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_registry_away_for_seconds(seconds: int, url: str, root: Path, adapter_dirs: dict[str, Path]) -> None:
    """What is in memory goes on answering. Who asks for another adapter is refused, and told to come back:
    it is loaded when the registry is there again, and nobody has to do anything for that."""
    registry, away = Registry(root), root.with_name("away")
    late = registry.publish(f"late{seconds}", adapter_dirs["bio"], registry.get("geo", 1).lineage)
    wait_until(both_run)  # one that starts while the registry is away knows nothing of it
    for _ in range(16):  # each replica has listed what there is
        assert httpx.get(f"{url}/v1/models").is_success
    refused: list[httpx.Response] = []

    def listed() -> dict[str, Any]:
        return {m["id"]: m for m in httpx.get(f"{url}/v1/models").json()["data"]}

    def ask_for_another() -> httpx.Response:
        return httpx.post(f"{url}/v1/score", json=SCORE | {"model": f"rand:{late.ref}"}, timeout=60)

    statuses = under_load(url, lambda: root.rename(away), each=5)
    try:
        back = time.monotonic() + seconds
        while not refused or time.monotonic() < back:
            statuses += under_load(url, lambda: refused.append(ask_for_another()), each=5, clients=4)
        meanwhile = listed()
    finally:
        statuses += under_load(url, lambda: away.rename(root), each=5)
    print(f"the registry away for {seconds} s: {dict(statuses)}, and {len(refused)} not in memory")
    assert set(statuses) == {200}
    for reply in refused:
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert "registry cannot be read" in reply.json()["error"]["message"]
    assert {"rand", "rand:geo", "rand:law@1"} <= set(meanwhile)
    assert all(m["adapter"]["stale"] for id, m in meanwhile.items() if ":" in id)
    assert ask_for_another().is_success
    assert not any(m["adapter"].get("stale") for id, m in listed().items() if ":" in id)


def test_bad_adapters_are_refused_and_disturb_nobody(
    url: str, root: Path, adapter_dirs: dict[str, Path]
) -> None:
    registry = Registry(root)
    lineage = registry.get("geo", 1).lineage
    for name in ("damaged", "pickled", "config"):
        registry.publish(name, adapter_dirs["bio"], {"base": lineage["base"]})
    registry.publish("alien", adapter_dirs["bio"], {"base": {"id": "other", "fingerprint": "ab" * 32}})
    weights = registry.get("damaged", 1).path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    weights = registry.get("pickled", 1).path / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    config = registry.get("config", 1).path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    wanted = {
        "damaged@1": 409,
        "pickled@1": 409,
        "config@1": 409,
        "alien@1": 409,
        "../geo": 404,
        "nobody": 404,
    }
    refusals: dict[str, int] = {}

    def ask_for_bad_ones() -> None:
        for name in wanted:
            reply = httpx.post(f"{url}/v1/score", json=SCORE | {"model": f"rand:{name}"}, timeout=60)
            refusals[name] = reply.status_code

    statuses = under_load(url, ask_for_bad_ones, each=10)
    assert refusals == wanted
    assert statuses == {200: 160}
