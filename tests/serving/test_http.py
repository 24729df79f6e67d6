"""The routes over a service in this process: answers, errors, limits. No Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from starlette.testclient import TestClient

from qwen_ray.registry import Registry
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.protocol import CompletionRequest
from qwen_ray.serving.service import Service
from tests.serving.conftest import events

GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def service(model_dir: Path, registry: Registry) -> Iterator[Service]:
    service = Service.load(str(model_dir), registry=registry.root)
    yield service
    service.stop()


def complete(http: TestClient, **body: Any) -> dict[str, Any]:
    reply = http.post("/v1/completions", json={"model": "rand", **GREEDY} | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(http: TestClient, path: str, body: Any, status: int) -> dict[str, Any]:
    reply = http.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in reply.text
    return error


def test_adapters_answer_by_name_and_version(http: TestClient, loaded: TorchEngine) -> None:
    ids = [9, 8, 7, 6]
    texts = {}
    for model, key in (("rand", None), ("rand:geo", "geo"), ("rand:law@1", "law"), ("rand:geo@2", "bio")):
        got = complete(http, model=model, prompt=ids)
        texts[model] = got["choices"][0]["text"]
        assert got["model"] == model
        assert texts[model] == loaded.generate([GenerateRequest(key, ids, 6)])[0].text
    assert len(set(texts.values())) == 4


def test_echo_with_logprobs_has_prompt_and_one_more(http: TestClient, loaded: TorchEngine) -> None:
    prompts = [[5, 9, 200, 31], [77]]
    got = complete(http, model="rand:law", prompt=prompts, max_tokens=1, echo=True, logprobs=1)
    for prompt, choice in zip(prompts, got["choices"], strict=True):
        block = choice["logprobs"]
        generated = loaded.generate([GenerateRequest("law", prompt, 1, logprobs=1)])[0]
        whole = [*prompt, *generated.ids]
        want = loaded.score([ScoreItem("law", prompt[:1], [whole[1:]], top=1)])[0].continuations[0]
        assert [len(v) for v in block.values()] == [len(prompt) + 1] * 4
        assert block["token_logprobs"][0] is None
        assert block["token_logprobs"][1:] == pytest.approx(want.logprobs, abs=1e-4)
        assert choice["text"] == loaded.tokenizer.decode(prompt) + generated.text
        # The last token is the likeliest: its entry is the same number.
        assert max(block["top_logprobs"][-1].values()) == block["token_logprobs"][-1]
        starts = block["text_offset"]
        assert starts == [sum(map(len, block["tokens"][:i])) for i in range(len(starts))]


def test_echo_paths_agree(http: TestClient) -> None:
    """One greedy token comes from the scoring forward; two come from the generator."""
    body = {"prompt": [5, 9, 200, 31], "echo": True, "logprobs": 2}
    one, two = complete(http, **body, max_tokens=1), complete(http, **body, max_tokens=2)
    none = complete(http, **body, max_tokens=0)
    short, long = one["choices"][0]["logprobs"], two["choices"][0]["logprobs"]
    assert len(long["tokens"]) == 6
    assert short["tokens"] == long["tokens"][:5]
    assert short["token_logprobs"][1:] == pytest.approx(long["token_logprobs"][1:5], abs=1e-4)
    assert none["choices"][0]["logprobs"]["tokens"] == short["tokens"][:4]
    assert none["usage"]["completion_tokens"] == 0


def test_prompt_that_fills_the_context_can_be_echoed(http: TestClient) -> None:
    got = complete(http, prompt=[[7] * 256], max_tokens=1, echo=True, logprobs=1)
    assert len(got["choices"][0]["logprobs"]["tokens"]) == 257
    refused(http, "/v1/completions", {"model": "rand", "prompt": [7] * 257, "echo": True, "logprobs": 1}, 400)
    refused(http, "/v1/completions", {"model": "rand", "prompt": [7] * 256}, 400)


def test_alternatives_with_one_text_are_all_there(http: TestClient, loaded: TorchEngine) -> None:
    """Half of the tokens of this vocabulary are single bytes, and many decode to the same mark."""
    prompt = list(range(100, 160))
    got = complete(http, prompt=prompt, max_tokens=0, echo=True, logprobs=20)["choices"][0]["logprobs"]
    tops = loaded.prompt_logprobs(None, prompt, top=20).continuations[0].top
    assert any("token_id:" in key for top in got["top_logprobs"][1:] for key in top)
    for i, (own, top) in enumerate(zip(got["token_logprobs"][1:], got["top_logprobs"][1:], strict=True)):
        likely = prompt[i + 1] in dict(tops[i])
        assert len(top) == (20 if likely else 21)
        assert own in top.values()


def test_score(http: TestClient, loaded: TorchEngine) -> None:
    items = [
        {"context": [1, 2, 3], "continuations": [[4, 5], [6], []]},
        {"context": [9] * 300, "continuations": [[1]]},
    ]
    reply = http.post("/v1/score", json={"model": "rand:geo", "items": items}).json()
    want = loaded.score([ScoreItem("geo", i["context"], i["continuations"]) for i in items])  # type: ignore[arg-type]
    assert reply["model"] == "rand:geo"
    for got, expect in zip(reply["items"], want, strict=True):
        assert got["logprobs"] == pytest.approx([c.total for c in expect.continuations], abs=1e-4)
        assert got["tokens"] == [len(c.logprobs) for c in expect.continuations]
        assert got["greedy"] == [c.greedy for c in expect.continuations]
    assert [item["truncated"] for item in reply["items"]] == [False, True]


def test_chat_uses_the_template_and_streams_the_same(http: TestClient) -> None:
    talk = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Where does "}, {"type": "text", "text": "it end?"}],
        }
    ]
    body = {
        "model": "rand:law",
        "messages": talk,
        "max_tokens": 7,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    got = http.post("/v1/chat/completions", json=body).json()
    prompt = "Question: Where does it end?\nAnswer:"
    plain = complete(http, model="rand:law", prompt=prompt, max_tokens=7)["choices"][0]
    message = got["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", plain["text"].removeprefix(" "))
    entries = got["choices"][0]["logprobs"]["content"]
    assert [len(e["top_logprobs"]) for e in entries] == [2] * 7
    chunks = events(http.post("/v1/chat/completions", json=body | {"stream": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == message["content"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_seeded_sampling_repeats_and_choices_differ(http: TestClient) -> None:
    body = {"prompt": [1, 2], "temperature": 1.0, "seed": 5, "n": 4, "max_tokens": 8}
    first, second = complete(http, **body), complete(http, **body)
    texts = [c["text"] for c in first["choices"]]
    assert texts == [c["text"] for c in second["choices"]]
    assert len(set(texts)) > 1


def test_stop(http: TestClient) -> None:
    free = complete(http, prompt=[11, 12], max_tokens=30)["choices"][0]["text"]
    cut = complete(http, prompt=[11, 12], max_tokens=30, stop=free[3:6])["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (free[: free.index(free[3:6])], "stop")


def test_models_lists_base_and_registry(http: TestClient, service: Service) -> None:
    data = {entry["id"]: entry for entry in http.get("/v1/models").json()["data"]}
    assert list(data) == [
        "rand",
        "rand:bio@1",
        "rand:geo",
        "rand:geo@1",
        "rand:geo@2",
        "rand:law",
        "rand:law@1",
    ]
    assert data["rand"]["max_model_len"] == 256
    assert data["rand:geo"]["adapter"]["base"]["fingerprint"] == service.engine.fingerprint


def test_tokenizer_routes(http: TestClient, loaded: TorchEngine) -> None:
    text = "The fox é 日本"
    ids = loaded.tokenizer.encode(text)
    assert http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"] == ids
    assert http.post("/tokenize", json={"prompt": [text, ""]}).json()["tokens"] == [ids, []]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    info = http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["chat_template"]) == ("<|endoftext|>", loaded.tokenizer.chat_template)


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("nope", 404),
        ("rand:nope", 404),
        ("rand:geo@7", 404),
        ("rand:bio", 404),
        ("rand:..", 404),
        ("rand:../geo", 404),
        ("rand:/etc", 404),
        ("/etc/passwd", 404),
        ("rand:%2e%2e", 404),
        ("rand:geo/..", 404),
        ("rand:auto", 400),
        ("rand+rag", 400),
        ("", 404),
        ("x" * 201, 400),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_model_that_is_not_served(http: TestClient, model: str, status: int, stream: bool) -> None:
    talk = [{"role": "user", "content": "hi"}]
    refused(http, "/v1/completions", {"model": model, "prompt": "hi", "stream": stream}, status)
    refused(http, "/v1/chat/completions", {"model": model, "messages": talk, "stream": stream}, status)
    refused(http, "/v1/score", {"model": model, "items": [{"context": [1], "continuations": [[1]]}]}, status)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [512]},
        {"prompt": [-1]},
        {"prompt": [1.5]},
        {"prompt": ["a", 1]},
        {"prompt": None},
        {"prompt": [True]},
        {"max_tokens": -1},
        {"max_tokens": "5"},
        {"temperature": -0.1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"n": 0},
        {"n": 17},
        {"logprobs": 21},
        {"logprobs": -1},
        {"stop": ["x"] * 65},
        {"stop": [1]},
        {"stop": "x" * 1001},
        {"seed": 2**70},
        {"echo": "yes"},
        {"stream": 1},
        {"suffix": "x"},
        {"best_of": 3},
        {"presence_penalty": 0.5},
        {"logit_bias": {"5": 1}},
        {"top_k": 3},
        {"prompt": [1] * 300},
    ],
)
def test_bad_completion_requests_are_400(http: TestClient, change: dict[str, Any]) -> None:
    error = refused(http, "/v1/completions", {"model": "rand", "prompt": "hi"} | change, 400)
    assert error["type"] == "invalid_request_error"
    if "streams" not in change:
        refused(http, "/v1/completions", {"model": "rand", "prompt": "hi", "stream": True} | change, 400)


def test_what_openai_clients_send_without_meaning_is_accepted(http: TestClient) -> None:
    neutral = {
        "user": "me",
        "metadata": {"a": "b"},
        "presence_penalty": 0,
        "logit_bias": {},
        "best_of": 1,
        "stop": None,
        "seed": None,
        "suffix": None,
    }
    complete(http, prompt="hi", **neutral)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [{"role": "user"}, {"content": "x"}]},
        {"messages": [{"role": "users", "content": "x"}]},
        {"top_logprobs": 2},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"max_tokens": 0},
    ],
)
def test_bad_chat_requests_are_400(http: TestClient, body: dict[str, Any]) -> None:
    talk = {"model": "rand", "messages": [{"role": "user", "content": "hi"}]}
    refused(http, "/v1/chat/completions", talk | body, 400)


def test_a_developers_message_is_the_systems(http: TestClient, service: Service) -> None:
    """Templates such as Qwen's pass over roles that they do not know."""
    tokenizer = service.engine.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}Rules: {{ m.content }}\n"
        "{% elif m.role == 'user' %}Question: {{ m.content }}\n{% endif %}{% endfor %}Answer:"
    )
    try:
        used = []
        for role in ("system", "developer"):
            messages = [{"role": role, "content": "be short"}, {"role": "user", "content": "hi"}]
            body = {"model": "rand", "messages": messages, "temperature": 0, "max_tokens": 3}
            reply = http.post("/v1/chat/completions", json=body).json()
            used.append((reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]))
    finally:
        tokenizer.chat_template = before
    assert used[0] == used[1]
    assert used[0][1] == len(tokenizer.encode("Rules: be short\nQuestion: hi\nAnswer:"))


