"""Canaries through the real app, and how soon a rollback is seen there."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.lifecycle import canary, endpoint_metrics
from qwen_ray.lifecycle.canary import Decision
from qwen_ray.lifecycle.watch_spec import CanaryRules
from qwen_ray.registry import Registry
from qwen_ray.registry.records import record_verdict
from qwen_ray.serving import catalog
from qwen_ray.serving.app import create_app
from qwen_ray.serving.assistant import Route
from qwen_ray.serving.canary import on_canary
from qwen_ray.serving.metrics import Metrics
from qwen_ray.serving.service import Service
from qwen_ray.serving.usage import Usage
from tests.lifecycle.watching import Clock, publish
from tests.serving.conftest import make_adapters, make_model
from tests.serving.fixed_assistant import FixedAssistant
from tests.serving.live import served

WAIT = 60.0
ROLLBACK_SECONDS = 10.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    model = make_model(tmp_path_factory.mktemp("models") / "rand")
    return model, make_adapters(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def registry(folders: tuple[Path, dict[str, Path]], tmp_path: Path) -> Registry:
    """``geo``: versions 1, in production, 2 and 3."""
    model, adapters = folders
    registry = Registry(tmp_path / "registry")
    base = {"id": "rand", "fingerprint": models.fingerprint(models.resolve(str(model)))}
    for name in ("geo", "law", "bio"):
        registry.publish("geo", adapters[name], {"base": base})
    registry.point("geo", "production", 1, reason="test")
    return registry


@pytest.fixture
def service(
    folders: tuple[Path, dict[str, Path]], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    monkeypatch.setattr(catalog, "CANARY_SECONDS", 0.0)
    assistant = FixedAssistant({"river": Route("geo", 0.8, "rivers"), "sum": Route(None, 0.7, "sums")}, {})
    service = Service.load(str(folders[0]), registry=registry.root, assistant=assistant)
    yield service
    service.stop()


@pytest.fixture
def http(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service)) as client:
        yield client


def ask(http: TestClient, *prompts: str, **more: Any) -> list[dict[str, Any]]:
    """What each prompt was answered by."""
    body = {"model": "rand:auto", "prompt": list(prompts), "max_tokens": 1, **more}
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["qwen_ray"]["prompts"])


def counters(http: TestClient) -> endpoint_metrics.Counters:
    return endpoint_metrics.counters(http.get("/metrics").text)


RIVERS = [f"Where does river {i} begin?" for i in range(40)]


def test_a_share_of_the_router_s_requests_goes_to_it_and_stays_there(
    http: TestClient, registry: Registry
) -> None:
    assert {one["adapter"] for one in ask(http, *RIVERS)} == {"geo@1"}
    registry.start_canary("geo", 2, 0.3, reason="test")
    first = ask(http, *RIVERS)
    by = Counter(one["adapter"] for one in first)
    assert set(by) == {"geo@1", "geo@2"}
    assert by["geo@2"] == sum(
        int(on_canary("geo", registry.canary("geo"), text))  # type: ignore[arg-type]
        for text in RIVERS
    )
    assert [one.get("canary") for one in first] == [
        "geo@2" if one["adapter"] == "geo@2" else None for one in first
    ]
    assert ask(http, *RIVERS) == first
    assert [ask(http, text)[0] for text in RIVERS[:5]] == first[:5]
    # Only what the router sends to it: the base's questions and ids by name are answered as before.
    (other,) = ask(http, "What is the sum of 1 and 2?")
    assert other["adapter"] is None
    (named,) = ask(http, RIVERS[by.total() - 1], model="rand:geo")
    assert named["adapter"] == "geo@1"
    found = counters(http)
    assert found["geo@2/canary/answered"] >= 2  # requests
    assert found["routed/adapter"] == 3 * len(RIVERS) + 5
    assert found["routed/base"] == 1
    assert found["geo@2/seconds/inf"] >= 2
    registry.stop_canary("geo", reason="test")
    assert {one["adapter"] for one in ask(http, *RIVERS)} == {"geo@1"}


def test_a_conversation_stays_on_its_side(http: TestClient, registry: Registry) -> None:
    registry.start_canary("geo", 2, 0.5, reason="test")
    sides = set()
    for opening in RIVERS[:8]:
        talk: list[dict[str, str]] = []
        answered = set()
        for question in (opening, "And the river after it?", "Which river is longer?"):
            talk.append({"role": "user", "content": question})
            body = {"model": "rand:auto", "messages": talk, "max_tokens": 1}
            reply = http.post("/v1/chat/completions", json=body).json()
            answered.add(reply["qwen_ray"]["prompts"][0]["adapter"])
            talk.append({"role": "assistant", "content": "It is."})
        assert len(answered) == 1
        sides |= answered
    assert sides == {"geo@1", "geo@2"}


def test_shares_are_kept_and_other_versions_choose_others() -> None:
    from qwen_ray.registry import Canary

    texts = [f"question {i}" for i in range(4000)]
    chosen = {v: {t for t in texts if on_canary("geo", Canary(v, 0.1), t)} for v in (2, 3)}
    for texts_of in chosen.values():
        assert 330 <= len(texts_of) <= 470  # four standard deviations
    assert len(chosen[2] & chosen[3]) < 80


def test_a_canary_that_cannot_be_loaded_fails_nobody_and_is_rolled_back(
    http: TestClient, registry: Registry
) -> None:
    weights = registry.get("geo", 2).path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    registry.start_canary("geo", 2, 0.5, reason="test")
    rules, clock = CanaryRules(requests=50, max_error_rate=0.1), Clock()
    memory, decision = canary.follow(rules, registry, "geo", None, counters=counters(http), now=clock())
    answers = [ask(http, text)[0] for text in RIVERS]
    assert {one["adapter"] for one in answers} == {"geo@1"}
    turns = [one for one in answers if one.get("canary") == "geo@2"]
    assert len(turns) > 5
    memory, decision = canary.follow(rules, registry, "geo", memory, counters=counters(http), now=clock())
    assert decision is not None
    assert (decision.what, decision.level) == ("stopped", "critical")
    assert decision.text == f"geo@2 was rolled back: {len(turns)} of its {len(turns)} requests failed"
    assert memory is None
    assert registry.canary("geo") is None
    assert not any("canary" in ask(http, text)[0] for text in RIVERS)
    assert registry.events("geo", kind="alias")[-1].value["reason"] == decision.text


def test_an_error_says_who_was_to_answer(
    http: TestClient, registry: Registry, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.start_canary("geo", 2, 0.5, reason="test")
    (turn,) = [text for text in RIVERS if "canary" in ask(http, text)[0]][:1]
    before = counters(http)

    async def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    body = {"model": "rand:auto", "prompt": turn, "max_tokens": 1}
    monkeypatch.setattr(service._completions, "run", broken)
    assert http.post("/v1/completions", json=body).status_code == 500
    seen = endpoint_metrics.since(before, counters(http))
    assert (seen["geo@2/canary/failed"], seen["geo@2/canary/answered"]) == (1, 0)
    text = http.get("/metrics").text
    assert 'qwen_ray_requests_total{adapter="geo@2",route="/v1/completions",status="500"} 1.0' in text


# -- decisions, from what an ingress counts


class Traffic:
    """Requests that a canary, ``geo@2``, and production answered, in the counters of a real ingress."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.metrics, self.clock = registry, Metrics(), Clock()
        self.memory: dict[str, Any] | None = None

    def goes(self, count: int, adapter: str, status: int = 200, seconds: float = 0.2) -> None:
        prompt = {"adapter": adapter, **({"canary": "geo@2"} if adapter == "geo@2" else {})}
        for _ in range(count):
            self.metrics.finished(
                "/v1/completions", status, seconds, [Usage(adapter, 1, 1)], prompts=[prompt]
            )

    def look(self, **rules: Any) -> Decision | None:
        self.memory, decision = canary.follow(
            CanaryRules(**rules),
            self.registry,
            "geo",
            self.memory,
            counters=endpoint_metrics.counters(self.metrics.text().decode()),
            now=self.clock(),
        )
        return decision


