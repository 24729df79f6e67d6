"""Everything a replica does for a request, without HTTP and without Ray.

Answers travel in an envelope, ``{"ok": value}`` or ``{"error": {"status", "message", "param"}}``, so that
bad input crosses process borders as data and no traceback ever reaches a client.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.registry import NAME, Registry
from qwen_ray.serving.adapters import DEFAULT_BYTES, AdapterStore, Use
from qwen_ray.serving.assistant import (
    NOTES,
    Assistant,
    NoAssistant,
    Passage,
    Route,
    control_tokens,
    question_of,
)
from qwen_ray.serving.canary import on_canary
from qwen_ray.serving.completions import Completions, Json, Plan, Prompt, finite
from qwen_ray.serving.engines.base import ScoreItem, ScoreResult, ServedEngine
from qwen_ray.serving.engines.packing import check_ids
from qwen_ray.serving.model_id import AUTO, RAG, ModelId, parse
from qwen_ray.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    ModelRequest,
    ScoreRequest,
    TokenizeRequest,
)

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass
class Assigned:
    """What answers one prompt: an adapter or the base, after reading passages."""

    model: ModelId
    use: Use
    passages: list[Passage]
    route: Route | None = None
    prefix: list[int] = field(default_factory=list)
    canary: str | None = None
    """The canary whose turn it is; another answers only if that one cannot be loaded."""

    def describe(self) -> Json:
        """As the response says it."""
        about: Json = {"adapter": self.use.name}
        if self.route is not None:
            domain = None if self.route.abstains else self.route.domain
            about["route"] = {"domain": domain, "score": round(self.route.score, 4)}
        if self.canary is not None:
            about["canary"] = self.canary
        if self.model.rag:
            about["citations"] = [passage.citation() for passage in self.passages]
        return about


class _Failed(Exception):
    """A request failed, for the reason that is this one's cause, after it was known what would answer it."""

    def __init__(self, assigned: Sequence[Assigned]) -> None:
        super().__init__()
        self.assigned = [*assigned]


