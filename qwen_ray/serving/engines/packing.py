"""Laying out score requests as rows: a context and all its continuations share one row of the batch.

A row holds the context once, then each continuation; a block mask lets a continuation see the context and
itself only, and its positions start where the context ends. The last token of a continuation predicts
nothing that is wanted, so it is left out. Four choices of 6 tokens after 60 of context cost 80 tokens
instead of 260, with the same log-probabilities up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import MAX_TOP, ScoreItem

NEXT = -1  # in place of a target token: the prediction after the last one
_LONG_ROW = 1024  # continuations go to a further row rather than make one longer than this


@dataclass
class Want:
    """A prediction to read out: at ``position`` of the row, of ``target`` (or :data:`NEXT`)."""

    position: int
    target: int
    item: int
    continuation: int


@dataclass
class Row:
    """One row of a batch. ``segment``: 0 for the context, k for the k-th continuation in the row."""

    adapter: str | None
    tokens: list[int]
    positions: list[int]
    segment: list[int]
    wants: list[Want]
    context_length: int
    pieces: int = 0
    top: int = 0

    def append(self, tokens: Sequence[int], *, item: int, continuation: int, keep_last: bool) -> None:
        """Add a continuation: its input tokens and the predictions wanted of it."""
        self.pieces += 1
        at, where = self.context_length - 1, self.context_length - 1
        for j, token in enumerate(tokens):
            self.wants.append(Want(where, token, item, continuation))
            if j + 1 < len(tokens) or keep_last:
                where, at = len(self.tokens), at + 1
                self.tokens.append(token)
                self.positions.append(at)
                self.segment.append(self.pieces)
        if keep_last:
            self.wants.append(Want(where, NEXT, item, continuation))


@dataclass
class ScoreBatch:
    """Rows for one forward."""

    rows: list[Row] = field(default_factory=list)

    @property
    def items(self) -> set[int]:
        """Indices of the items that have a part in this batch."""
        return {want.item for row in self.rows for want in row.wants}

    @property
    def packed(self) -> bool:
        return any(row.pieces > 1 for row in self.rows)


def check_ids(ids: Sequence[int], what: str, *, vocabulary: int) -> None:
    """Refuse anything that is not a token id; an index error in the embedding would fail a whole batch."""
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise UserError(f"{what}: {token!r} is not a token id", fix=f"ids are 0 to {vocabulary - 1}")


def check_item(item: ScoreItem, *, vocabulary: int, context_length: int) -> None:
    """Raise :class:`UserError` (400) for an item that cannot be scored."""
    if not item.context:
        raise UserError("the context is empty", fix="give at least one token, such as the end-of-text token")
    check_ids(item.context, "context", vocabulary=vocabulary)
    for tokens in item.continuations:
        check_ids(tokens, "continuation", vocabulary=vocabulary)
        if len(tokens) > context_length:
            raise UserError(
                f"a continuation of {len(tokens)} tokens does not fit the context of {context_length}",
                fix="shorten it",
            )
    if not 0 <= item.top <= MAX_TOP:
        raise UserError(f"top is {item.top}", fix=f"at most {MAX_TOP} alternatives a position")
    if item.next_token:
        if len(item.continuations) > 1:
            raise UserError("next_token is for one continuation", fix="send the others as items of their own")
        length = len(item.context) + sum(map(len, item.continuations))
        if length > context_length:
            raise UserError(
                f"the prompt has {length} tokens and the model's context {context_length}", fix="shorten it"
            )


def truncated(item: ScoreItem, *, context_length: int) -> bool:
    """Whether some continuation sees less than the whole context."""
    return any(_kept(item, c, context_length) < len(item.context) for c in item.continuations)


def _kept(item: ScoreItem, continuation: Sequence[int], context_length: int) -> int:
    """Context tokens kept, from the right, as lm-eval truncates: context + continuation <= length + 1."""
    return min(len(item.context), context_length + 1 - len(continuation))


def plan(items: Sequence[ScoreItem], *, context_length: int, budget: int, share: bool) -> list[ScoreBatch]:
    """Batches of at most ``budget`` tokens (padding counted), rows of like length together.

    ``share`` False gives each continuation its own row, for models that cannot take a block mask.
    """
    rows: list[Row] = []
    for i, item in enumerate(items):
        rows.extend(_rows(i, item, context_length=context_length, share=share))
    rows.sort(key=lambda row: len(row.tokens), reverse=True)
    batches: list[ScoreBatch] = []
    for row in rows:
        if not batches or (len(batches[-1].rows) + 1) * len(batches[-1].rows[0].tokens) > budget:
            batches.append(ScoreBatch())
        batches[-1].rows.append(row)
    return batches


def _rows(index: int, item: ScoreItem, *, context_length: int, share: bool) -> list[Row]:
    rows: list[Row] = []
    by_kept: dict[int, Row] = {}
    continuations: Sequence[Sequence[int]] = item.continuations or ((),)
    for c, tokens in enumerate(continuations):
        if not tokens and not item.next_token:
            continue
        kept = _kept(item, tokens, context_length)
        row = by_kept.get(kept) if share else None
        if row is None or len(row.tokens) + len(tokens) > max(_LONG_ROW, 2 * kept):
            context = list(item.context[len(item.context) - kept :])
            row = Row(item.adapter, context, list(range(kept)), [0] * kept, [], kept, top=item.top)
            by_kept[kept] = row
            rows.append(row)
        row.append(tokens, item=index, continuation=c, keep_last=item.next_token)
    return rows


def tensors(
    batch: ScoreBatch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(token ids [B, T], position ids [B, T], attention mask [B, 1, T, T] bool) of a batch.

    The last two are None when no row is shared: rows are padded on the right, which a causal model never
    looks at. True in the mask means "may attend".
    """
    longest = max(len(row.tokens) for row in batch.rows)
    ids = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in batch.rows], device=device)
    if not batch.packed:
        return ids, None, None
    positions = torch.tensor(
        [row.positions + [0] * (longest - len(row.positions)) for row in batch.rows], device=device
    )
    # Padding is a segment of its own at the end; it sees the context too, so no query has an empty row.
    segment = torch.tensor(
        [row.segment + [-1] * (longest - len(row.segment)) for row in batch.rows], device=device
    )
    visible = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    return ids, positions, visible.tril_().unsqueeze(1)
