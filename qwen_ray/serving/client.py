"""HTTP to a qwen-ray server, with the patience that a long benchmark needs of a busy one.

Lost connections and 503 are tried again a few times; 429 is waited out as the server asks, and makes fewer
requests run at once until they succeed again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qwen_ray.errors import UserError

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "QWEN_RAY_API_KEY"
RETRY_SECONDS = 0.5  # before the first retry; doubled before each further one
LONGEST_RETRY_SECONDS = 8.0
ATTEMPTS = 8  # of one request that finds no server: half a minute, in which a replica comes back
PATIENCE_SECONDS = 900.0  # that one request may spend being told to come back later

T = TypeVar("T")
R = TypeVar("R")


class Client:
    """Requests to one server, at most ``concurrency`` of them at a time. Safe to use from several threads."""

    def __init__(
        self, base_url: str, api_key: str | None = None, concurrency: int = 4, *, timeout: float = 600.0
    ) -> None:
        """``base_url`` with or without ``/v1``. ``api_key``: by default $QWEN_RAY_API_KEY, if it is set.
        ``timeout``: seconds one request may take."""
        import httpx

        self.url = base_url.rstrip("/").removesuffix("/completions").removesuffix("/v1")
        self._concurrency = max(1, concurrency)
        self._turns = Turns(self._concurrency)
        key = api_key or os.environ.get(KEY_VARIABLE)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=10),
            limits=httpx.Limits(max_connections=self._concurrency),
        )

    def close(self) -> None:
        self._http.close()

    def map(self, call: Callable[[T], R], work: Sequence[T]) -> list[R]:
        """``call`` of each, several at a time; answers in order. The first failure ends the rest."""
        if len(work) < 2 or self._concurrency == 1:
            return [call(part) for part in work]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(call, part) for part in work]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def request(self, method: str, path: str, body: Any = None, *, attempts: int | None = None) -> Any:
        """The JSON of one answer.

        Raises :class:`UserError` for what the server refuses (its status; 413 and 504 mean too much at
        once) or where none answers, and RuntimeError for a failure inside it. ``attempts``: by default
        :data:`ATTEMPTS`.
        """
        import httpx

        url, failed, waited = self.url + path, 0, 0.0
        attempts = attempts or ATTEMPTS
        while True:
            with self._turns.turn():
                reply = self._send(method, url, body)
            if isinstance(reply, httpx.Response) and reply.status_code not in (429, 503):
                self._turns.succeeded()
                return _answer(reply, url)
            pause = min(RETRY_SECONDS * 2**failed, LONGEST_RETRY_SECONDS)
            if isinstance(reply, httpx.Response):
                pause = max(pause, _retry_after(reply))
                if reply.status_code == 429:
                    waited += pause
                    if waited > PATIENCE_SECONDS:
                        return _answer(reply, url)
                    self._turns.turned_away(pause)
                    continue
            failed += 1
            if failed >= attempts or isinstance(reply, httpx.ReadTimeout):
                return _answer(reply, url)
            time.sleep(pause)

    def _send(self, method: str, url: str, body: Any) -> httpx.Response | httpx.TransportError:
        import httpx

        try:
            return self._http.request(method, url, json=body)
        except httpx.TransportError as e:
            return e


class Turns:
    """How many requests may run: half as many when the server turns one away, one more after as many
    successes as run at once. While the server wants rest, none starts."""

    def __init__(self, most: int) -> None:
        self._most, self.allowed, self._running = most, float(most), 0
        self._rests_until = 0.0
        self._changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._changed:
            while True:
                rest = self._rests_until - time.monotonic()
                if rest <= 0 and self._running < int(self.allowed):
                    break
                self._changed.wait(rest if rest > 0 else None)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def succeeded(self) -> None:
        with self._changed:
            self.allowed = min(float(self._most), self.allowed + 1 / self.allowed)
            self._changed.notify_all()

    def turned_away(self, seconds: float) -> None:
        with self._changed:
            now = time.monotonic()
            if now >= self._rests_until:  # once for all that it turns away together
                self.allowed = max(1.0, self.allowed / 2)
            self._rests_until = max(self._rests_until, now + seconds)


def _retry_after(reply: httpx.Response) -> float:
    """Seconds; 0 where the header is absent or a date."""
    try:
        return max(0.0, float(reply.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


def not_ours(url: str) -> UserError:
    """What is said of an answer that no qwen-ray server gives."""
    return UserError(
        "what answers here is not a qwen-ray server",
        where=url,
        fix="check the address; it may be that of a page or a proxy in front of the server",
    )


def _answer(reply: httpx.Response | httpx.TransportError, url: str) -> Any:
    if isinstance(reply, Exception):
        raise UserError(
            f"the server does not answer ({type(reply).__name__}: {reply})",
            where=url,
            fix="start it with `qwen-ray serve`, or check the address",
            status=503,
        ) from reply
    if reply.is_success:
        try:
            return reply.json()
        except ValueError:
            raise not_ours(url) from None
    status = reply.status_code
    try:
        message = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = reply.text[:200]
    if status >= 500 and status != 504:
        raise RuntimeError(f"{url}: HTTP {status}: {message}")
    fix = {
        401: f"give a key of this server: --api-key KEY, or set {KEY_VARIABLE}",
        429: "it is busy with others' requests, or the key's limits are too low for this",
        504: "raise the server's limit on the time of a request, or send less at once",
    }.get(status, "")
    raise UserError(f"the server refused: {message}", where=url, fix=fix, status=status)
