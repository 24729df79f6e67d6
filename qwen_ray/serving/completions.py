"""Completions and chat: requests to scheduler jobs, and results to OpenAI's response objects."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import (
    Alternatives,
    EngineQueue,
    GenerateRequest,
    GenerateResult,
    ScoreItem,
    ScoreResult,
    ServedEngine,
    TokenEvent,
    prompt_item,
)
from qwen_ray.serving.engines.packing import check_ids
from qwen_ray.serving.protocol import ChatRequest, CompletionRequest, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]

T = TypeVar("T")

_SHORT = 2**14  # characters of text that are encoded at once; it takes a few milliseconds
_NORMALIZED = 3  # at most so many times shorter are a text's bytes once it is normalised (NFC)
# OpenAI's value for "next to impossible"; JSON has no infinity.
_FLOOR = -9999.0


def finite(logprob: float) -> float:
    """A log-probability as JSON can carry it."""
    return logprob if math.isfinite(logprob) else _FLOOR


@dataclass
class Prompt:
    """``adapter``: the engine's key of what answers. ``prefix``: tokens that the model reads before ``ids``
    and that are not part of what the client sent (retrieved passages)."""

    ids: list[int]
    text: str = ""
    """What is echoed; empty if it came as ids and no echo is wanted."""
    adapter: str | None = None
    prefix: list[int] = field(default_factory=list)

    def item(self, *, top: int) -> ScoreItem:
        """Asks for the log-probabilities of ``ids`` after the first, and of the token that would follow."""
        return prompt_item(self.adapter, self.ids, top=top, prefix=self.prefix)


@dataclass
class Plan:
    """A request in token terms. Choice ``p * n + j`` is the j-th of prompt p."""

    kind: str  # "completion" or "chat"
    model: str
    prompts: list[Prompt]
    echo: bool
    n: int
    generate: list[GenerateRequest]
    score_prompts: bool = False  # log-probabilities of the prompts are wanted
    top: int | None = None
    usage_in_stream: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def from_score(self) -> bool:
        """lm-eval's form, echo + logprobs + one greedy token: the scoring forward already has that token."""
        return self.score_prompts and all(
            g.max_tokens == 1 and g.temperature == 0 and not g.stop for g in self.generate
        )

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.prefix) + len(prompt.ids) for prompt in self.prompts)


