"""The HTTP backend against a server that misbehaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.serving import backends
from qwen_ray.serving.backends import EndpointBackend


class Server(ThreadingHTTPServer):
    """Answers like ours; ``failures`` are statuses (0: hang up) given first to requests for scores."""

    failures: list[int]
    asked: list[tuple[str, str | None]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def _reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
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
        if status == 0:
            self.close_connection = True
        elif status != 200:
            self._reply(status, {"error": {"message": f"status {status} it is"}})
        else:
            lengths = [[len(c) for c in item["continuations"]] for item in body["items"]]
            scores = [{"logprobs": [-float(n) for n in row], "greedy": [True] * len(row)} for row in lengths]
            self._reply(200, {"items": [score | {"truncated": False} for score in scores]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(backends, "RETRY_SECONDS", 0.001)
    server = Server(("127.0.0.1", 0), Handler)
    server.failures, server.asked = [], []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def backend(server: Server, **settings: Any) -> EndpointBackend:
    return EndpointBackend(f"http://127.0.0.1:{server.server_address[1]}/v1/", "m", **settings)


ITEMS = [([1], [[2] * (i + 1)]) for i in range(100)]
WANT = [-float(i + 1) for i in range(100)]


def score(client: EndpointBackend) -> list[float]:
    return [scores[0][0] for scores in client.score(ITEMS, lambda _: None)]


def test_order_is_kept_over_many_concurrent_requests(server: Server) -> None:
    assert score(backend(server, api_key="secret", concurrency=8, items_per_request=3)) == WANT
    assert len([path for path, _ in server.asked if path == "/v1/score"]) == 34
    assert {key for _, key in server.asked} == {"Bearer secret"}


def test_lost_connections_and_503_are_tried_again(server: Server) -> None:
    client = backend(server, concurrency=1)
    server.failures = [503, 0, 503]
    assert score(client) == WANT


def test_retries_are_bounded(server: Server) -> None:
    client = backend(server, concurrency=1)
    server.failures = [0] * 50
    with pytest.raises(UserError, match="does not answer"):
        score(client)
    assert len(server.failures) == 46
    server.failures = [503] * 50
    with pytest.raises(RuntimeError, match="503"):
        score(client)


@pytest.mark.parametrize(("status", "error"), [(404, UserError), (400, UserError), (500, RuntimeError)])
def test_refusals_are_not_tried_again(server: Server, status: int, error: type[Exception]) -> None:
    client = backend(server, concurrency=1)
    server.failures = [status] * 3
    with pytest.raises(error, match=f"status {status} it is"):
        score(client)
    assert len(server.failures) == 2
