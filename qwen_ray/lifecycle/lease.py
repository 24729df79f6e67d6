"""A lease: the right to be the only one at something, for as long as it is renewed.

It is one JSON document in storage, ``{"owner", "id", "token", "since", "until"}``, which only conditional
writes change. Who dies stops renewing, and from ``until`` on anybody may take it. ``token`` grows by one with
each new holder. It works by the machines' clocks; they may differ by a fifth of the lease's time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.storage import Missing, read_document, update

if TYPE_CHECKING:
    from qwen_ray.storage import Storage

SECONDS = 60.0
_RENEWED = 0.25  # of the lease's time, after which it is renewed
_TRUSTED = 0.8  # of the lease's time, for which its holder relies on it: clocks differ


@dataclass(frozen=True)
class Holder:
    """Who has a lease. ``since`` and ``until``: seconds since 1970, UTC."""

    owner: str
    token: int
    since: float
    until: float


class LeaseLost(RuntimeError):
    """Somebody else may have the lease by now: stop, and write nothing more."""


class _Taken(Exception):
    """Somebody has the lease."""


class Lease:
    """One contender for the lease that is kept under ``key``.

    As a context manager it is acquired (:class:`UserError`, status 409, if somebody has it), renewed by a
    thread, and released. Work calls :meth:`check` before each step that only the holder may take.
    """

    def __init__(
        self,
        storage: Storage,
        key: str,
        owner: str,
        seconds: float = SECONDS,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``owner``: told to others, and different for each process (see :func:`this_process`). ``seconds``:
        how long a dead holder keeps others out. ``clock``: seconds since 1970."""
        self._storage, self._key, self._clock = storage, key, clock
        self.owner, self.seconds = owner, seconds
        self.token: int | None = None
        """Of the holder, while this is one."""
        self.lost = threading.Event()
        """Set when the lease is found to be lost."""
        self._id = uuid.uuid4().hex  # two contenders may give the same owner
        self._since = self._trusted = 0.0
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        """Take the lease; False if somebody has it."""

        def change(document: Any) -> Any:
            now = self._clock()
            if document is None:
                return self._document(1, now)
            if self._is_ours(document):  # a write of before that arrived, though its answer did not
                return self._document(document["token"], now)
            if document["until"] > now:
                raise _Taken
            return self._document(document["token"] + 1, now)

        self._since = now = self._clock()
        try:
            self.token = update(self._storage, self._key, change)["token"]
        except _Taken:
            return False
        self._trusted = now + _TRUSTED * self.seconds
        self.lost.clear()
        return True

    def renew(self) -> None:
        """Keep the lease for its whole time from now on. :class:`LeaseLost` if somebody else took it."""

        def change(document: Any) -> Any:
            if document is None or not self._is_ours(document):
                raise self._lose()
            return self._document(document["token"], self._clock())

        now = self._clock()
        update(self._storage, self._key, change)
        self._trusted = now + _TRUSTED * self.seconds

    def release(self) -> None:
        """Let others have it at once. Nothing, if it is lost already."""

        def change(document: Any) -> Any:
            if document is None or not self._is_ours(document):
                raise _Taken
            return {**document, "id": "", "until": 0.0}

        if self.token is not None:
            self.token = None
            try:
                update(self._storage, self._key, change)
            except _Taken:
                return

    def holder(self) -> Holder | None:
        """Who has the lease now."""
        try:
            found = read_document(self._storage, self._key)
        except Missing:
            return None
        if found["until"] <= self._clock():
            return None
        return Holder(found["owner"], found["token"], found["since"], found["until"])

    @property
    def held(self) -> bool:
        """Whether this is surely the holder."""
        return self.token is not None and not self.lost.is_set() and self._clock() < self._trusted

    def check(self) -> None:
        """:class:`LeaseLost` unless this is surely the holder."""
        if not self.held:
            raise self._lose()

    def __enter__(self) -> Lease:
        if not self.acquire():
            raise self.taken()
        self._released.clear()
        self._thread = threading.Thread(target=self._keep, name=f"lease {self._key}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(UserError):  # storage is away; the lease ends by itself
            self.release()

    def taken(self) -> UserError:
        """What to say when somebody else has it."""
        holder = self.holder()
        who = "somebody else" if holder is None else f"{holder.owner}, since {_time(holder.since)}"
        return UserError(
            f"this is being done by {who}",
            where=f"{self._storage.location}/{self._key}",
            fix=f"wait; if that process is dead, its lease ends within {self.seconds:g} s",
            status=409,
        )

    def _keep(self) -> None:
        while not self._released.wait(_RENEWED * self.seconds):
            try:
                self.renew()
            except LeaseLost:
                return
            except Exception:  # storage may be back before the time is up
                if not self.held:
                    self.lost.set()
                    return

    def _document(self, token: int, now: float) -> dict[str, Any]:
        return {
            "owner": self.owner,
            "id": self._id,
            "token": token,
            "since": self._since,
            "until": now + self.seconds,
        }

    def _is_ours(self, document: Any) -> bool:
        return bool(document["id"] == self._id)

    def _lose(self) -> LeaseLost:
        self.lost.set()
        return LeaseLost(
            f"the lease {self._storage.location}/{self._key} was lost: {self.owner} was too slow"
        )


def this_process() -> str:
    """A name for this process: machine and process id."""
    return f"{socket.gethostname()}/{os.getpid()}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
