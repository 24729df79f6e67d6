"""One scoring forward: what is known of its rows is taken from the prefix cache, the rest is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qwen_ray.serving.engines.base import Alternatives, ScoreResult
from qwen_ray.serving.engines.packing import NEXT, Row, ScoreBatch, Want, tensors
from qwen_ray.serving.engines.prefix import BLOCK, Block, Marks, PrefixCache, past, stacked

if TYPE_CHECKING:
    from qwen_ray.serving.engines.torch import TorchEngine

_LOGITS_AT_ONCE = 2**24  # float32 values, 64 MiB: a 152k vocabulary times a long prompt would be gigabytes


@dataclass
class Known:
    """The part of a trunk that was read before: its blocks, and how many of their tokens are used."""

    chain: list[Block] = field(default_factory=list)
    length: int = 0

    def of(self, want: Want) -> int:
        """How many of the predictions need not be made."""
        return max(0, min(self.length - want.first, len(want.targets)))


def known(prefixes: PrefixCache, adapter: str | None, trunk: Sequence[int], wants: Sequence[Want]) -> Known:
    """What of a trunk need not be read again: predictions that are not known are still to be made."""
    chain = prefixes.find(adapter, trunk)
    if not chain:
        return Known()
    length = min(_predicted(chain, want, len(trunk)) for want in wants)
    return Known(chain, min(length, BLOCK * len(chain)))


def _predicted(chain: Sequence[Block], want: Want, trunk: int) -> int:
    """The first position whose prediction is wanted and not known."""
    if not want.whole:
        return want.first
    # Position p predicts token p + 1. All of a prompt's tokens are read, so in the trunk they are its own.
    token = want.first + 1
    end = min(want.first + len(want.targets), trunk, BLOCK * len(chain))  # the last target is NEXT
    while token < end:
        marks = chain[token // BLOCK].marks
        if marks is None or token % BLOCK < marks.first or marks.top < want.top:
            break
        token = (token // BLOCK + 1) * BLOCK
    return min(token, end) - 1 if end > want.first else want.first


@dataclass
class _Answers:
    """Predictions of a batch's wants one after the other; ``ids`` and ``values`` [places, k] by ``place``."""

    logprobs: list[float]
    greedy: list[bool]
    place: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor

    def alternatives(self, start: int, end: int, top: int) -> list[Alternatives]:
        place = self.place[start:end]
        return _pairs(self.ids[place, :top], self.values[place, :top])


@torch.inference_mode()
def run(engine: TorchEngine, batch: ScoreBatch, results: list[ScoreResult]) -> None:
    """Score a batch; writes what it gives into ``results`` (indexed by item) once all of it is known."""
    rows, prefixes = batch.rows, engine.prefixes
    parts = [Known() for _ in rows]
    if prefixes is not None:
        parts = [known(prefixes, row.adapter, row.tokens[: row.trunk], row.wants) for row in rows]
    skipped = [part.length for part in parts]
    ids, positions, mask = tensors(rows, skipped, engine.device)
    cache = None if prefixes is None else past([part.chain for part in parts], skipped)
    adapters = [row.adapter for row in rows]
    with engine.lora.select(adapters):
        hidden, logits = engine._hidden(ids, positions, mask, cache)
    answers = _answers(engine, rows, parts, hidden, logits)
    _write(rows, parts, answers, results)
    if prefixes is not None:
        _keep(prefixes, rows, parts, answers, cache)


