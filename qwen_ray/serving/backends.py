"""Where scores and text come from, for a client that has token ids: this process or a server.

Both sides offer the same few calls (:class:`Backend`), so an evaluation does not know which it runs on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qwen_ray.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

    from qwen_ray.serving.engines.base import Engine

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5  # before the first retry; doubled before each further one

Ids = list[int]
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

    def score(
        self, items: Sequence[tuple[Ids, list[Ids]]], progress: Callable[[int], object]
    ) -> list[list[Scored]]:
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

    def score(
        self, items: Sequence[tuple[Ids, list[Ids]]], progress: Callable[[int], object]
    ) -> list[list[Scored]]:
        from qwen_ray.serving.engines.base import ScoreItem

        out: list[list[Scored]] = []
        for chunk in _chunks(items, 256):
            results = self._engine.score([ScoreItem(self._adapter, *item) for item in chunk])
            out.extend([(c.total, c.greedy) for c in result.continuations] for result in results)
            _warn_truncated(sum(result.truncated for result in results), self.info)
            progress(sum(len(continuations) for _, continuations in chunk))
        return out

    def generate(
        self, prompts: Sequence[Ids], sampling: Sampling, progress: Callable[[int], object]
    ) -> list[str]:
        from qwen_ray.serving.engines.base import GenerateRequest

        out: list[str] = []
        for chunk in _chunks(prompts, 64):
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
        """``base_url`` with or without ``/v1``. ``timeout``: seconds one request may take.

        Raises :class:`UserError` if nothing answers or the model is unknown.
        """
        import httpx

        self._url = base_url.rstrip("/").removesuffix("/completions").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=concurrency)
        self._client = httpx.Client(
            headers=headers, timeout=httpx.Timeout(timeout, connect=10), limits=limits
        )
        self._model, self._concurrency, self._per_request = model, max(1, concurrency), items_per_request
        self.info = self._preflight()

    def close(self) -> None:
        self._client.close()

    def _preflight(self) -> Info:
        served = {entry["id"]: entry for entry in self._call("GET", "/v1/models", attempts=1)["data"]}
        if self._model not in served:
            raise UserError(
                f"the server has no model '{self._model}'",
                where=self._url,
                fix=did_you_mean(self._model, served),
            )
        facts = self._call("GET", "/tokenizer_info")
        self._special = {k: v for k, v in facts.items() if k.endswith("_token") and isinstance(v, str)}
        return Info(
            model=self._model,
            max_length=int(served[self._model]["max_model_len"]),
            tokenizer_name=str(facts.get("name_or_path", self._model)).replace("/", "__"),
            eos_token=str(facts["eos_token"]),
            bos_token=facts.get("bos_token"),
            chat_template=facts.get("chat_template"),
        )

    def encode(self, texts: Sequence[str], *, special: bool | None) -> list[Ids]:
        extra = {} if special is None else {"add_special_tokens": special}
        chunks = list(_chunks(texts, 512))
        replies = self._map(
            lambda chunk: self._call("POST", "/tokenize", {"prompt": list(chunk), **extra}), chunks
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

    def score(
        self, items: Sequence[tuple[Ids, list[Ids]]], progress: Callable[[int], object]
    ) -> list[list[Scored]]:
        def post(chunk: Sequence[tuple[Ids, list[Ids]]]) -> list[list[Scored]]:
            body = [{"context": context, "continuations": continuations} for context, continuations in chunk]
            reply = self._call("POST", "/v1/score", {"model": self._model, "items": body})["items"]
            _warn_truncated(sum(item["truncated"] for item in reply), self.info)
            progress(sum(len(continuations) for _, continuations in chunk))
            return [list(zip(item["logprobs"], item["greedy"], strict=True)) for item in reply]

        return [
            scored for part in self._map(post, list(_chunks(items, self._per_request))) for scored in part
        ]

    def generate(
        self, prompts: Sequence[Ids], sampling: Sampling, progress: Callable[[int], object]
    ) -> list[str]:
        def post(chunk: Sequence[Ids]) -> list[str]:
            body: dict[str, Any] = {
                "model": self._model,
                "prompt": list(chunk),
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "stop": list(sampling.stop),
            }
            if sampling.seed is not None:
                body["seed"] = sampling.seed
            choices = self._call("POST", "/v1/completions", body)["choices"]
            progress(len(chunk))
            return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]

        return [text for part in self._map(post, list(_chunks(prompts, 16))) for text in part]

    def _map(self, call: Callable[[Any], Any], chunks: list[Any]) -> list[Any]:
        """Calls with bounded concurrency, answers in order. The first failure ends the rest."""
        if len(chunks) < 2 or self._concurrency == 1:
            return [call(chunk) for chunk in chunks]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(call, chunk) for chunk in chunks]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _call(self, method: str, path: str, body: Any = None, *, attempts: int = 4) -> Any:
        """One request; connection failures and 503 are tried again, at most ``attempts`` times in all."""
        import time

        import httpx

        url = self._url + path
        for attempt in range(attempts):
            last = attempt + 1 == attempts
            try:
                reply = self._client.request(method, url, json=body)
            except httpx.TransportError as e:
                if last or isinstance(e, httpx.ReadTimeout):
                    raise UserError(
                        f"the server does not answer ({type(e).__name__}: {e})",
                        where=url,
                        fix="start it with `qwen-ray serve`, or check the address",
                        status=503,
                    ) from e
            else:
                if reply.status_code != 503 or last:
                    return _checked(reply, url)
            time.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable")


def _checked(reply: httpx.Response, url: str) -> Any:
    if reply.is_success:
        return reply.json()
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = reply.text[:200]
    if reply.status_code < 500:
        raise UserError(f"the server refused: {message}", where=url, status=reply.status_code)
    raise RuntimeError(f"{url}: HTTP {reply.status_code}: {message}")


def _chunks(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _warn_truncated(count: int, info: Info) -> None:
    if count:
        log.warning(
            "%d contexts were longer than the %d tokens of %s and lost their start",
            count,
            info.max_length,
            info.model,
        )
