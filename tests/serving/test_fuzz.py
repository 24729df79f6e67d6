"""Hostile requests over a real socket: made from the app's own OpenAPI by schemathesis, and raw bytes.

Whatever comes, the answer is no failure of the server, has OpenAI's shape, and the next request is answered.
``QWEN_RAY_FUZZ=10000`` sends so many in all (500 otherwise), two in five of the first kind, which are slow to
make.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from qwen_ray.registry import Registry
from qwen_ray.serving.app import create_app
from qwen_ray.serving.assistant import Route
from qwen_ray.serving.auth import KeyFile, create_key
from qwen_ray.serving.limits import Limits
from qwen_ray.serving.service import Service
from tests.serving.fixed_assistant import FixedAssistant, passage
from tests.serving.live import served

REQUESTS = int(os.environ.get("QWEN_RAY_FUZZ", "500"))
OF_SCHEMA = REQUESTS * 2 // 5
DELIBERATE = (503, 504)
SERVED = ["rand", "rand:geo", "rand:law@1", "rand:auto", "rand:geo+rag", "rand:auto+rag", "rand+rag", "fixed"]

pytestmark = pytest.mark.timeout(max(600, REQUESTS // 4))


@pytest.fixture(scope="module")
def service(model_dir: Path, registry: Registry) -> Iterator[Service]:
    assistant = FixedAssistant({"a": Route("geo", 0.8, "rivers")}, {"rivers": [passage("It begins.")]})
    service = Service.load(str(model_dir), registry=registry.root, assistant=assistant)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def server(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL and key."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    key = create_key(path, "fuzz")
    with served(create_app(service, keys=KeyFile(path), limits=Limits(body_bytes=200_000))) as url:
        yield url, key


@pytest.fixture
def failures(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What the server logs as its own failure, also where the client no longer sees it."""
    found: list[str] = []
    yield found
    found += [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert not found


def likely(schema: dict[str, Any]) -> dict[str, Any]:
    """The app's schema, with ids and tokens that exist among what it allows: most requests should get
    through to the engine. Answers are kept short."""
    schemas = schema["components"]["schemas"]
    token = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 511}] * 3 + [{"type": "integer"}]}
    for body in schemas.values():
        fields = body.get("properties", {})
        if "model" in fields:
            fields["model"] = {"anyOf": [{"enum": SERVED}] * 4 + [fields["model"]]}
        if "models" in fields:
            fields["models"]["items"] = {"anyOf": [{"enum": SERVED}] * 4 + [{"type": "string"}]}
        for name in ("max_tokens", "max_completion_tokens"):
            if name in fields:
                fields[name] = {"type": "integer", "minimum": 0, "maximum": 5}
                body.setdefault("required", []).append(name)
    text = json.dumps(schema).replace('{"type": "integer", "minimum": 0.0}', json.dumps(token))
    return json.loads(text.replace('{"type": "integer", "minimum": 0}', json.dumps(token)))


