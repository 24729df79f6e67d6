"""Which adapters may be served: the folders given at start, then the registry.

A registry may be a mounted folder, which can vanish or hang. What was looked up before is remembered, so that
adapters in memory go on answering; the rest is refused with 503 until the registry is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.peft_folder import CONFIG, check_adapter
from qwen_ray.registry import NAME, PRODUCTION, AdapterVersion, Canary, Registry
from qwen_ray.serving.model_id import AUTO

T = TypeVar("T")
Listing = list[tuple[str, dict[str, Any]]]
"""(id after the base and colon, facts) of each adapter."""

LOOKUP_SECONDS = 3.0  # a lookup that takes longer is taken for a registry that hangs
LISTING_SECONDS = 30.0  # one of all adapters reads several files of each
RETRY_SECONDS = 5.0
CANARY_SECONDS = 2.0
MISS_SECONDS = 2.0  # what was not there is not looked for again so soon
_MISSES = 1024  # remembered
_THREADS = 4


@dataclass(frozen=True)
class Found:
    """An adapter. ``name``: ``NAME@VERSION``, or a folder's name. ``place``: where on this machine it is, or
    will be. ``root``: what its files may not leave. ``fixed``: what was asked for always means this adapter;
    an alias may move to another."""

    name: str
    place: Path
    root: Path | None
    fixed: bool = field(compare=False)
    version: AdapterVersion | None = field(default=None, compare=False)

    @property
    def folder(self) -> Path:
        """Its files; those of a registry in an object store are copied here first."""
        return self.place if self.version is None else self.version.path

    @property
    def key(self) -> str:
        # The path is part of it: the same name and version under another root is another adapter.
        return f"{self.name}@{self.place}"


class Catalog:
    """Looks adapters up by name. Safe to use from several threads and event loops."""

    def __init__(
        self, *, registry: Registry | None = None, folders: Mapping[str, Path] | None = None
    ) -> None:
        self._registry = registry
        self.folders = {name: checked_folder(name, Path(folder)) for name, folder in (folders or {}).items()}
        self._known: dict[tuple[str, str | None], Found] = {}
        self._misses: OrderedDict[tuple[str, str | None], tuple[float, UserError]] = OrderedDict()
        self._canaries: dict[str, tuple[float, Canary | None]] = {}
        self._listing: Listing = []
        self._late: set[Future[Any]] = set()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="registry")
        self._listings: dict[str, tuple[float, Future[Listing]]] = {}  # under way, by fingerprint: since when
        self._lister = ThreadPoolExecutor(1, thread_name_prefix="registry-listing")

    async def find(self, name: str, at: str | None) -> tuple[Found, bool]:
        """The adapter that is meant now, and whether the registry could be asked.

        Where it could not, the adapter that was meant before. Raises :class:`UserError`: 404 unknown, now or
        within the last :data:`MISS_SECONDS`, 503 not known and not to be looked up now.
        """
        since, missed = self._misses.get((name, at), (0.0, None))
        if missed is not None and time.monotonic() - since < MISS_SECONDS:
            raise copy.copy(missed)
        try:
            return await self._in_time(lambda: self.look_up(name, at)), True
        except UserError as e:
            if e.status == 404:
                self._miss(name, at, e)
            known = self.remembered(name, at)
            if e.status != 503 or known is None:
                raise
            return known, False

    def look_up(self, name: str, at: str | None) -> Found:
        """As :meth:`find`, but waits for the disk and remembers only for others."""
        if name in self.folders:
            if at is not None:
                raise UserError(
                    f"adapter '{name}' is a folder without versions", fix=f"leave out '@{at}'", status=404
                )
            found = Found(name, self.folders[name], None, fixed=True)
        elif self._registry is None:
            fix = did_you_mean(name, self.folders) if self.folders else "this server has no adapters"
            raise UserError(f"unknown adapter '{name}'", fix=fix, status=404)
        else:
            # Of a name that nobody has, the registry itself would say which there are, and read each of them.
            if (name, at) not in self._known and not self._asked(lambda registry: registry.versions(name)):
                raise self._unknown(name)
            version = self._asked(lambda registry: registry.resolve(name, at))
            fixed = at is not None and at.isdecimal()
            found = Found(version.ref, version.folder, self._registry.root, fixed, version)
            self._known[name, str(version.version)] = replace(found, fixed=True)
        self._known[name, at] = found
        self._misses.pop((name, at), None)
        return found

    def _unknown(self, name: str) -> UserError:
        """Nothing under this name; what is known without asking helps to find the right one."""
        if not self.reachable:
            raise unreachable()
        names = {*self.folders, *(listed.partition("@")[0] for listed, _ in self._listing)}
        near = get_close_matches(name, names, n=1)
        fix = f"did you mean '{near[0]}'?" if near else "GET /v1/models lists what is served"
        return UserError(f"unknown adapter '{name}'", fix=fix, status=404)

    def _miss(self, name: str, at: str | None, error: UserError) -> None:
        self._misses[name, at] = time.monotonic(), error
        self._misses.move_to_end((name, at))
        while len(self._misses) > _MISSES:
            self._misses.popitem(last=False)

    async def canary(self, name: str) -> Canary | None:
        """The canary of a name, as it was within the last :data:`CANARY_SECONDS`; while the registry cannot
        be read, as it was last."""
        if self._registry is None or name in self.folders:
            return None
        at, known = self._canaries.get(name, (-CANARY_SECONDS, None))
        now = time.monotonic()
        if now - at >= CANARY_SECONDS:
            with contextlib.suppress(UserError):
                known = await self._in_time(lambda: self._asked(lambda registry: registry.canary(name)))
            self._canaries[name] = (now, known)
        return known

    def remembered(self, name: str, at: str | None) -> Found | None:
        """What :meth:`look_up` found last."""
        return self._known.get((name, at))

    @property
    def reachable(self) -> bool:
        """Whether the registry is there."""
        return self._registry is None or self._registry.reachable(used=bool(self._known))

    def available(self, fingerprint: str = "") -> Listing:
        """What can be asked for now.

        A registry may hold adapters of several base models; with ``fingerprint`` only that one's are listed.
        """
        listing: Listing = [(name, {"source": "folder"}) for name in sorted(self.folders)]
        if self._registry is not None:
            try:
                listing += self._asked(lambda registry: self._versions(registry, fingerprint))
            except UserError as e:
                if e.status != 503:
                    raise
                return self._stale()
        self._listing = listing
        return listing

    async def listing(self, fingerprint: str = "") -> Listing:
        """:meth:`available`; while the registry cannot be read what it held last, each marked ``stale``.

        Those who ask while a listing is under way wait for that one. A slow one holds up no lookup.
        """
        began, future = self._listings.get(fingerprint, (0.0, None))
        if future is None or future.done():
            began, future = time.monotonic(), self._lister.submit(self.available, fingerprint)
            self._listings[fingerprint] = began, future
        if await settled(future, max(0.0, began + LISTING_SECONDS - time.monotonic())):
            with contextlib.suppress(UserError):
                return future.result()
        return self._stale()

    def _stale(self) -> Listing:
        return [
            (name, facts | {"stale": True} if facts["source"] == "registry" else facts)
            for name, facts in self._listing
        ]

    def _versions(self, registry: Registry, fingerprint: str) -> Listing:
        out: Listing = []
        for name in registry.files.names():
            if name in self.folders or name == AUTO:
                continue
            state = registry.state(name)
            for version in registry.history(name):
                if str(version) in state.archived or str(version) in state.removed:
                    continue
                facts = _facts(version, registry.lineage(name, version), state.aliases)
                if fingerprint and (facts["base"] or {}).get("fingerprint") != fingerprint:
                    continue
                if state.aliases.get(PRODUCTION) == version:
                    out.append((name, facts))
                out.append((f"{name}@{version}", facts))
        return out

    def _asked(self, ask: Callable[[Registry], T]) -> T:
        """The registry's answer; 503 if its folder is away or cannot be read."""
        assert self._registry is not None
        for last in (False, True):
            if not self.reachable:
                raise unreachable()
            try:
                return ask(self._registry)
            except OSError as e:
                raise unreachable() from e
            except UserError as e:
                if e.status == 503:
                    raise unreachable() from e
                # Asked again: it may have gone, and come back, meanwhile.
                if last and self.reachable:
                    raise
        raise unreachable()

    async def _in_time(self, work: Callable[[], T]) -> T:
        """Run ``work`` on a thread. 503 if it takes too long, and at once while earlier work still hangs."""
        if self._late:
            raise unreachable()
        future = self._threads.submit(work)
        if await settled(future, LOOKUP_SECONDS):
            return future.result()
        self._late.add(future)
        future.add_done_callback(self._late.discard)
        raise unreachable()


