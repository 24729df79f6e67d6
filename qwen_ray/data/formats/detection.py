"""Which format a row, and so a file, is in: by its keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from qwen_ray.data.formats import chat, flat, oasst
from qwen_ray.data.formats.fields import NOT_OBJECT, UNKNOWN, Fault, Row
from qwen_ray.data.formats.lines import Item
from qwen_ray.errors import UserError

SAMPLE = 20  # records looked at to tell the format
LOOKED_AT = 1000  # rows among which there must be one of a known format
_MOST_KEYS = 12  # named in a message

Parser = Callable[[Row, str], Row | list[Row]]

# Format -> row of the file -> the keys of a Record that it knows, or a list of such.
FORMATS: dict[str, Parser] = {
    "record": chat.from_record,
    "openai": chat.from_openai,
    "sharegpt": chat.from_sharegpt,
    "alpaca": flat.from_alpaca,
    "dolly": flat.from_dolly,
    "prompt-completion": flat.from_prompt_completion,
    "question-answer": flat.from_question_answer,
    "multiple-choice": flat.from_multiple_choice,
    "self-instruct": flat.from_seed_task,
    "oasst-tree": oasst.from_tree,
}
OASST_FLAT = "oasst-flat"  # whose records are of several rows: oasst.threads comes first
_READS = (
    "Record JSONL, Alpaca (instruction/input/output), ShareGPT (conversations), OpenAI (messages), Dolly "
    "(instruction/context/response), prompt/completion, question/answer, question/choices/answer, "
    "self-instruct seeds (instances) or OpenAssistant messages"
)
# A format and the keys that together tell it.
_KEYS = (
    ("openai", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("dolly", ("instruction", "response")),
    ("self-instruct", ("instruction", "instances")),
    ("prompt-completion", ("prompt", "completion")),
    ("question-answer", ("question", "answer")),
    ("oasst-tree", ("message_tree_id", "prompt")),
)
_OF_RECORDS = ("domain", "source", "license", "difficulty")


def format_of(row: Row, where: str) -> str:
    """The format of one row. Raises :class:`Fault` if it could be none or more than one."""
    found = _formats_of(tuple(row))
    if len(found) == 1:
        return found[0]
    if found:
        raise Fault(
            f"unsure of the format: this could be {' or '.join(found)}",
            where=where,
            fix="keep one of them",
            reason=UNKNOWN,
        )
    keys = ", ".join(key[:40] for key in list(row)[:_MOST_KEYS]) or "(none)"
    raise Fault(
        f"unknown format: keys are {keys}{', …' if len(row) > _MOST_KEYS else ''}",
        where=where,
        fix=f"give {_READS}",
        reason=UNKNOWN,
    )


@lru_cache(maxsize=256)  # the rows of a file have few sets of keys
def _formats_of(row: tuple[str, ...]) -> tuple[str, ...]:
    if oasst.is_flat(row):
        return (OASST_FLAT,)
    found = tuple(name for name, keys in _KEYS if all(key in row for key in keys))
    if found == ("openai",) and any(key in row for key in _OF_RECORDS):
        return ("record",)
    if found == ("question-answer",) and ("choices" in row or ("A" in row and "B" in row)):
        return ("multiple-choice",)
    return found


def is_same(one: str, other: str) -> bool:
    """Whether rows of both may stand in one file: a Record may leave domain, source and license out."""
    return one == other or {one, other} == {"record", "openai"}


def format_of_all(rows: Iterable[tuple[str, Row]], path: Path) -> str:
    """The format of the first rows of a file, all of which must be sound."""
    names: dict[str, str] = {}
    for where, row in rows:
        chat.refuse_other_objectives(row, where)
        chat.refuse_unusable(row, where)
        names.setdefault(format_of(row, where), where)
    if not names:
        raise UserError("the file holds no record", where=str(path))
    if set(names) == {"record", "openai"}:
        return "record"
    if len(names) > 1:
        (one, at_one), (two, at_two), *_ = names.items()
        raise UserError(
            f"unsure of the format: {one} at {at_one}, {two} at {at_two}",
            where=str(path),
            fix="split the file, one format each",
        )
    return next(iter(names))


def format_of_most(head: Iterable[Item], path: Path) -> str:
    """The format of most of the first rows of a file whose format can be told."""
    names: Counter[str] = Counter()
    first_fault: UserError | None = None
    for item in head:
        try:
            names[_readable_format(item)] += 1
        except UserError as fault:
            first_fault = first_fault or fault
        if names.total() == SAMPLE:
            break
    if names:
        return names.most_common(1)[0][0]
    if first_fault is None:
        raise UserError("the file holds no record", where=str(path))
    raise UserError(
        f"the file holds no record that can be read; the first: {first_fault.what}",
        where=first_fault.where,
        fix=first_fault.fix,
    )


def _readable_format(item: Item) -> str:
    row = as_row(item)
    return format_of(chat.plain(row, item.where), item.where)


def as_row(item: Item) -> Row:
    """The row as an object. Raises its :class:`Fault`."""
    if isinstance(item.value, Fault):
        raise item.value
    if not isinstance(item.value, dict):
        raise Fault(
            f"a record is a JSON object, this is {type(item.value).__name__}",
            where=item.where,
            reason=NOT_OBJECT,
        )
    return item.value
