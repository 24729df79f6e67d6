"""By which names a server may be asked: a page elsewhere must not reach one that asks for no key."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from qwen_ray.errors import UserError
from qwen_ray.serving.app import create_app
from qwen_ray.serving.hosts import LOCAL, allowed
from tests.serving.test_limits import ASK, Scripted


@pytest.mark.parametrize("header", ["localhost", "127.0.0.1:8000", "[::1]:8000", "[::1]", "LocalHost:80"])
def test_names_of_this_machine(header: str) -> None:
    assert allowed(header, LOCAL)


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", ":8000", "evil.example", "evil.example:8000", "localhost.evil.example", "evil-localhost"),
        *("127.0.0.1.evil.example:8000", "localhost:8000@evil.example", "[::1].evil.example", "::1", "[::1"),
    ],
)
def test_other_names(header: str | None) -> None:
    assert not allowed(header, LOCAL)


def test_all_names_below_one() -> None:
    hosts = ["*.notes.example"]
    assert allowed("a.notes.example:443", hosts)
    assert allowed("a.B.Notes.example", hosts)
    for header in ("notes.example", "badnotes.example", "a.notes.example.evil"):
        assert not allowed(header, hosts)
    assert allowed("notes.example", ["*"])


def test_every_route_is_closed_to_a_page_that_lets_its_name_point_here() -> None:
    service = Scripted()
    app = create_app(service, hosts=LOCAL)
    here, elsewhere = (
        TestClient(app, base_url=f"http://{name}:8000") for name in ("localhost", "evil.example")
    )
    for path in ("/", "/page/script.js", "/health", "/metrics", "/v1/models", "/openapi.json", "/nowhere"):
        reply = elsewhere.get(path)
        assert reply.status_code == 403, path
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert "host name" in reply.json()["error"]["message"]
        assert here.get(path).status_code == (404 if path == "/nowhere" else 200)
    before = service.entered
    assert elsewhere.post("/v1/completions", json=ASK).status_code == 403
    assert service.entered == before
    assert here.post("/v1/completions", json=ASK).status_code == 200
    assert TestClient(create_app(service), base_url="http://any.example").get("/v1/models").is_success


@pytest.mark.parametrize("host", ["", "http://a.example", "a.example:80", "a.*.example", "*a.example", "a b"])
def test_only_names_can_be_listed(host: str) -> None:
    with pytest.raises(UserError, match="not the name of a host"):
        create_app(Scripted(), hosts=[host])