async def settled(future: Future[Any], seconds: float) -> bool:
    """Wait for at most so long; whether it has ended then. Unlike with asyncio's own, giving up cancels
    nothing."""
    if not future.done():
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(ended.set)

        future.add_done_callback(wake)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), seconds)
    return future.done()


def unreachable() -> UserError:
    return UserError(
        "the adapter registry cannot be read now",
        fix="adapters in memory go on answering; ask again later",
        status=503,
        retry_after=RETRY_SECONDS,
    )


def _facts(version: int, lineage: dict[str, Any], aliases: dict[str, int]) -> dict[str, Any]:
    return {
        "source": "registry",
        "version": version,
        "aliases": sorted(alias for alias, meant in aliases.items() if meant == version),
        "base": lineage.get("base"),
        "parent": lineage.get("parent"),
        "run": lineage.get("run"),
    }


def checked_folder(name: str, folder: Path) -> Path:
    """The full path of an adapter folder given by a user, under a name that may be served."""
    if not NAME.fullmatch(name) or name == AUTO:
        raise UserError(
            f"'{name}' cannot be the name of an adapter", where=str(folder), fix="like 'geography-2'"
        )
    if not folder.is_dir():
        raise UserError("no such adapter folder", where=str(folder), fix="check the path")
    check_adapter(folder, CONFIG, fix="check the path")
    return folder.resolve()
