"""Everything a replica does for a request, without HTTP and without Ray.

Answers travel in an envelope, ``{"ok": value}`` or ``{"error": {"status", "message", "param"}}``, so that
bad input crosses process borders as data and no traceback ever reaches a client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.registry import NAME, Registry
from qwen_ray.serving.adapters import DEFAULT_BYTES, AdapterStore
from qwen_ray.serving.completions import Completions, Json, Plan, finite
from qwen_ray.serving.engines.base import ScoreItem
from qwen_ray.serving.engines.packing import check_ids
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.model_id import ModelId, parse
from qwen_ray.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ScoreRequest,
    TokenizeRequest,
)
from qwen_ray.serving.scheduler import Scheduler

log = logging.getLogger(__name__)


class Service:
    """One engine with its queue and adapters, behind :meth:`call` and :meth:`stream`."""

    def __init__(
        self,
        engine: TorchEngine,
        *,
        registry: Path | None = None,
        adapters: dict[str, Path] | None = None,
        adapter_bytes: int = DEFAULT_BYTES,
    ) -> None:
        if not NAME.fullmatch(engine.id):
            raise UserError(
                f"'{engine.id}' cannot be a model's name on the API",
                fix="rename the folder: lower-case letters, digits, dot, dash and underscore, at most 64",
            )
        self.engine = engine
        self.scheduler = Scheduler(engine)
        self.store = AdapterStore(
            engine,
            registry=None if registry is None else Registry(registry),
            folders=adapters,
            max_bytes=adapter_bytes,
            on_model=self.scheduler.call,
        )
        self._completions = Completions(engine, self.scheduler)
        self._calls: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "models": self._models,
            "health": self._health,
            "tokenizer_info": self._tokenizer_info,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
            "score": self._score,
            "completion": self._completion,
            "chat": self._completion,
        }

    @classmethod
    def load(cls, model: str, *, threads: int = 1, **settings: Any) -> Service:
        """Load the named model (see :func:`qwen_ray.models.resolve`) and serve it."""
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
            async with self._adapter(body.model) as key:
                async for chunk in self._completions.stream(self._plan(body, key)):
                    yield {"ok": chunk}
        except Exception as e:
            yield _error(e)

    def stop(self) -> None:
        self.scheduler.stop()

    # -- models

    @asynccontextmanager
    async def _adapter(self, model: str) -> AsyncIterator[str | None]:
        """The engine's key of the model's adapter, held in memory meanwhile. Disk work stays off the loop."""
        lease = self.store.use(self._known(model))
        key = await asyncio.to_thread(lease.__enter__)
        try:
            yield key
        finally:
            await asyncio.shield(asyncio.to_thread(lease.__exit__, None, None, None))

    def _known(self, model: str) -> ModelId:
        parsed = parse(model)
        if parsed.base != self.engine.id:
            raise UserError(
                f"unknown model '{model}'",
                fix=f"this server has '{self.engine.id}'; see GET /v1/models",
                status=404,
            )
        return parsed

    async def _models(self, _: None) -> Json:
        common = {
            "object": "model",
            "created": 0,
            "owned_by": "qwen-ray",
            "max_model_len": self.engine.context_length,
        }
        base = {"id": self.engine.id, **common, "fingerprint": self.engine.fingerprint, "parent": None}
        available = await asyncio.to_thread(self.store.available, self.engine.fingerprint)
        entries = [
            {"id": f"{self.engine.id}:{name}", **common, "parent": self.engine.id, "adapter": facts}
            for name, facts in available
        ]
        return {"object": "list", "data": [base, *entries]}

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
        encoded = (
            self.engine.tokenizer(texts, add_special_tokens=body.add_special_tokens, verbose=False)[
                "input_ids"
            ]
            if texts
            else []
        )
        ids = [list(row) for row in encoded]
        return {
            "tokens": ids[0] if isinstance(body.prompt, str) else ids,
            "count": sum(map(len, ids)),
            "max_model_len": self.engine.context_length,
        }

    async def _detokenize(self, body: DetokenizeRequest) -> Json:
        check_ids(body.tokens, "tokens", vocabulary=self.engine.vocabulary)
        return {"prompt": self.engine.tokenizer.decode(body.tokens)}

    # -- scores and text

    async def _score(self, body: ScoreRequest) -> Json:
        async with self._adapter(body.model) as key:
            items = [ScoreItem(key, item.context, item.continuations) for item in body.items]
            results = await asyncio.wrap_future(self.scheduler.score(items))
        return {
            "model": body.model,
            "items": [
                {
                    "logprobs": [finite(score.total) for score in result.continuations],
                    "greedy": [score.greedy for score in result.continuations],
                    "tokens": [len(score.logprobs) for score in result.continuations],
                    "truncated": result.truncated,
                }
                for result in results
            ],
        }

    async def _completion(self, body: CompletionRequest | ChatRequest) -> Json:
        async with self._adapter(body.model) as key:
            return await self._completions.run(self._plan(body, key))

    def _plan(self, body: CompletionRequest | ChatRequest, key: str | None) -> Plan:
        if isinstance(body, ChatRequest):
            return self._completions.plan_chat(body, key)
        return self._completions.plan_completion(body, key)


def _error(e: Exception) -> Json:
    if isinstance(e, UserError):
        message = e.what + (f" ({e.fix})" if e.fix else "")
        return {"error": {"status": e.status, "message": message}}
    log.error("a request failed", exc_info=e)
    return {"error": {"status": 500, "message": "the server failed on this request; its log says why"}}
