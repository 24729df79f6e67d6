"""The versions of knowledge bases as LanceDB tables: in a folder, or under an object store's URI.

A knowledge base is a table; a version of it is a state of the table with the tag ``v1``, ``v2`` ..., and the
tag ``current`` says which one is read. What is being written has no tag, so no reader sees it, and a write
that breaks off leaves the version that was current. The manifest of a version lies in the table itself, as
metadata of its first column: it is versioned with the rows and needs no file beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.registry import NAME
from qwen_ray.retrieval.manifest import Manifest
from qwen_ray.retrieval.writer import CURRENT, Writer, conflict

_FIX = "make one with `qwen-ray kb build`"


@dataclass(frozen=True)
class Snapshot:
    """One version, to read: nothing that is written later changes it."""

    table: Any
    state: int
    """The table's own version number."""
    manifest: Manifest


class Store:
    """All knowledge bases under one root."""

    def __init__(self, root: str | Path) -> None:
        """``root``: a folder, which need not exist, or a URI that LanceDB reads (``s3://bucket/prefix``)."""
        try:
            import lancedb
        except ImportError:
            raise UserError(
                "knowledge bases need lancedb, which is not installed", fix="pip install 'qwen-ray[rag]'"
            ) from None
        self.root = str(root)
        self._remote = "://" in self.root
        self._connect = lancedb.connect

    def names(self) -> list[str]:
        """Of the knowledge bases that have a version, sorted."""
        self.check()
        with self.reading():
            return sorted(name for name in self._tables() if CURRENT in self._open(name).tags.list())

    @property
    def there(self) -> bool:
        """Whether the root can hold anything yet: a folder is made by the first build."""
        return self._remote or Path(self.root).is_dir()

    def check(self) -> None:
        """Raise :class:`UserError` where the root is a folder and not there."""
        if not self.there:
            raise UserError("no knowledge bases here: no such folder", where=self.root, fix=_FIX, status=503)

    def current(self, name: str) -> int:
        """The table's version that readers shall read; 404 where there is none."""
        return self._tagged(name, CURRENT)

    def open(self, name: str, version: int | None = None) -> Snapshot:
        """A version, by default the current one."""
        state = self._tagged(name, CURRENT if version is None else f"v{version}")
        with self.reading():
            table = self._open(name)
            table.checkout(state)
            return Snapshot(table, state, Manifest.of(table))

    def versions(self, name: str) -> list[Manifest]:
        """Of all versions, oldest first."""
        return [self.open(name, number).manifest for number in self._numbers(name)]

    def rollback(self, name: str, version: int) -> Manifest:
        """Make an earlier (or a later) version the current one again."""
        with self.writing(name):
            snapshot = self.open(name, version)
            self._open(name).tags.update(CURRENT, snapshot.state)
            return snapshot.manifest

    # -- writing

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Alone, as far as this file system goes; on an object store :meth:`publish` sees other writers."""
        if not NAME.fullmatch(name):
            raise UserError(
                f"'{name}' cannot be the name of a knowledge base",
                fix="lower-case letters, digits, dot, dash and underscore, at most 64",
            )
        if self._remote:
            yield
            return
        import fcntl

        root = Path(self.root)
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f".{name}.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise conflict(name, self.root) from None
            yield

    def start(self, name: str, schema: Any, *, fresh: bool) -> Writer:
        """A writer on the current version's rows, or with ``fresh`` on none."""
        known = name in self._tables()
        state = self._open(name).tags.list().get(CURRENT, {}).get("version") if known else None
        if fresh or state is None:
            table = self._db.create_table(name, schema=schema, mode="overwrite" if known else "create")
        else:
            table = self._open(name)
            if table.version != state:  # what an interrupted write left, or a later version than the current
                table.checkout(state)
                table.restore()
        number = max(self._numbers(name), default=0) + 1
        parent = None if state is None else _number_of(table, state)
        return Writer(table, name, self.root, version=number, parent=parent, read=state)

    def _numbers(self, name: str) -> list[int]:
        with self.reading():
            return sorted(_tag_numbers(self._open(name)))

    def _tagged(self, name: str, tag: str) -> int:
        with self.reading():
            tags = self._open(name).tags.list() if name in self._tables() else {}
        if CURRENT not in tags:
            raise UserError(
                f"no knowledge base '{name}'",
                where=self.root,
                fix=did_you_mean(name, names) if (names := self.names()) else _FIX,
                status=404,
            )
        if tag not in tags:
            raise UserError(
                f"'{name}' has no version {tag.removeprefix('v')}",
                where=self.root,
                fix=f"it has {', '.join(map(str, self._numbers(name)))}",
                status=404,
            )
        return int(tags[tag]["version"])

    def _tables(self) -> list[str]:
        names: list[str] = []
        with self.reading():
            page = self._db.list_tables()
            names += page.tables
            while page.page_token:
                page = self._db.list_tables(page_token=page.page_token)
                names += page.tables
        return names

    def _open(self, name: str) -> Any:
        return self._db.open_table(name)

    @cached_property
    def _db(self) -> Any:
        self.check()  # LanceDB would make the folder
        with self.reading():
            return self._connect(self.root)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what the storage raises into a :class:`UserError` with status 503.

        The storage's own message names paths and buckets: it goes where no client of a server reads it.
        """
        try:
            yield
        except (OSError, RuntimeError, ValueError) as e:
            reason = next(iter(str(e).splitlines()), "") or type(e).__name__
            raise UserError(
                "the knowledge bases cannot be read",
                where=f"{self.root} ({reason})",
                fix="check the root, and that it can be reached",
                status=503,
                retry_after=5,
            ) from e


def _tag_numbers(table: Any) -> dict[int, int]:
    """Version numbers and the table's own version of each."""
    tags = table.tags.list()
    return {int(tag[1:]): int(of["version"]) for tag, of in tags.items() if tag[1:].isdecimal()}


def _number_of(table: Any, state: int) -> int | None:
    return next((number for number, of in _tag_numbers(table).items() if of == state), None)
