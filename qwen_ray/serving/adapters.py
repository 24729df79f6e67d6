"""Which adapters exist, which are in memory, and which are in use.

A name is looked up in the folders given at start, then in the registry; nothing else is ever opened. An
adapter is loaded when it is first asked for and dropped, least recently used first, when the resident ones
pass a limit in bytes; one that a request is using is never dropped.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.registry import NAME, PRODUCTION, AdapterVersion, Registry
from qwen_ray.serving.lora_weights import LoraWeights
from qwen_ray.serving.model_id import AUTO, ModelId

DEFAULT_BYTES = 2 * 2**30


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


@dataclass
class _Resident:
    nbytes: int
    users: int = 0


class AdapterStore:
    """Loads adapters into an engine on demand. Safe to use from several threads."""

    def __init__(
        self,
        host: Host,
        *,
        registry: Registry | None = None,
        folders: Mapping[str, Path] | None = None,
        max_bytes: int = DEFAULT_BYTES,
        on_model: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> None:
        """``on_model(fn)`` runs ``fn`` where the model may be changed (the scheduler's thread) and waits."""
        self._host, self._registry, self._max_bytes = host, registry, max_bytes
        self._folders = {name: checked_folder(name, Path(folder)) for name, folder in (folders or {}).items()}
        self._on_model = on_model or (lambda fn: fn())
        self._resident: OrderedDict[str, _Resident] = OrderedDict()
        # One lock: loads are rare and short, and two requests for one adapter must not load it twice.
        self._lock = threading.Lock()

    @contextmanager
    def use(self, model: ModelId) -> Iterator[Use]:
        """The adapter of a parsed model id, resident until the block ends.

        Raises :class:`UserError`: 404 unknown, 409 damaged, unsupported or trained on another base.
        """
        if model.adapter is None:
            yield Use()
            return
        used, folder, root = self._locate(model.adapter, model.at)
        key = str(used.key)
        with self._lock:
            entry = self._resident.get(key) or self._load(key, folder, root)
            entry.users += 1
            self._resident.move_to_end(key)
        try:
            yield used
        finally:
            with self._lock:
                entry.users -= 1
                self._evict()

    def _locate(self, name: str, at: str | None) -> tuple[Use, Path, Path | None]:
        """(engine's key and name, folder, root that the files may not leave)."""
        if name in self._folders:
            if at is not None:
                raise UserError(
                    f"adapter '{name}' is a folder without versions", fix=f"leave out '@{at}'", status=404
                )
            folder = self._folders[name]
            return Use(f"{name}@{folder}", name), folder, None
        if self._registry is None:
            fix = did_you_mean(name, self._folders) if self._folders else "this server has no adapters"
            raise UserError(f"unknown adapter '{name}'", fix=fix, status=404)
        found = self._registry.resolve(name, at)
        # The path is part of the key: the same name and version under another root is another adapter.
        return Use(f"{found.ref}@{found.path}", found.ref), found.path, self._registry.root

    def _load(self, key: str, folder: Path, root: Path | None) -> _Resident:
        self._host.check_lineage(folder)
        weights = self._host.read_adapter(folder, within=root)
        self._evict(room_for=weights.nbytes)
        nbytes = self._on_model(lambda: self._host.add_adapter(key, weights))
        entry = self._resident[key] = _Resident(nbytes)
        return entry

    def _evict(self, room_for: int = 0) -> None:
        """Drop unused adapters, oldest first, until the rest and ``room_for`` more fit."""
        total = room_for + sum(entry.nbytes for entry in self._resident.values())
        for key, entry in list(self._resident.items()):
            if total <= self._max_bytes:
                return
            if entry.users == 0:
                del self._resident[key]
                self._on_model(partial(self._host.remove_adapter, key))
                total -= entry.nbytes

    @property
    def resident(self) -> list[str]:
        """Keys in memory, least recently used first."""
        with self._lock:
            return list(self._resident)

    def available(self, fingerprint: str = "") -> list[tuple[str, dict[str, Any]]]:
        """(id after the base and colon, facts) of what can be asked for now.

        A registry may hold adapters of several base models; with ``fingerprint`` only that one's are listed.
        """
        out: list[tuple[str, dict[str, Any]]] = [
            (name, {"source": "folder"}) for name in sorted(self._folders)
        ]
        if self._registry is None:
            return out
        for name in self._registry.names():
            if name in self._folders or name == AUTO:
                continue
            aliases = self._registry.aliases(name)
            for version in self._registry.versions(name):
                facts = _facts(self._registry.get(name, version), aliases)
                if fingerprint and (facts["base"] or {}).get("fingerprint") != fingerprint:
                    continue
                if aliases.get(PRODUCTION) == version:
                    out.append((name, facts))
                out.append((f"{name}@{version}", facts))
        return out


def _facts(adapter: AdapterVersion, aliases: dict[str, int]) -> dict[str, Any]:
    lineage = adapter.lineage
    return {
        "source": "registry",
        "version": adapter.version,
        "aliases": sorted(alias for alias, version in aliases.items() if version == adapter.version),
        "base": lineage.get("base"),
        "parent": lineage.get("parent"),
        "run": lineage.get("run"),
    }


def checked_folder(name: str, folder: Path) -> Path:
    if not NAME.fullmatch(name) or name == AUTO:
        raise UserError(
            f"'{name}' cannot be the name of an adapter", where=str(folder), fix="like 'geography-2'"
        )
    if not folder.is_dir():
        raise UserError("no such adapter folder", where=str(folder), fix="check the path")
    return folder.resolve()