def test_echo_with_logprobs_keeps_to_stop_and_to_n(http: TestClient) -> None:
    prompt = "The quick brown"
    (choice,) = complete(http, prompt=prompt, max_tokens=1)["choices"]
    assert choice["text"]
    asked = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "stop": [choice["text"]]}
    (stopped,) = complete(http, **asked)["choices"]
    assert (stopped["text"], stopped["finish_reason"]) == (prompt, "stop")
    echoed = complete(http, prompt=[prompt, "fox"], max_tokens=0, echo=True, n=2)["choices"]
    assert [(c["index"], c["text"]) for c in echoed] == [(0, prompt), (1, prompt), (2, "fox"), (3, "fox")]


def test_one_model_is_told_by_its_id(http: TestClient) -> None:
    for model in ("rand", "rand:geo", "rand:geo@2"):
        listed = [entry for entry in http.get("/v1/models").json()["data"] if entry["id"] == model]
        assert [http.get(f"/v1/models/{model}").json()] == listed
    for unknown in ("rand:geo@7", "other", "a/b", "x" * 300):
        reply = http.get(f"/v1/models/{unknown}")
        assert reply.status_code == (404 if len(unknown) < 300 else 400), reply.text
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"model": "rand", "items": []}),
        ("/v1/score", {"model": "rand", "items": [{"context": [], "continuations": [[1]]}]}),
        ("/v1/score", {"model": "rand", "items": [{"context": [1], "continuations": []}]}),
        ("/v1/score", {"model": "rand", "items": [{"context": [1], "continuations": [[600]]}]}),
        ("/v1/score", {"model": "rand", "items": [{"context": [1], "continuations": [[1] * 257]}]}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {"tokens": [600]}),
        ("/detokenize", {"tokens": "abc"}),
    ],
)
def test_bad_bodies_are_400(http: TestClient, path: str, body: Any) -> None:
    refused(http, path, body, 400)