def _answers(
    engine: TorchEngine,
    rows: Sequence[Row],
    parts: Sequence[Known],
    hidden: torch.Tensor,
    logits: torch.Tensor | None,
) -> _Answers:
    """Read the predictions out. Those of several wants at one place are computed once.

    A token's figure and those of the likeliest come from the same tensor, so the likeliest token's two
    figures are the same bits: lm-eval's client tests them for equality.
    """
    width = (hidden if logits is None else logits).shape[1]
    flat: list[int] = []
    targets: list[int] = []
    for r, (row, part) in enumerate(zip(rows, parts, strict=True)):
        for want in row.wants:
            done = part.of(want)
            flat += [r * width + position - part.length for position in want.positions[done:]]
            targets += want.targets[done:]
    places, inverse = torch.unique(torch.tensor(flat, device=engine.device), return_inverse=True)
    target = torch.tensor(targets, device=engine.device)
    top = min(max(1, *(want.top for row in rows for want in row.wants)), engine.vocabulary)
    own = torch.empty(len(flat), device=engine.device)
    ids = torch.empty(len(places), top, dtype=torch.long, device=engine.device)
    values = torch.empty(len(places), top, device=engine.device)
    adapters = [row.adapter for row in rows]
    step = max(1, _LOGITS_AT_ONCE // engine.vocabulary)
    for start in range(0, len(places), step):
        place = places[start : start + step]
        row, column = place // width, place % width
        found = engine._head(hidden[row, column], adapters, row) if logits is None else logits[row, column]
        logprobs = torch.log_softmax(found.float(), dim=-1)
        values[start : start + step], ids[start : start + step] = logprobs.topk(top, dim=-1)
        inside = ((inverse >= start) & (inverse < start + step)).nonzero().squeeze(1)
        own[inside] = logprobs[inverse[inside] - start, target[inside].clamp(min=0)]
    read = own.tolist()
    if any(map(math.isnan, read)):
        raise FloatingPointError("the model's output is not a number")
    return _Answers(read, (ids[inverse, 0] == target).tolist(), inverse, ids, values)


def _write(
    rows: Sequence[Row], parts: Sequence[Known], answers: _Answers, results: list[ScoreResult]
) -> None:
    start = 0
    for row, part in zip(rows, parts, strict=True):
        for want in row.wants:
            end = start + len(want.targets) - part.of(want)
            last = end - 1 if want.targets[-1] == NEXT else end
            if last < end:
                results[want.item].next_token = answers.alternatives(last, end, max(want.top, 1))[0]
            if len(want.targets) > end - last:
                score = results[want.item].continuations[want.continuation]
                _write_known(part, want, score.logprobs, score.top)
                score.logprobs += answers.logprobs[start:last]
                score.greedy = all(answers.greedy[start:last]) and _known_greedy(part, want)
                if want.top:
                    score.top += answers.alternatives(start, last, want.top)
            start = end


def _known_marks(part: Known, want: Want) -> list[tuple[Marks, int, int]]:
    """The marks of the predictions that were not made, with the part of each that is wanted."""
    out = []
    token, end = want.first + 1, want.first + 1 + part.of(want)
    while token < end:
        at = token // BLOCK
        marks = part.chain[at].marks
        assert marks is not None  # known() has looked
        out.append((marks, token - at * BLOCK - marks.first, min(end - at * BLOCK, BLOCK) - marks.first))
        token = (at + 1) * BLOCK
    return out


def _write_known(part: Known, want: Want, logprobs: list[float], top: list[Alternatives]) -> None:
    for marks, a, b in _known_marks(part, want):
        logprobs += marks.logprobs[a:b]
        if want.top:
            top += _pairs(marks.ids[a:b, : want.top], marks.values[a:b, : want.top])


def _known_greedy(part: Known, want: Want) -> bool:
    return all(all(marks.greedy[a:b]) for marks, a, b in _known_marks(part, want))


def _pairs(ids: torch.Tensor, values: torch.Tensor) -> list[Alternatives]:
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


def _keep(
    prefixes: PrefixCache, rows: Sequence[Row], parts: Sequence[Known], answers: _Answers, cache: object
) -> None:
    """Keep what was read of each trunk, and the predictions within it where a whole prompt was asked for."""
    kv = stacked(cache, max(part.length for part in parts))
    if kv is None:
        return
    start = 0
    for r, (row, part) in enumerate(zip(rows, parts, strict=True)):
        longest: Marks | None = None
        for want in row.wants:
            done = part.of(want)
            end = start + len(want.targets) - done
            tokens = min(end - start - 1, row.trunk - want.first - done - 1)  # without NEXT, in the trunk
            if want.whole and tokens > (0 if longest is None else len(longest.logprobs)):
                part_of = slice(start, start + tokens)
                place = answers.place[part_of]
                longest = Marks(
                    want.first + done + 1,
                    answers.logprobs[part_of],
                    answers.greedy[part_of],
                    answers.ids[place],
                    answers.values[place],
                )
            start = end
        prefixes.store(row.adapter, row.tokens[: row.trunk], kv[:, :, r], part.length, longest)
