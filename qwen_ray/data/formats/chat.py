"""Conversations: Record, ShareGPT, OpenAI messages, and what other objectives add to them.

Formats: LLaMA-Factory's data/README (ShareGPT, preference and KTO keys), OpenAI's chat messages.
"""

from __future__ import annotations

from typing import Any

from qwen_ray.data.formats.fields import (
    DISLIKED,
    KTO,
    LEAVE_TOOLS_OUT,
    LOSS_WEIGHT,
    MEDIA,
    PREFERENCE,
    TOOL_ROLES,
    TOOLS,
    Fault,
    Row,
    example,
    first_of,
    is_number,
    joined_text,
    refuse_empty,
    turn,
)

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_PREFERENCE_KEYS = ("chosen", "rejected", "chosen_messages", "rejected_messages")
_KTO_KEYS = ("label", "kto_tag")
# Key of a record -> (what it is, why it is left out). Found in any format, each makes the record unusable.
_REFUSED_KEYS = {
    "tools": ("a conversation with tools", LEAVE_TOOLS_OUT, TOOLS),
    "functions": ("a conversation with tools", LEAVE_TOOLS_OUT, TOOLS),
    "images": ("a record with images", "leave it out; only text is trained on", MEDIA),
    "videos": ("a record with videos", "leave it out; only text is trained on", MEDIA),
    "audios": ("a record with audio", "leave it out; only text is trained on", MEDIA),
}


def from_record(row: Row, where: str) -> Row:
    """A Record, whose other keys are checked later; null is as if absent."""
    refuse_empty(row.get("messages"), where)
    if row.get("difficulty") is not None and not is_number(row["difficulty"]):
        raise Fault("'difficulty' must be a finite number", where=where)
    return {key: value for key, value in row.items() if value is not None}


def from_sharegpt(row: Row, where: str) -> Row:
    """``conversations`` of ``from``/``value`` or ``role``/``content``."""
    messages = [
        _sharegpt_turn(said, f"conversations[{i}]", where)
        for i, said in enumerate(_turns(row, "conversations", where))
    ]
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, turn("system", row["system"]))
    return example(row, messages, where)


def _sharegpt_turn(said: Any, name: str, where: str) -> Row:
    speaker = first_of(said, "from", "role") if isinstance(said, dict) else None
    if speaker in TOOL_ROLES:
        raise Fault(f"{name} is a tool call ('{speaker}')", where=where, fix=LEAVE_TOOLS_OUT, reason=TOOLS)
    value = first_of(said, "value", "content") if isinstance(said, dict) else None
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES or not isinstance(value, str):
        raise Fault(
            f"{name} must be {{'from': one of {', '.join(_SHAREGPT_ROLES)}, 'value': text}}", where=where
        )
    return turn(_SHAREGPT_ROLES[speaker], value)


def from_openai(row: Row, where: str) -> Row:
    """``messages`` of ``role`` and ``content``, text or typed parts."""
    messages = [
        _openai_turn(said, f"messages[{i}]", where) for i, said in enumerate(_turns(row, "messages", where))
    ]
    return example(row, messages, where)


def _openai_turn(said: Any, name: str, where: str) -> Row:
    if not isinstance(said, dict):
        raise Fault(f"{name} must be an object with role and content", where=where)
    role = "system" if said.get("role") == "developer" else said.get("role")
    if said.get("tool_calls") or said.get("function_call") or role in TOOL_ROLES:
        raise Fault(f"{name} is a tool call", where=where, fix=LEAVE_TOOLS_OUT, reason=TOOLS)
    weight = said.get("loss_weight")
    # Training learns every assistant turn and no other; a file that asks otherwise is refused.
    if weight is not None and weight != (1 if role == "assistant" else 0):
        raise Fault(
            f"{name}: loss_weight {str(weight)[:20]} on the {str(role)[:20]}'s turn is not read",
            where=where,
            fix="remove loss_weight",
            reason=LOSS_WEIGHT,
        )
    return turn(role, joined_text(said.get("content"), name, where))


def _turns(row: Row, key: str, where: str) -> list[Any]:
    turns = row.get(key)
    if not isinstance(turns, list):
        raise Fault(f"'{key}' must be a list", where=where)
    return turns


def refuse_unusable(row: Row, where: str) -> None:
    """Tools and media. Many exporters write ``"tools": []`` or ``"images": null`` on plain conversations."""
    for key, (what, fix, reason) in _REFUSED_KEYS.items():
        if _is_given(row, key):
            raise Fault(f"{what} ('{key}') is not read", where=where, fix=fix, reason=reason)


# --- other objectives: preference pairs (DPO), liked and disliked answers (KTO) --------------------


def refuse_other_objectives(row: Row, where: str) -> None:
    """Half of such a file is what must not be learned, so training does not take it as it is."""
    for key in (*_PREFERENCE_KEYS, *_KTO_KEYS):
        if _is_objective(row, key):
            pair = key in _PREFERENCE_KEYS
            what = "a preference pair" if pair else "a KTO (liked or disliked) record"
            kept = "chosen" if pair else "liked"
            raise Fault(
                f"{what} ('{key}') is not read",
                where=where,
                fix=f"`qwen-ray data prepare` with the source 'file' keeps the {kept} answers",
                reason=PREFERENCE if pair else KTO,
            )


def plain(row: Row, where: str) -> Row:
    """The row as a plain example: a preference pair's chosen answer, a KTO record that was liked.

    A disliked one is a :class:`Fault`, and so is a pair without a chosen answer.
    """
    objectives = [key for key in (*_PREFERENCE_KEYS, *_KTO_KEYS) if _is_objective(row, key)]
    if not objectives:
        return row
    if any(row[key] is False for key in objectives):
        raise Fault("a disliked answer (KTO)", where=where, fix="leave it out", reason=DISLIKED)
    rest = {key: value for key, value in row.items() if key not in (*_PREFERENCE_KEYS, *_KTO_KEYS)}
    if _is_given(row, "chosen_messages"):
        return {**rest, "messages": row["chosen_messages"]}
    if _is_given(row, "chosen"):
        return _with_chosen(rest, row["chosen"])
    if all(key in _KTO_KEYS for key in objectives):
        return rest
    raise Fault("a preference pair without a chosen answer", where=where)


def _with_chosen(rest: Row, chosen: Any) -> Row:
    if isinstance(chosen, list):
        # TRL: the prompt apart as messages, or the whole conversation in ``chosen``.
        prompt = rest["prompt"] if isinstance(rest.get("prompt"), list) else []
        kept = {key: value for key, value in rest.items() if key not in ("prompt", "messages")}
        return {**kept, "messages": [*prompt, *chosen]}
    if isinstance(rest.get("conversations"), list):
        return {**rest, "conversations": [*rest["conversations"], chosen]}
    return {**rest, "output" if "instruction" in rest else "completion": chosen}


def _is_objective(row: Row, key: str) -> bool:
    # A 'label' that is no boolean is an unrelated column of the same name.
    return isinstance(row.get(key), bool) if key in _KTO_KEYS else _is_given(row, key)


def _is_given(row: Row, key: str) -> bool:
    return key in row and row[key] not in (None, [], "", {}, "[]")
