"""How much waits in front of an engine, and when more is refused.

What waits is counted in tokens, and the speed at which they are worked off is measured. Beyond what can be
done in bearable time a request is refused at once (429, with the seconds after which it would be taken)
rather than kept until its client gives up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from qwen_ray.errors import UserError

WAIT_SECONDS = 60.0  # what may wait by default: as many tokens as are worked off in this time
_LEAST = 2**17  # tokens that may wait whatever the measured speed
_HALF = 20.0  # seconds of work after which a measurement counts half


class Backlog:
    """Counts tokens that wait and tokens that were worked off. Thread-safe."""

    def __init__(self, most: int | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``most``: tokens that may wait; None: what takes a minute at the measured speed, and 131,072 at
        the least."""
        self._most, self._clock = most, clock
        self._lock = threading.Lock()
        self.waiting = self._open = 0
        self._tokens = self._seconds = self._mark = 0.0

    @property
    def most(self) -> int:
        """Beyond so many tokens of waiting requests, further ones are refused."""
        return self._most if self._most is not None else max(_LEAST, int(WAIT_SECONDS * self.speed))

    @property
    def speed(self) -> float:
        """Tokens a second while there was work; 0 before anything was measured."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def enter(self, tokens: int) -> Place:
        """A request of so many tokens begins to wait. :class:`UserError` (429) if too many do already; one
        alone is taken, however large."""
        return self.enter_all([tokens])[0]

    def enter_all(self, parts: Sequence[int]) -> list[Place]:
        """As :meth:`enter`, for a request of several parts, each with a place of its own: it is taken, or
        refused, as a whole."""
        tokens = sum(parts)
        with self._lock:
            excess = self.waiting + tokens - self.most
            if self.waiting and excess > 0:
                seconds = excess / self.speed if self.speed else 1.0
                raise UserError(
                    f"the server is busy: {self.waiting} tokens wait",
                    fix="send the request again later",
                    status=429,
                    retry_after=min(max(1.0, seconds), WAIT_SECONDS),
                )
            if not self._open:
                self._mark = self._clock()
            self.waiting += tokens
            self._open += len(parts)
        return [Place(self, part) for part in parts]

    def work(self, tokens: int) -> None:
        """So many more are worked off."""
        with self._lock:
            now = self._clock()
            spent, self._mark = now - self._mark, now
            kept = 0.5 ** (spent / _HALF)
            self._tokens = self._tokens * kept + tokens
            self._seconds = self._seconds * kept + spent

    def change(self, waiting: int, requests: int) -> None:
        """For :class:`Place`."""
        with self._lock:
            self.waiting += waiting
            self._open += requests


class Place:
    """One request's. Either call counts once, whoever makes it again."""

    def __init__(self, backlog: Backlog, tokens: int) -> None:
        self._backlog, self._tokens = backlog, [tokens]
        self._open = [1]

    def start(self) -> None:
        """It waits no longer."""
        if tokens := _taken(self._tokens):
            self._backlog.change(-tokens, 0)

    def leave(self) -> None:
        """It has ended."""
        self.start()
        if _taken(self._open):
            self._backlog.change(0, -1)


def _taken(left: list[int]) -> int:
    """What is left, which then is not: ``pop`` gives it to one thread only."""
    try:
        return left.pop()
    except IndexError:
        return 0
