"""Where scores and text come from, for a client that has token ids: this process or a server.

Both sides offer the same few calls (:class:`Backend`), so an evaluation does not know which it runs on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.serving.client import Client, not_ours
from qwen_ray.serving.model_id import parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_ray.serving.engines.base import Engine

log = logging.getLogger(__name__)

TOKENS_PER_REQUEST = 16_384
"""Of a request for scores, contexts and continuations of all models together: minutes for 7B on a CPU."""
PROMPTS_PER_REQUEST = 16
CHARACTERS_PER_REQUEST = 1_000_000  # of texts to encode

T = TypeVar("T")
Ids = list[int]
Item = tuple[Ids, list[Ids]]
"""A context with its continuations."""
Scored = tuple[float, bool]
"""(log-probability in nats of a whole continuation, whether each of its tokens was the likeliest)."""


@dataclass(frozen=True)
class Info:
    """What the harness must know of a model: its id, context length in tokens, and its tokenizer's facts."""

    model: str
    max_length: int
    tokenizer_name: str
    eos_token: str
    bos_token: str | None
    chat_template: str | None


@dataclass(frozen=True)
class Sampling:
    """How to generate: see :class:`qwen_ray.serving.engines.base.GenerateRequest`."""

    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int | None


class Backend(Protocol):
    """Where tokens are made and scored."""

    info: Info

    def encode(self, texts: Sequence[str], *, special: bool | None) -> list[Ids]:
        """Token ids of each text; ``special`` None leaves special tokens to the tokenizer's default."""

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """A conversation as the model's chat template writes it."""

    def score(self, items: Sequence[Item], progress: Callable[[int], object]) -> list[list[Scored]]:
        """Scores of each context's continuations, in order; ``progress(n)`` after n more continuations."""

    def generate(
        self, prompts: Sequence[Ids], sampling: Sampling, progress: Callable[[int], object]
    ) -> list[str]:
        """The text that follows each prompt, in order."""


class EngineBackend:
    """Scores in this process, on an engine that has ``adapter`` (None: the base model) loaded."""

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, adapter: str | None = None
    ) -> None:
        self._engine, self._tokenizer, self._adapter = engine, tokenizer, adapter
        self.info = Info(
            model=engine.id if adapter is None else f"{engine.id}:{adapter}",
            max_length=engine.context_length,
            tokenizer_name=str(tokenizer.name_or_path).replace("/", "__"),
            eos_token=str(tokenizer.eos_token),
            bos_token=tokenizer.bos_token,
            chat_template=tokenizer.chat_template,
        )

    def encode(self, texts: Sequence[str], *, special: bool | None) -> list[Ids]:
        extra = {} if special is None else {"add_special_tokens": special}
        return [list(ids) for ids in self._tokenizer(list(texts), verbose=False, **extra)["input_ids"]]

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def score(self, items: Sequence[Item], progress: Callable[[int], object]) -> list[list[Scored]]:
        from qwen_ray.serving.engines.base import ScoreItem

        out: list[list[Scored]] = []
        for chunk in chunks(items, 256):
            results = self._engine.score([ScoreItem(self._adapter, *item) for item in chunk])
            out.extend([(c.total, c.greedy) for c in result.continuations] for result in results)
            warn_truncated(sum(result.truncated for result in results), self.info)
            progress(sum(len(continuations) for _, continuations in chunk))
        return out

    def generate(
        self, prompts: Sequence[Ids], sampling: Sampling, progress: Callable[[int], object]
    ) -> list[str]:
        from qwen_ray.serving.engines.base import GenerateRequest

        out: list[str] = []
        for chunk in chunks(prompts, 64):
            requests = [
                GenerateRequest(
                    self._adapter,
                    prompt,
                    sampling.max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sampling.seed,
                    stop=sampling.stop,
                )
                for prompt in chunk
            ]
            out.extend(result.text for result in self._engine.generate(requests))
            progress(len(chunk))
        return out


