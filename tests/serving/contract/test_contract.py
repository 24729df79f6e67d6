"""What a client of the API may rely on, whatever engine answers."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen_ray.registry import Registry
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.service import Service
from tests.serving.conftest import events

TOLERANCE = 1e-3  # nats
# What each id answers with, by the adapters of the reference. Version 2 of geo is bio's weights.
MODELS = {"rand": None, "rand:geo": "geo", "rand:geo@2": "bio", "rand:law": "law", "rand:bio": "bio"}


def post(http: TestClient, path: str, **body: Any) -> dict[str, Any]:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def complete(http: TestClient, **body: Any) -> dict[str, Any]:
    return post(http, "/v1/completions", **{"model": "rand", "temperature": 0, "max_tokens": 6} | body)


def refused(http: TestClient, path: str, status: int, **body: Any) -> dict[str, Any]:
    reply = http.post(path, json=body)
    assert reply.status_code == status, reply.text
    assert "Traceback" not in reply.text
    return reply.json()["error"]


def test_models_and_health(http: TestClient, service: Service) -> None:
    listed = {entry["id"]: entry for entry in http.get("/v1/models").json()["data"]}
    assert {*MODELS, "rand:geo@1", "rand:law@1", "rand:bio@1"} == set(listed)
    assert listed["rand"]["max_model_len"] == 256
    assert listed["rand"]["fingerprint"] == service.engine.fingerprint
    assert http.get("/health").json()["status"] == "ok"


def test_tokens(http: TestClient, loaded: TorchEngine) -> None:
    ids = loaded.tokenizer.encode("The fox é 日本")
    assert post(http, "/tokenize", prompt="The fox é 日本")["tokens"] == ids
    assert post(http, "/detokenize", tokens=ids) == {"prompt": "The fox é 日本"}
    assert http.get("/tokenizer_info").json()["vocab_size"] == loaded.vocabulary


def test_forms_of_prompt_agree(http: TestClient, loaded: TorchEngine) -> None:
    text = "The river begins"
    ids = loaded.tokenizer.encode(text)
    want = loaded.generate([GenerateRequest(None, ids, 6)])[0].text
    for prompt in (text, [text], ids, [ids]):
        assert [c["text"] for c in complete(http, prompt=prompt)["choices"]] == [want]
    several = complete(http, prompt=[ids, ids[:2]], n=2)
    assert [c["index"] for c in several["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in several["choices"]][:2] == [want] * 2
    assert several["usage"] == {
        "prompt_tokens": len(ids) + 2,
        "completion_tokens": 24,
        "total_tokens": len(ids) + 26,
    }


@pytest.mark.parametrize("model", MODELS)
def test_generation_is_the_adapters_own(http: TestClient, loaded: TorchEngine, model: str) -> None:
    want = loaded.generate([GenerateRequest(MODELS[model], [9, 8, 7, 6], 20, logprobs=3)])[0]
    got = complete(http, model=model, prompt=[9, 8, 7, 6], max_tokens=20, logprobs=3)
    choice = got["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (want.text, want.finish_reason)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(want.logprobs, abs=TOLERANCE)
    for alternatives, expected in zip(choice["logprobs"]["top_logprobs"], want.top, strict=True):
        assert sorted(alternatives.values()) == pytest.approx(
            sorted(value for _, value in expected), abs=TOLERANCE
        )
    assert got["model"] == model


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_the_adapters_own(http: TestClient, loaded: TorchEngine, model: str) -> None:
    items = [
        {"context": [1, 2, 3], "continuations": [[4, 5], [6], [], [4, 5, 7, 8]]},
        {"context": [9] * 300, "continuations": [[1], [2, 3]]},  # more than the model can see
        {"context": [7], "continuations": [[7] * 256]},  # all that it can
    ]
    reply = post(http, "/v1/score", model=model, items=items)
    want = loaded.score([ScoreItem(MODELS[model], i["context"], i["continuations"]) for i in items])  # type: ignore[arg-type]
    for got, expected in zip(reply["items"], want, strict=True):
        for value, one in zip(got["logprobs"], expected.continuations, strict=True):
            assert value == pytest.approx(one.total, abs=TOLERANCE * max(1, len(one.logprobs)))
        assert got["tokens"] == [len(c.logprobs) for c in expected.continuations]
        assert got["greedy"] == [c.greedy for c in expected.continuations]
    assert [item["truncated"] for item in reply["items"]] == [False, True, False]


def test_many_models_in_one_call(http: TestClient) -> None:
    items = [{"context": [1, 2, 3 + i], "continuations": [[4, 5], [6]]} for i in range(8)]
    together = post(http, "/v1/score", models=list(MODELS), items=items)["models"]
    for model in MODELS:
        alone = post(http, "/v1/score", model=model, items=items)
        for got, want in zip(together[model]["items"], alone["items"], strict=True):
            assert got["logprobs"] == pytest.approx(want["logprobs"], abs=TOLERANCE)
    firsts = [tuple(round(x, 2) for x in together[m]["items"][0]["logprobs"]) for m in MODELS]
    assert len(set(firsts)) == 4  # version 2 of geo and version 1 of bio are the same weights


def test_echo_with_logprobs_as_lm_eval_reads_it(http: TestClient, loaded: TorchEngine) -> None:
    """One entry a token of the prompt, the first null, and the generated token last; the likeliest
    alternative is the same number as the token's own where the token is the likeliest."""
    for prompt in ([5, 9, 200, 31], [77], list(range(100, 160))):
        body = {"model": "rand:law", "prompt": [prompt], "max_tokens": 1, "echo": True, "logprobs": 1}
        block = complete(http, **body)["choices"][0]["logprobs"]
        want = loaded.prompt_logprobs("law", prompt, top=1)
        assert [len(v) for v in block.values()] == [len(prompt) + 1] * 4
        assert block["token_logprobs"][0] is None
        scored = want.continuations[0] if want.continuations else None
        assert block["token_logprobs"][1:-1] == pytest.approx(
            scored.logprobs if scored else [], abs=TOLERANCE
        )
        assert want.next_token is not None
        assert block["token_logprobs"][-1] == pytest.approx(want.next_token[0][1], abs=TOLERANCE)
        for own, top in zip(block["token_logprobs"][1:], block["top_logprobs"][1:], strict=True):
            assert own in top.values()
            assert own <= max(top.values())
        assert max(block["top_logprobs"][-1].values()) == block["token_logprobs"][-1]


