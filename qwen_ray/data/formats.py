"""Read training examples in the formats people have them in: Record, Alpaca, ShareGPT, OpenAI messages.

A file is JSONL or one JSON list (either may be gzipped). Its format is detected from its first
records. What these formats can hold but training here cannot use (tool calls, images, preference
pairs, per-turn loss weights) is refused with the line or record number, never skipped in silence.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_ray.data.records import Record
from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_json

Row = dict[str, Any]
OnEmpty = Callable[[str], None]

SAMPLE = 20  # records looked at to tell the format
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TOOL_ROLES = ("function_call", "function_response", "observation", "tool", "function")
_READS = "Record JSONL, Alpaca (instruction/input/output), ShareGPT (conversations) or OpenAI (messages)"

# Key of a record -> (what it is, what to do). Found in any format, each makes the record unusable here.
_REFUSED_KEYS = {
    "chosen": ("a preference pair", "keep the chosen answer as a plain conversation"),
    "rejected": ("a preference pair", "keep the chosen answer as a plain conversation"),
    "chosen_messages": ("a preference pair", "keep chosen_messages, renamed to messages"),
    "rejected_messages": ("a preference pair", "keep chosen_messages, renamed to messages"),
    "label": ("a KTO (liked or disliked) record", "keep the liked ones, without 'label'"),
    "kto_tag": ("a KTO (liked or disliked) record", "keep the liked ones, without 'kto_tag'"),
    "tools": ("a conversation with tools", "leave records with tool calls out"),
    "functions": ("a conversation with tools", "leave records with tool calls out"),
    "images": ("a record with images", "leave it out; only text is trained on"),
    "videos": ("a record with videos", "leave it out; only text is trained on"),
    "audios": ("a record with audio", "leave it out; only text is trained on"),
}
# Layouts that are recognised only to say what to do about them.
_KNOWN_LAYOUTS = {
    "message_tree_id": ("an OpenAssistant message tree", "write out one path of each tree as messages"),
    "parent_message_id": (
        "a flat OpenAssistant message list",
        "join each thread into one record with messages",
    ),
    "instances": ("a self-instruct seed task", "write each instance as instruction, input, output"),
    "response": ("a Dolly record", "rename context to input and response to output"),
}


def detect(path: Path) -> str:
    """Name of the format: ``record``, ``alpaca``, ``sharegpt`` or ``openai``."""
    return _detect([row for row, _ in zip(_rows(path), range(SAMPLE), strict=False)], path)


def load_examples(
    path: Path,
    *,
    domain: str | None = None,
    source: str | None = None,
    license: str | None = None,
    on_empty: OnEmpty | None = None,
) -> list[Record]:
    """Read every example of ``path`` as Records.

    ``domain``, ``source`` and ``license`` fill what the file does not say (else ``general``, the
    file's stem and ``unknown``). Where the format has no id, one is made from the content. An
    example with an empty question or answer is an error, or is left out and told to ``on_empty``.
    """
    rows = list(_rows(path))
    name = _detect(rows[:SAMPLE], path)
    given = {
        "domain": domain or "general",
        "source": source or path.name.removesuffix(".gz").rsplit(".", 1)[0],
        "license": license or "unknown",
    }
    records: list[Record] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        _refuse_unusable(row, where)
        if (other := _format_of(row, where)) != name and (name, other) != ("record", "openai"):
            raise UserError(
                f"this record is {other}, the file began as {name}", where=where, fix="split the file"
            )
        try:
            example = _FORMATS[name](row, where)
        except _EmptyExample as e:
            if on_empty is None:
                raise
            on_empty(f"{where}: {e.what}")
            continue
        record = Record.from_dict(_with_id({**given, **example}, seen), where=where)
        if record.id in seen:
            raise UserError(
                f"id '{record.id}' is already at {seen[record.id]}", where=where, fix="make ids unique"
            )
        seen[record.id] = where
        records.append(record)
    return records


# --- one function a format: a row of the file -> the keys of a Record it knows ---------------------


def _from_record(row: Row, where: str) -> Row:
    _refuse_empty(row.get("messages"), where)
    return row


def _from_alpaca(row: Row, where: str) -> Row:
    question = _text(row, "instruction", where)
    if extra := _text(row, "input", where).strip():
        question = f"{question}\n\n{extra}" if question.strip() else extra
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row, "output", where)},
    ]
    if system := _text(row, "system", where).strip():
        messages.insert(0, {"role": "system", "content": system})
    history = row.get("history") or []
    for turn in reversed(history) if isinstance(history, list) else [history]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise UserError("'history' must be a list of [question, answer] pairs", where=where)
        at = 1 if messages[0]["role"] == "system" else 0
        messages[at:at] = [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    _refuse_empty(messages, where)
    return {**_metadata(row), "messages": messages}


def _from_sharegpt(row: Row, where: str) -> Row:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise UserError("'conversations' must be a list", where=where)
    messages = []
    for i, turn in enumerate(turns):
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        if speaker in _TOOL_ROLES:
            raise UserError(
                f"conversations[{i}] is a tool call ('{speaker}')",
                where=where,
                fix="leave records with tool calls out",
            )
        value = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES or not isinstance(value, str):
            raise UserError(
                f"conversations[{i}] must be {{'from': one of {', '.join(_SHAREGPT_ROLES)}, 'value': text}}",
                where=where,
            )
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": value})
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    _refuse_empty(messages, where)
    return {**_metadata(row), "messages": messages}


def _from_openai(row: Row, where: str) -> Row:
    turns = row.get("messages")
    if not isinstance(turns, list):
        raise UserError("'messages' must be a list", where=where)
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise UserError(f"messages[{i}] must be an object with role and content", where=where)
        role = "system" if turn.get("role") == "developer" else turn.get("role")
        if turn.get("tool_calls") or turn.get("function_call") or role in _TOOL_ROLES:
            raise UserError(
                f"messages[{i}] is a tool call", where=where, fix="leave records with tool calls out"
            )
        _check_loss_weight(turn, role, f"messages[{i}]", where)
        messages.append({"role": role, "content": _joined_text(turn.get("content"), f"messages[{i}]", where)})
    _refuse_empty(messages, where)
    return {**_metadata(row), "messages": messages}


_FORMATS: dict[str, Callable[[Row, str], Row]] = {
    "record": _from_record,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "openai": _from_openai,
}


# --- detection and refusal -------------------------------------------------------------------------


def _detect(rows: list[tuple[str, Row]], path: Path) -> str:
    if not rows:
        raise UserError("the file holds no record", where=str(path))
    names: dict[str, str] = {}
    for where, row in rows:
        _refuse_unusable(row, where)
        names.setdefault(_format_of(row, where), where)
    if set(names) == {"record", "openai"}:  # Records of which some leave domain, source and license out
        return "record"
    if len(names) > 1:
        (one, at_one), (two, at_two), *_ = names.items()
        raise UserError(
            f"unsure of the format: {one} at {at_one}, {two} at {at_two}",
            where=str(path),
            fix="split the file, one format each",
        )
    return next(iter(names))


def _format_of(row: Row, where: str) -> str:
    found = [name for name, key in (("openai", "messages"), ("sharegpt", "conversations")) if key in row]
    if "instruction" in row and "output" in row:
        found.append("alpaca")
    if found == ["openai"] and row.keys() & {"domain", "source", "license", "difficulty"}:
        return "record"
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise UserError(
            f"unsure of the format: this could be {' or '.join(found)}", where=where, fix="keep one of them"
        )
    for key, (what, fix) in _KNOWN_LAYOUTS.items():
        if key in row:
            raise UserError(f"{what} is not read", where=where, fix=fix)
    raise UserError(
        f"unknown format: keys are {', '.join(row) or '(none)'}", where=where, fix=f"give {_READS}"
    )


def _refuse_unusable(row: Row, where: str) -> None:
    for key, (what, fix) in _REFUSED_KEYS.items():
        if key == "label" and not isinstance(row.get(key), bool):
            continue  # an unrelated column of the same name
        # Many exporters write "tools": [] or "images": null on plain conversations.
        if key in row and row[key] not in (None, [], "", {}, "[]"):
            raise UserError(f"{what} ('{key}') is not read", where=where, fix=fix)


class _EmptyExample(UserError):
    """Nothing to ask or nothing to learn; apart, because ``prepare`` counts these and goes on."""


def _refuse_empty(messages: Any, where: str) -> None:
    """Only what is empty in an otherwise sound conversation; parse_messages judges the rest."""
    turns = [t for t in messages if isinstance(t, dict)] if isinstance(messages, list) else []
    for role, name in (("user", "question"), ("assistant", "answer")):
        said = [t["content"] for t in turns if t.get("role") == role and isinstance(t.get("content"), str)]
        if not said or not all(text.strip() for text in said):
            raise _EmptyExample(f"empty {name}", where=where, fix="drop the record")


def _check_loss_weight(turn: Row, role: Any, name: str, where: str) -> None:
    """Training learns every assistant turn and no other; a file that asks otherwise is refused."""
    weight = turn.get("loss_weight")
    if weight is not None and weight != (1 if role == "assistant" else 0):
        raise UserError(
            f"{name}: loss_weight {weight} on the {role}'s turn is not read",
            where=where,
            fix="remove loss_weight",
        )


# --- small helpers ---------------------------------------------------------------------------------


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"'{key}' must be text, this is {type(value).__name__}", where=where)
    return value


def _joined_text(content: Any, name: str, where: str) -> str:
    """Content as text: a string, or a list of ``{"type": "text", "text": ...}`` parts."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise UserError(
                f"{name}: content of type '{kind}' is not read", where=where, fix="only text is trained on"
            )
        texts.append(text)
    return "".join(texts)


