"""Adapter versions by name, alias or number: immutable once published, on a folder or an object store.

Layout in a folder (an object store has the same documents; its files are described in objects.py)::

    ROOT/NAME/versions/0001/     an ordinary PEFT folder + lineage.json + manifest.json
    ROOT/NAME/state.json         aliases, archive, canary, and the log of what was decided
    ROOT/NAME/events/ID.json     what was recorded: evaluations, verdicts, overrides, notes

Each is written in one step. A crash at any point leaves the old state or the new one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.object_storage import ObjectStorage
from qwen_ray.registry import events as happened
from qwen_ray.registry.events import Clock, Event, iso, new_id, utc_now
from qwen_ray.registry.folders import Folders
from qwen_ray.registry.objects import Objects
from qwen_ray.registry.state import CANARY, PRODUCTION, Change, State, Was, check_alias, gone, of_files
from qwen_ray.registry.version import (
    NAME,
    AdapterVersion,
    Document,
    VersionFiles,
    check_files,
    check_lineage,
    digest_of,
    files_of,
    hashed,
    parents_of,
    parse_ref,
)
from qwen_ray.storage import (
    LocalStorage,
    Missing,
    decoded,
    open_storage,
    read_document,
    update,
)

if TYPE_CHECKING:
    from qwen_ray.registry.collect import Removal, Retention

_ALIAS_FILE = re.compile(r"[^/]+/aliases/([^/]+)\.json")


@dataclass(frozen=True)
class Canary:
    """A version that answers a part of the requests. ``share``: of 1."""

    version: int
    share: float


class Registry:
    """The versions and aliases at one place. Several processes may use it at once."""

    def __init__(self, root: Path | str | LocalStorage | ObjectStorage, *, clock: Clock = utc_now) -> None:
        """``root``: a folder, or a URI of an object store (see :func:`qwen_ray.storage.open_storage`)."""
        self.storage = open_storage(root) if isinstance(root, (str, Path)) else root
        self.clock = clock
        self._states: dict[str, tuple[str, State]] = {}  # by name, with the tag of what was read
        self.files: VersionFiles = (
            Folders(self.storage) if isinstance(self.storage, LocalStorage) else Objects(self.storage)
        )

    @property
    def location(self) -> str:
        """The folder's full path, or the URI."""
        return self.storage.location

    @property
    def root(self) -> Path:
        """The folder below which all files are: the registry's own; of an object store, the cache's."""
        return self.files.root

    # -- versions

    def names(self) -> list[str]:
        """Every adapter name with at least one version."""
        return [name for name in self.files.names() if self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """The version numbers of ``name`` whose files are there, archived ones too, ascending."""
        numbers = self.history(name)
        removed = self.state(name).removed if numbers else {}
        return [number for number in numbers if str(number) not in removed]

    def check(self, name: str) -> None:
        """:class:`UserError` (HTTP 404) where nothing was ever published under ``name``."""
        if not self.history(name):
            raise self._unknown(name)

    def history(self, name: str) -> list[int]:
        """Every version number ever published under ``name``, ascending."""
        return self.files.numbers(_checked(name))

    def publish(self, name: str, adapter: Path, lineage: dict[str, Any]) -> AdapterVersion:
        """Copy a PEFT folder in as the next version of ``name`` and return it.

        The same files with the same lineage are the version that they were before. ``lineage`` must hold
        ``base`` (``{"id", "fingerprint"}``); ``parents`` (a list of ``NAME@VERSION``) are kept while the
        version is; the rest is free.
        """
        _checked(name)
        lineage = json.loads(json.dumps(lineage))
        check_lineage(lineage, adapter)
        digest = digest_of(hashed(adapter, files_of(adapter)), lineage)

        def same(number: int, other: Document) -> bool:
            return other.digest == digest and str(number) not in self.state(name).removed

        numbers = self.history(name)
        for number in reversed(numbers):
            if same(number, self._document(name, number)):
                return self.get(name, number)
        for parent in parents_of(lineage):
            self._hold(parent)
        at = iso(self.clock())
        number = self.files.publish(name, adapter, lineage, at=at, after=max(numbers, default=0), same=same)
        return self.get(name, number)

    def get(self, name: str, version: int) -> AdapterVersion:
        """One version by number; :class:`UserError` (HTTP 404) when there is none, or its files are gone."""
        document = self._document(name, version)
        if at := self.state(name).removed.get(str(version)):
            raise gone(name, version, at)
        return self.files.open(name, version, document)

    def resolve(self, name: str, at: str | None = None) -> AdapterVersion:
        """``name`` at a version number or alias; without one, at ``production``.

        Raises :class:`UserError` with HTTP status 404 for anything that is not in the registry.
        """
        at = at or PRODUCTION
        if at.isdecimal():
            return self.get(name, int(at))
        version = self.aliases(name).get(at)
        if version is None:
            raise self._absent(name, f"'{at}' version")
        return self.files.open(name, version, self._document(name, version))

    def lineage(self, name: str, version: int) -> dict[str, Any]:
        """What a version was made from, also when its files are gone."""
        return self._document(name, version).lineage

    def verify(self, adapter: AdapterVersion) -> None:
        """Check every file against the manifest; :class:`UserError` (409) names the first that differs."""
        check_files(adapter.path, self._document(adapter.name, adapter.version).files)

    def reachable(self, *, used: bool = False) -> bool:
        """Whether the folder is there. ``used``: it held something before, so an empty one is what is left of
        a lost mount. An object store is always taken to be: it says itself when it cannot be read (503)."""
        if not isinstance(self.storage, LocalStorage):
            return True
        try:
            return self.root.is_dir() and (not used or any(self.root.iterdir()))
        except OSError:
            return False

    # -- aliases

    def aliases(self, name: str) -> dict[str, int]:
        """Alias to version number."""
        return dict(sorted(self.state(name).aliases.items()))

    def point(
        self, name: str, alias: str, version: int, *, reason: str, by: str | None = None, was: Was = "any"
    ) -> None:
        """Move ``alias`` to ``version``, with the reason in its log, in one atomic step.

        ``was``: what the alias must mean now (None: nothing). Raises :class:`UserError`: 404 no such version,
        409 the alias means something else, or the version is archived.
        """
        _check_movable(alias)
        self.get(name, version)
        self.change(name, lambda change: change.point(alias, version, reason=reason, by=by, was=was))

    def unpoint(self, name: str, alias: str, *, reason: str, by: str | None = None) -> None:
        """Let ``alias`` mean nothing."""
        check_alias(alias)
        self.check(name)
        self.change(name, lambda change: change.point(alias, None, reason=reason, by=by))

    def rollback(
        self, name: str, *, reason: str, alias: str = PRODUCTION, by: str | None = None
    ) -> AdapterVersion:
        """Let ``alias`` mean what it meant before, out of the archive if need be; again: before that.

        Raises :class:`UserError` (409) where there is nothing before. A canary is stopped, not rolled back.
        """
        _check_movable(alias)
        self.check(name)
        self.change(name, lambda change: change.rollback(alias, reason=reason, by=by))
        return self.resolve(name, alias)

    def start_canary(
        self, name: str, version: int, share: float, *, reason: str, by: str | None = None
    ) -> None:
        """Let ``version`` answer ``share`` (above 0, below 1) of the requests to ``name`` by ``:auto``."""
        if not 0 < share < 1:
            raise UserError(f"{share} is no share of the requests", fix="above 0 and below 1, such as 0.1")
        self.get(name, version)
        self.change(
            name, lambda change: change.point(CANARY, version, reason=reason, by=by, share=share)
        )  # fmt: skip

    def canary(self, name: str) -> Canary | None:
        """The canary that runs, if one does."""
        state = self.state(name)
        if CANARY not in state.aliases or state.share is None:
            return None
        return Canary(state.aliases[CANARY], state.share)

    def stop_canary(self, name: str, *, reason: str, by: str | None = None) -> None:
        """End the canary."""
        self.unpoint(name, CANARY, reason=reason, by=by)

    # -- the archive

    def archive(self, name: str, version: int, *, reason: str, by: str | None = None) -> None:
        """Put a version away: it is not listed by servers, and :meth:`collect` may remove its files one day.

        Raises :class:`UserError` (409) while an alias means it.
        """
        self.get(name, version)
        self.change(name, lambda change: change.archive(version, reason=reason, by=by))

    def restore(self, name: str, version: int, *, reason: str, by: str | None = None) -> None:
        """Take a version out of the archive; :class:`UserError` (404) if its files are gone."""
        self.get(name, version)
        self.change(name, lambda change: change.restore(version, reason=reason, by=by))

    def archived(self, name: str) -> list[int]:
        """The archived versions whose files are there, ascending."""
        return sorted(map(int, self.state(name).archived))

    def collect(self, retention: Retention, *, dry_run: bool) -> list[Removal]:
        """Remove the files of archived versions that nothing needs (see :mod:`.collect`)."""
        from qwen_ray.registry.collect import collect

        return collect(self, retention, dry_run=dry_run)

    # -- events

    def record(self, name: str, version: int, kind: str, value: dict[str, Any]) -> Event:
        """Note an evaluation, a verdict, an override or a note on a version, for ever."""
        self._document(name, version)
        if kind == "verdict":
            self._hold(str(value.get("baseline")))
        now = self.clock()
        return happened.record(self.storage, Event(new_id(now), iso(now), kind, name, version, value))

    def events(self, name: str, *, version: int | None = None, kind: str | None = None) -> list[Event]:
        """All that happened, oldest first; of one version or kind if given."""
        documents = [(number, self._document(name, number)) for number in self.history(name)]
        found = [
            *happened.published(name, documents),
            *happened.logged(name, self.state(name)),
            *happened.recorded(self.storage, name),
        ]
        return [
            event
            for event in sorted(found, key=lambda event: event.at)
            if (version is None or event.concerns(version)) and kind in (None, event.kind)
        ]

    # -- the rest

    def _document(self, name: str, version: int) -> Document:
        document = self.files.document(_checked(name), version)
        if document is None:
            raise self._absent(name, f"version {version}")
        return document

    def state(self, name: str) -> State:
        """What is decided on ``name`` now."""
        key = _state_key(_checked(name))
        try:
            stored = self.storage.read(key)
        except Missing:
            return self._state_of_files(name)
        tag, state = self._states.get(name, ("", State()))
        if tag != stored.tag:  # the log grows, and servers ask with every request
            state = State.of(decoded(self.storage, key, stored))
            self._states[name] = stored.tag, state
        return state

    def _state_of_files(self, name: str) -> State:
        keys = (_ALIAS_FILE.fullmatch(key) for key in self.storage.keys(f"{name}/aliases/"))
        return of_files({key[1]: read_document(self.storage, key[0]) for key in keys if key})

    def change(self, name: str, act: Callable[[Change], Any]) -> None:
        """Change the state in one step, once: also where another writer is faster, or an answer is lost."""
        now = self.clock()
        id, at = new_id(now), iso(now)

        def changed(document: Any) -> Any:
            state = State.of(document) if document else self._state_of_files(name)
            change = Change(name, state, id, at)
            if not change.done:
                act(change)
            return state.document()

        update(self.storage, _state_key(_checked(name)), changed)

    def _hold(self, ref: str) -> None:
        """Keep what is about to be needed, if it is a version here."""
        parsed = parse_ref(ref)
        if parsed is None or self.files.document(*parsed) is None:
            return
        name, version = parsed

        def hold(change: Change) -> None:
            if str(version) not in change.state.removed:
                change.hold(version)

        self.change(name, hold)

    def _absent(self, name: str, what: str) -> UserError:
        have = self.versions(name)
        if not have:
            return self._unknown(name)
        return UserError(
            f"adapter '{name}' has no {what}",
            where=self.location,
            fix=f"name one of: {', '.join(f'{name}@{v}' for v in have)}",
            status=404,
        )

    def _unknown(self, name: str) -> UserError:
        names = self.names()
        known = (
            f"registered: {', '.join(names)}" if names else "the registry is empty; register an adapter first"
        )
        return UserError(f"unknown adapter '{name}'", where=self.location, fix=known, status=404)


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(
            f"'{name}' is not an adapter name",
            fix="at most 64 lower-case letters, digits, '.', '_', '-', the first a letter or digit",
            status=404,
        )
    return name


def _check_movable(alias: str) -> None:
    """:class:`UserError` for what cannot be an alias, and for the canary, which has a share, too."""
    check_alias(alias)
    if alias == CANARY:
        raise UserError(
            "a canary has a share",
            fix="`qwen-ray canary start NAME@VERSION --share S`, `qwen-ray canary stop`",
        )


def _state_key(name: str) -> str:
    return f"{name}/state.json"
