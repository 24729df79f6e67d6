"""One write of a knowledge base: rows in, rows out, and at the end a version or nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.retrieval.manifest import Manifest

CURRENT = "current"
"""The tag of the version that is read."""

_KEPT = timedelta(days=36500)  # longer than any state is old: nothing is removed


class Writer:
    """Writes a version and publishes it. Another process writing at once is noticed, not waited for."""

    def __init__(
        self, table: Any, name: str, root: str, *, version: int, parent: int | None, read: int | None
    ) -> None:
        self.table, self.name, self.root, self.version, self.parent = table, name, root, version, parent
        self._read = read

    def ids(self) -> list[str]:
        """Of the rows that are there."""
        return list(self.table.search().select(["id"]).to_arrow()["id"].to_pylist())

    def add(self, rows: Any) -> None:
        """Append rows (an arrow table)."""
        self._commit(partial(self.table.add, rows))

    def remove(self, ids: list[str], *, at_once: int = 1000) -> None:
        """Delete rows by their ids."""
        for start in range(0, len(ids), at_once):
            listed = ", ".join("'" + id.replace("'", "''") + "'" for id in ids[start : start + at_once])
            self._commit(partial(self.table.delete, f"id IN ({listed})"))

    def publish(self, manifest: Manifest) -> None:
        """Make what was written a version, and the current one."""
        # Indices cover what was there when they were made: bring them up to date, and merge small files.
        # It would also remove states older than a week, and fails where one of them is a version.
        self.table.optimize(cleanup_older_than=_KEPT)
        self._commit(partial(manifest.put, self.table))
        tags = self.table.tags
        if tags.list().get(CURRENT, {}).get("version") != self._read:
            raise conflict(self.name, self.root)
        tags.create(f"v{manifest.version}", self.table.version)
        (tags.create if self._read is None else tags.update)(CURRENT, self.table.version)

    def _commit(self, change: Callable[[], Any]) -> None:
        before = self.table.version
        try:
            change()
        except RuntimeError as e:  # Lance's word for two commits that cannot both hold
            if "Incompatible transaction" not in str(e):
                raise
            raise conflict(self.name, self.root) from None
        if self.table.version != before + 1:
            raise conflict(self.name, self.root)


def conflict(name: str, root: str) -> UserError:
    """What a second writer is told."""
    return UserError(
        f"another process is writing the knowledge base '{name}'",
        where=root,
        fix="let it finish, then run this again; readers still have the current version",
        status=409,
    )