class Service:
    """One engine with its queue and adapters, behind :meth:`call` and :meth:`stream`."""

    def __init__(
        self,
        engine: ServedEngine,
        *,
        registry: Path | str | None = None,
        adapters: dict[str, Path] | None = None,
        adapter_bytes: int = DEFAULT_BYTES,
        assistant: Assistant | None = None,
        notes_template: str = NOTES,
        max_waiting_tokens: int | None = None,
    ) -> None:
        """``assistant``: router and knowledge bases, for ``:auto`` and ``+rag``. ``notes_template`` holds
        ``{passages}``, the numbered passages that the model reads before the question.
        ``max_waiting_tokens``: beyond them requests are refused; None: a minute's work."""
        if not NAME.fullmatch(engine.id):
            raise UserError(
                f"'{engine.id}' cannot be a model's name on the API",
                fix="rename the folder: lower-case letters, digits, dot, dash and underscore, at most 64",
            )
        self.engine = engine
        self.scheduler = engine.queue(max_waiting_tokens=max_waiting_tokens)
        self.store = AdapterStore(
            engine,
            registry=None if registry is None else Registry(registry),
            folders=adapters,
            max_bytes=adapter_bytes,
            on_model=self.scheduler.call,
        )
        self.assistant = assistant or NoAssistant()
        self.notes_template = notes_template
        self._completions = Completions(engine, self.scheduler)
        self._control = control_tokens(engine.tokenizer)
        self._calls: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "models": self._models,
            "model": self._model,
            "health": self._health,
            "tokenizer_info": self._tokenizer_info,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
            "score": self._score,
            "completion": self._completion,
            "chat": self._completion,
            "embeddings": self._embeddings,
        }

    @classmethod
    def load(cls, model: str, *, threads: int = 1, **settings: Any) -> Service:
        """Load the named model (see :func:`qwen_ray.models.resolve`) and serve it."""
        from qwen_ray.serving.engines.torch import TorchEngine

        return cls(TorchEngine.load(models.resolve(model), threads=threads), **settings)

    async def call(self, method: str, body: Any = None) -> Json:
        """The envelope with the answer to one request."""
        try:
            return {"ok": await self._calls[method](body)}
        except Exception as e:
            return _error(e)

    async def stream(self, method: str, body: CompletionRequest | ChatRequest) -> AsyncIterator[Json]:
        """Envelopes with response chunks; an error ends the stream."""
        try:
            async with self._planned(body) as (plan, about):
                first = about
                async for chunk in self._completions.stream(plan):
                    yield {"ok": chunk | first}
                    first = {}
        except Exception as e:
            yield _error(e)

    def stop(self) -> None:
        self.scheduler.stop()

    # -- models

    def _known(self, model: str) -> ModelId:
        parsed = parse(model)
        if parsed.base != self.engine.id:
            raise UserError(
                f"unknown model '{model}'",
                fix=f"this server has '{self.engine.id}'; see GET /v1/models",
                status=404,
            )
        return parsed

    @asynccontextmanager
    async def _assigned(
        self,
        model: str,
        questions: Callable[[], list[str]],
        count: int,
        *,
        openings: Callable[[], list[str]] | None = None,
    ) -> AsyncIterator[list[Assigned]]:
        """What answers each of the ``count`` prompts of a request, with the adapters held in memory.

        ``openings``: how the conversation of each began, if it is one: all of it goes to the same version.
        """
        parsed = self._known(model)
        asked = [question_of(text) for text in questions()] if parsed.auto or parsed.rag else []
        routes = await self.assistant.route(asked) if parsed.auto else []
        passages = await self._passages(parsed, asked, routes) if parsed.rag else [[]] * count
        async with AsyncExitStack() as stack:
            if parsed.auto:
                texts = (openings or questions)()
                assigned = await self._routed(stack, parsed, routes, texts, passages)
            else:
                used = await stack.enter_async_context(self.store.use(parsed))
                assigned = [Assigned(parsed, used, found) for found in passages]
            try:
                yield assigned
            except _Failed as e:  # of a request for several models
                e.assigned += assigned
                raise
            except Exception as e:
                raise _Failed(assigned) from e

    async def _routed(
        self,
        stack: AsyncExitStack,
        model: ModelId,
        routes: Sequence[Route],
        texts: Sequence[str],
        passages: Sequence[list[Passage]],
    ) -> list[Assigned]:
        """The router's choices, at their production versions, or at a canary where it is its turn."""
        canaries = {name: await self.store.canary(name) for name in _each(r.adapter for r in routes) if name}
        assigned = []
        for route, text, found in zip(routes, texts, passages, strict=True):
            one = Assigned(model, Use(), found, route)
            canary = canaries.get(route.adapter or "")
            if route.adapter and canary and on_canary(route.adapter, canary, text):
                one.canary = f"{route.adapter}@{canary.version}"
            assigned.append(one)
        wanted = _each((one.route.adapter if one.route else None, one.canary) for one in assigned)
        uses = {key: await self._chosen(stack, model, *key) for key in wanted}
        for one in assigned:
            one.use = uses[one.route.adapter if one.route else None, one.canary]
        return assigned

    async def _chosen(
        self, stack: AsyncExitStack, model: ModelId, adapter: str | None, canary: str | None
    ) -> Use:
        """The adapter that the router chose; the base where it is not served. A canary that cannot be loaded
        fails no request."""
        if canary is not None:
            try:
                asked = ModelId(model.base, adapter, canary.partition("@")[2])
                return await stack.enter_async_context(self.store.use(asked))
            except UserError as e:
                log.warning("the canary %s cannot answer: %s", canary, e.what)
        try:
            return await stack.enter_async_context(self.store.use(ModelId(model.base, adapter)))
        except UserError as e:
            if e.status != 404:
                raise
            log.warning("the router chose an adapter that is not served: %s", e.what)
            return Use()

    async def _passages(
        self, model: ModelId, questions: list[str], routes: Sequence[Route]
    ) -> list[list[Passage]]:
        """What to read on each question: of its domain or of all; nothing if the router abstains."""
        if not model.auto:
            return await self.assistant.retrieve(questions, model.adapter)
        found: list[list[Passage]] = [[] for _ in questions]
        chosen = [None if route.abstains else route.domain for route in routes]
        for domain in sorted({name for name in chosen if name}):
            members = [i for i, name in enumerate(chosen) if name == domain]
            lists = await self.assistant.retrieve([questions[i] for i in members], domain, only=True)
            for i, passages in zip(members, lists, strict=True):
                found[i] = passages
        return found

    async def _models(self, _: None) -> Json:
        """Every id that can be asked for: base, adapters, the router's choice, and these with retrieval."""
        available = await self.store.listing(self.engine.fingerprint)
        about = await self.assistant.describe()
        base = self.engine.id
        entries: list[Json] = [{"id": base, "fingerprint": self.engine.fingerprint, "parent": None}]
        entries += [{"id": f"{base}:{name}", "parent": base, "adapter": facts} for name, facts in available]
        if about["router"]:
            entries.append({"id": f"{base}:{AUTO}", "parent": base, "router": about["router"]})
        if bases := about["knowledge_bases"]:
            read = [{"id": f"{e['id']}+{RAG}", "parent": base} for e in entries if "@" not in e["id"]]
            entries += [entry | {"knowledge_bases": bases} for entry in read]
        common = {"object": "model", "created": 0, "owned_by": "qwen-ray"}
        served = [entry | common | {"max_model_len": self.engine.context_length} for entry in entries]
        if about["embedder"]:
            served.append({"id": about["embedder"], **common, "parent": None, "embeddings": True})
        return {"object": "list", "data": served}

    async def _model(self, body: ModelRequest) -> Json:
        """What :meth:`_models` says of one."""
        for entry in (await self._models(None))["data"]:
            if entry["id"] == body.model:
                return dict(entry)
        raise UserError(f"unknown model '{body.model}'", fix="see GET /v1/models", status=404)

    async def _health(self, _: None) -> Json:
        if not self.scheduler.alive:
            raise RuntimeError("the model's thread has ended")
        return {
            "status": "ok",
            "model": self.engine.id,
            "load": self.scheduler.load,
            "adapters": len(self.store.resident),
        }

    # -- tokens

    async def _tokenizer_info(self, _: None) -> Json:
        tokenizer = self.engine.tokenizer
        names = ("eos_token", "bos_token", "pad_token", "unk_token")
        return {
            **{name: getattr(tokenizer, name, None) for name in names},
            "tokenizer_class": type(tokenizer).__name__,
            "name_or_path": self.engine.id,
            "vocab_size": self.engine.vocabulary,
            "chat_template": tokenizer.chat_template,
        }

    async def _tokenize(self, body: TokenizeRequest) -> Json:
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt

        def encode() -> list[list[int]]:
            special = body.add_special_tokens
            encoded = self.engine.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
            return [list(row) for row in encoded]

        ids = await self._completions.aside(sum(map(len, texts)), encode) if texts else []
        return {
            "tokens": ids[0] if isinstance(body.prompt, str) else ids,
            "count": sum(map(len, ids)),
            "max_model_len": self.engine.context_length,
        }

    async def _detokenize(self, body: DetokenizeRequest) -> Json:
        check_ids(body.tokens, "tokens", vocabulary=self.engine.vocabulary)
        text = await self._completions.aside(len(body.tokens), lambda: self._completions.decode(body.tokens))
        return {"prompt": text}

    # -- scores and text

    async def _score(self, body: ScoreRequest) -> Json:
        """All models in one call, so that they share forwards."""
        models = body.models or [str(body.model)]
        self._check_places(models)
        for item in body.items:
            check_ids(item.context, "context", vocabulary=self.engine.vocabulary)

        def texts() -> list[str]:
            return [self._completions.decode(item.context) for item in body.items]

        async with AsyncExitStack() as stack:
            assigned = [
                await stack.enter_async_context(self._assigned(model, texts, len(body.items)))
                for model in models
            ]
            items = []
            for of_model in assigned:
                for item, one in zip(body.items, of_model, strict=True):
                    longest = max(map(len, item.continuations))
                    one.prefix = self._prefix(one, len(item.context) + longest - 1)
                    context = [*one.prefix, *item.context]
                    items.append(ScoreItem(one.use.key, context, item.continuations))
            scored = await asyncio.wrap_future(self.scheduler.score(items))
        results = iter(scored)
        answers = [
            {"items": [_scored(next(results)) for _ in body.items]} | _answered(of_model)
            for of_model in assigned
        ]
        if body.model is not None:
            return {"model": body.model, **answers[0]}
        return {"models": dict(zip(models, answers, strict=True))}

    def _check_places(self, models: Sequence[str]) -> None:
        """:class:`UserError` for more adapters in one request than the engine has places for: they would wait
        for one another."""
        places: int | None = getattr(self.engine, "max_adapters", None)
        asked = {(m.adapter, m.at) for m in map(self._known, models) if m.adapter and not m.auto}
        if places is not None and len(asked) > places:
            raise UserError(
                f"the request names {len(asked)} adapters, this server holds {places} at once",
                where="models",
                fix="send it in parts, or start the server with a larger max_adapters",
                status=413,
            )

    async def _completion(self, body: CompletionRequest | ChatRequest) -> Json:
        async with self._planned(body) as (plan, about):
            return await self._completions.run(plan) | about

    @asynccontextmanager
    async def _planned(self, body: CompletionRequest | ChatRequest) -> AsyncIterator[tuple[Plan, Json]]:
        """The plan of a request, and what its answer says of who answered."""
        if isinstance(body, ChatRequest):
            for message in body.messages:
                self._completions.check_fits(message.content, "messages")
            users = [message.content for message in body.messages if message.role == "user"]
            async with self._assigned(
                body.model, lambda: users[-1:] or [""], 1, openings=lambda: users[:1] or [""]
            ) as (one,):
                size = sum(len(message.content) for message in body.messages)
                ids = await self._completions.aside(size, lambda: self._talk(body, one))
                prompt = Prompt(ids, adapter=one.use.key)
                yield self._completions.plan_chat(body, prompt), _answered([one])
            return
        size = len(body.prompt)
        if not isinstance(body.prompt, str):
            size = sum(1 if isinstance(part, int) else len(part) for part in body.prompt)
        prompts = await self._completions.aside(size, lambda: self._completions.prompts(body))

        def texts() -> list[str]:
            return [prompt.text or self._completions.decode(prompt.ids) for prompt in prompts]

        async with self._assigned(body.model, texts, len(prompts)) as assigned:
            for prompt, one in zip(prompts, assigned, strict=True):
                prompt.adapter = one.use.key
                prompt.prefix = one.prefix = self._prefix(one, len(prompt.ids) + body.max_tokens)
            yield self._completions.plan_completion(body, prompts), _answered(assigned)

    def _prefix(self, one: Assigned, needed: int) -> list[int]:
        """The notes on a question in tokens: as many of its passages as leave room for ``needed`` tokens."""
        while one.passages:
            ids = self._completions.encode(self._notes(one.passages), special=False)
            if len(ids) + needed <= self.engine.context_length:
                return ids
            one.passages = one.passages[:-1]
        return []

    def _talk(self, body: ChatRequest, one: Assigned) -> list[int]:
        """A conversation in tokens, with as many of the passages as leave room for the answer."""
        wanted = body.max_completion_tokens or body.max_tokens or 1
        while one.passages:
            ids = self._completions.conversation(body.messages, self._notes(one.passages))
            if len(ids) + wanted <= self.engine.context_length:
                return ids
            one.passages = one.passages[:-1]
        return self._completions.conversation(body.messages)

    def _notes(self, passages: Sequence[Passage]) -> str:
        # A document must not end its part of the prompt: what the model takes for control is not passed on.
        texts = [self._control.sub(" ", passage.text) for passage in passages]
        shown = "\n".join(f"[{i}] {text}" for i, text in enumerate(texts, start=1))
        return self.notes_template.replace("{passages}", shown)

    async def _embeddings(self, body: EmbeddingsRequest) -> Json:
        about = await self.assistant.describe()
        if about["embedder"] is None or body.model != about["embedder"]:
            raise UserError(
                f"'{body.model}' is not an embedding model",
                fix=f"this server has '{about['embedder']}'" if about["embedder"] else "this server has none",
                status=404,
            )
        texts = [body.input] if isinstance(body.input, str) else body.input
        embedded = await self.assistant.embed(texts)
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(vector, body.encoding_format)}
            for i, vector in enumerate(embedded.vectors)
        ]
        usage = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
        return {"object": "list", "model": body.model, "data": data, "usage": usage}


