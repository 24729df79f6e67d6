"""Record: the one shape of a training example, and its JSONL file.

One JSON object a line::

    {"id": "...", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}],
     "domain": "biology", "source": "openstax_biology", "license": "CC-BY-3.0", "difficulty": 0.4}

``difficulty`` is optional. Every other key is required; unknown keys are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.fsio import write_jsonl

ROLES = ("system", "user", "assistant")
_KEYS = ("id", "messages", "domain", "source", "license", "difficulty")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``role`` is one of :data:`ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation that ends in, or holds, at least one assistant turn to learn from."""

    id: str
    messages: tuple[Message, ...]
    domain: str
    source: str
    license: str
    difficulty: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of one line."""
        row: dict[str, Any] = {
            "id": self.id,
            "messages": [{"role": m.role, "content": m.content} for m in self.messages],
            "domain": self.domain,
            "source": self.source,
            "license": self.license,
        }
        if self.difficulty is not None:
            row["difficulty"] = self.difficulty
        return row

    def line(self) -> bytes:
        """The line of a JSONL file."""
        return json.dumps(self.to_dict(), ensure_ascii=False).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> Record:
        """Of a line that :meth:`line` made."""
        return Record.from_dict(json.loads(line), where="")

    @staticmethod
    def from_dict(row: Any, *, where: str) -> Record:
        """Check one JSON object. ``where`` (file:line) goes into the error."""
        if not isinstance(row, dict):
            raise UserError(f"a record is a JSON object, this is {type(row).__name__}", where=where)
        for key in row:
            if key not in _KEYS:
                raise UserError(f"unknown key '{key}' in a record", where=where, fix=did_you_mean(key, _KEYS))
        for key in ("id", "domain", "source", "license"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(
                    f"'{key}' must be a non-empty string", where=where, fix=f"give every record its {key}"
                )
        difficulty = row.get("difficulty")
        if difficulty is not None and (
            isinstance(difficulty, bool) or not isinstance(difficulty, (int, float))
        ):
            raise UserError("'difficulty' must be a number", where=where)
        return Record(
            id=row["id"],
            messages=parse_messages(row.get("messages"), where=where),
            domain=row["domain"],
            source=row["source"],
            license=row["license"],
            difficulty=None if difficulty is None else _finite(difficulty, where),
        )


def _finite(value: int | float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError("'difficulty' must be a finite number", where=where)
    return number


def parse_messages(value: Any, *, where: str) -> tuple[Message, ...]:
    """Check a list of ``{"role", "content"}``: optional system first, then user/assistant turns."""
    if not isinstance(value, list) or not value:
        raise UserError("'messages' must be a non-empty list", where=where)
    messages = []
    for i, turn in enumerate(value):
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in ROLES
            or not isinstance(turn.get("content"), str)
        ):
            raise UserError(
                f"messages[{i}] must be {{'role': one of {', '.join(ROLES)}, 'content': text}}", where=where
            )
        if turn["role"] == "system" and i > 0:
            raise UserError(f"messages[{i}]: a system turn may only come first", where=where)
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise UserError(
                f"messages[{i}]: the assistant's turn is empty", where=where, fix="drop the record"
            )
        messages.append(Message(turn["role"], turn["content"]))
    if not any(m.role == "assistant" for m in messages):
        raise UserError("no assistant turn, so nothing to learn from", where=where, fix="drop the record")
    return tuple(messages)


def read_records(path: Path) -> list[Record]:
    """Read a Record JSONL file. Raises :class:`UserError` naming the file and line at fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            "no such data file", where=str(path), fix="make one with `qwen-ray data prepare`"
        ) from None
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8 text ({e.reason})", where=str(path)) from None
    records, seen = [], dict[str, int]()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(
                f"malformed record: not JSON ({e.msg})", where=where, fix="one JSON object a line"
            ) from None
        record = Record.from_dict(row, where=where)
        if record.id in seen:
            raise UserError(
                f"id '{record.id}' is already on line {seen[record.id]}", where=where, fix="make ids unique"
            )
        seen[record.id] = number
        records.append(record)
    if not records:
        raise UserError("the file holds no record", where=str(path))
    return records


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write Record JSONL atomically; returns the number of records."""
    return write_jsonl(path, (r.to_dict() for r in records))
