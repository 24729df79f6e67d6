"""What answers a prompt: the router's choice and what is read before the question. No Ray, no HTTP."""

from __future__ import annotations

import asyncio
import base64
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.registry import Registry
from qwen_ray.serving.assistant import Route, question_of
from qwen_ray.serving.completions import Completions
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.protocol import ChatRequest, CompletionRequest, EmbeddingsRequest, ScoreRequest
from qwen_ray.serving.service import Service
from tests.serving.conftest import ask
from tests.serving.fixed_assistant import FixedAssistant, passage
from tests.serving.test_scheduler import held

RIVER, LAW = "Where does the river begin?", "What does the fox jump over?"
NOTES = "Use these notes where they help.\n[1] The river begins in the mountains.\n\n"


@pytest.fixture(scope="module")
def assistant() -> FixedAssistant:
    routes = {
        "river": Route("geo", 0.8, "rivers"),
        "fox": Route("law", 0.7, "law"),
        "snow": Route("gone", 0.9, "snow"),
        "delta": Route(None, 0.9, "rivers"),
    }
    return FixedAssistant(routes, {"rivers": [passage("The river begins in the mountains.")]})


@pytest.fixture(scope="module")
def service(model_dir: Path, registry: Registry, assistant: FixedAssistant) -> Iterator[Service]:
    service = Service.load(str(model_dir), registry=registry.root, assistant=assistant)
    yield service
    service.stop()


def complete(service: Service, model: str, prompt: Any, **more: Any) -> dict[str, Any]:
    return ask(
        service,
        "completion",
        CompletionRequest(model=model, prompt=prompt, max_tokens=5, temperature=0, **more),
    )


def greedy(loaded: TorchEngine, adapter: str | None, text: str) -> str:
    return loaded.generate([GenerateRequest(adapter, loaded.tokenizer.encode(text), 5)])[0].text


def greedy_after_notes(loaded: TorchEngine, adapter: str | None, text: str) -> str:
    tokens = [*loaded.tokenizer.encode(NOTES), *loaded.tokenizer.encode(text)]
    return loaded.generate([GenerateRequest(adapter, tokens, 5)])[0].text


def test_the_router_chooses_for_each_prompt_of_a_request(service: Service, loaded: TorchEngine) -> None:
    got = complete(service, "rand:auto", [RIVER, LAW, "1 + 2 ="])
    wanted = [greedy(loaded, key, text) for key, text in (("geo", RIVER), ("law", LAW), (None, "1 + 2 ="))]
    assert len(set(wanted)) == 3
    assert [choice["text"] for choice in got["choices"]] == wanted
    assert got["qwen_ray"]["prompts"] == [
        {"adapter": "geo@1", "route": {"domain": "rivers", "score": 0.8}},
        {"adapter": "law@1", "route": {"domain": "law", "score": 0.7}},
        {"adapter": None, "route": {"domain": None, "score": 0.1}},
    ]


def test_the_base_answers_where_the_routers_choice_is_not_served(
    service: Service, loaded: TorchEngine
) -> None:
    got = complete(service, "rand:auto", "snow melts")
    assert got["choices"][0]["text"] == greedy(loaded, None, "snow melts")
    assert got["qwen_ray"]["prompts"][0]["adapter"] is None


def test_only_the_last_question_of_a_prompt_is_routed(service: Service) -> None:
    """Solved examples of another subject come before it."""
    prompt = f"Question: {LAW}\nAnswer: the dog\n\nQuestion: {RIVER}\nAnswer:"
    assert complete(service, "rand:auto", prompt)["qwen_ray"]["prompts"][0]["adapter"] == "geo@1"
    assert question_of("\n\n") == ""


def test_passages_are_read_before_the_prompt_and_cited(service: Service, loaded: TorchEngine) -> None:
    got = complete(service, "rand:geo+rag", RIVER)
    tokens = [*loaded.tokenizer.encode(NOTES), *loaded.tokenizer.encode(RIVER)]
    assert got["choices"][0]["text"] == loaded.generate([GenerateRequest("geo", tokens, 5)])[0].text
    assert got["usage"]["prompt_tokens"] == len(tokens)
    (prompt,) = got["qwen_ray"]["prompts"]
    assert prompt["adapter"] == "geo@1"
    (citation,) = prompt["citations"]
    assert citation["source"] == "A book"
    assert citation["license"] == "CC BY 4.0"
    assert citation["version"] == 3


def test_echo_and_log_probabilities_are_of_the_clients_own_tokens(
    service: Service, loaded: TorchEngine
) -> None:
    """As lm-eval asks; it counts its own tokens and would read another's figures if there were more."""
    ids, notes = loaded.tokenizer.encode(RIVER), loaded.tokenizer.encode(NOTES)
    body = {
        "model": "rand+rag",
        "prompt": ids,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
    }
    choice = ask(service, "completion", CompletionRequest(**body))["choices"][0]
    got = choice["logprobs"]["token_logprobs"]
    scored = loaded.score([ScoreItem(None, [*notes, ids[0]], [ids[1:]])])[0].continuations[0].logprobs
    assert got[0] is None
    assert got[1:-1] == pytest.approx(scored, abs=1e-4)
    assert len(got) == len(ids) + 1
    assert choice["text"].startswith(RIVER)