def _metadata(row: Row) -> Row:
    kept = {
        key: row[key] for key in ("domain", "source", "license") if isinstance(row.get(key), str) and row[key]
    }
    if isinstance(row.get("id"), (str, int)) and str(row["id"]).strip():
        kept["id"] = str(row["id"])
    return kept


def _with_id(row: Row, seen: dict[str, str]) -> Row:
    """Give a row without id one that depends on its content only (and on being a repeat)."""
    if "id" in row:
        return row
    base = sha256_json(row.get("messages"))[:16]
    name, copy = base, 1
    while name in seen:
        copy += 1
        name = f"{base}-{copy}"
    return {**row, "id": name}


def read_text(path: Path) -> str:
    """The text of a file, gunzipped where its name ends in ``.gz``."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError("no such data file", where=str(path), fix="check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8 text ({e.reason})", where=str(path), fix="convert it to UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"damaged gzip file ({e})", where=str(path), fix="get it again") from None


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """``(where, object)`` for every record of a JSON list or JSONL file."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as e:
            raise UserError(
                f"not valid JSON ({e.msg})", where=f"{path}:{e.lineno}", fix="mend the list"
            ) from None
        located: Iterator[tuple[str, Any]] = (
            (f"{path} record {n}", value) for n, value in enumerate(values, start=1)
        )
    else:
        located = _json_lines(text, path)
    for where, value in located:
        if not isinstance(value, dict):
            raise UserError(f"a record is a JSON object, this is {type(value).__name__}", where=where)
        yield where, value


def _json_lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): it also splits at U+2028, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as e:
                raise UserError(
                    f"malformed line: not JSON ({e.msg})",
                    where=where,
                    fix="one JSON object a line, or one JSON list",
                ) from None
            yield where, value
