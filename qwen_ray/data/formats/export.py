"""Records written in the formats that other tools read.

Every row is read back by the code that reads such files, and one that would not give the same record is
refused: what is exported is never less than what was there. Only ``openai`` has room for messages alone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qwen_ray.data.formats import chat, flat
from qwen_ray.data.formats.fields import Row
from qwen_ray.data.formats.reading import record_of
from qwen_ray.data.records import Message, Record
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.fsio import write_jsonl, write_text

_ALPACA_COLUMNS = ("instruction", "input", "output", "system", "history")
_METADATA = ("domain", "source", "license", "difficulty")


def export(records: Iterable[Record], path: Path, format: str) -> int:
    """Write ``records`` to ``path`` as a file of ``format``, one of :data:`EXPORTS`; returns how many.

    The JSON formats are a list where the name ends in ``.json``, and one object a line in ``.jsonl``. CSV has
    the columns of Alpaca. The file is whole or absent. Raises :class:`UserError` for a record that the format
    cannot hold (several turns or a system prompt in ``dolly``), and names it.
    """
    if format not in EXPORTS:
        raise UserError(f"unknown format '{format}'", where="--format", fix=did_you_mean(format, EXPORTS))
    suffixes = {"csv": (".csv",), "parquet": (".parquet",)}.get(format, (".jsonl", ".json"))
    if path.suffix not in suffixes:
        raise UserError(
            f"a file of format '{format}' ends in {' or '.join(suffixes)}", where=str(path), fix="rename it"
        )
    rows = _rows(records, format)
    return _WRITERS[path.suffix](path, rows)


def _rows(records: Iterable[Record], format: str) -> Iterator[Row]:
    to_row, read_as = EXPORTS[format]
    for record in records:
        where = f"record '{record.id}'"
        row = to_row(record, where)
        expected = replace(record, id="-", domain="-", source="-", license="-", difficulty=None)
        given = {key: value for key, value in expected.to_dict().items() if key != "messages"}
        read = record_of({**given, **read_as(row, where)}, where)
        if read != (expected if format == "openai" else record):
            raise UserError(f"format '{format}' cannot hold it as it is", where=where, fix="choose 'record'")
        yield row


# --- one function a format: a Record -> its row ----------------------------------------------------


def _to_record(record: Record, where: str) -> Row:
    return record.to_dict()


def _to_openai(record: Record, where: str) -> Row:
    return {"messages": record.to_dict()["messages"]}


def _to_sharegpt(record: Record, where: str) -> Row:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    said = [{"from": speakers[m.role], "value": m.content} for m in record.messages]
    return {"id": record.id, "conversations": said, **_metadata(record)}


def _to_alpaca(record: Record, where: str) -> Row:
    system, pairs = _pairs(record, "alpaca", where)
    *history, (question, answer) = pairs
    row: Row = {"id": record.id, "instruction": question, "input": "", "output": answer}
    if system is not None:
        row["system"] = system
    if history:
        row["history"] = [list(pair) for pair in history]
    return {**row, **_metadata(record)}


def _to_dolly(record: Record, where: str) -> Row:
    system, pairs = _pairs(record, "dolly", where)
    for more, what in ((len(pairs) > 1, "more than one question"), (system is not None, "a system prompt")):
        if more:
            raise UserError(
                f"format 'dolly' cannot hold {what}", where=where, fix="choose 'alpaca' or 'sharegpt'"
            )
    ((question, answer),) = pairs
    return {"id": record.id, "instruction": question, "context": "", "response": answer, **_metadata(record)}


def _metadata(record: Record) -> Row:
    row = record.to_dict()
    return {key: row[key] for key in _METADATA if key in row}


def _pairs(record: Record, format: str, where: str) -> tuple[str | None, list[tuple[str, str]]]:
    """The system prompt and the turns as pairs of question and answer."""
    turns: tuple[Message, ...] = record.messages
    system = turns[0].content if turns[0].role == "system" else None
    spoken = turns if system is None else turns[1:]
    if [m.role for m in spoken] != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise UserError(
            f"format '{format}' holds questions and answers in turn",
            where=where,
            fix="choose 'sharegpt' or 'record'",
        )
    texts = [m.content for m in spoken]
    return system, list(zip(texts[::2], texts[1::2], strict=True))


EXPORTS: dict[str, tuple[Callable[[Record, str], Row], Callable[[Row, str], Row]]] = {
    "record": (_to_record, chat.from_record),
    "alpaca": (_to_alpaca, flat.from_alpaca),
    "sharegpt": (_to_sharegpt, chat.from_sharegpt),
    "openai": (_to_openai, chat.from_openai),
    "dolly": (_to_dolly, flat.from_dolly),
    "csv": (_to_alpaca, flat.from_alpaca),
    "parquet": (_to_record, chat.from_record),
}
"""Format -> a Record's row, and how such a row is read back."""


# --- files -----------------------------------------------------------------------------------------


def _write_list(path: Path, rows: Iterable[Row]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    return len(lines)


def _write_csv(path: Path, rows: Iterable[Row]) -> int:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ("id", *_ALPACA_COLUMNS, *_METADATA), restval="")
    writer.writeheader()
    count = 0
    for row in rows:
        history = {"history": json.dumps(row["history"], ensure_ascii=False)} if "history" in row else {}
        writer.writerow({**row, **history})
        count += 1
    write_text(path, text.getvalue())
    return count


def _write_parquet(path: Path, rows: Iterable[Row]) -> int:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    schema = pyarrow.schema(
        [
            ("id", text),
            ("messages", pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))),
            *((key, text) for key in _METADATA[:-1]),
            ("difficulty", pyarrow.float64()),
        ]
    )
    table = pyarrow.Table.from_pylist(list(rows), schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        parquet.write_table(table, unfinished)
        unfinished.replace(path)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    return len(table)


_WRITERS: dict[str, Callable[[Path, Iterable[Row]], int]] = {
    ".jsonl": write_jsonl,
    ".json": _write_list,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