def test_the_chat_reads_the_notes_with_the_last_question(service: Service, loaded: TorchEngine) -> None:
    talk = [{"role": "user", "content": LAW}, {"role": "assistant", "content": "A dog."}]
    talk.append({"role": "user", "content": RIVER})
    body = ChatRequest(model="rand:auto+rag", messages=talk, max_tokens=5, temperature=0)
    got = ask(service, "chat", body)
    talk[-1]["content"] = NOTES + RIVER
    text = loaded.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert got["choices"][0]["message"]["content"] == greedy(loaded, "geo", text)
    assert [c["knowledge_base"] for c in got["qwen_ray"]["prompts"][0]["citations"]] == ["rivers"]


def test_a_stream_says_who_answers_in_its_first_chunk(service: Service) -> None:
    async def read() -> list[dict[str, Any]]:
        body = CompletionRequest(
            model="rand:auto+rag", prompt=RIVER, max_tokens=3, temperature=0, stream=True
        )
        return [envelope["ok"] async for envelope in service.stream("completion", body)]

    chunks = asyncio.run(read())
    assert chunks[0]["qwen_ray"]["prompts"][0]["adapter"] == "geo@1"
    assert not any("qwen_ray" in chunk for chunk in chunks[1:])


def test_an_abstaining_router_reads_nothing_and_a_domain_only_its_own(
    service: Service, assistant: FixedAssistant
) -> None:
    for prompt in ("1 + 2 =", LAW):  # no domain; a domain without a knowledge base
        about = complete(service, "rand:auto+rag", prompt)["qwen_ray"]["prompts"][0]
        assert about["citations"] == []
    assert complete(service, "rand:law+rag", LAW)["qwen_ray"]["prompts"][0]["citations"]  # from all of them


def test_a_domain_without_an_adapter_is_read_about_all_the_same(
    service: Service, loaded: TorchEngine
) -> None:
    """A knowledge base helps before there is an adapter; only a router that abstains reads nothing."""
    got = complete(service, "rand:auto+rag", "Where is the delta?")
    about = got["qwen_ray"]["prompts"][0]
    assert (about["adapter"], about["route"]["domain"]) == (None, "rivers")
    assert [citation["knowledge_base"] for citation in about["citations"]] == ["rivers"]
    assert got["choices"][0]["text"] == greedy_after_notes(loaded, None, "Where is the delta?")


def test_passages_that_leave_no_room_are_left_out(service: Service, assistant: FixedAssistant) -> None:
    """The model's context is 256 tokens."""
    long = " ".join(["mountain"] * 100)
    assistant.passages = {"rivers": [passage("The river begins in the mountains."), passage(long)]}
    try:
        citations = complete(service, "rand+rag", RIVER)["qwen_ray"]["prompts"][0]["citations"]
        assert [c["text"] for c in citations] == ["The river begins in the mountains."]
        talk = [{"role": "user", "content": RIVER}]
        got = ask(service, "chat", ChatRequest(model="rand+rag", messages=talk, max_tokens=5))
        assert len(got["qwen_ray"]["prompts"][0]["citations"]) == 1
    finally:
        assistant.passages = {"rivers": [passage("The river begins in the mountains.")]}


def test_one_call_scores_several_models(service: Service, loaded: TorchEngine) -> None:
    context, choices = loaded.tokenizer.encode(RIVER), [[5, 6], [7]]
    ids = ["rand", "rand:geo", "rand:geo@2", "rand:law", "rand:auto", "rand:law+rag"]
    body = ScoreRequest(models=ids, items=[{"context": context, "continuations": choices}])
    got = ask(service, "score", body)["models"]
    notes = loaded.tokenizer.encode(NOTES)
    for model, key, tokens in (
        ("rand", None, context),
        ("rand:geo", "geo", context),
        ("rand:geo@2", "bio", context),
        ("rand:law", "law", context),
        ("rand:auto", "geo", context),
        ("rand:law+rag", "law", [*notes, *context]),
    ):
        want = [c.total for c in loaded.score([ScoreItem(key, tokens, choices)])[0].continuations]
        assert got[model]["items"][0]["logprobs"] == pytest.approx(want, abs=1e-4), model
        alone = ask(service, "score", ScoreRequest(model=model, items=body.items))
        assert alone["items"][0]["logprobs"] == pytest.approx(want, abs=1e-4), model
        assert alone["qwen_ray"] == got[model]["qwen_ray"]
    assert got["rand:geo@2"]["qwen_ray"]["prompts"] == [{"adapter": "geo@2"}]


@pytest.mark.parametrize("form", [{}, {"model": "rand", "models": ["rand"]}, {"models": ["rand", "rand"]}])
def test_a_score_request_names_its_models_once(form: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="model"):
        ScoreRequest(**form, items=[{"context": [1], "continuations": [[2]]}])


