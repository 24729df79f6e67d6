"""From records to token ids with labels: only the assistant's tokens carry loss.

The spans come from the chat template itself: a turn's span is what rendering it adds to the rendering of
the turns before it with the generation prompt, so any template works whose renderings are prefixes of one
another. Qwen's are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from qwen_ray.data.records import Record
from qwen_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
CHUNK = 1000
"""Records tokenised together."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record. ``labels[t]`` is ``ids[t]`` where the token carries loss, else -100."""

    id: str
    domain: str
    ids: list[int]
    labels: list[int]
    supervised: int = field(init=False, compare=False)
    """Number of tokens that carry loss; never the first, which nothing predicts."""

    def __post_init__(self) -> None:
        count = sum(label != IGNORE for label in self.labels[:1])
        object.__setattr__(self, "supervised", len(self.labels) - self.labels.count(IGNORE) - count)


@dataclass
class TokeniseReport:
    """What happened to records that do not fit: nothing is lost without being counted here."""

    cut: list[str] = field(default_factory=list)
    """Ids of records cut to ``max_length``."""
    dropped: list[str] = field(default_factory=list)
    """Ids of records with no assistant token left inside ``max_length``."""


def render(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The text of a record and the character spans ``[start, end)`` of the assistant's turns, ascending."""
    turns = [{"role": m.role, "content": m.content} for m in record.messages]
    text = _template(tokenizer, turns, prompt=False)
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _template(tokenizer, turns[:i], prompt=True)
        last = i + 1 == len(turns)
        upto = text if last else _template(tokenizer, turns[: i + 1], prompt=False)
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
    waiting = iter(records)
    while chunk := list(islice(waiting, CHUNK)):
        rendered = [render(record, tokenizer) for record in chunk]
        # Many texts at once: a fast tokenizer spreads them over threads, and each call has a cost of its own.
        encoded = tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # it would warn of texts longer than the model's context, which are cut below
        )
        parts = zip(chunk, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for record, (_, spans), all_ids, offsets in parts:
            ids = all_ids[:max_length]
            if len(all_ids) > max_length:
                report.cut.append(record.id)
            labels = _labels(ids, offsets, spans)
            labels[:1] = [IGNORE]  # nothing predicts the first token of an isolated document
            if labels.count(IGNORE) == len(labels):
                report.dropped.append(record.id)
                continue
            examples.append(Example(record.id, record.domain, ids, labels))
    return examples, report


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """``ids`` where the token lies wholly inside a span, else -100. Offsets and spans ascend."""
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        for t in range(bisect_left(offsets, (start, 0)), len(ids)):
            a, b = offsets[t]
            if a >= end:
                break
            if a < b <= end:
                labels[t] = ids[t]
    return labels
