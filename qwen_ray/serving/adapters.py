"""Which adapters are in memory, and which are in use.

An adapter is loaded when it is first asked for, or at start if it is pinned, and dropped, least recently used
first, when the loaded ones pass a limit in bytes; one that a request is using, or that is pinned, is never
dropped. Disk work runs on threads: a slow load holds up nobody who does not ask for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from qwen_ray.errors import UserError
from qwen_ray.registry import Registry
from qwen_ray.serving.catalog import RETRY_SECONDS, Catalog, Found, settled, unreachable
from qwen_ray.serving.lora_weights import LoraWeights, check_size
from qwen_ray.serving.model_id import ModelId, parse

log = logging.getLogger(__name__)

DEFAULT_BYTES = 2 * 2**30
SWAP_SECONDS = 2.0  # where an alias has moved, the version it meant before answers from then on until it can
LOAD_SECONDS = 60.0
_THREADS = 4


class Host(Protocol):
    """The engine's side of loading."""

    def read_adapter(self, folder: Path, *, within: Path | None = None) -> LoraWeights: ...
    def check_lineage(self, folder: Path) -> None: ...
    def add_adapter(self, key: str, folder: LoraWeights) -> int: ...
    def remove_adapter(self, key: str) -> None: ...


@dataclass(frozen=True)
class Use:
    """An adapter in use: the engine's ``key`` of it, and its ``name``, ``NAME@VERSION``; None is the base."""

    key: str | None = None
    name: str | None = None


@dataclass(eq=False)
class _Entry:
    """An adapter that is loaded or being loaded. ``ready`` ends with the load."""

    found: Found
    use: Use
    ready: Future[None] = field(default_factory=Future)
    started: float = field(default_factory=time.monotonic)
    nbytes: int = 0
    users: int = 0


class Lease:
    """An adapter, in memory from the block's start to its end: ``async with store.use(model) as used``."""

    def __init__(self, store: AdapterStore, model: ModelId) -> None:
        self._store, self._model = store, model
        self._entry: _Entry | None = None

    async def __aenter__(self) -> Use:
        if self._model.adapter is None:
            return Use()
        self._entry = await self._store._acquire(self._model.adapter, self._model.at)
        return self._entry.use

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    def __enter__(self) -> Use:
        """The same on a thread that has no event loop."""
        return asyncio.run(self.__aenter__())

    def __exit__(self, *_: object) -> None:
        if self._entry is not None:
            self._store._release(self._entry)


