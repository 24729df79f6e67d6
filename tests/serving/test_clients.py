"""Clients that people use, over a real socket to a server that asks for keys."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.registry import Registry
from qwen_ray.serving.app import create_app
from qwen_ray.serving.auth import KeyFile, create_key
from qwen_ray.serving.engines.base import GenerateRequest
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.limits import Rates
from qwen_ray.serving.service import Service
from tests.serving.fixed_assistant import FixedAssistant
from tests.serving.live import served

IDS = [9, 8, 7, 6]
ASK: dict[str, Any] = {"model": "rand:geo", "prompt": IDS, "max_tokens": 6, "temperature": 0}
TALK: dict[str, Any] = {
    "model": "rand:law",
    "messages": [{"role": "user", "content": "Where does the river begin?"}],
    "max_tokens": 6,
    "temperature": 0,
}
LITELLM = """
import json, sys
import litellm

litellm.telemetry = False
url, key, talk = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
common = {"model": "openai/" + talk["model"], "api_base": url, "max_retries": 0} | {
    name: talk[name] for name in ("messages", "max_tokens", "temperature")
}
whole = litellm.completion(api_key=key, **common)
parts = litellm.completion(api_key=key, stream=True, **common)
streamed = "".join(part.choices[0].delta.content or "" for part in parts)
try:
    litellm.completion(api_key="qr-wrong", **common)
    wrong = "answered"
except litellm.AuthenticationError as e:
    wrong = "refused"
print(json.dumps([whole.choices[0].message.content, whole.usage.completion_tokens, streamed, wrong]))
"""


@dataclass
class Server:
    url: str
    key: str
    slow_key: str
    """Of one request a minute."""


@pytest.fixture(scope="module")
def server(model_dir: Path, registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    service = Service.load(str(model_dir), registry=registry.root, assistant=FixedAssistant({}, {}))
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    key, slow = create_key(path, "tests"), create_key(path, "slow", limits=Rates(requests_per_minute=1))
    with served(create_app(service, keys=KeyFile(path))) as url:
        yield Server(url, key, slow)
    service.stop()


def openai(server: Server, kind: str = "OpenAI", key: str | None = None) -> Any:
    import openai

    return getattr(openai, kind)(base_url=f"{server.url}/v1", api_key=key or server.key, max_retries=0)


@pytest.fixture(scope="module")
def want(loaded: TorchEngine) -> str:
    """The answer to :data:`ASK`."""
    return loaded.generate([GenerateRequest("geo", IDS, 6)])[0].text


def test_openai_sync(server: Server, want: str) -> None:
    client = openai(server)
    assert "rand:geo" in {model.id for model in client.models.list()}
    got = client.completions.create(**ASK)
    assert (got.choices[0].text, got.usage.prompt_tokens) == (want, 4)
    assert got.qwen_ray["prompts"][0]["adapter"] == "geo@1"
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**ASK, stream=True)) == want
    whole = client.chat.completions.create(**TALK).choices[0].message.content
    parts = client.chat.completions.create(**TALK, stream=True, stream_options={"include_usage": True})
    chunks = list(parts)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.total_tokens > 6


def test_openai_async_at_the_same_time(server: Server, want: str) -> None:
    async def scenario() -> list[str]:
        async with openai(server, "AsyncOpenAI") as client:

            async def streamed() -> str:
                chunks = await client.completions.create(**ASK, stream=True)
                return "".join([chunk.choices[0].text async for chunk in chunks])

            async def whole() -> str:
                return (await client.completions.create(**ASK)).choices[0].text

            return list(await asyncio.gather(*(f() for f in [streamed, whole] * 8)))

    assert asyncio.run(scenario()) == [want] * 16


def test_openai_embeddings_and_its_errors(server: Server) -> None:
    import openai as library

    client = openai(server)
    vectors = client.embeddings.create(model="fixed", input=["ab", "abc"]).data
    assert [vector.embedding for vector in vectors] == [[1.0, 2.0], [1.0, 3.0]]
    with pytest.raises(library.NotFoundError, match="not an embedding model") as missing:
        client.embeddings.create(model="rand", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(library.BadRequestError) as bad:
        client.completions.create(**ASK | {"n": 0})
    assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")


def test_openai_knows_a_refused_key_and_a_limit(server: Server) -> None:
    import openai as library

    for kind in ({"model": "rand", "prompt": "a"}, {"model": "rand", "prompt": "a", "stream": True}):
        with pytest.raises(library.AuthenticationError) as refused:
            openai(server, key="qr-wrong").completions.create(**kind)
        assert refused.value.code == "invalid_api_key"
    slow = openai(server, key=server.slow_key)
    slow.completions.create(**ASK)
    with pytest.raises(library.RateLimitError) as limited:
        slow.completions.create(**ASK)
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60


def curl(*arguments: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body."""
    command = ["curl", "--silent", "--max-time", "20", "--include", *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, _, body = out.partition("\n\n")
    first, *lines = head.splitlines()
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(first.split()[1]), headers, body


def test_curl(server: Server, want: str) -> None:
    key = f"Authorization: Bearer {server.key}"
    url, body = f"{server.url}/v1/completions", json.dumps(ASK)
    status, _, answer = curl(url, "-H", key, "--json", body)
    assert (status, json.loads(answer)["choices"][0]["text"]) == (200, want)
    status, _, events = curl(url, "-N", "-H", key, "--json", json.dumps(ASK | {"stream": True}))
    assert (status, events.rstrip().splitlines()[-1]) == (200, "data: [DONE]")
    assert curl(url, "-H", key, "-d", body)[0] == 415  # what curl sends when not told that it is JSON
    for wrong in ([], ["-H", "Authorization: Bearer qr-wrong"], ["-u", "me:secret"]):
        status, headers, answer = curl(url, *wrong, "--json", body)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert json.loads(answer)["error"]["code"] == "invalid_api_key"
    assert curl(f"{server.url}/health")[0] == 200
    assert curl(f"{server.url}/metrics")[0] == 401
    assert "qwen_ray_requests_total" in curl(f"{server.url}/metrics", "-H", key)[2]


def test_litellm(server: Server, loaded: TorchEngine) -> None:
    python = os.environ.get("QWEN_RAY_LITELLM_PYTHON")
    # litellm takes only openai < 3, and the other clients are tested with openai 3: it cannot be installed
    # beside them, so it runs in an environment of its own, where one is named.
    if python is None:
        pytest.skip("QWEN_RAY_LITELLM_PYTHON names no Python with litellm (which wants openai < 3)")
    command = [python, "-c", LITELLM, f"{server.url}/v1", server.key, json.dumps(TALK)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    content, tokens, streamed, wrong = json.loads(done.stdout.splitlines()[-1])
    want = openai(server).chat.completions.create(**TALK).choices[0].message.content
    assert (content, tokens, streamed, wrong) == (want, 6, want, "refused")
