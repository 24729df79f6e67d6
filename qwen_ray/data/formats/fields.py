"""What can be wrong with one row of a file, and the fields that several formats share."""

from __future__ import annotations

import json
import math
from typing import Any

from qwen_ray.errors import UserError

Row = dict[str, Any]

NOT_JSON, NOT_UTF8, NUL = "not JSON", "not UTF-8", "NUL bytes"
NOT_OBJECT, MALFORMED = "not a JSON object", "malformed record"
LONG_LINE = "line of more than 16 MiB"
COLUMNS = "another number of columns than the header"
UNKNOWN, OTHER = "unknown format", "another format than the file's"
EMPTY = "empty question or answer"
ROLES = "turns in the wrong order"
TOOLS, MEDIA = "tool call", "images, video or audio"
LOSS_WEIGHT = "loss weights other than 1 for the assistant's turns"
PREFERENCE, KTO = "preference pair", "liked or disliked answer"
DISLIKED = "disliked answer"
UNAPPROVED, LANGUAGE = "deleted or not approved", "in another language than 'en'"
NO_ANSWER, NO_PARENT = "message without an approved answer", "message that no thread leads to"

TOOL_ROLES = ("function_call", "function_response", "observation", "tool", "function")
LEAVE_TOOLS_OUT = "leave records with tool calls out"


class Fault(UserError):
    """One row that cannot be used. ``reason`` is one of the few above: ``data prepare`` counts them."""

    def __init__(
        self, what: str, *, where: str = "", fix: str = "", status: int = 400, reason: str = MALFORMED
    ) -> None:
        super().__init__(what, where=where, fix=fix, status=status)
        self.reason = reason


def text_of(row: Row, key: str, where: str) -> str:
    """A text field; absent or null is empty."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Fault(f"'{key}' must be text, this is {type(value).__name__}", where=where)
    return value


def joined_text(content: Any, name: str, where: str) -> str:
    """Content as text: a string, or a list of ``{"type": "text", "text": ...}`` parts."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = first_of(part, "text", "value") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise Fault(
                f"{name}: content of type '{str(kind)[:40]}' is not read",
                where=where,
                fix="only text is trained on",
                reason=MALFORMED if kind == "text" or not isinstance(part, dict) else MEDIA,
            )
        texts.append(text)
    return "".join(texts)


def first_of(row: Row, *keys: str) -> Any:
    """The first of the fields that is there and not null, else ``None``."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def turn(role: Any, content: Any) -> Row:
    """One message."""
    return {"role": role, "content": content}


def exchange(question: str, answer: str, *, system: str = "") -> list[Row]:
    """The messages of one question and answer; a blank system prompt is none."""
    first = [turn("system", system)] if system.strip() else []
    return [*first, turn("user", question), turn("assistant", answer)]


def example(row: Row, messages: Any, where: str) -> Row:
    """The keys of a Record that ``row`` knows, with its messages; one that is empty is a fault."""
    refuse_empty(messages, where)
    return {**_metadata(row), "messages": messages}


def refuse_empty(messages: Any, where: str) -> None:
    """Only what is empty in an otherwise sound conversation; parse_messages judges the rest."""
    turns = [t for t in messages if isinstance(t, dict)] if isinstance(messages, list) else []
    for role, name in (("user", "question"), ("assistant", "answer")):
        said = [t["content"] for t in turns if t.get("role") == role and isinstance(t.get("content"), str)]
        if not said or not all(text.strip() for text in said):
            raise Fault(f"empty {name}", where=where, fix="drop the record", reason=EMPTY)


def is_number(value: Any) -> bool:
    """Whether it fits a finite float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _metadata(row: Row) -> Row:
    kept = {
        key: row[key]
        for key in ("domain", "source", "license")
        if isinstance(row.get(key), str) and row[key].strip()
    }
    if type(row.get("id")) in (str, int) and str(row["id"]).strip():
        kept["id"] = str(row["id"])
    if is_number(row.get("difficulty")):
        kept["difficulty"] = float(row["difficulty"])
    return kept


def shown(value: Any) -> str:
    """A row for a report: JSON on one line where it can be, and always text that can be written."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError):
        text = f"({type(value).__name__})"
    return text.encode("utf-8", "backslashreplace").decode()
