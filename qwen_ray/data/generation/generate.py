"""Questions and answers written by a model from passages, each checked against its passage.

The model is behind any endpoint of OpenAI's chat completions. It must copy the sentence that proves its
answer; what does not stand in the passage is refused. The checks are of words: they find what was made up,
not a statement turned round ("is" for "is not").
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import ConfigDict, Field

from qwen_ray.config import Section
from qwen_ray.data.decontamination.wording import content, key, words
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import Drops, Found
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, sha256_json, write_json

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

NO_REPLY = "the endpoint gave no answer"
REFUSED = "the endpoint refused the passage"
NOT_JSON = "the reply is not the JSON asked for"
NO_QUESTION = "not a question"
REFERS = "the question refers to the passage"
NO_EVIDENCE = "the evidence is not in the passage"
UNSUPPORTED = "the answer is not in the evidence and the passage"
VAGUE = "the question names nothing of the passage"
TELLS = "the question holds its answer"
REPEATED = "the same question was written before"

MAX_FAILED = 10  # passages in a row without an answer; then nothing is to be expected of the endpoint
LONGEST_WAIT = 60.0  # seconds before a retry, also where the server asks for more
_LONGEST_QUESTION = 300  # characters
_LEAST_EVIDENCE = 4  # words
_LEAST_NAMED = 2  # words that question and passage share
_STARTS = 20  # brackets of a reply at which its JSON may begin

_PROMPT = """\
Write {count} questions that the passage below answers, for readers who do not have it: name what you ask \
about, and never mention the passage, the text or its author. Answer in a few words or one sentence, in the \
words of the passage. Evidence is the sentence that proves the answer, copied word for word. Reply with JSON \
only:
[{{"question": "...", "answer": "...", "evidence": "..."}}]

Passage:
{text}"""
_THOUGHT = re.compile(r"<think>.*?</think>", re.S)
_REFERS = re.compile(
    r"\b(?:the|this|that) (?:passage|text|excerpt|paragraph|author|section|chapter|sentence)\b"
    r"|\b(?:mentioned|described|discussed|stated|listed|according to) (?:above|here|it)\b",
    re.I,
)


class Endpoint(Section):
    """A model to write questions with."""

    model_config = ConfigDict(frozen=True)
    page: ClassVar[str] = "docs/data.md"

    url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    """Base URL as OpenAI's client takes it: https://api.example.com/v1."""
    model: Annotated[str, Field(min_length=1)]
    """A model that the endpoint serves."""
    key_variable: str | None = None
    """Environment variable that holds the API key. Default: no key is sent."""
    questions: Annotated[int, Field(ge=1, le=20)] = 3
    """Questions to ask for, of each passage."""
    concurrency: Annotated[int, Field(ge=1)] = 4
    """Requests at a time."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds one request may take."""
    attempts: Annotated[int, Field(ge=1)] = 5
    """How often a request is sent before its passage is given up (busy, failing or slow server)."""
    backoff: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the first retry, doubled before each further one; a server's Retry-After goes first."""
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """Tokens of one reply."""


@dataclass(frozen=True)
class Passage:
    """Text to ask about. ``id`` is that of a record without its last part: ``source/chapter/section``."""

    id: str
    text: str
    domain: str
    source: str
    license: str
    where: str


class _Reply(NamedTuple):
    """What the model wrote, or why there is nothing."""

    text: str | None
    reason: str = ""
    detail: str = ""


class _Busy(Exception):
    """Worth another try. ``after``: seconds the server asks to wait."""

    def __init__(self, detail: str, after: float | None = None) -> None:
        super().__init__(detail)
        self.after = after


