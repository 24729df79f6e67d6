"""What a version of a knowledge base is: kept in its table, as metadata of the first column."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

_COLUMN, _KEY = "id", "qwen_ray.manifest"


@dataclass(frozen=True)
class Manifest:
    """What a version is. ``embedded`` counts the chunks whose vectors were computed for it; ``embedder`` is
    the id of the model, ``embedder_name`` what loads it."""

    name: str
    version: int
    action: str
    """``build`` or ``update``."""
    parent: int | None
    created: str
    """UTC, ISO 8601."""
    embedder: str
    embedder_name: str
    dimensions: int
    chunks: int
    documents: int
    embedded: int
    removed: int
    origins: list[dict[str, str]]
    """Kind, path and licence of what was read; an update reads them again."""
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the source's name, its licence and number of chunks."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Why and how many records of the sources were left out."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(table: Any) -> Manifest:
        """Of the version that a table is checked out at."""
        return Manifest(**json.loads(table.schema.field(_COLUMN).metadata[_KEY.encode()]))

    def put(self, table: Any) -> None:
        """Commit it to the table."""
        value = json.dumps(self.to_dict(), ensure_ascii=False)
        table.update_field_metadata({"path": _COLUMN, "metadata": {_KEY: value}})