def _answered(assigned: Sequence[Assigned]) -> Json:
    """Our addition to OpenAI's objects: for each prompt what answered, its route and its citations."""
    return {"qwen_ray": {"prompts": [one.describe() for one in assigned]}}


def _scored(result: ScoreResult) -> Json:
    return {
        "logprobs": [finite(score.total) for score in result.continuations],
        "greedy": [score.greedy for score in result.continuations],
        "tokens": [len(score.logprobs) for score in result.continuations],
        "truncated": result.truncated,
    }


def _vector(values: Sequence[float], form: str) -> list[float] | str:
    """As JSON, or as OpenAI's clients ask for it: little-endian float32 in base64."""
    if form == "float":
        return list(values)
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _each(names: Iterable[T]) -> list[T]:
    """Each once, in order."""
    return list(dict.fromkeys(names))


def _error(e: BaseException) -> Json:
    if isinstance(e, _Failed):
        assert e.__cause__ is not None
        envelope = _error(e.__cause__)
        return {"error": envelope["error"] | _answered(e.assigned)}
    if isinstance(e, UserError):
        message = e.what + (f" ({e.fix})" if e.fix else "")
        return {"error": {"status": e.status, "message": message, "retry_after": e.retry_after}}
    log.error("a request failed", exc_info=e)
    return {"error": {"status": 500, "message": "the server failed on this request; its log says why"}}
