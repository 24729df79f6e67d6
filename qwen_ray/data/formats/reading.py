"""Records from files: strictly, where any fault is an error (training), and tolerantly (``data prepare``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.data.formats import chat, oasst
from qwen_ray.data.formats.detection import (
    FORMATS,
    LOOKED_AT,
    OASST_FLAT,
    SAMPLE,
    as_row,
    format_of,
    format_of_all,
    format_of_most,
    is_same,
)
from qwen_ray.data.formats.fields import MALFORMED, NOT_UTF8, OTHER, ROLES, Fault, Row, shown
from qwen_ray.data.formats.items import can_cut, cut, items
from qwen_ray.data.formats.lines import Item, Span, stem
from qwen_ray.data.records import Record
from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_json

if TYPE_CHECKING:
    from qwen_ray.data.sources.base import Drops, Found


def detect(path: Path) -> str:
    """Name of the format: a key of :data:`FORMATS`, or ``oasst-flat``."""
    return format_of_all(((item.where, as_row(item)) for item in islice(items(path), SAMPLE)), path)


def load_examples(
    path: Path,
    *,
    domain: str | None = None,
    source: str | None = None,
    license: str | None = None,
    seen: dict[str, str] | None = None,
) -> list[Record]:
    """Read every example of ``path`` as Records; any that cannot be trained on is a :class:`UserError`.

    ``domain``, ``source`` and ``license`` fill what the file does not say (else ``general``, the
    file's stem and ``unknown``). Where a row has no id, one is made from its content, and that of a repeat
    has a number. ``seen``: where each id of the files before is; those of this one are added.
    """
    rows = [item._replace(value=as_row(item)) for item in items(path)]
    name = format_of_all(((item.where, item.value) for item in rows[:SAMPLE]), path)
    given = _given(path, domain, source, license)
    records: list[Record] = []
    seen = {} if seen is None else seen
    for item, row_format in _joined(rows, name):
        row, where = as_row(item), item.where
        chat.refuse_other_objectives(row, where)
        for example in _examples(row, where, row_format):
            record = record_of({**given, **example}, where)
            if "id" not in example:
                record = _told_apart(record, seen)
            elif record.id in seen:
                raise UserError(
                    f"id '{record.id}' is already at {seen[record.id]}",
                    where=where,
                    fix="name each file once, and make ids unique",
                )
            seen[record.id] = where
            records.append(record)
    return records


def read_found(
    path: Path,
    *,
    domain: str | None,
    source: str | None,
    license: str | None,
    drops: Drops,
    span: Span | None = None,
) -> Iterator[Found]:
    """The Records of a file one by one, each with its place; what is faulty goes to ``drops`` with its own.

    The format is that of most of the first rows. Of a preference pair the chosen answer is read, of KTO
    records those that were liked. Rows without id get the SHA-256 of their messages: repeats have the same.
    Memory is constant but for a JSON list and a flat OpenAssistant file, which are held whole.

    Raises :class:`UserError` for a file that cannot be read, is in no known format or, without ``span``,
    holds no record that can be used.
    """
    from qwen_ray.data.sources.base import Found  # whose package imports this one

    name = format_of_most(islice(items(path), LOOKED_AT), path)
    given = _given(path, domain, source, license)
    count, first_fault = 0, ""
    for item, row_format in _joined(items(path, span), name):
        try:
            row = chat.plain(as_row(item), item.where)
            records = [
                record_of({**given, **_in_order(example, item.where)}, item.where)
                for example in _examples(row, item.where, row_format)
            ]
        except UserError as fault:
            reason = fault.reason if isinstance(fault, Fault) else MALFORMED
            drops.add(reason, f"{shown(fault.what)}{_content(item)}", where=item.where)
            first_fault = first_fault or f"{item.where}: {shown(fault.what)}"
            continue
        count += len(records)
        yield from (Found(record, item.where) for record in records)
    if span is None and not count:
        raise UserError(f"no record can be used; the first: {first_fault}", where=str(path), fix="mend it")


def spans(path: Path, size: int) -> list[Span | None]:
    """Parts of a file, of about ``size`` bytes, to read apart by :func:`read_found`; ``[None]`` is the whole.

    Plain JSONL is cut at line ends, which takes one pass that counts them, and Parquet at row groups.
    """
    if not can_cut(path) or format_of_most(islice(items(path), LOOKED_AT), path) == OASST_FLAT:
        return [None]
    found = cut(path, size)
    return [None] if len(found) == 1 else [*found]


def _given(path: Path, domain: str | None, source: str | None, license: str | None) -> Row:
    return {
        "domain": domain or "general",
        "source": source or stem(path) or path.name,
        "license": license or "unknown",
    }


def _joined(rows: Iterable[Item], name: str) -> Iterator[tuple[Item, str]]:
    """Each item that holds whole examples, and the format it is in."""
    if name == OASST_FLAT:
        return ((item, "openai") for item in oasst.threads(rows))
    return ((item, name) for item in rows)


def _examples(row: Row, where: str, name: str) -> list[Row]:
    """The keys of a Record that the row knows, for each of its examples."""
    chat.refuse_unusable(row, where)
    own = format_of(row, where)
    if not is_same(own, name):
        raise Fault(
            f"this record is {own}, the file began as {name}", where=where, fix="split the file", reason=OTHER
        )
    made = FORMATS[own](row, where)
    return made if isinstance(made, list) else [made]


def record_of(row: Row, where: str) -> Record:
    """The Record of the keys that a row knows and those given, named by its content where it has no id."""
    record = Record.from_dict(row if "id" in row else {"id": "-", **row}, where=where)
    if "id" not in row:
        record = replace(record, id=sha256_json(record.to_dict()["messages"])[:16])
    texts = [record.id, record.domain, record.source, record.license, *(m.content for m in record.messages)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise Fault(
            "half of a surrogate pair, which is no text", where=where, fix="write it again", reason=NOT_UTF8
        ) from None
    return record


def _told_apart(record: Record, seen: dict[str, str]) -> Record:
    """A repeat under another name."""
    name, copy = record.id, 1
    while name in seen:
        copy += 1
        name = f"{record.id}-{copy}"
    return replace(record, id=name)


def _in_order(example: Row, where: str) -> Row:
    """A system turn comes first, then user and assistant take turns; the user may have the last word."""
    messages: Any = example["messages"]
    turns = messages if isinstance(messages, list) else []
    roles = [said.get("role") for said in turns if isinstance(said, dict)]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        said = ", ".join(str(role)[:20] for role in roles[:8])
        raise Fault(
            f"the turns are {said}", where=where, fix="let user and assistant alternate", reason=ROLES
        )
    return example


def _content(item: Item) -> str:
    if item.raw:
        return f": {item.raw[:4000].decode('utf-8', 'replace').strip()}"
    return "" if isinstance(item.value, Fault) else f": {shown(item.value)}"