def test_errors_of_http_itself_have_the_same_shape(http: TestClient) -> None:
    as_json = {"content-type": "application/json"}
    bodies: list[bytes] = [b"{", b"", b'"', b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000, b"\x00", b"nul"]
    bodies += [
        b'{"prompt": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "a"}',
    ]
    for body in bodies:
        reply = http.post("/tokenize", content=body, headers=as_json)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error"), body[:20]
    nowhere = http.get("/nowhere")
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "not_found_error")
    assert nowhere.json()["error"]["code"] is None
    assert http.get("/v1/models/", follow_redirects=False).status_code == 404  # no redirect to a given Host
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        unread = http.post("/tokenize", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert unread.status_code == 415
        assert "application/json" in unread.json()["error"]["message"]
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        read = http.post("/tokenize", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert read.status_code == 200


def test_a_body_of_many_mistakes_is_refused_at_the_first(http: TestClient) -> None:
    """An error object for each would take gigabytes."""
    for body in (
        {"model": "rand", "prompt": [{}] * 100_000},
        {"model": "rand", "prompt": [[{}] * 100_000]},
        {"model": "rand", "prompt": "a"} | dict.fromkeys(map(str, range(100_000)), 1),
    ):
        with pytest.raises(ValidationError) as error:
            CompletionRequest.model_validate(body)
        assert error.value.error_count() <= 4
        refused(http, "/v1/completions", body, 400)


def test_openapi_tells_what_there_is(http: TestClient) -> None:
    schema = http.get("/openapi.json").json()
    operations = {path: next(iter(operation.values())) for path, operation in schema["paths"].items()}
    assert set(operations) == {
        *("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/score"),
        *("/v1/models/{model}", "/v1/embeddings", "/tokenize", "/detokenize", "/tokenizer_info"),
    }
    told = operations["/v1/completions"]["responses"]
    assert {"200", "400", "401", "404", "409", "413", "415", "429", "500", "503", "504"} <= set(told)
    assert "422" not in str(schema)
    assert set(told["200"]["content"]) == {"application/json", "text/event-stream"}


def test_no_other_origin_is_allowed(http: TestClient) -> None:
    """A page elsewhere may neither read answers nor send JSON without a preflight, which fails."""
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert http.options("/v1/completions", headers=headers).status_code >= 400
    reply = http.get("/v1/models", headers=headers)
    assert not [name for name in reply.headers if name.startswith("access-control")]
    simple = http.post(
        "/v1/completions", content=b'{"model": "rand", "prompt": "a"}', headers={"content-type": "text/plain"}
    )
    assert simple.status_code == 415


def test_adapter_of_another_base_is_409(
    http: TestClient, registry: Registry, adapter_dirs: dict[str, Path]
) -> None:
    registry.publish("alien", adapter_dirs["geo"], {"base": {"id": "qwen-other", "fingerprint": "ab" * 32}})
    try:
        error = refused(http, "/v1/completions", {"model": "rand:alien@1", "prompt": "a"}, 409)
        assert "qwen-other" in error["message"]
        assert "rand:alien@1" not in [entry["id"] for entry in http.get("/v1/models").json()["data"]]
        assert "rand" in error["message"]
    finally:
        (registry.root / "alien").rename(registry.root / ".alien")  # out of the other tests' lists


def test_failure_of_the_model_is_500_without_details_then_all_is_well(
    http: TestClient, service: Service
) -> None:
    engine, original = service.engine, service.engine.last_logits

    def failing(*_: Any) -> Any:
        raise RuntimeError("secret path /x/y")

    engine.last_logits = failing  # type: ignore[method-assign]
    try:
        for stream in (False, True):
            error = refused(http, "/v1/completions", {"model": "rand", "prompt": "a", "stream": stream}, 500)
            assert "secret" not in error["message"]
    finally:
        engine.last_logits = original  # type: ignore[method-assign]
    complete(http, prompt="a")


def test_nan_from_the_model_fails_its_own_request_only(http: TestClient, service: Service) -> None:
    head = service.engine.model.get_output_embeddings()

    def poison(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.fill_(float("nan"))

    handle = head.register_forward_hook(poison)
    try:
        refused(
            http, "/v1/score", {"model": "rand", "items": [{"context": [1], "continuations": [[2]]}]}, 500
        )
        refused(http, "/v1/completions", {"model": "rand", "prompt": "a", "temperature": 0}, 500)
    finally:
        handle.remove()
    complete(http, prompt="a")