def test_requests_of_the_schema(server: tuple[str, str], failures: list[str]) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
        unsupported_method,
    )

    url, key = server
    headers = {"Authorization": f"Bearer {key}"}
    described = httpx.get(f"{url}/openapi.json", headers=headers).json()
    schema = schemathesis.openapi.from_dict(likely(described))
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method == "post"]
    gets = [operation for operation in operations if operation.method == "get"]
    plan = [(operation, mode) for operation in posts for mode in schemathesis.GenerationMode]
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
        unsupported_method,
    ]
    seen: Counter[int] = Counter()
    each = settings(
        max_examples=max(4, OF_SCHEMA // len(plan)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation, mode in [*plan, *((get, schemathesis.GenerationMode.POSITIVE) for get in gets)]:

        @each
        @given(case=operation.as_strategy(mode))
        def exchange(case: Any) -> None:
            answer = case.call(base_url=url, headers=headers, timeout=30)
            seen[answer.status_code] += 1
            case.validate_response(answer, checks=checks, headers=headers)
            assert "server_error" not in answer.text  # in a stream

        exchange()
    print("schemathesis:", dict(sorted(seen.items())))
    assert seen[200] > seen.total() / 10  # some get through to the engine
    assert seen[400] > seen.total() / 10
    still_answers(server)


# -- raw bytes

JSON_BODIES: list[tuple[str, Any]] = [
    ("/v1/completions", {"model": "rand", "prompt": [1, 2, 3], "max_tokens": 2, "logprobs": 1, "echo": True}),
    ("/v1/completions", {"model": "rand:geo", "prompt": ["a", "b"], "max_tokens": 2, "stream": True, "n": 2}),
    (
        "/v1/chat/completions",
        {"model": "rand", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    ),
    ("/v1/score", {"model": "rand:law", "items": [{"context": [1, 2], "continuations": [[3], [4, 5]]}]}),
    ("/v1/embeddings", {"model": "fixed", "input": ["a", "b"]}),
    ("/tokenize", {"prompt": "Where does the river begin?"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
SPLICES = [
    *(b"\x00", b"\xff\xfe", b"\r\n", b"\r\n\r\n", b'"', b"[" * 5000, b'{"a":' * 2000, b"\\ud800", b"NaN"),
    *(b"1e999", b"-" * 50, b"9" * 5000, b"null", b"true", b"[]", b"{}", b"../../etc/passwd", b"%00", b"\x7f"),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Expect: x\r\n",
    ),
    *(b"Content-Type: text/html\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"A" * 70_000),
]


VALUES: list[Any] = [
    *("", "\ud800", "\x00", "é" * 3000, "rand:auto+rag", [], {}, [[]], [{}], [[[[1]]]], ["\udfff"], [1, "a"]),
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**40, 1e308, float("nan"), float("inf"), [511] * 300),
]


def twisted(rng: random.Random, value: Any) -> Any:
    """``value`` with one part of it, or itself, replaced by another that JSON can carry."""
    if not value or not isinstance(value, dict | list) or rng.random() < 0.2:
        return rng.choice(VALUES)
    at = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    copy[at] = twisted(rng, value[at])
    return copy


def valid(rng: random.Random, key: str, *, twist: bool = False) -> tuple[bytes, bytes]:
    """Head and body of a good request; with ``twist`` of one with a part that may not be."""
    path, body = rng.choice(JSON_BODIES)
    content = json.dumps(twisted(rng, body) if twist else body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        "Content-Type: application/json",
    ]
    lines += [f"Authorization: Bearer {key}", f"Content-Length: {len(content)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode(), content


def spoiled(rng: random.Random, data: bytes) -> bytes:
    """``data`` with some bytes changed, put in, taken out or said twice."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0:
                out[at : at + 1] = rng.randbytes(1)
            case 1:
                out[at:at] = rng.choice(SPLICES)
            case 2:
                del out[at : at + rng.randint(1, 20)]
            case 3:
                out[at:at] = out[at : at + rng.randint(1, 40)]
            case 4:
                out[at:at] = rng.randbytes(rng.randint(1, 30))
    return bytes(out)


def hostile(rng: random.Random, key: str) -> bytes:
    head, body = valid(rng, key)
    match rng.randrange(8):
        case 0 | 1 | 2:
            return b"".join(valid(rng, key, twist=True))
        case 3 | 4:  # a spoiled body, its length right
            body = spoiled(rng, body)
            head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
            return head + body
        case 5:
            return spoiled(rng, head) + body
        case 6:  # in chunks, some spoiled
            head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
            cut = rng.randrange(len(body))
            chunks = b"".join(
                b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part
            )
            return head + (spoiled(rng, chunks) if rng.random() < 0.5 else chunks) + b"0\r\n\r\n"
    return rng.randbytes(rng.randint(1, 300))


async def exchange(address: tuple[str, int], data: bytes) -> bytes:
    """What comes back; nothing if the server waits for the rest of an unfinished request."""
    reader, writer = await asyncio.open_connection(*address)
    answer = b""
    try:
        writer.write(data)
        while part := await asyncio.wait_for(reader.read(65536), 1.0):
            answer += part
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return answer


def test_raw_bytes(server: tuple[str, str], failures: list[str]) -> None:
    url, key = server
    rng = random.Random(7)
    address = ("127.0.0.1", int(urlsplit(url).port or 0))
    seen: Counter[int] = Counter()

    async def scenario() -> None:
        sent = 0
        while sent < REQUESTS - OF_SCHEMA:
            batch = [hostile(rng, key) for _ in range(25)]
            for data, answer in zip(
                batch, await asyncio.gather(*(exchange(address, d) for d in batch)), strict=True
            ):
                check(data, answer)
            sent += len(batch)

    def check(data: bytes, answer: bytes) -> None:
        statuses = [int(status) for status in re.findall(rb"(?m)^HTTP/1\.1 (\d{3}) ", answer)]
        seen.update(statuses or [0])
        assert all(status < 500 or status in DELIBERATE for status in statuses), (data, answer)
        assert b"server_error" not in answer, (data, answer)
        assert b"Traceback" not in answer
        head, _, body = answer.partition(b"\r\n\r\n")
        if len(statuses) == 1 and statuses[0] >= 400 and b"application/json" in head:
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        elif statuses and statuses[0] >= 400:
            assert body == b"Invalid HTTP request received.", (data, answer)  # it was no HTTP

    asyncio.run(scenario())
    print("raw bytes:", dict(sorted(seen.items())))
    assert seen[200] > 0
    assert seen[400] > seen.total() / 10
    still_answers(server)


def still_answers(server: tuple[str, str]) -> None:
    url, key = server
    ask = {"model": "rand:geo", "prompt": "a", "max_tokens": 2}
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.get(f"{url}/health").json()["load"]["waiting"] == 0
    assert httpx.post(f"{url}/v1/completions", json=ask, headers=headers).status_code == 200
    while "\nqwen_ray_requests_in_flight 0.0\n" not in httpx.get(f"{url}/metrics", headers=headers).text:
        time.sleep(0.1)  # requests whose client left are still being given up
