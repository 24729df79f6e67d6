"""The rows of a file, one at a time, each with its place: JSONL, a JSON list, CSV, Parquet.

What is wrong with one row is its value, a :class:`~qwen_ray.data.formats.fields.Fault`; only a file that
cannot be read on at all is an error. JSONL, CSV and Parquet take constant memory; a JSON list is held whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_ray.data.formats.fields import LONG_LINE, NOT_JSON, NOT_UTF8, NUL, Fault
from qwen_ray.data.formats.lines import MAX_LINE, Item, Span, byte_lines, cut_lines, kind, opened, read_text
from qwen_ray.data.formats.tables import csv_rows, cut_row_groups, parquet_rows
from qwen_ray.errors import UserError

_LINES = (".jsonl", ".ndjson")


def items(path: Path, span: Span | None = None) -> Iterator[Item]:
    """The rows of a file, or of the lines or row groups of ``span`` where it :func:`can_cut`, in their order.

    Raises :class:`UserError` for a file that is missing, damaged, or one broken JSON list.
    """
    return _layout_of_file(path)(path, span if can_cut(path) else None)


def can_cut(path: Path) -> bool:
    """Whether a large file of this name can be read in spans: JSONL that is not gzipped, and Parquet."""
    return path.suffix.lower() in (".parquet", *_LINES)


def cut(path: Path, size: int) -> list[Span]:
    """Spans of at least ``size`` bytes, the last one excepted, that together are the file."""
    if path.suffix.lower() == ".parquet":
        return cut_row_groups(path, size)
    with opened(path) as file:
        return list(cut_lines(file, size)) or [Span(0, 0, 1)]


# --- JSON ------------------------------------------------------------------------------------------


def _layout_of_file(path: Path) -> Callable[[Path, Span | None], Iterator[Item]]:
    suffix = kind(path)
    if suffix == ".parquet":
        return parquet_rows
    if suffix in (".csv", ".tsv"):
        return csv_rows
    if suffix not in _LINES:
        first = next((line for _, line in byte_lines(path) if line.strip()), b"")
        if first.lstrip().startswith(b"["):
            return _json_list
    return _json_lines


def _json_lines(path: Path, span: Span | None) -> Iterator[Item]:
    for number, line in byte_lines(path, span):
        if line.strip():
            where = f"{path}:{number}"
            yield Item(where, _parsed(line, where), line)


def _parsed(line: bytes, where: str) -> Any:
    if len(line) > MAX_LINE:
        return Fault(f"a {LONG_LINE}", where=where, fix="split it", reason=LONG_LINE)
    if b"\0" in line:
        return Fault("NUL bytes, which no text has", where=where, fix="write the line again", reason=NUL)
    try:
        return json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as e:
        return Fault(f"not UTF-8 text ({e.reason})", where=where, fix="convert it to UTF-8", reason=NOT_UTF8)
    except (ValueError, RecursionError) as e:
        return Fault(
            f"malformed line: not JSON ({_why(e)})",
            where=where,
            fix="one JSON object a line, or one JSON list in a file called .json",
            reason=NOT_JSON,
        )


def _json_list(path: Path, _: Span | None) -> Iterator[Item]:
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(f"not valid JSON ({_why(e)})", where=f"{path}{line}", fix="mend the list") from None
    for number, value in enumerate(values, start=1):
        yield Item(f"{path} record {number}", value)


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
