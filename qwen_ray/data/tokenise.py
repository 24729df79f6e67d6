"""From records to token ids with labels: only the assistant's tokens carry loss.

The spans come from the chat template itself: a turn's span is what rendering it adds to the rendering of
the turns before it with the generation prompt, so any template works whose renderings are prefixes of one
another. Qwen's are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen_ray.data.records import Record
from qwen_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record. ``labels[t]`` is ``ids[t]`` where the token carries loss, else -100."""

    id: str
    domain: str
    ids: list[int]
    labels: list[int]


@dataclass
class TokeniseReport:
    """What happened to records that do not fit: nothing is lost without being counted here."""

    cut: list[str] = field(default_factory=list)
    """Ids of records cut to ``max_length``."""
    dropped: list[str] = field(default_factory=list)
    """Ids of records with no assistant token left inside ``max_length``."""


def render(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The text of a record and the character spans ``[start, end)`` of the assistant's turns."""
    turns = [{"role": m.role, "content": m.content} for m in record.messages]
    text = _template(tokenizer, turns, prompt=False)
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _template(tokenizer, turns[:i], prompt=True)
        upto = _template(tokenizer, turns[: i + 1], prompt=False)
        if not (text.startswith(upto) and upto.startswith(before)):
            raise UserError(
                "the chat template renders earlier turns differently once later ones follow, so the "
                "assistant's tokens cannot be told apart",
                where=f"record {record.id}",
                fix="use single-turn records with this model, or a template without that rule",
            )
        # Text after the end-of-turn token (Qwen: a line break) is the template's, not the assistant's.
        spans.append((len(before), len(upto.rstrip())))
    return text, spans


def _template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, prompt: bool) -> str:
    if not turns:
        return ""
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))


def tokenise(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], TokeniseReport]:
    """Tokenise records, cutting each at ``max_length`` tokens."""
    examples: list[Example] = []
    report = TokeniseReport()
    for record in records:
        text, spans = render(record, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, labels = list(encoded["input_ids"]), []
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
            inside = any(a <= start and end <= b and end > start for a, b in spans)
            labels.append(token if inside else IGNORE)
        if len(ids) > max_length:
            ids, labels = ids[:max_length], labels[:max_length]
            report.cut.append(record.id)
        labels[0] = IGNORE  # nothing predicts the first token of an isolated document
        if all(label == IGNORE for label in labels):
            report.dropped.append(record.id)
            continue
        examples.append(Example(record.id, record.domain, ids, labels))
    return examples, report
