"""The HTTP backend against a server that misbehaves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.serving import client
from qwen_ray.serving.backends import EndpointBackend, chunks


class Server(ThreadingHTTPServer):
    """Answers like ours; ``failures`` are statuses (0: hang up) given first to requests for scores.

    It takes ``most`` items and ``places`` models a request, and ``room`` requests at once. When full it
    asks for ``rest`` seconds; ``early`` counts the requests that came before they were over.
    """

    failures: list[int]
    most = places = room = 1000
    rest = 0.0
    work = rests_until = 0.0
    early = 0
    running = 0
    lock: threading.Lock
    asked: list[tuple[str, str | None]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def _reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("retry-after", f"{self.server.rest:g}")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("authorization")))
        if self.path == "/v1/models":
            self._reply(200, {"data": [{"id": "m", "max_model_len": 64}]})
        else:
            self._reply(200, {"eos_token": "<e>", "chat_template": None})

    def do_POST(self) -> None:
        self.server.asked.append((self.path, self.headers.get("authorization")))
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status = self.server.failures.pop(0) if self.server.failures else 200
        with self.server.lock:
            self.server.running += 1
            self.server.early += time.monotonic() < self.server.rests_until
            if self.server.running > self.server.room:
                status = 429
        if len(body["items"]) > self.server.most or len(body.get("models", ())) > self.server.places:
            status = 413
        if status == 429:
            self.server.rests_until = time.monotonic() + self.server.rest
        if status == 0:
            self.close_connection = True
        elif status != 200:
            self._reply(status, {"error": {"message": f"status {status} it is"}})
        else:
            time.sleep(self.server.work)
            lengths = [[len(c) for c in item["continuations"]] for item in body["items"]]
            scores = [{"logprobs": [-float(n) for n in row], "greedy": [True] * len(row)} for row in lengths]
            answer = {"items": [score | {"truncated": False} for score in scores]}
            several = {"models": dict.fromkeys(body.get("models", ()), answer)}
            self._reply(200, several if "models" in body else answer)
        with self.server.lock:
            self.server.running -= 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.001)
    server = Server(("127.0.0.1", 0), Handler)
    server.failures, server.asked, server.lock = [], [], threading.Lock()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def backend(server: Server, **settings: Any) -> EndpointBackend:
    return EndpointBackend(f"http://127.0.0.1:{server.server_address[1]}/v1/", "m", **settings)


ITEMS = [([1], [[2] * (i + 1)]) for i in range(100)]
WANT = [-float(i + 1) for i in range(100)]


def score(ours: EndpointBackend) -> list[float]:
    return [scores[0][0] for scores in ours.score(ITEMS, lambda _: None)]


def test_order_is_kept_over_many_concurrent_requests(server: Server) -> None:
    assert score(backend(server, api_key="secret", concurrency=8, items_per_request=3)) == WANT
    assert len([path for path, _ in server.asked if path == "/v1/score"]) == 34
    assert {key for _, key in server.asked} == {"Bearer secret"}


def test_lost_connections_and_503_are_tried_again(server: Server) -> None:
    ours = backend(server, concurrency=1)
    server.failures = [503, 0, 503]
    assert score(ours) == WANT


def test_retries_are_bounded(server: Server) -> None:
    ours = backend(server, concurrency=1)
    server.failures = [0] * 50
    with pytest.raises(UserError, match="does not answer"):
        score(ours)
    assert len(server.failures) == 50 - client.ATTEMPTS
    server.failures = [503] * 50
    with pytest.raises(RuntimeError, match="503"):
        score(ours)


@pytest.mark.parametrize(("status", "error"), [(404, UserError), (400, UserError), (500, RuntimeError)])
def test_refusals_are_not_tried_again(server: Server, status: int, error: type[Exception]) -> None:
    ours = backend(server, concurrency=1)
    server.failures = [status] * 3
    with pytest.raises(error, match=f"status {status} it is"):
        score(ours)
    assert len(server.failures) == 2


def test_a_full_server_is_given_rest(server: Server) -> None:
    """All is answered though it takes two at a time, and nothing is sent before it may be."""
    server.room, server.work, server.rest = 2, 0.002, 0.02
    assert score(backend(server, concurrency=12, items_per_request=1)) == WANT
    server.failures, server.rest = [429], 0.3
    server.early = 0
    assert score(backend(server, concurrency=1)) == WANT
    assert server.early == 0


def test_fewer_requests_run_after_a_refusal() -> None:
    turns = client.Turns(8)
    turns.turned_away(60)
    turns.turned_away(60)  # one burst
    assert turns.allowed == 4
    for _ in range(40):
        turns.succeeded()
    assert turns.allowed == 8


def test_patience_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.05)
    server.failures, server.rest = [429] * 50, 0.02
    with pytest.raises(UserError, match="status 429") as e:
        score(backend(server, concurrency=1))
    assert e.value.status == 429
    assert len(server.failures) == 47


def test_a_request_that_is_too_much_goes_in_parts(server: Server) -> None:
    server.most = 5
    assert score(backend(server, concurrency=3, items_per_request=64)) == WANT
    server.most = 0
    with pytest.raises(UserError, match="status 413"):
        score(backend(server, concurrency=1))


def test_models_that_a_server_does_not_hold_at_one_time_go_in_parts(server: Server) -> None:
    server.places = 2
    answers = backend(server).score_each(["a", "b", "c", "d", "e"], [([1], [[2], [3, 4]])])
    assert [answer["items"][0]["logprobs"] for answer in answers] == [[-1.0, -2.0]] * 5


def test_a_key_that_is_refused_says_how_to_give_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.KEY_VARIABLE, "from-the-environment")
    ours = backend(server)
    server.failures = [401]
    with pytest.raises(UserError, match="status 401") as e:
        score(ours)
    assert e.value.status == 401
    assert client.KEY_VARIABLE in e.value.fix
    assert {key for _, key in server.asked} == {"Bearer from-the-environment"}


def test_parts_keep_order_and_limits() -> None:
    sizes = [5, 1, 1, 9, 2, 2, 2, 2, 30, 1]
    parts = [list(part) for part in chunks(sizes, 3, lambda size: size, 10)]
    assert [size for part in parts for size in part] == sizes
    assert parts == [[5, 1, 1], [9], [2, 2, 2], [2], [30], [1]]
    assert [list(part) for part in chunks(sizes, 4)] == [sizes[:4], sizes[4:8], sizes[8:]]
    assert list(chunks([], 4)) == []
