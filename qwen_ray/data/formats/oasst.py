"""OpenAssistant: one conversation of each message tree, the best-ranked (arXiv 2304.07327).

From the root, the reply with the lowest ``rank`` is followed (ties and unranked: the first in the file);
of a user's follow-ups only those that were answered. Messages that are deleted, not approved by reviewers or
not in English are not followed, where the file has these fields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from qwen_ray.data.formats.fields import (
    EMPTY,
    LANGUAGE,
    MALFORMED,
    NO_ANSWER,
    NO_PARENT,
    OTHER,
    UNAPPROVED,
    Fault,
    Row,
    example,
    first_of,
    is_number,
    turn,
)
from qwen_ray.data.formats.lines import Item

_ROLES = {"prompter": "user", "assistant": "assistant"}
_STOPPED = ("aborted_low_grade", "halted_by_moderator")  # states of a tree that was given up
_UNRANKED = 1 << 30

Replies = Callable[[Row], list[Any]]


def is_flat(row: Collection[str]) -> bool:
    """Whether these are the keys of one message of a flat file, which names its parent."""
    return "text" in row and "role" in row and ("parent_message_id" in row or "parent_id" in row)


def from_tree(row: Row, where: str) -> Row:
    """One line of a tree file: ``message_tree_id``, ``prompt`` and below it ``replies``."""
    root = row.get("prompt")
    if not isinstance(root, dict):
        raise Fault("'prompt' must be a message with text and replies", where=where)
    if row.get("tree_state") in _STOPPED:
        raise Fault(f"tree_state is {row['tree_state']}", where=where, reason=UNAPPROVED)

    def replies(node: Row) -> list[Any]:
        found = node.get("replies")
        return found if isinstance(found, list) else []

    return _conversation({**row, "id": row.get("message_tree_id")}, root, replies, where)


def threads(items: Iterable[Item]) -> Iterator[Item]:
    """The conversations of a flat file as OpenAI messages, in the order of their first messages.

    All of the file is held: a reply may stand anywhere. What belongs to no thread is a fault.
    """
    nodes: dict[str, Item] = {}
    children: dict[str, list[str]] = {}
    roots: list[str] = []
    for item in items:
        if isinstance(item.value, Fault) or not isinstance(item.value, dict):
            yield item
            continue
        fault, name, parent = _placed(item, nodes)
        if fault is not None:
            yield item._replace(value=fault)
            continue
        nodes[name] = item
        if parent is None:
            roots.append(name)
        else:
            children.setdefault(parent, []).append(name)

    def replies(node: Row) -> list[Any]:
        return [nodes[name].value for name in children.get(str(_id(node)), ())]

    for name in roots:
        item = nodes[name]
        yield item._replace(value=_thread(item.value, replies, item.where))
    for name in _unreached(nodes, children, roots):
        fault = Fault("no thread leads to this message", where=nodes[name].where, reason=NO_PARENT)
        yield nodes[name]._replace(value=fault)


def _placed(item: Item, nodes: dict[str, Item]) -> tuple[Fault | None, str, str | None]:
    """The message's id and its parent's, or what is wrong with them."""
    row, where = item.value, item.where
    name, parent = _id(row), first_of(row, "parent_message_id", "parent_id")
    if not is_flat(row):
        return Fault("this is no OpenAssistant message", where=where, reason=OTHER), "", None
    if not isinstance(name, str) or not (parent is None or isinstance(parent, str)):
        return Fault("a message and its parent are named by text", where=where, reason=MALFORMED), "", None
    if name in nodes:
        return Fault(f"message '{name[:40]}' is also at {nodes[name].where}", where=where), "", None
    return None, name, parent or None


def _unreached(nodes: dict[str, Item], children: dict[str, list[str]], roots: list[str]) -> list[str]:
    reached, left = set(roots), list(roots)
    while left:
        below = children.get(left.pop(), [])
        reached.update(below)
        left += below
    return [name for name in nodes if name not in reached]


def _thread(root: Row, replies: Replies, where: str) -> Row | Fault:
    try:
        return _conversation({**root, "id": _id(root)}, root, replies, where)
    except Fault as fault:
        return fault


def _conversation(row: Row, root: Row, replies: Replies, where: str) -> Row:
    if reason := _unusable(root):
        raise Fault(
            f"the first message cannot be used: {reason}", where=where, fix="leave it out", reason=reason
        )
    path = [root]
    while nexts := _nexts(path[-1], replies):
        path.append(min(nexts, key=_rank))
    if len(path) == 1:
        raise Fault("the first message has no approved answer", where=where, reason=NO_ANSWER)
    return example(row, [turn(_ROLES[node["role"]], node["text"]) for node in path], where)


def _nexts(node: Row, replies: Replies) -> list[Row]:
    def after(before: Row) -> list[Row]:
        return [
            reply
            for reply in replies(before)
            if isinstance(reply, dict) and not _unusable(reply) and reply["role"] != before["role"]
        ]

    found = after(node)
    return [reply for reply in found if after(reply)] if node["role"] == "assistant" else found


def _unusable(node: Row) -> str:
    """Why a message is not followed; empty if it is."""
    role = node.get("role")
    if not isinstance(role, str) or role not in _ROLES or not isinstance(node.get("text"), str):
        return MALFORMED
    if not node["text"].strip():
        return EMPTY
    if node.get("deleted") or node.get("review_result", True) is not True:
        return UNAPPROVED
    lang = node.get("lang")
    return LANGUAGE if isinstance(lang, str) and lang and not lang.lower().startswith("en") else ""


def _id(node: Row) -> Any:
    return first_of(node, "message_id", "user_message_id")


def _rank(node: Row) -> float:
    rank: Any = node.get("rank")
    return float(rank) if is_number(rank) else _UNRANKED