def generate(passages: Iterable[Passage], endpoint: Endpoint, cache: Path, drops: Drops) -> Iterator[Found]:
    """Records of the answers that pass the checks, in the order of the passages; the others go to ``drops``.

    Every reply is kept below ``cache``, by model, prompt and passage: what was answered once is not asked
    again, so a run that was stopped goes on, and the same replies give the same records. A passage without a
    reply after all attempts is a drop, and the next run asks again. Raises :class:`UserError` for an endpoint
    that cannot be reached, refuses the key or the model, or fails for many passages in a row.
    """
    asked: set[str] = set()
    failed = 0
    with closing(_Client(endpoint, cache)) as client, closing(_in_order(client, passages)) as replies:
        for passage, (text, reason, detail) in replies:
            if text is None:
                drops.add(reason, f"{passage.id}: {detail}", where=passage.where)
                failed += reason == NO_REPLY
                if failed == MAX_FAILED:
                    raise UserError(
                        f"{failed} passages in a row without an answer: {detail}",
                        where=endpoint.url,
                        fix="run again when it answers: the replies so far are kept",
                    )
                continue
            failed = 0
            yield from _records(passage, text, asked, drops)


def _in_order(client: _Client, passages: Iterable[Passage]) -> Generator[tuple[Passage, _Reply], None, None]:
    """Replies in the order of the passages, so many requests at a time as the endpoint allows."""
    waiting: deque[tuple[Passage, Future[_Reply]]] = deque()
    concurrency = client.endpoint.concurrency
    pool = ThreadPoolExecutor(concurrency)
    try:
        for passage in passages:
            waiting.append((passage, pool.submit(client.reply, passage)))
            if (
                len(waiting) >= 2 * concurrency
            ):  # more than are asked, so that a slow one does not idle the rest
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        client.stopped.set()
        pool.shutdown(cancel_futures=True)


# --- asking ----------------------------------------------------------------------------------------


class _Client:
    """Asks for passages, from any number of threads."""

    def __init__(self, endpoint: Endpoint, cache: Path) -> None:
        import httpx

        self.endpoint, self.cache = endpoint, cache
        self.stopped = Event()
        """Set: no further try is made."""
        self._secret = _secret(endpoint)
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        self._http = httpx.Client(headers=headers, timeout=endpoint.timeout)

    def close(self) -> None:
        self._http.close()

    def reply(self, passage: Passage) -> _Reply:
        """The reply kept, or a new one. :class:`UserError` for what no retry would mend."""
        prompt = _PROMPT.format(count=self.endpoint.questions, text=passage.text)
        name = sha256_json([self.endpoint.model, self.endpoint.max_tokens, prompt])
        file = self.cache / name[:2] / f"{name}.json"
        if file.is_file():
            return _Reply(read_json(file)["reply"])
        found = self._ask(prompt)
        if found.text is not None:
            write_json(file, {"model": self.endpoint.model, "passage": passage.id, "reply": found.text})
        return found

    def _ask(self, prompt: str) -> _Reply:
        import httpx
        from tenacity import (
            Retrying,
            retry_if_exception_type,
            sleep_using_event,
            stop_after_attempt,
            stop_when_event_set,
        )

        retrying = Retrying(
            retry=retry_if_exception_type((_Busy, httpx.ConnectError)),
            stop=stop_after_attempt(self.endpoint.attempts) | stop_when_event_set(self.stopped),
            wait=self._wait,
            sleep=sleep_using_event(self.stopped),
            reraise=True,
        )
        try:
            return retrying(self._once, prompt)
        except _Busy as e:
            return _Reply(None, NO_REPLY, str(e))
        except httpx.ConnectError as e:
            raise UserError(
                f"the endpoint cannot be reached ({e})", where=self.endpoint.url, fix="check the address"
            ) from None

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        after = error.after if isinstance(error, _Busy) else None
        doubled = self.endpoint.backoff * 2.0 ** (state.attempt_number - 1)
        return min(LONGEST_WAIT, doubled if after is None else after)

    def _once(self, prompt: str) -> _Reply:
        import httpx

        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.endpoint.max_tokens,
        }
        try:
            response = self._http.post(self.endpoint.url.rstrip("/") + "/chat/completions", json=body)
        except httpx.ConnectError:
            raise
        except httpx.TransportError as e:
            raise _Busy(f"{type(e).__name__}: {e}") from e
        if response.is_success:
            return _Reply(_sound(_said(response)))
        status = response.status_code
        told = f"HTTP {status}: {' '.join(response.text.split())[:200]}"
        if self._secret:  # some servers repeat the key that they refuse
            told = told.replace(self._secret, "***")
        if status in (408, 409, 425, 429) or status >= 500:
            after = response.headers.get("retry-after", "")
            raise _Busy(told, float(after) if after.isdecimal() else None)
        if status in (400, 413, 422):
            return _Reply(None, REFUSED, told)
        raise UserError(
            f"the endpoint refused: {told}",
            where=self.endpoint.url,
            fix="check the url (does it end in /v1?), the model's name and the key",
        )