@pytest.fixture
def traffic(tmp_path: Path) -> Traffic:
    registry = Registry(tmp_path / "registry")
    for number in (1, 2, 3):
        publish(registry, tmp_path, "geo", number)
    registry.point("geo", "production", 1, reason="test")
    registry.start_canary("geo", 2, 0.1, reason="test")
    return Traffic(registry)


def production(registry: Registry) -> int:
    return registry.resolve("geo").version


def test_one_that_did_well_becomes_production(traffic: Traffic) -> None:
    traffic.goes(500, "geo@2", status=500)  # of before: another version may have been meant
    assert traffic.look() is None
    traffic.goes(195, "geo@2")
    traffic.goes(4, "geo@2", status=500)
    traffic.goes(9, "geo@2", status=503)  # the server was busy: nobody's fault
    traffic.goes(9, "geo@2", status=400)
    assert traffic.look() is None
    assert production(traffic.registry) == 1
    traffic.metrics = Metrics()  # the server was started again
    traffic.goes(1, "geo@2")
    decision = traffic.look()
    assert decision is not None
    assert (decision.what, decision.text) == ("promoted", "geo@2 is promoted: 4 of its 200 requests failed")
    assert production(traffic.registry) == 2
    assert traffic.registry.canary("geo") is None
    assert traffic.look() is None