def test_echo_of_a_prompt_that_fills_the_context(http: TestClient) -> None:
    got = complete(http, prompt=[[7] * 256], max_tokens=1, echo=True, logprobs=1)
    assert len(got["choices"][0]["logprobs"]["tokens"]) == 257
    refused(http, "/v1/completions", 400, model="rand", prompt=[7] * 257, echo=True, logprobs=1, max_tokens=1)
    refused(http, "/v1/completions", 400, model="rand", prompt=[7] * 256)


def test_generation_ends_where_the_context_does(http: TestClient) -> None:
    got = complete(http, prompt=[7] * 250, max_tokens=50)
    assert (got["usage"]["completion_tokens"], got["choices"][0]["finish_reason"]) == (6, "length")


def test_stop_strings(http: TestClient) -> None:
    free = complete(http, prompt=[11, 12], max_tokens=30)["choices"][0]["text"]
    cut = complete(http, prompt=[11, 12], max_tokens=30, stop=["\0", free[3:6]])["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (free[: free.index(free[3:6])], "stop")


def test_sampling_repeats_by_seed(http: TestClient) -> None:
    body = {"prompt": [1, 2], "temperature": 1.0, "top_p": 0.9, "n": 4, "max_tokens": 8}
    first, second, other = (complete(http, **body, seed=seed)["choices"] for seed in (5, 5, 6))
    texts = [choice["text"] for choice in first]
    assert texts == [choice["text"] for choice in second]
    assert texts != [choice["text"] for choice in other]
    assert len(set(texts)) > 1


def test_sampling_has_the_models_distribution(http: TestClient, loaded: TorchEngine) -> None:
    """One token drawn 400 times: within five standard deviations of the likeliest token's probability."""
    ids = [21, 22]
    top = loaded.prompt_logprobs(None, ids, top=2).next_token
    assert top is not None
    probability = math.exp(top[0][1])
    name = loaded.tokenizer.decode([top[0][0]])
    draws = [
        choice["text"]
        for seed in range(0, 400, 16)
        for choice in complete(http, prompt=ids, temperature=1.0, max_tokens=1, n=16, seed=1000 + seed)[
            "choices"
        ]
    ]
    spread = math.sqrt(probability * (1 - probability) / len(draws))
    assert abs(draws.count(name) / len(draws) - probability) < 5 * spread


@pytest.mark.parametrize("echo", [False, True])
def test_stream_equals_whole(http: TestClient, echo: bool) -> None:
    body = {"model": "rand:geo", "prompt": [[9, 8, 7], [1]], "n": 2, "logprobs": 1, "echo": echo}
    whole = complete(http, **body)
    extra = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 6}
    chunks = events(http.post("/v1/completions", json=body | extra))
    assert chunks[-1]["usage"] == whole["usage"]
    for want in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == want["index"]]
        assert "".join(part["text"] for part in parts) == want["text"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [want["finish_reason"]]
        for key in ("tokens", "text_offset"):
            assert [x for p in parts for x in p["logprobs"][key]] == want["logprobs"][key]
        got = [x for p in parts for x in p["logprobs"]["token_logprobs"] if x is not None]
        expected = [x for x in want["logprobs"]["token_logprobs"] if x is not None]
        assert got == pytest.approx(expected, abs=TOLERANCE)


def test_chat(http: TestClient) -> None:
    body = {
        "model": "rand:law",
        "messages": [{"role": "user", "content": "Where does it end?"}],
        "max_tokens": 7,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    got = post(http, "/v1/chat/completions", **body)["choices"][0]
    plain = complete(http, model="rand:law", prompt="Question: Where does it end?\nAnswer:", max_tokens=7)
    assert got["message"]["content"] == plain["choices"][0]["text"].removeprefix(" ")
    assert [len(entry["top_logprobs"]) for entry in got["logprobs"]["content"]] == [2] * 7
    chunks = events(http.post("/v1/chat/completions", json=body | {"stream": True}))
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(said) == got["message"]["content"]


def test_mixed_requests_at_once_get_their_own_answers(http: TestClient, loaded: TorchEngine) -> None:
    rng = random.Random(0)
    asked = [
        (rng.choice(list(MODELS)), [rng.randrange(512) for _ in range(rng.randint(1, 20))]) for _ in range(96)
    ]
    want = loaded.generate([GenerateRequest(MODELS[model], prompt, 8) for model, prompt in asked])
    scored = loaded.score([ScoreItem(MODELS[model], prompt, [[1, 2, 3]]) for model, prompt in asked])

    def ask(request: tuple[str, list[int]]) -> tuple[str, float]:
        model, prompt = request
        text = complete(http, model=model, prompt=prompt, max_tokens=8)["choices"][0]["text"]
        items = [{"context": prompt, "continuations": [[1, 2, 3]]}]
        return text, post(http, "/v1/score", model=model, items=items)["items"][0]["logprobs"][0]

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(ask, asked))
    assert [text for text, _ in got] == [result.text for result in want]
    totals = [result.continuations[0].total for result in scored]
    assert [total for _, total in got] == pytest.approx(totals, abs=3 * TOLERANCE)


def test_a_new_version_is_answered_by_the_new_one(
    http: TestClient, registry: Registry, adapter_dirs: dict[str, Path], loaded: TorchEngine, service: Service
) -> None:
    """The alias moves to weights that an old name, and so an old cache, must not answer for."""
    base = {"id": "rand", "fingerprint": service.engine.fingerprint}
    items = [{"context": [5, 6, 7], "continuations": [[8, 9, 10]]}]
    name = f"swap-{type(service.engine).__name__.lower()}"
    try:
        for adapter in ("geo", "law", "bio"):
            published = registry.publish(name, adapter_dirs[adapter], {"base": base})
            registry.point(name, "production", published.version, reason="test")
            want = loaded.score([ScoreItem(adapter, [5, 6, 7], [[8, 9, 10]])])[0].continuations[0].total
            got = post(http, "/v1/score", model=f"rand:{name}", items=items)["items"][0]["logprobs"][0]
            assert got == pytest.approx(want, abs=3 * TOLERANCE)
            text = complete(http, model=f"rand:{name}", prompt=[5, 6, 7])["choices"][0]["text"]
            assert text == loaded.generate([GenerateRequest(adapter, [5, 6, 7], 6)])[0].text
    finally:
        (registry.root / name).rename(registry.root / f".{name}")  # out of the other tests' lists


@pytest.mark.parametrize(
    "model", ["nope", "rand:nope", "rand:geo@7", "rand:..", "rand:../geo", "/etc/passwd"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_served_is_404(http: TestClient, model: str, stream: bool) -> None:
    refused(http, "/v1/completions", 404, model=model, prompt="hi", stream=stream)
    refused(http, "/v1/score", 404, model=model, items=[{"context": [1], "continuations": [[1]]}])


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": [512]},
        {"prompt": [-1]},
        {"prompt": [1] * 300},
        {"temperature": -0.1},
        {"top_p": 0},
        {"logprobs": 21},
        {"n": 0},
    ],
)
def test_bad_requests_are_400(http: TestClient, change: dict[str, Any]) -> None:
    refused(http, "/v1/completions", 400, **{"model": "rand", "prompt": "hi"} | change)


def test_adapter_of_another_base_is_409(
    http: TestClient, registry: Registry, adapter_dirs: dict[str, Path], service: Service
) -> None:
    name = f"alien-{type(service.engine).__name__.lower()}"
    registry.publish(name, adapter_dirs["geo"], {"base": {"id": "other", "fingerprint": "ab" * 32}})
    try:
        error = refused(http, "/v1/completions", 409, model=f"rand:{name}@1", prompt="a")
        assert "other" in error["message"]
    finally:
        (registry.root / name).rename(registry.root / f".{name}")