def _secret(endpoint: Endpoint) -> str:
    if endpoint.key_variable is None:
        return ""
    secret = os.environ.get(endpoint.key_variable, "").strip()
    if not secret:
        raise UserError(
            "the environment variable with the API key is not set",
            where=f"${endpoint.key_variable}",
            fix="export it, or leave key_variable out for an endpoint without keys",
        )
    return secret


def _said(response: httpx.Response) -> str:
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise _Busy("the answer is no chat completion")
    return text


# --- checking --------------------------------------------------------------------------------------


def _records(passage: Passage, reply: str, asked: set[str], drops: Drops) -> Iterator[Found]:
    written = _parse(reply)
    if written is None:
        drops.add(NOT_JSON, f"{passage.id}: {reply}", where=passage.where)
        return
    for row in written:
        question, answer, evidence = (_line(row.get(name)) for name in ("question", "answer", "evidence"))
        reason = _fault(question, answer, evidence, passage)
        if reason is None and key(question) in asked:
            reason = REPEATED
        if reason is not None:
            drops.add(reason, f"{passage.id}: {question} → {answer} ({evidence})", where=passage.where)
            continue
        asked.add(key(question))
        messages = (Message("user", question), Message("assistant", answer))
        id = f"{passage.id}/generated-{sha256_json(question)[:8]}"
        yield Found(Record(id, messages, passage.domain, passage.source, passage.license), passage.where)


def _line(value: Any) -> str:
    """Text in one line; without the halves of characters that JSON can name and UTF-8 cannot."""
    return " ".join(_sound(value).split()) if isinstance(value, str) else ""


def _sound(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _parse(reply: str) -> list[dict[str, Any]] | None:
    """The objects of the first JSON in a reply, whatever is said around it."""
    text = _THOUGHT.sub("", reply)
    decoder = json.JSONDecoder()
    for start in islice(re.finditer(r"[\[{]", text), _STARTS):
        try:
            value, _ = decoder.raw_decode(text, start.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(value, dict) and "question" not in value:  # {"questions": [...]}
            value = next((inner for inner in value.values() if isinstance(inner, list)), value)
        rows = value if isinstance(value, list) else [value]
        if rows and all(isinstance(row, dict) for row in rows):
            return rows
    return None


def _fault(question: str, answer: str, evidence: str, passage: Passage) -> str | None:
    """Why an answer is refused; None if it is kept."""
    told, proof = words(passage.text), words(evidence)
    there, asks, says = set(content(passage.text)), set(content(question)), set(content(answer))
    proved = says & set(content(evidence))
    checks = {
        NO_QUESTION: not question.endswith("?") or len(question) > _LONGEST_QUESTION,
        REFERS: _REFERS.search(question),
        NO_EVIDENCE: len(proof) < _LEAST_EVIDENCE or f" {' '.join(proof)} " not in f" {' '.join(told)} ",
        UNSUPPORTED: not says or not says <= there or 2 * len(proved) < len(says),
        VAGUE: len(asks & there) < _LEAST_NAMED,
        TELLS: says <= asks,
    }
    return next((reason for reason, failed in checks.items() if failed), None)
