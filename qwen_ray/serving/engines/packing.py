"""Laying out score requests as rows: sequences that begin alike share one row of the batch.

A row is a tree of tokens in depth-first order: what sequences have in common is in it once, each branch sees
its own way to the root only, and positions are counted along that way. Four choices of 6 tokens after 60 of
context cost 80 tokens instead of 260, with the same log-probabilities up to rounding; it does not matter
whether they came as one item, or as whole prompts of their own (lm-eval's stock client). The last token of a
continuation predicts nothing that is wanted, so it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import MAX_TOP, ScoreItem
from qwen_ray.serving.engines.prefix import BLOCK

NEXT = -1  # in place of a target token: the prediction after the last one
_SHORT = 16  # tokens of padding a row that are cheaper than another forward
_PUT_OFF = 8  # a row waits for another forward if that spares it one in so many of its tokens
_LONG_ROW = 1024  # branches go to a further row rather than make one longer than this


@dataclass(slots=True)
class Want:
    """The predictions wanted of one continuation: at ``positions`` of the row, of ``targets``.

    The last target can be :data:`NEXT`. ``first``: tokens before the first position's own. ``top``: likeliest
    tokens wanted at each. ``whole``: the continuation is a prompt, whose predictions may be known.
    """

    item: int
    continuation: int
    first: int
    positions: Sequence[int]
    targets: list[int]
    top: int = 0
    whole: bool = False


@dataclass
class Row:
    """One row of a batch. ``until``: for each token, where the part of the row ends that sees it.

    The first ``trunk`` tokens are before any branch. ``known``: trunk tokens that are expected to be known
    when the row is run, in the given ``wave``.
    """

    adapter: str | None
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    until: list[int] = field(default_factory=list)
    wants: list[Want] = field(default_factory=list)
    trunk: int = 0
    known: int = 0
    wave: int = 0
    _path: list[int] = field(default_factory=list)  # places of the last sequence's tokens

    @property
    def new(self) -> int:
        """Tokens to be read."""
        return len(self.tokens) - self.known

    @property
    def branches(self) -> bool:
        return self.trunk < len(self.tokens)

    def add(self, sequence: Branch, shared: int) -> None:
        """Add a sequence that has ``shared`` tokens in common with the one added last."""
        before, path = len(self.tokens), self._path
        grows = self.trunk == before and shared == len(path)
        for place in path[shared:]:
            self.until[place] = before
        new = sequence.tokens[shared:]
        path[shared:] = range(before, before + len(new))
        self.tokens += new
        self.positions += range(shared, len(sequence.tokens))
        self.until += [0] * len(new)
        self.trunk = len(self.tokens) if grows else min(self.trunk, shared)
        want = sequence.want
        places = path[want.first : want.first + len(want.targets)]
        self.wants.append(replace(want, positions=places))

    def close(self) -> Row:
        """After the last sequence."""
        for place in self._path:
            self.until[place] = len(self.tokens)
        return self


@dataclass
class Branch:
    """What one continuation asks the model to read."""

    adapter: str | None
    tokens: tuple[int, ...]
    want: Want


Known = Callable[[str | None, Sequence[int], Sequence[Want]], int]
"""Tokens at the beginning of a trunk that need not be read again, with an adapter, for some predictions."""


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
        return any(row.branches for row in self.rows)


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


def plan(
    items: Sequence[ScoreItem],
    *,
    context_length: int,
    budget: int,
    share: bool,
    known: Known | None = None,
) -> list[ScoreBatch]:
    """Batches of at most ``budget`` tokens (padding and what is known counted), rows of like length together.

    ``share`` False gives each continuation its own row, for models that cannot take a block mask. ``known``
    says what of a row was read before. Of rows that begin alike and do not fit into one, the first comes an
    earlier wave than the others, which then find what it has read.
    """
    branches = [branch for i, item in enumerate(items) for branch in _branches(i, item, context_length)]
    if share:
        branches.sort(key=lambda branch: (branch.adapter or "", branch.tokens))
    rows = _rows(branches, share, known)
    if known is not None:
        _set_waves(rows)
    # A forward computes each of its adapters for all rows: apart, where each fills forwards of its own.
    apart = sum(len(row.tokens) for row in rows) >= budget * len({row.adapter for row in rows})
    rows.sort(key=lambda row: (row.wave, (row.adapter or "") if apart else "", -row.new, -row.known))
    batches: list[ScoreBatch] = []
    past = 0
    for row in rows:
        first = batches[-1].rows[0] if batches else row
        past = max(past, row.known)
        fits = batches and (len(batches[-1].rows) + 1) * (first.new + past) <= budget
        # A row much shorter than the batch's longest would be mostly padding.
        alike = 0 <= first.new - row.new <= max(_SHORT, first.new // 2)
        if not fits or not alike or row.wave != first.wave:
            batches.append(ScoreBatch())
            past = row.known
        batches[-1].rows.append(row)
    return batches


def _branches(index: int, item: ScoreItem, context_length: int) -> list[Branch]:
    out = []
    continuations: Sequence[Sequence[int]] = item.continuations or ((),)
    for c, tokens in enumerate(continuations):
        if not tokens and not item.next_token:
            continue
        kept = _kept(item, tokens, context_length)
        context = item.context[len(item.context) - kept :]
        read = (*context, *(tokens if item.next_token else tokens[:-1]))
        targets = [*tokens, NEXT] if item.next_token else list(tokens)
        want = Want(index, c, kept - 1, range(kept - 1, len(read)), targets, item.top, item.next_token)
        out.append(Branch(item.adapter, read, want))
    return out


def _rows(branches: Sequence[Branch], share: bool, known: Known | None) -> list[Row]:
    """Sorted sequences as rows: one joins the row before where what they share outweighs a longer row."""
    rows: list[Row] = []
    before: tuple[int, ...] = ()
    for branch in branches:
        found = 0 if known is None else known(branch.adapter, branch.tokens, [branch.want])
        row, shared = None, 0
        if share and rows and rows[-1].adapter == branch.adapter:
            shared = common(before, branch.tokens)
            new = len(branch.tokens) - shared
            trunk = min(rows[-1].trunk, shared)
            if (
                _worth(shared, new)
                and len(rows[-1].tokens) + new <= max(_LONG_ROW, 2 * shared)
                and max(rows[-1].known, found) <= trunk  # else what is known could not be used
            ):
                row = rows[-1]
        if row is None:
            row, shared = Row(branch.adapter), 0
            rows.append(row)
        row.add(branch, shared)
        row.known = max(row.known, found)
        before = branch.tokens
    return [row.close() for row in rows]


def _set_waves(rows: Sequence[Row]) -> None:
    """Put off rows (in the order of their tokens) that begin with what an earlier row is going to read."""
    read: dict[int, int] = {}  # depth in the trunk of the row before -> the wave that reads up to it
    before: list[int] = []
    adapter: str | None = None
    for row in rows:
        trunk = row.tokens[: row.trunk]
        shared = common(before, trunk) if row.adapter == adapter else 0
        depth = shared // BLOCK * BLOCK
        kept: dict[int, int] = {}
        for end, wave in read.items():
            kept[min(end, depth)] = min(wave, kept.get(min(end, depth), wave))
        if depth > row.known and _PUT_OFF * (depth - row.known) >= row.new:
            row.known, row.wave = depth, 1 + kept[depth]
        read = {row.trunk: row.wave} | kept
        before, adapter = trunk, row.adapter


def _worth(shared: int, new: int) -> bool:
    return 2 * shared >= new


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


def tensors(
    rows: Sequence[Row], skipped: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(token ids [B, T], position ids [B, T], attention mask [B, 1, T, P + T] bool) of rows.

    Of row i the first ``skipped[i]`` tokens are not in it: they are the end of P columns of a cache. The last
    two are None when no row branches or skips: rows are padded on the right, which a causal model never looks
    at. True in the mask means "may attend".
    """
    longest = max(len(row.tokens) - skip for row, skip in zip(rows, skipped, strict=True))

    def padded(values: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(
            [
                [*own[skip:], *[0] * (longest - len(own) + skip)]
                for own, skip in zip(values, skipped, strict=True)
            ],
            device=device,
        )

    ids = padded([row.tokens for row in rows])
    if not any(skipped) and not any(row.branches for row in rows):
        return ids, None, None
    positions = padded([row.positions for row in rows])
    skip = torch.tensor(list(skipped), device=device).view(-1, 1, 1)
    until = padded([row.until for row in rows]).unsqueeze(1) - skip  # [B, 1, T]
    at = torch.arange(longest, device=device)
    # A token sees itself, so that no padding has an empty row.
    own = (until > at.view(1, -1, 1)).tril_() | torch.eye(longest, dtype=torch.bool, device=device)
    past = int(skip.max())
    if not past:
        return ids, positions, own.unsqueeze(1)
    columns = torch.arange(past, device=device).view(1, 1, -1) >= past - skip  # [B, 1, P]
    return ids, positions, torch.cat([columns.expand(-1, longest, -1), own], dim=2).unsqueeze(1)
