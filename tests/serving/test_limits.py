"""Limits: of one request, of a key, of the server; time-outs; origins. The service is a stand-in where its
slowness or its refusal is what matters."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from qwen_ray.errors import UserError
from qwen_ray.serving.app import create_app
from qwen_ray.serving.auth import KeyFile, create_key, revoke_key
from qwen_ray.serving.limits import Admission, Bucket, Limits, Rates, request_size
from qwen_ray.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    ScoreRequest,
    TokenizeRequest,
)
from tests.serving.live import served

ASK = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 2}
ABOUT = {"qwen_ray": {"prompts": [{"adapter": None}]}}


class Scripted:
    """A service that answers at once, fails, or never ends. ``cancelled``: calls given up in the middle."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {
            "ok": {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 10}, **ABOUT}
        }
        self.entered, self.cancelled, self.hanging = 0, 0, False

    async def call(self, method: str, body: Any = None) -> dict[str, Any]:
        if method != "health":
            await self._wait()
        return self.answer

    async def stream(self, method: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        yield {"ok": {"choices": [{"text": "a"}]} | ABOUT}
        await self._wait()
        if body.stream_options.include_usage:
            yield {"ok": {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}}

    async def _wait(self) -> None:
        self.entered += 1
        try:
            while self.hanging:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@contextmanager
def serving(service: Any, **options: Any) -> Iterator[TestClient]:
    with TestClient(create_app(service, **options), raise_server_exceptions=False) as http:
        yield http


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def too_many(reply: httpx.Response) -> int:
    """Its Retry-After."""
    error = error_of(reply, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert reply.headers["retry-after"].isdecimal()
    return int(reply.headers["retry-after"])


# -- counting


def test_bucket_fills_at_its_rate() -> None:
    bucket = Bucket()
    assert bucket.wait(60, 0.0) == 0
    bucket.take(60)
    assert bucket.wait(60, 0.0) == pytest.approx(1)
    assert bucket.wait(60, 0.5) == pytest.approx(0.5)
    assert bucket.wait(60, 1.0) == 0
    bucket.take(181)  # more than it holds
    assert bucket.wait(60, 1.0) == pytest.approx(181)
    assert bucket.wait(60, 1e6) == 0
    bucket.take(60)  # rest does not add up beyond a minute's worth
    assert bucket.wait(60, 1e6) == pytest.approx(1)


def test_a_key_waits_for_its_own_use_only() -> None:
    now = 0.0
    admission = Admission(Limits(requests_per_minute=2), clock=lambda: now)
    own = Rates(tokens_per_minute=600)
    for _ in range(2):
        assert admission.enter("a", own) is None
        admission.leave("a", 0)
    refusal = admission.enter("a", own)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after) == ("requests_per_minute", pytest.approx(30))
    assert admission.enter("b", own) is None
    admission.leave("b", 1200)  # overdrawn by 600: 60 s, and the 0.1 s for one token
    now = 30.0
    refusal = admission.enter("b", own)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after) == ("tokens_per_minute", pytest.approx(30.1))
    assert admission.enter("a", own) is None
    admission.leave("a", 0)
    assert admission.running == 0


def test_places() -> None:
    admission = Admission(Limits(in_flight=3, concurrent=2))
    entered = [admission.enter("a", Rates()) for _ in range(3)]
    assert [e and e.reason for e in entered] == [None, None, "concurrent"]
    assert [r and r.reason for r in (admission.enter("b", Rates()), admission.enter("c", Rates()))] == [
        None,
        "in_flight",
    ]
    admission.leave("a", 5)
    assert admission.enter("c", Rates()) is None
    wide = Rates(concurrent=9)  # a key's own limit goes before the server's
    admission.leave("b", 0)
    assert admission.enter("a", wide) is None


@pytest.mark.parametrize(
    ("kind", "body", "size"),
    [
        (CompletionRequest, {"model": "m", "prompt": "12345678", "max_tokens": 5}, (1, 7)),
        (CompletionRequest, {"model": "m", "prompt": [1, 2, 3], "max_tokens": 5}, (1, 8)),
        (CompletionRequest, {"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 5, "n": 3}, (2, 33)),
        (CompletionRequest, {"model": "m", "prompt": ["éé", "1234"], "max_tokens": 0}, (2, 2)),
        (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "12345678"}]}, (1, 2)),
        (
            ChatRequest,
            {"model": "m", "messages": [{"role": "user", "content": "1234"}], "max_tokens": 4, "n": 2},
            (1, 9),
        ),
        (
            ScoreRequest,
            {"models": ["m", "k"], "items": [{"context": [1, 2], "continuations": [[1], [2, 3]]}] * 3},
            (3, 30),
        ),
        (EmbeddingsRequest, {"model": "m", "input": ["1234", "12345678"]}, (2, 3)),
        (TokenizeRequest, {"prompt": "12345678"}, (1, 2)),
        (TokenizeRequest, {"prompt": []}, (0, 0)),
        (DetokenizeRequest, {"tokens": [1, 2, 3]}, (1, 3)),
    ],
)
def test_size_of_a_request(kind: Any, body: dict[str, Any], size: tuple[int, int]) -> None:
    assert request_size(kind.model_validate(body)) == size


