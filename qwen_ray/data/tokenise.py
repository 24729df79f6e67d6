"""From records to token ids with labels: only the assistant's tokens carry loss.

The spans come from the chat template itself: a turn's span is what rendering it adds to the rendering of
the turns before it with the generation prompt, so any template works whose renderings are prefixes of one
another. Qwen's are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from qwen_ray.data.records import Record
from qwen_ray.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
CHUNK = 1000
"""Records tokenised together."""
RULES = 2
"""Raised when other tokens carry loss than before: lengths that are kept beside a file hold for one."""


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
    """The text of a record and the character spans ``[start, end)`` of the assistant's turns, ascending.

    A first turn that is the assistant's has none.
    """
    turns = [{"role": m.role, "content": m.content} for m in record.messages]
    text = _template(tokenizer, turns, prompt=False)
    spans = []
    for i, turn in enumerate(turns):
        # An answer to nothing (ShareGPT files have them) is read, not learnt: where it begins cannot be told
        # from a default system prompt, which a template may put before it.
        if turn["role"] != "assistant" or i == 0:
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
            return_attention_mask=False,
            verbose=False,  # it would warn of texts longer than the model's context, which are cut below
        )
        parts = zip(chunk, rendered, encoded["input_ids"], encoded.encodings, strict=True)
        for record, (_, spans), all_ids, encoding in parts:
            ids = all_ids[:max_length]
            if len(all_ids) > max_length:
                report.cut.append(record.id)
            labels = _labels(all_ids, encoding, spans)[:max_length]
            labels[:1] = [IGNORE]  # nothing predicts the first token of an isolated document
            if labels.count(IGNORE) == len(labels):
                report.dropped.append(record.id)
                continue
            examples.append(Example(record.id, record.domain, ids, labels))
    return examples, report


def _labels(ids: list[int], encoding: Encoding, spans: list[tuple[int, int]]) -> list[int]:
    """``ids`` where the token lies wholly inside a span, else -100.

    The encoding is asked for the ends of each span only: the offsets of every token, as Python objects, cost
    about a quarter of the tokenising itself.
    """
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        first = _token_of(encoding, range(start, end))
        last = _token_of(encoding, range(end - 1, start - 1, -1))
        if first is None or last is None:
            continue
        while first <= last and _place(encoding, first)[0] < start:
            first += 1
        # A character of several tokens is found at its first.
        while last + 1 < len(ids) and start <= _place(encoding, last + 1)[0] < end:
            last += 1
        while first <= last and _place(encoding, last)[1] > end:
            last -= 1
        labels[first : last + 1] = ids[first : last + 1]
    return labels


def _token_of(encoding: Encoding, characters: range) -> int | None:
    """The token of the first of these characters that has one: a normaliser may have taken some away."""
    found = (encoding.char_to_token(at) for at in characters)
    return next((token for token in found if token is not None), None)


def _place(encoding: Encoding, token: int) -> tuple[int, int]:
    """The characters ``[start, end)`` of a token."""
    place = encoding.token_to_chars(token)
    assert place is not None  # only for tokens of no sequence, and none are added
    return place