def _answer_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes between the prompt and an answer: the model will, and it is not content.

    Empty for Qwen's template; a space for one that ends the prompt in ``Answer:``.
    """
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    if not tokenizer.chat_template:
        return ""
    prompt = str(tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template([question, answer], tokenize=False))
    lead = whole.removeprefix(prompt).partition("a")[0]
    return lead if whole.startswith(prompt) and lead.isspace() else ""


class Completions:
    """Runs plans on a scheduler. All methods belong to one event loop."""

    def __init__(self, engine: ServedEngine, scheduler: EngineQueue) -> None:
        self._engine, self._scheduler = engine, scheduler
        self.token_text = lru_cache(maxsize=2**17)(lambda token: str(engine.tokenizer.decode([token])))
        self._answer_lead = _answer_lead(engine.tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        longest = max((len(token.encode()) for token in engine.tokenizer.get_vocab()), default=1)
        self._most_bytes = engine.context_length * longest * _NORMALIZED

    # -- plans

    def plan_completion(self, body: CompletionRequest, prompts: list[Prompt]) -> Plan:
        """Check; :class:`UserError` names what is wrong. ``prompts``: those of :meth:`prompts`, assigned."""
        plan = Plan("completion", body.model, prompts, body.echo, body.n, [], top=body.logprobs)
        plan.score_prompts = body.echo and body.logprobs is not None
        plan.usage_in_stream = body.stream_options.include_usage
        plan.id = f"cmpl-{uuid.uuid4().hex}"
        self._fill(plan, body, body.max_tokens, body.logprobs)
        if plan.score_prompts:
            for prompt in prompts:
                self._engine.check_score(prompt.item(top=body.logprobs or 0))
        return plan

    def plan_chat(self, body: ChatRequest, prompt: Prompt) -> Plan:
        """Check; ``prompt`` is that of :meth:`conversation`, assigned."""
        if body.top_logprobs and not body.logprobs:
            raise UserError("top_logprobs needs logprobs", where="top_logprobs", fix="set logprobs to true")
        top = body.top_logprobs if body.logprobs else None
        plan = Plan("chat", body.model, [prompt], False, body.n, [], top=top)
        plan.usage_in_stream = body.stream_options.include_usage
        plan.id = f"chatcmpl-{uuid.uuid4().hex}"
        limit = body.max_completion_tokens or body.max_tokens or self._engine.context_length
        self._fill(plan, body, limit, top)
        return plan

    def conversation(self, messages: Sequence[Message], notes: str = "") -> list[int]:
        """The conversation as the model's template writes it, in tokens. ``notes`` go before the text of the
        last message of the user."""
        from jinja2 import TemplateError

        listed = [message.model_dump(include={"role", "content"}) for message in messages]
        if notes and (users := [m for m in listed if m["role"] == "user"]):
            users[-1]["content"] = notes + users[-1]["content"]
        try:
            text = self._engine.tokenizer.apply_chat_template(
                listed, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as e:
            raise UserError(
                f"the model's chat template refuses this conversation: {e}", where="messages"
            ) from None
        return self.encode(str(text), special=False)

    def _fill(self, plan: Plan, body: CompletionRequest | ChatRequest, limit: int, top: int | None) -> None:
        if limit == 0:
            return
        for prompt in plan.prompts:
            for j in range(body.n):
                plan.generate.append(
                    GenerateRequest(
                        prompt.adapter,
                        [*prompt.prefix, *prompt.ids],
                        limit,
                        temperature=body.temperature,
                        top_p=body.top_p,
                        seed=None if body.seed is None else body.seed + j,
                        stop=body.stop,
                        logprobs=top,
                    )
                )
        if not plan.from_score:  # that form may fill the context: its token comes from the scoring forward
            for request in plan.generate:
                self._engine.check_generate(request)

    def prompts(self, body: CompletionRequest) -> list[Prompt]:
        """The prompts of a request in tokens, checked."""
        given: Any = body.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        prompts = []
        for prompt in given:
            if isinstance(prompt, str):
                self.check_fits(prompt, "prompt")
                ids, text = self.encode(prompt), prompt
            else:
                ids = list(prompt)
                check_ids(ids, "prompt", vocabulary=self._engine.vocabulary)
                text = self.decode(ids) if body.echo else ""
            if not ids:
                raise UserError("the prompt is empty", where="prompt", fix="give at least one token")
            prompts.append(Prompt(ids, text))
        return prompts

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """The result of ``work`` on so many characters or tokens: done here if they are few, or else on a
        thread of its own, so that the loop goes on."""
        if size <= _SHORT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def check_fits(self, text: str, where: str) -> None:
        """:class:`UserError` for a text that is longer than any that fills the context, before it is encoded:
        that takes seconds for megabytes."""
        if len(text) > self._most_bytes or len(text.encode()) > self._most_bytes:
            length = self._engine.context_length
            raise UserError(
                f"{len(text)} characters do not fit the context of {length} tokens",
                where=where,
                fix="shorten it",
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(self._engine.tokenizer.encode(text, add_special_tokens=special, verbose=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._engine.tokenizer.decode(ids))

    # -- whole answers

    async def run(self, plan: Plan) -> Json:
        """The response object of a request that is not streamed."""
        scored = await self._score(plan)
        running = [] if plan.from_score else self._scheduler.generate(plan.generate)
        try:
            # The first that fails ends the request, whichever it is.
            results = await asyncio.gather(
                *(asyncio.wrap_future(generation.future) for generation in running)
            )
        finally:
            for generation in running:  # all done, unless one failed or the client went away
                generation.cancel()
        n = plan.n
        if plan.from_score:
            results = [self._next_as_result(plan, scored[i // n]) for i in range(len(plan.generate))]
        choices = []
        for i in range(len(plan.prompts) * n):
            result = results[i] if results else GenerateResult([], "", "length")
            choices.append(self._choice(plan, i, result, scored[i // n] if scored else None))
        return self._envelope(plan, choices) | {"usage": _usage(plan, results)}

    async def _score(self, plan: Plan) -> list[ScoreResult]:
        if not plan.score_prompts:
            return []
        items = [prompt.item(top=plan.top or 0) for prompt in plan.prompts]
        return await asyncio.wrap_future(self._scheduler.score(items))

    def _next_as_result(self, plan: Plan, scored: ScoreResult) -> GenerateResult:
        top = scored.next_token or []
        token, logprob = top[0]
        ends = token in self._engine.eos_ids
        text = "" if ends else self.token_text(token)
        return GenerateResult([token], text, "stop" if ends else "length", [logprob], [top[: plan.top]])

    def _choice(self, plan: Plan, index: int, result: GenerateResult, scored: ScoreResult | None) -> Json:
        if plan.kind == "chat":
            logprobs = None
            if plan.top is not None:
                entries = zip(result.ids, result.logprobs, result.top, strict=True)
                logprobs = {"content": [self._chat_logprob(*entry) for entry in entries], "refusal": None}
            message = {
                "role": "assistant",
                "content": result.text.removeprefix(self._answer_lead),
                "refusal": None,
            }
            return {
                "index": index,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": result.finish_reason,
            }
        prompt = plan.prompts[index // plan.n]
        echoed = prompt.text if plan.echo else ""
        block_body: Json | None = None
        if plan.top is not None:
            block = LogprobBlock(self)
            if scored is not None:
                block.add_prompt(prompt.ids, scored)
            for token, logprob, top in zip(result.ids, result.logprobs, result.top, strict=True):
                block.add(token, logprob, top)
            block_body = block.body
        text = echoed + result.text
        return {"index": index, "text": text, "logprobs": block_body, "finish_reason": result.finish_reason}

    def _chat_logprob(self, token: int, logprob: float, top: Alternatives) -> Json:
        def entry(token: int, logprob: float) -> Json:
            text = self.token_text(token)
            return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}

        return entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in top]}

    @staticmethod
    def _envelope(plan: Plan, choices: Sequence[Json], *, chunk: bool = False) -> Json:
        kind = {"completion": "text_completion", "chat": "chat.completion"}[plan.kind]
        if chunk and plan.kind == "chat":
            kind += ".chunk"
        return {
            "id": plan.id,
            "object": kind,
            "created": plan.created,
            "model": plan.model,
            "choices": list(choices),
        }

    # -- streams

    async def stream(self, plan: Plan) -> AsyncIterator[Json]:
        """Response chunks. What can fail before the first token fails before the first chunk."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, TokenEvent | None]] = asyncio.Queue()

        def tell(index: int, event: TokenEvent | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        scored = await self._score(plan)
        running = self._scheduler.generate(plan.generate, tell)
        try:
            for i, generation in enumerate(running):
                generation.future.add_done_callback(lambda _, i=i: tell(i, None))  # type: ignore[misc]
            offsets = [0] * len(running)
            opened = False
            left = len(running)
            while left:
                index, event = await queue.get()
                if event is None:
                    left -= 1
                    running[index].future.result()  # raises what the generation raised
                    continue
                if not opened:
                    opened = True
                    for chunk in self._opening(plan, scored, offsets):
                        yield chunk
                yield self._chunk(plan, index, event, offsets)
            if not opened:
                for chunk in self._opening(plan, scored, offsets or [0] * len(plan.prompts) * plan.n):
                    yield chunk
            if plan.usage_in_stream:
                results = [generation.future.result() for generation in running]
                yield self._envelope(plan, [], chunk=True) | {"usage": _usage(plan, results)}
        finally:
            for generation in running:
                generation.cancel()

    def _opening(self, plan: Plan, scored: Sequence[ScoreResult], offsets: list[int]) -> list[Json]:
        """What comes before the first token: the assistant's role, or the echoed prompt."""
        out = []
        for i in range(len(offsets)):
            if plan.kind == "chat":
                delta = {"role": "assistant", "content": ""}
                choice: Json = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            elif plan.echo:
                number, logprobs = i // plan.n, None
                prompt = plan.prompts[number]
                if scored:
                    block = LogprobBlock(self)
                    block.add_prompt(prompt.ids, scored[number])
                    logprobs, offsets[i] = block.body, block.offset
                finish = None if plan.generate else "length"
                choice = {
                    "index": i,
                    "text": prompt.text,
                    "logprobs": logprobs,
                    "finish_reason": finish,
                }
            else:
                continue
            out.append(self._envelope(plan, [choice], chunk=True))
        return out

    def _chunk(self, plan: Plan, index: int, event: TokenEvent, offsets: list[int]) -> Json:
        logprobs: Json | None = None
        if event.logprob is not None and event.top is not None:
            if plan.kind == "chat":
                logprobs = {
                    "content": [self._chat_logprob(event.id, event.logprob, event.top)],
                    "refusal": None,
                }
            else:
                block = LogprobBlock(self, offsets[index])
                block.add(event.id, event.logprob, event.top)
                logprobs, offsets[index] = block.body, block.offset
        choice: Json = {"index": index, "logprobs": logprobs, "finish_reason": event.finish_reason}
        if plan.kind == "chat":
            # Offsets are not needed for logprobs here; they tell the answer's beginning.
            text = event.text if offsets[index] else event.text.removeprefix(self._answer_lead)
            offsets[index] += len(event.text)
            choice["delta"] = {"content": text}
        else:
            choice["text"] = event.text
        return self._envelope(plan, [choice], chunk=True)


class LogprobBlock:
    """OpenAI's ``logprobs`` object of a text completion, built token by token."""

    def __init__(self, owner: Completions, offset: int = 0) -> None:
        self._owner, self.offset = owner, offset
        self.body: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def add_prompt(self, prompt: Sequence[int], scored: ScoreResult) -> None:
        """The first token has no log-probability: nothing precedes it."""
        self.add(prompt[0], None, [])
        if scored.continuations:
            score = scored.continuations[0]
            tops = score.top or [[]] * len(score.logprobs)
            for token, logprob, top in zip(prompt[1:], score.logprobs, tops, strict=True):
                self.add(token, logprob, top)

    def add(self, token: int, logprob: float | None, top: Alternatives) -> None:
        text = self._owner.token_text(token)
        self.body["tokens"].append(text)
        self.body["text_offset"].append(self.offset)
        self.offset += len(text)
        if logprob is None:
            self.body["token_logprobs"].append(None)
            self.body["top_logprobs"].append(None)
            return
        alternatives: dict[str, float] = {}
        missing = True
        for other, value in top:
            name = text if other == token else self._owner.token_text(other)
            # Tokens that are parts of a character share one text; the likeliest keeps it.
            alternatives[f"token_id:{other}" if name in alternatives else name] = finite(value)
            missing = missing and other != token
        if missing:
            alternatives[f"token_id:{token}" if text in alternatives else text] = finite(logprob)
        self.body["token_logprobs"].append(finite(logprob))
        self.body["top_logprobs"].append(alternatives)


def _usage(plan: Plan, results: Sequence[GenerateResult]) -> Json:
    made = sum(len(result.ids) for result in results)
    return {
        "prompt_tokens": plan.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": plan.prompt_tokens + made,
    }