class EndpointBackend:
    """Scores over HTTP on a qwen-ray server; the tokenizer is the server's too."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        concurrency: int = 4,
        *,
        timeout: float = 600.0,
        items_per_request: int = 64,
    ) -> None:
        """Arguments as :class:`Client` takes them. ``model``: an id of the API.

        Raises :class:`UserError` if nothing answers or the model is unknown.
        """
        self.client = Client(base_url, api_key, concurrency, timeout=timeout)
        self._model, self._per_request = model, items_per_request
        try:
            self.served = self.listed()
            self.info = self._facts()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.client.close()

    def listed(self) -> dict[str, dict[str, Any]]:
        listed = self.client.request("GET", "/v1/models", attempts=1)
        try:
            return {entry["id"]: entry for entry in listed["data"]}
        except (KeyError, TypeError):
            raise not_ours(self.client.url) from None

    def _facts(self) -> Info:
        self.check(self._model)
        facts = self.client.request("GET", "/tokenizer_info")
        try:
            self._special = {k: v for k, v in facts.items() if k.endswith("_token") and isinstance(v, str)}
            return Info(
                model=self._model,
                max_length=int(self.served[self.base(self._model)]["max_model_len"]),
                tokenizer_name=str(facts.get("name_or_path", self._model)).replace("/", "__"),
                eos_token=str(facts["eos_token"]),
                bos_token=facts.get("bos_token"),
                chat_template=facts.get("chat_template"),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise not_ours(self.client.url) from None

    def base(self, model: str) -> str:
        """The id of the model that ``model`` is an adapter of; itself where the server lists it as such."""
        base = parse(model).base
        return base if base in self.served else model

    def check(self, model: str) -> None:
        """:class:`UserError` unless the server answers for ``model``: an id that it lists, or one that it
        does not list and can make out, such as ``base:adapter@candidate``."""
        if model in self.served:
            return
        try:
            self.score_each([model], [([0], [[0]])])
        except UserError as e:
            if e.status != 404:
                raise
            raise UserError(
                f"the server has no model '{model}'",
                where=self.client.url,
                fix=did_you_mean(model, self.served),
            ) from e

    def encode(self, texts: Sequence[str], *, special: bool | None) -> list[Ids]:
        extra = {} if special is None else {"add_special_tokens": special}
        replies = self.client.map(
            lambda chunk: self.client.request("POST", "/tokenize", {"prompt": list(chunk), **extra}),
            list(chunks(texts, 512, len, CHARACTERS_PER_REQUEST)),
        )
        return [ids for reply in replies for ids in reply["tokens"]]

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            conversations=[messages],
            chat_template=self.info.chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._special,
        )
        return str(rendered[0])

    def score(self, items: Sequence[Item], progress: Callable[[int], object]) -> list[list[Scored]]:
        def post(chunk: Sequence[Item]) -> list[list[Scored]]:
            (reply,) = self.score_each([self._model], chunk)
            warn_truncated(sum(item["truncated"] for item in reply["items"]), self.info)
            progress(sum(len(continuations) for _, continuations in chunk))
            return [list(zip(item["logprobs"], item["greedy"], strict=True)) for item in reply["items"]]

        parts = list(chunks(items, self._per_request, tokens_of, TOKENS_PER_REQUEST))
        return [scored for part in self.client.map(post, parts) for scored in part]

    def score_each(self, models: Sequence[str], items: Sequence[Item]) -> list[dict[str, Any]]:
        """Each model's answer (see ``POST /v1/score``) on all ``items``, in one request; in two or more
        where the server says that it is too much for one."""
        body: dict[str, Any] = {
            "items": [{"context": context, "continuations": texts} for context, texts in items]
        }
        try:
            if len(models) == 1:
                return [self.client.request("POST", "/v1/score", {"model": models[0], **body})]
            reply = self.client.request("POST", "/v1/score", {"models": list(models), **body})["models"]
            return [reply[model] for model in models]
        except UserError as e:
            if e.status == 413 and len(models) > 1:  # it may hold fewer adapters at one time
                half = len(models) // 2
                return self.score_each(models[:half], items) + self.score_each(models[half:], items)
            if e.status not in (413, 504) or len(items) == 1:
                raise
        half = len(items) // 2
        first, second = self.score_each(models, items[:half]), self.score_each(models, items[half:])
        return [_joined(a, b) for a, b in zip(first, second, strict=True)]

    def generate(
        self, prompts: Sequence[Ids], sampling: Sampling, progress: Callable[[int], object]
    ) -> list[str]:
        def post(chunk: Sequence[Ids]) -> list[str]:
            reply = self.complete(self._model, chunk, sampling)
            progress(len(chunk))
            return [choice["text"] for choice in reply["choices"]]

        parts = list(chunks(prompts, PROMPTS_PER_REQUEST))
        return [text for part in self.client.map(post, parts) for text in part]

    def complete(self, model: str, prompts: Sequence[Ids], sampling: Sampling) -> dict[str, Any]:
        """The answer of ``POST /v1/completions``, its choices in the order of ``prompts``."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(prompts),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(sampling.stop),
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        reply = dict(self.client.request("POST", "/v1/completions", body))
        reply["choices"] = sorted(reply["choices"], key=lambda choice: choice["index"])
        return reply


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two answers on parts of a request as one on the whole."""
    joined = {**first, "items": first["items"] + second["items"]}
    if about := first.get("qwen_ray"):
        joined["qwen_ray"] = {"prompts": about["prompts"] + second["qwen_ray"]["prompts"]}
    return joined


def chunks(
    items: Sequence[T], most: int, size: Callable[[T], int] | None = None, total: int = 0
) -> Iterator[Sequence[T]]:
    """``items`` in parts of at most ``most`` and, beyond the first of a part, of a ``total`` of sizes."""
    start = held = 0
    for end, item in enumerate(items):
        more = 0 if size is None else size(item)
        if end > start and (end - start >= most or held + more > total):
            yield items[start:end]
            start, held = end, 0
        held += more
    if start < len(items):
        yield items[start:]


def tokens_of(item: Item) -> int:
    """Tokens of a context and all its continuations."""
    context, continuations = item
    return len(context) + sum(map(len, continuations))


def warn_truncated(count: int, info: Info) -> None:
    """Say that ``count`` contexts lost their start, if any did."""
    if count:
        log.warning(
            "%d contexts were longer than the %d tokens of %s and lost their start",
            count,
            info.max_length,
            info.model,
        )
