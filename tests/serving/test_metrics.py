"""/metrics: what is counted, by whom it was answered, and that no text of a request gets in."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from qwen_ray.registry import Registry
from qwen_ray.serving.app import create_app
from qwen_ray.serving.assistant import Route
from qwen_ray.serving.limits import Limits
from qwen_ray.serving.metrics import Metrics
from qwen_ray.serving.protocol import CompletionRequest
from qwen_ray.serving.service import Service
from qwen_ray.serving.usage import Usage, usages
from tests.serving.fixed_assistant import FixedAssistant

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def service(model_dir: Path, registry: Registry) -> Iterator[Service]:
    assistant = FixedAssistant({"river": Route("geo", 0.8, "rivers")}, {})
    service = Service.load(str(model_dir), registry=registry.root, assistant=assistant)
    yield service
    service.stop()


@pytest.fixture
def http(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service, limits=Limits(tokens_per_request=1000))) as client:
        yield client


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((f"qwen_ray_{name}", tuple(sorted(labels.items()))), 0.0)


def scrape(http: TestClient) -> Samples:
    reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(reply.text)


def test_requests_tokens_and_latency_by_what_answered(http: TestClient) -> None:
    ask = {"model": "rand:geo", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
    made = http.post("/v1/completions", json=ask).json()["usage"]["completion_tokens"]
    for _ in range(2):
        http.post("/v1/completions", json=ask | {"stream": True})
    http.post("/v1/completions", json=ask | {"model": "rand:law", "max_tokens": 0})
    talk = {"model": "rand", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    chat = http.post("/v1/chat/completions", json=talk).json()["usage"]
    http.post("/tokenize", json={"prompt": "a"})
    found = scrape(http)
    route = "/v1/completions"
    assert value(found, "requests_total", adapter="geo@1", route=route, status="200") == 3
    assert value(found, "requests_total", adapter="law@1", route=route, status="200") == 1
    assert value(found, "requests_total", adapter="base", route="/v1/chat/completions", status="200") == 1
    assert value(found, "requests_total", adapter="none", route="/tokenize", status="200") == 1
    assert value(found, "prompt_tokens_total", adapter="geo@1") == 9
    assert value(found, "completion_tokens_total", adapter="geo@1") == 3 * made
    assert value(found, "prompt_tokens_total", adapter="law@1") == 3
    assert value(found, "completion_tokens_total", adapter="law@1") == 0
    assert value(found, "prompt_tokens_total", adapter="base") == chat["prompt_tokens"]
    assert value(found, "request_seconds_count", route=route) == 4
    assert value(found, "first_token_seconds_count", route=route) == 2
    whole = value(found, "request_seconds_sum", route=route)
    assert 0 < value(found, "first_token_seconds_sum", route=route) < whole
    assert value(found, "requests_in_flight") == 0


def test_scores_count_for_each_model_and_routed_prompts_for_what_they_got(http: TestClient) -> None:
    items = [{"context": [1, 2], "continuations": [[3], [4, 5]]}, {"context": [6], "continuations": [[7]]}]
    http.post("/v1/score", json={"models": ["rand", "rand:geo", "rand:law"], "items": items})
    routed = {"model": "rand:auto", "prompt": ["the river", "the sea", "a river"], "max_tokens": 0}
    tokens = http.post("/v1/completions", json=routed).json()["usage"]["prompt_tokens"]
    found = scrape(http)
    for adapter in ("base", "geo@1", "law@1"):
        assert value(found, "requests_total", adapter=adapter, route="/v1/score", status="200") == 1
    assert value(found, "prompt_tokens_total", adapter="law@1") == 7
    assert value(found, "prompt_tokens_total", adapter="geo@1") == pytest.approx(7 + tokens * 2 / 3)
    assert value(found, "prompt_tokens_total", adapter="base") == pytest.approx(7 + tokens / 3)


def test_no_text_of_a_request_becomes_a_label(http: TestClient) -> None:
    secret = "zq7-secret"
    http.post("/v1/completions", json={"model": f"rand:{secret}", "prompt": "a"})
    http.post("/v1/completions", json={"model": "rand", "prompt": "a", "max_tokens": 5000})
    http.post(f"/v1/{secret}", json={})
    http.get(f"/page/{secret}")
    http.request(secret.upper(), "/v1/models")
    text = http.get("/metrics").text
    assert secret not in text.lower()
    found = samples(text)
    route = "/v1/completions"
    assert value(found, "requests_total", adapter="unknown", route=route, status="404") == 1
    assert value(found, "requests_total", adapter="unknown", route=route, status="413") == 1
    assert value(found, "requests_total", adapter="none", route="other", status="404") == 1
    assert value(found, "requests_total", adapter="none", route="/v1/models", status="405") == 1


class Replicas:
    """Answers as two replicas do, in turn; every third call is refused by the engine's queue, and streams
    fail in the middle."""

    def __init__(self) -> None:
        self.calls = 0

    async def call(self, method: str, body: Any = None) -> dict[str, Any]:
        self.calls += 1
        load = {"waiting": self.calls, "generating": 0}
        replica = {"id": f"r{self.calls % 2}", "load": load, "adapters": ["geo@1", "law@2"][: self.calls]}
        if self.calls % 3 == 0:
            return {"error": {"status": 429, "message": "full", "retry_after": 1}, "replica": replica}
        return {"ok": {"data": []}, "replica": replica}

    async def stream(self, method: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        yield {"ok": {"choices": [{"text": "a"}], "qwen_ray": {"prompts": [{"adapter": "geo@1"}]}}}
        yield {"error": {"status": 503, "message": "the replica ended"}}


def test_replicas_rejections_and_broken_streams() -> None:
    with TestClient(create_app(Replicas(), limits=Limits(requests_per_minute=4))) as http:
        assert [http.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
        ask = {"model": "m", "prompt": "a", "stream": True}
        assert "error" in json.loads(http.post("/v1/completions", json=ask).text.split("data: ")[2])
        assert http.get("/v1/models").status_code == 429
        found = scrape(http)  # asks a replica once more
    assert value(found, "rejected_total", reason="engine") == 1
    assert value(found, "rejected_total", reason="requests_per_minute") == 1
    route = "/v1/completions"
    assert value(found, "requests_total", adapter="geo@1", route=route, status="503") == 1
    assert value(found, "completion_tokens_total", adapter="geo@1") == 1
    assert value(found, "replica_load", replica="r1", of="waiting") == 3
    assert value(found, "replica_load", replica="r0", of="waiting") == 4
    assert value(found, "replica_adapters", replica="r0") == 2
    assert value(found, "adapter_loaded", replica="r0", adapter="law@2") == 1


def test_a_silent_replica_is_forgotten() -> None:
    now = 0.0
    metrics = Metrics(clock=lambda: now)
    for name in ("a", "b"):
        metrics.heard({"ok": 1, "replica": {"id": name, "load": {"waiting": 1}, "adapters": []}})
    now = 200.0
    metrics.heard({"error": {}, "replica": {"id": "b", "load": {"waiting": 2}, "adapters": []}})
    assert value(samples(metrics.text().decode()), "replica_load", replica="a", of="waiting") == 1
    now = 301.0
    found = samples(metrics.text().decode())
    assert not [key for key in found if ("replica", "a") in key[1]]
    assert value(found, "replica_load", replica="b", of="waiting") == 2


def test_each_app_has_counters_of_its_own(service: Service) -> None:
    with TestClient(create_app(service)) as one, TestClient(create_app(service)) as other:
        one.get("/health")
        assert value(scrape(one), "requests_total", adapter="none", route="/health", status="200") == 1
        assert value(scrape(other), "requests_total", adapter="none", route="/health", status="200") == 0


def test_an_answer_without_adapters_is_of_none() -> None:
    body = CompletionRequest(model="m", prompt="a")
    assert usages(body, {"usage": {"prompt_tokens": 3, "total_tokens": 3}}) == [Usage("none", 3, 0)]
    assert usages(None, {"data": []}) == []
