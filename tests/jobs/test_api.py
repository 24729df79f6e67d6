"""What is said where something else than the right job server answers, or nothing does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.jobs import api
from qwen_ray.jobs.api import JobsApi, Unreachable
from qwen_ray.jobs.where import auth_token, server_address


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@contextmanager
def answering(reply: Callable[[socket.socket], object]) -> Iterator[str]:
    """A server that lets ``reply`` treat one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                reply(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


@contextmanager
def web(status: int, body: bytes, seen: list[str | None]) -> Iterator[str]:
    """A web server that always answers the same; ``seen`` gets the tokens."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "http://127.0.0.1:8265"),
        ("head", "http://head:8265"),
        ("head:1234", "http://head:1234"),
        ("http://head:8265/", "http://head:8265"),
        ("https://ray.example.org/team", "https://ray.example.org/team"),
    ],
)
def test_addresses(given: str | None, meant: str) -> None:
    assert server_address(given) == meant


@pytest.mark.parametrize("given", ["ray://head:10001", "http://", "http://head:port"])
def test_other_addresses_are_refused(given: str) -> None:
    with pytest.raises(UserError, match="8265"):
        server_address(given)


def test_the_token_is_found_where_ray_finds_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert auth_token() is None
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("of-home\n")
    assert auth_token() == "of-home"
    (home / "named").write_text("of-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "named"))
    assert auth_token() == "of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    assert auth_token() == "of-variable"
    seen: list[str | None] = []
    with web(200, b"[]", seen) as address, JobsApi(address) as server:
        assert server.jobs() == []
    assert seen == ["Bearer of-variable"]


def test_a_token_file_that_is_not_there_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        auth_token()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b"Unauthorized", "asks for a token, and there is none here"),
        (404, b"nothing here", "not Ray's job server"),
        (200, b"<html>", "not Ray's job server"),
        (200, b'{"status": "ok"}', "not Ray's job server"),
        (200, b'{"ray_version": "2.1.0"}', "the cluster runs Ray 2.1.0"),
    ],
)
def test_a_wrong_server_is_bad_input(status: int, body: bytes, said: str) -> None:
    with web(status, body, []) as address, JobsApi(address) as server, pytest.raises(UserError, match=said):
        server.check()


def test_a_wrong_token_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with web(403, b"Forbidden", []) as address, JobsApi(address) as server:
        with pytest.raises(UserError, match="does not accept the token of RAY_AUTH_TOKEN") as raised:
            server.check()
        assert "wrong" not in str(raised.value)


def test_a_failure_of_the_server_is_one_line() -> None:
    body = b"Traceback (most recent call last):\n  File ...\nRuntimeError: no agent"
    with web(500, body, []) as address, JobsApi(address) as server:
        with pytest.raises(RuntimeError, match="answered 500: RuntimeError: no agent") as raised:
            server.jobs()
        assert "Traceback" not in str(raised.value)


def test_the_port_of_something_that_is_no_web_server() -> None:
    """As Ray's own port, 6379, is."""
    with (
        answering(lambda c: c.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00")) as address,
        JobsApi(address) as server,
        pytest.raises(UserError, match="no web server") as raised,
    ):
        server.check()
    assert "6379" in str(raised.value)


def test_a_head_that_dies_while_it_is_asked() -> None:
    """Its connection ends without an answer, as that of another server would; but it has answered before."""

    def once(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
        connection.recv(4096)

    with answering(once) as address, JobsApi(address) as server:
        assert server.jobs() == []
        with pytest.raises(Unreachable, match="no head answers"):
            server.jobs()


def test_a_head_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_QUICK", 0.2)
    done = threading.Event()
    with answering(lambda _: done.wait(10)) as address:
        with JobsApi(address) as server, pytest.raises(Unreachable, match="did not answer"):
            server._send("GET", "/api/version", seconds=0.2)
        done.set()


def test_nobody_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with JobsApi(f"http://127.0.0.1:{port}") as server, pytest.raises(Unreachable, match="no head answers"):
        server.check()