def test_unknown_limits_are_refused() -> None:
    from qwen_ray.config import validate

    with pytest.raises(UserError, match="did you mean 'in_flight'"):
        validate(Limits, {"inflight": 3}, where="serve", origin={})


# -- over HTTP


def test_a_request_may_ask_for_so_much() -> None:
    with serving(Scripted(), limits=Limits(prompts_per_request=2, tokens_per_request=100)) as http:
        for path, body in (
            ("/v1/completions", {"model": "m", "prompt": ["a", "b", "c"]}),
            ("/v1/completions", {"model": "m", "prompt": [[1], [1], [1]], "stream": True}),
            ("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 101}),
            ("/tokenize", {"prompt": "a" * 404}),
        ):
            assert "this server takes" in error_of(http.post(path, json=body), 413)["message"]
        assert http.post("/v1/completions", json=ASK).status_code == 200


def test_bodies_have_a_size() -> None:
    with serving(Scripted(), limits=Limits(body_bytes=1000)) as http:
        headers = {"content-type": "application/json"}
        error_of(http.post("/tokenize", content=b"x" * 1001, headers=headers), 413)
        error_of(http.post("/tokenize", content=iter([b"x" * 501] * 2), headers=headers), 413)
        assert http.post("/tokenize", json={"prompt": "x" * 900}).status_code == 200


def test_requests_and_tokens_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ada = {"authorization": f"Bearer {create_key(path, 'ada', limits=Rates(requests_per_minute=2))}"}
    bob = {"authorization": f"Bearer {create_key(path, 'bob', limits=Rates(tokens_per_minute=60))}"}
    with serving(Scripted(), keys=KeyFile(path)) as http:
        for _ in range(2):
            assert http.post("/v1/completions", json=ASK, headers=ada).status_code == 200
        assert 20 <= too_many(http.post("/v1/completions", json=ASK, headers=ada)) <= 30
        assert http.get("/health", headers=ada).status_code == 200
        for _ in range(2):  # 60 in the bucket, 40 a request: two get in, and 20 are owed
            assert http.post("/v1/completions", json=ASK, headers=bob).status_code == 200
        assert 10 <= too_many(http.post("/v1/completions", json=ASK, headers=bob)) <= 21
        revoke_key(path, "ada")
        assert http.post("/v1/completions", json=ASK, headers=ada).status_code == 401


def test_a_stream_is_counted_whether_usage_is_wanted_or_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ada = {"authorization": f"Bearer {create_key(path, 'ada', limits=Rates(tokens_per_minute=6))}"}
    with serving(Scripted(), keys=KeyFile(path)) as http:
        wanted = {"stream": True, "stream_options": {"include_usage": True}}
        told = http.post("/v1/completions", json=ASK | wanted, headers=ada).text
        assert "usage" in told
        untold = http.post("/v1/completions", json=ASK | {"stream": True}, headers=ada).text
        assert "usage" not in untold
        assert untold.endswith("data: [DONE]\n\n")
        assert too_many(http.post("/v1/completions", json=ASK, headers=ada)) >= 2  # 8 of 6 are used


def test_keys_before_everything_else(tmp_path: Path) -> None:
    """No route, no method and no body is looked at for a stranger; the page and /health are for all."""
    path = tmp_path / "keys.json"
    secret = create_key(path, "ada")
    with serving(Scripted(), keys=KeyFile(path), limits=Limits(body_bytes=10)) as http:
        for method, url in (
            ("POST", "/v1/completions"),
            ("GET", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/nowhere"),
            ("OPTIONS", "/v1/models"),
        ):
            for headers in ({}, {"authorization": f"Bearer {secret}x"}):
                reply = http.request(method, url, headers=headers, content=b"x" * 20)
                assert error_of(reply, 401)["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200
        page = http.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert http.get("/page/script.js").status_code == 200
        error_of(http.get("/page/../v1/models"), 401)
        known = {"authorization": f"Bearer {secret}"}
        assert http.get("/metrics", headers=known).status_code == 200
        error_of(http.get("/nowhere", headers=known), 404)


def test_keys_are_asked_for_under_any_prefix(tmp_path: Path) -> None:
    """The page's parts are open; an application that is itself served there is not."""
    path = tmp_path / "keys.json"
    create_key(path, "ada")
    app = create_app(Scripted(), keys=KeyFile(path))
    for prefix in ("/page", "/llm", ""):
        http = TestClient(app, root_path=prefix)
        assert http.get(f"{prefix}/v1/models").status_code == 401
        assert http.get(f"{prefix}/health").status_code == 200
        assert http.get(f"{prefix}/page/style.css").status_code == 200


def test_what_the_engine_refuses_is_passed_on() -> None:
    service = Scripted()
    service.answer = {"error": {"status": 429, "message": "queue is full", "retry_after": 2.1}}
    with serving(service) as http:
        assert too_many(http.post("/v1/completions", json=ASK)) == 3
        service.answer["error"]["retry_after"] = 0.0
        assert too_many(http.post("/v1/completions", json=ASK)) == 1
        service.answer = {"error": {"status": 503, "message": "loading", "retry_after": 7}}
        reply = http.post("/v1/completions", json=ASK)
        assert error_of(reply, 503)["type"] == "overloaded_error"
        assert reply.headers["retry-after"] == "7"


def test_time_out_cancels_the_work() -> None:
    service = Scripted()
    service.hanging = True
    with serving(service, limits=Limits(timeout_seconds=0.05)) as http:
        error = error_of(http.post("/v1/completions", json=ASK), 504)
        assert (error["type"], service.cancelled) == ("timeout_error", 1)
        stream = http.post("/v1/completions", json=ASK | {"stream": True})
        events = [line for line in stream.text.splitlines() if line]
        assert json.loads(events[0].removeprefix("data: "))["choices"] == [{"text": "a"}]
        assert json.loads(events[1].removeprefix("data: "))["error"]["type"] == "timeout_error"
        assert (len(events), service.cancelled) == (2, 2)


def test_at_most_so_many_in_flight_and_places_come_back() -> None:
    service = Scripted()
    service.hanging = True

    async def scenario(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=10) as http:
            running = [asyncio.create_task(http.post("/v1/completions", json=ASK)) for _ in range(2)]
            while service.entered < 2:
                await asyncio.sleep(0.01)
            assert too_many(await http.post("/v1/completions", json=ASK)) == 1
            assert too_many(await http.post("/v1/completions", content=b"{")) == 1
            assert "in_flight 2.0\n" in (await http.get("/metrics")).text
            service.hanging = False
            assert [reply.status_code for reply in await asyncio.gather(*running)] == [200, 200]
            assert (await http.post("/v1/completions", json=ASK)).status_code == 200

    with served(create_app(service, limits=Limits(in_flight=2))) as url:
        asyncio.run(scenario(url))


def test_a_stream_whose_client_leaves_gives_its_place_back() -> None:
    service = Scripted()
    service.hanging = True
    with served(create_app(service, limits=Limits(in_flight=1))) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=ASK | {"stream": True}) as reply:
            lines = reply.iter_lines()  # held: without it the connection is closed
            assert next(lines).startswith("data: ")
            assert too_many(httpx.get(f"{url}/v1/models")) == 1
        while not service.cancelled:
            time.sleep(0.01)
        service.hanging = False
        assert httpx.get(f"{url}/v1/models").status_code == 200


# -- origins


def test_listed_origins_may_read_and_others_may_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    create_key(path, "ada")
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    good, bad = {"origin": "https://a.example"}, {"origin": "https://a.example.evil"}
    with serving(Scripted(), keys=KeyFile(path), cors=["https://a.example"]) as http:
        asked = http.options("/v1/completions", headers=good | preflight)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        refused = http.get("/v1/models", headers=good)  # the page can read why
        assert error_of(refused, 401)
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-credentials" not in asked.headers | refused.headers
        assert http.options("/v1/completions", headers=bad | preflight).status_code == 400
        assert "access-control-allow-origin" not in http.get("/health", headers=bad).headers


@pytest.mark.parametrize("origin", ["*", "a.example", "https://a.example/", "https://*.example", "null", ""])
def test_only_origins_can_be_listed(origin: str) -> None:
    with pytest.raises(UserError, match="not an origin"):
        create_app(Scripted(), cors=[origin])