class AdapterStore:
    """Loads adapters into an engine on demand. Safe to use from several threads and event loops."""

    def __init__(
        self,
        host: Host,
        *,
        registry: Registry | None = None,
        folders: Mapping[str, Path] | None = None,
        max_bytes: int = DEFAULT_BYTES,
        on_model: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> None:
        """``max_bytes``: of all loaded adapters, and so of any one. ``on_model(fn)`` runs ``fn`` where the
        model may be changed (the scheduler's thread) and waits."""
        self._host, self._max_bytes = host, max_bytes
        # An engine may have so many places only (vLLM reserves memory for each at its start).
        self._places: int | None = getattr(host, "max_adapters", None)
        self._catalog = Catalog(registry=registry, folders=folders)
        self.available, self.listing = self._catalog.available, self._catalog.listing
        self.canary = self._catalog.canary
        self._on_model = on_model or self._one_at_a_time
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # by Found.key, least recently used first
        self._answered: dict[tuple[str, str | None], Found] = {}
        self._pinned: set[tuple[str, str | None]] = set()
        self._loads = 0
        self._lock = threading.Lock()  # held for bookkeeping only
        self._changing = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="adapters")
        # One of its own: loads that wait for a place may take all the others.
        self._dropper = ThreadPoolExecutor(1, thread_name_prefix="adapters-dropped")

    def use(self, model: ModelId) -> Lease:
        """The adapter of a parsed model id, to be held in a block.

        Entering raises :class:`UserError`: 404 unknown, 409 damaged, too large, unsupported or trained on
        another base, 503 not in memory while the registry cannot be read.
        """
        return Lease(self, model)

    def pin(self, names: Iterable[str]) -> None:
        """Load ``NAME`` or ``NAME@VERSION`` and never drop it. Waits; one that cannot be loaded is logged,
        and loaded when it is asked for and can be."""
        for name in names:
            model = parse(f"base:{name}")
            assert model.adapter is not None
            self._pinned.add((model.adapter, model.at))
            try:
                entry = self._hold(self._catalog.look_up(model.adapter, model.at))
                try:
                    entry.ready.result()
                finally:
                    self._release(entry)
            except UserError as e:
                log.error("pinned adapter '%s' is not loaded: %s", name, e)

    @property
    def resident(self) -> list[Use]:
        """What is in memory, least recently used first."""
        with self._lock:
            return [entry.use for entry in self._entries.values() if entry.ready.done()]

    async def _acquire(self, name: str, at: str | None) -> _Entry:
        found = self._catalog.remembered(name, at)
        if found is None or not found.fixed or found.key not in self._entries:
            found, current = await self._catalog.find(name, at)
            if not current and found.key not in self._entries:
                raise unreachable()
        entry = self._hold(found)
        try:
            before = self._answered.get((name, at))
            if before is not None and before != found:
                left = entry.started + SWAP_SECONDS - time.monotonic()
                loaded = await settled(entry.ready, left)
                if not loaded and (old := self._hold_loaded(before)) is not None:
                    self._release(entry)
                    return old
            if not await settled(entry.ready, LOAD_SECONDS):
                raise UserError(
                    f"adapter '{found.name}' is still being loaded", status=503, retry_after=RETRY_SECONDS
                )
            entry.ready.result()
        except BaseException:
            self._release(entry)
            raise
        self._answered[name, at] = found
        return entry

    def _hold(self, found: Found) -> _Entry:
        """The entry with one more user; loading starts if there is none."""
        with self._lock:
            entry = self._entries.get(found.key)
            if entry is None:
                # A key of its own for each load: what is being dropped is never taken for what comes.
                self._loads += 1
                entry = _Entry(found, Use(f"{found.key}#{self._loads}", found.name))
                self._entries[found.key] = entry
                entry.ready = self._threads.submit(self._load, entry)
            entry.users += 1
            self._entries.move_to_end(found.key)
            return entry

    def _hold_loaded(self, found: Found) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(found.key)
            if entry is None or not entry.ready.done():
                return None
            entry.users += 1
            return entry

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            dropped = self._over()
        if dropped:
            self._dropper.submit(self._drop, dropped)

    def _load(self, entry: _Entry) -> None:
        found = entry.found
        try:
            self._host.check_lineage(found.folder)
            check_size(found.folder, self._max_bytes, within=found.root)
            weights = self._host.read_adapter(found.folder, within=found.root)
            with self._lock:
                entry.nbytes = weights.nbytes
                dropped = self._over()
            self._drop(dropped)
            assert entry.use.key is not None
            nbytes = self._on_model(partial(self._host.add_adapter, entry.use.key, weights))
            with self._lock:
                entry.nbytes = nbytes
        except BaseException as e:
            with self._lock:
                del self._entries[found.key]
            if found.root is not None and not self._catalog.reachable:
                raise unreachable() from e
            raise

    def _one_at_a_time(self, change: Callable[[], Any]) -> Any:
        with self._changing:
            return change()

    def _over(self) -> list[_Entry]:
        """Take out unused entries, oldest first, until the rest fits."""
        read = [entry for entry in self._entries.values() if entry.nbytes]
        count, total = len(read), sum(entry.nbytes for entry in read)
        kept = {self._catalog.remembered(*pinned) for pinned in self._pinned}
        dropped = []
        for entry in read:
            if total <= self._max_bytes and (self._places is None or count <= self._places):
                break
            if entry.users == 0 and entry.ready.done() and entry.found not in kept:
                dropped.append(self._entries.pop(entry.found.key))
                total, count = total - entry.nbytes, count - 1
        return dropped

    def _drop(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            assert entry.use.key is not None
            self._on_model(partial(self._host.remove_adapter, entry.use.key))