def test_it_may_only_end(traffic: Traffic) -> None:
    traffic.look(on_pass="stop")
    traffic.goes(200, "geo@2")
    decision = traffic.look(on_pass="stop")
    assert decision is not None
    assert decision.what == "ended"
    assert production(traffic.registry) == 1


def test_it_is_stopped_as_soon_as_it_cannot_pass(traffic: Traffic) -> None:
    traffic.look()
    traffic.goes(4, "geo@2", status=500)
    assert traffic.look() is None
    traffic.goes(1, "geo@2", status=500)
    decision = traffic.look()
    assert decision is not None
    assert decision.what == "stopped"
    assert production(traffic.registry) == 1


def test_it_is_stopped_for_being_slow(traffic: Traffic) -> None:
    traffic.look()
    traffic.goes(100, "geo@1")
    traffic.goes(49, "geo@2", seconds=2.0)
    assert traffic.look() is None  # too few to say
    traffic.goes(1, "geo@2", seconds=2.0)
    decision = traffic.look()
    assert decision is not None
    assert decision.what == "stopped"
    assert "95% of its requests took up to 2.42 s, production's 0.24 s" in decision.text


def test_it_ends_where_nobody_asks_or_production_moves(traffic: Traffic) -> None:
    traffic.look()
    traffic.goes(150, "geo@2")
    traffic.registry.point("geo", "production", 3, reason="somebody else")
    assert traffic.look() is None  # against another production it begins anew
    traffic.goes(100, "geo@2")
    assert traffic.look() is None
    traffic.clock.now += 72 * 3600
    decision = traffic.look()
    assert decision is not None
    assert (decision.what, decision.level) == ("ended", "warning")
    traffic.registry.start_canary("geo", 2, 0.1, reason="test")
    traffic.registry.point("geo", "production", 2, reason="promoted, and then the watch was killed")
    decision = traffic.look()
    assert decision is not None
    assert decision.what == "ended"
    assert traffic.registry.canary("geo") is None


def test_a_candidate_judged_fit_is_given_a_share_once(traffic: Traffic) -> None:
    registry, rules = traffic.registry, CanaryRules(share=0.2)
    registry.stop_canary("geo", reason="test")
    registry.point("geo", "candidate", 3, reason="test")
    assert canary.start(rules, registry, "geo") is None  # no verdict
    record_verdict(registry, registry.get("geo", 3), {"verdict": "promote"}, baseline="geo@1", run="1")
    assert canary.start(CanaryRules(), registry, "geo") is None
    decision = canary.start(rules, registry, "geo")
    assert decision is not None
    assert decision.text == "geo@3 gets 20% of the router's requests for geo"
    started = registry.canary("geo")
    assert started is not None
    assert (started.version, started.share) == (3, 0.2)
    assert canary.start(rules, registry, "geo") is None
    registry.stop_canary("geo", reason="it failed")
    assert canary.start(rules, registry, "geo") is None  # not a second time
    with pytest.raises(UserError):
        registry.start_canary("geo", 3, 1.5, reason="test")


# -- rollback


def test_a_rollback_under_load_is_seen_in_seconds_and_fails_nobody(
    service: Service, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.point("geo", "production", 2, reason="promoted")
    answers: list[tuple[float, int, str | None]] = []
    stop = threading.Event()

    def client(url: str) -> None:
        body = {"model": "rand:geo", "prompt": "Where does the river begin?", "max_tokens": 4}
        with httpx.Client(timeout=WAIT) as http:
            while not stop.is_set():
                reply = http.post(f"{url}/v1/completions", json=body)
                by = reply.json().get("qwen_ray", {}).get("prompts", [{}])[0].get("adapter")
                answers.append((time.monotonic(), reply.status_code, by))

    def until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, answers[-5:]
            time.sleep(0.01)

    with served(create_app(service)) as url:
        threads = [threading.Thread(target=client, args=(url,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: len(answers) > 30, WAIT)
            begun = time.monotonic()
            assert registry.rollback("geo", reason="wrong dates").version == 1
            until(lambda: [by for _, _, by in answers[-30:]] == ["geo@1"] * 30, ROLLBACK_SECONDS)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert {status for _, status, _ in answers} == {200}
    old = [at for at, _, by in answers if by == "geo@2"]
    assert {by for _, _, by in answers} == {"geo@1", "geo@2"}
    with capsys.disabled():
        print(f" {len(answers)} requests; the last of the old version {max(old) - begun:.2f} s after", end="")