def test_the_list_has_every_id_that_answers(service: Service) -> None:
    data = {entry["id"]: entry for entry in ask(service, "models", None)["data"]}
    assert {"rand", "rand:geo", "rand:geo@2", "rand:auto", "rand+rag", "rand:geo+rag"} <= set(data)
    assert "rand:auto+rag" in data
    assert "rand:geo@2+rag" not in data  # answers, but would double the list
    assert data["rand:auto+rag"]["knowledge_bases"] == [{"name": "rivers", "version": 3}]
    assert data["fixed"]["embeddings"]
    for model in set(data) - {"fixed"}:
        complete(service, model, RIVER)


def test_embeddings_in_both_forms(service: Service) -> None:
    request = {"model": "fixed", "input": ["abc", "de"]}
    plain = ask(service, "embeddings", EmbeddingsRequest(**request))
    packed = ask(service, "embeddings", EmbeddingsRequest(**request, encoding_format="base64"))
    assert [entry["embedding"] for entry in plain["data"]] == [[1.0, 3.0], [1.0, 2.0]]
    raw = [base64.b64decode(entry["embedding"]) for entry in packed["data"]]
    assert [list(struct.unpack("<2f", values)) for values in raw] == [[1.0, 3.0], [1.0, 2.0]]
    assert plain["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    error = asyncio.run(service.call("embeddings", EmbeddingsRequest(model="rand", input="a")))["error"]
    assert error["status"] == 404


@pytest.mark.parametrize(("model", "word"), [("rand:auto", "router"), ("rand+rag", "knowledge base")])
def test_a_server_without_the_part_says_so(model_dir: Path, model: str, word: str) -> None:
    service = Service.load(str(model_dir))
    try:
        body = CompletionRequest(model=model, prompt="a", max_tokens=1)
        error = asyncio.run(service.call("completion", body))["error"]
        assert error["status"] == 400
        assert word in error["message"]
    finally:
        service.stop()


def test_long_text_is_encoded_beside_the_event_loop_and_short_text_at_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a long text is held up, short ones are answered."""
    go, encode = threading.Event(), Completions.encode

    def slow(self: Completions, text: str, **more: Any) -> list[int]:
        if len(text) > 2**14:
            assert go.wait(30)
        return encode(self, text, **more)

    monkeypatch.setattr(Completions, "encode", slow)
    monkeypatch.setattr(service._completions, "_most_bytes", 2**20)
    body = {"model": "rand", "max_tokens": 1}
    long, message = "a" * 2**15, {"role": "user", "content": "a" * 2**15}

    async def ask() -> list[dict[str, Any]]:
        held = [
            asyncio.create_task(service.call("completion", CompletionRequest(prompt=long, **body))),
            asyncio.create_task(
                service.call("chat", ChatRequest.model_validate({"messages": [message]} | body))
            ),
        ]
        await asyncio.sleep(0.05)
        assert "ok" in await service.call("completion", CompletionRequest(prompt="hi", **body))
        assert not any(task.done() for task in held)
        go.set()
        return [await task for task in held]

    assert [answer["error"]["status"] for answer in asyncio.run(ask())] == [400, 400]


def test_text_that_no_context_holds_is_refused_unread(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Completions, "encode", lambda *_, **__: pytest.fail("encoded"))
    text = "a" * 2**20
    messages = [{"role": "user", "content": text}]
    for method, body in (
        ("completion", CompletionRequest(model="rand", prompt=text)),
        ("chat", ChatRequest.model_validate({"model": "rand", "messages": messages})),
    ):
        error = asyncio.run(service.call(method, body))["error"]
        assert error["status"] == 400
        assert "do not fit" in error["message"]


def test_more_adapters_in_a_request_than_places_for_them(service: Service) -> None:
    service.engine.max_adapters = 1  # type: ignore[attr-defined] # as vLLM's has
    try:
        items = [{"context": [1], "continuations": [[2]]}]
        both = ScoreRequest.model_validate({"models": ["rand:geo", "rand:law"], "items": items})
        error = asyncio.run(service.call("score", both))["error"]
        assert error["status"] == 413
        assert "holds 1 at once" in error["message"]
        one = ScoreRequest.model_validate({"models": ["rand", "rand:geo", "rand:geo+rag"], "items": items})
        assert len(ask(service, "score", one)["models"]) == 3
    finally:
        del service.engine.max_adapters  # type: ignore[attr-defined]


def test_a_refused_prompt_ends_its_request_at_once(service: Service) -> None:
    """Its other prompts are not waited for."""
    scheduler, generate = service.scheduler, service.scheduler.generate
    started: list[Any] = []

    def second_fails(requests: Any, *rest: Any) -> Any:
        first, second = generate(requests, *rest)
        second.cancel()
        second.future = Future()
        second.future.set_exception(UserError("busy", status=429))
        started.append(first)
        return [first, second]

    scheduler.generate = second_fails  # type: ignore[method-assign]
    gate = held(service.scheduler)
    try:
        body = CompletionRequest(model="rand", prompt=["a", "b"], max_tokens=200, temperature=0)
        assert asyncio.run(service.call("completion", body))["error"]["status"] == 429
    finally:
        gate.set()
        del scheduler.generate  # type: ignore[method-assign]
    assert started[0].future.result(30).finish_reason == "cancelled"
