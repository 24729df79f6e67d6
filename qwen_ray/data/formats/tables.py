"""The rows of CSV, TSV and Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_ray.data.formats.fields import COLUMNS, LONG_LINE, MALFORMED, NOT_UTF8, Fault
from qwen_ray.data.formats.lines import CHUNK, MAX_LINE, Item, Span, byte_lines, kind, opened
from qwen_ray.errors import UserError

_CUT = "\udc00"  # stands for the rest of a longer line of CSV; no decoder makes it
_JSON_COLUMNS = (
    "messages", "conversations", "history", "choices", "instances", "chosen", "rejected", "chosen_messages",
    "rejected_messages", "difficulty", "label", "kto_tag", "deleted", "review_result", "rank",
)  # fmt: skip


def csv_rows(path: Path, _: Span | None) -> Iterator[Item]:
    """One item a row below the header, with the line it starts on; blank rows are none."""
    csv.field_size_limit(MAX_LINE)
    delimiter = "\t" if kind(path) == ".tsv" else ","
    reader = csv.reader(_csv_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            yield Item(where, Fault(f"malformed CSV ({e})", where=where, reason=MALFORMED))
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
        else:
            value = _csv_row(header, cells, where)
            raw = delimiter.join(cells).encode("utf-8", "replace") if isinstance(value, Fault) else b""
            yield Item(where, value, raw)


def _csv_lines(path: Path) -> Iterator[str]:
    for _, line in byte_lines(path):
        text = line.decode("utf-8", "surrogateescape")
        yield text if len(line) <= MAX_LINE else text[:CHUNK] + _CUT


def _csv_row(header: list[str], cells: list[str], where: str) -> Any:
    text = "".join(cells)
    if _CUT in text:
        return Fault(f"a {LONG_LINE}", where=where, fix="split it", reason=LONG_LINE)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Fault("not UTF-8 text", where=where, fix="convert it to UTF-8", reason=NOT_UTF8)
    if len(cells) != len(header):
        what = f"{len(cells)} columns, the header has {len(header)}"
        return Fault(what, where=where, fix="put quotes round cells with a comma", reason=COLUMNS)
    return {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}


def _cell(name: str, cell: str) -> Any:
    """Text, but lists, numbers and truth values where a format has them."""
    if name not in _JSON_COLUMNS:
        return cell
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
    except (ValueError, RecursionError):
        return cell


# --- Parquet ---------------------------------------------------------------------------------------


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    with opened(path) as raw:
        try:
            yield parquet.ParquetFile(raw)
        except (pyarrow.ArrowException, OSError, ValueError) as e:
            what = str(e).split("\n", 1)[0][:200]
            raise UserError(
                f"not a readable Parquet file ({what})", where=str(path), fix="get it again"
            ) from None


def parquet_rows(path: Path, span: Span | None) -> Iterator[Item]:
    """One item a row, numbered from 1."""
    with _parquet_file(path) as file:
        groups = range(file.num_row_groups)[span.start : span.end] if span else range(file.num_row_groups)
        number = span.first_line if span else 1
        for batch in file.iter_batches(batch_size=256, row_groups=list(groups)):
            for value in _parquet_values(batch, path, number):
                yield Item(f"{path} row {number}", value)
                number += 1


def _parquet_values(batch: Any, path: Path, first: int) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # of some row: find it
        return [_parquet_row(batch.slice(i, 1), f"{path} row {first + i}") for i in range(len(batch))]


def _parquet_row(row: Any, where: str) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return Fault("not UTF-8 text", where=where, fix="convert it to UTF-8", reason=NOT_UTF8)
    except (ValueError, OverflowError) as e:  # a date or time that Python has no value for
        return Fault(f"a value that is not read ({e})", where=where, reason=MALFORMED)


def cut_row_groups(path: Path, size: int) -> list[Span]:
    """Runs of row groups of at least ``size`` bytes each, the last one excepted."""
    spans: list[Span] = []
    with _parquet_file(path) as file:
        start, row, held, rows = 0, 1, 0, 0
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            held, rows = held + about.total_byte_size, rows + about.num_rows
            if held >= size or group == file.num_row_groups - 1:
                spans.append(Span(start, group + 1, row))
                start, row, held, rows = group + 1, row + rows, 0, 0
    return spans or [Span(0, 0, 1)]
