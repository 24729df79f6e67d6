"""The frozen base of a pack: forward and backward over a sequence in which each trial has its own segment."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch

from qwen_ray import models
from qwen_ray.config import RunConfig
from qwen_ray.data.packing import Batch, Row, collate
from qwen_ray.training import attention, memory, precision
from qwen_ray.training.loss import TokenLoss, head_loss
from qwen_ray.training.packed_bank import Bank, Lane
from qwen_ray.training.packed_layers import Adapters, Pass

EVALUATED = 4
"""How many times the tokens of a pass with gradients one without takes, about, as it keeps nothing: a row of
each lane is the least."""
PASS_VALUES = {"cpu": 2**17, "cuda": 2**24}
"""Tokens times hidden size of a pass with gradients, at most (a lane is the least): beyond it a device is
busy, and more only take memory."""
Parts = Mapping[int, tuple[Batch, int]]
"""Lane -> (its batch, supervised tokens of its whole step), in order of the lanes."""
Dropout = Mapping[int, tuple[float, torch.Generator]]


class FrozenBase:
    """A model whose linear layers take the adapters of a :class:`Bank`, lane by lane."""

    def __init__(self, config: RunConfig, device: torch.device | None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ref = models.resolve(config.model.name)
        self.numbers = precision.choose(config.precision, self.device)
        kind = attention.choose(config.compute.attention, self.device, self.numbers.compute)
        self.tokenizer = models.load_tokenizer(ref)
        self.context = models.context_length(ref)
        self.fingerprint = models.fingerprint(ref)
        attention.register()
        model: Any = models.load_model(ref, dtype=self.numbers.compute, attention=attention.ATTENTION)
        self.model = model.requires_grad_(False).to(self.device)
        if config.compute.activation_checkpointing:
            memory.checkpoint_layers(self.model)
        self.adapters = Adapters(self.model)
        self.loss = TokenLoss(self.model, attention=kind)
        self.batched = self.device.type == "cuda"
        """Whether small products are batched over lanes, rather than made one by one."""
        self.pass_tokens = PASS_VALUES[self.device.type] // self.model.config.get_text_config().hidden_size
        self._offloads = config.compute.activation_offload

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def bank(
        self,
        lanes: Sequence[Lane],
        *,
        trains: bool = False,
        old: tuple[Bank, Sequence[int | None]] | None = None,
    ) -> Bank:
        """A bank of these lanes; see :class:`Bank`."""
        return Bank(
            self.adapters.shapes,
            lanes,
            padded=self.batched,
            device=self.device,
            dtype=self.numbers.trained if trains else self.numbers.compute,
            compute=self.numbers.compute,
            trains=trains,
            old=old,
        )

    def passes(self, parts: Parts) -> Iterator[Parts]:
        """Lanes that go together through one pass: as few passes as there can be without more tokens in any
        than are worth it, and then as even as these few can be, for the largest decides the memory."""
        lanes = list(parts)
        lengths = [batch.input_ids.shape[1] for batch, _ in parts.values()]
        most = self.pass_tokens
        fewest = len(_cut(lengths, most))
        least = min(-(-sum(lengths) // (fewest - 1)), most)
        even = bisect_left(range(least, most), True, key=lambda tokens: len(_cut(lengths, tokens)) <= fewest)
        for start, end in pairwise(_cut(lengths, least + even)):
            yield {lane: parts[lane] for lane in lanes[start:end]}

    def backward(
        self, bank: Bank, parts: Parts, dropout: Dropout
    ) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Add the gradients of one pass to the bank's: those of the sum of the lanes' token means.

        Returns of each lane: its number, the loss of each supervised token, float32 ``[S]``, and the domains
        of these.
        """
        self.model.train()
        batch = join([batch for batch, _ in parts.values()]).to(self.device)
        sizes = [part.supervised for part, _ in parts.values()]
        share = torch.tensor([1 / supervised for _, supervised in parts.values()])
        scale = share.repeat_interleave(torch.tensor(sizes))[:, None].to(self.device, non_blocking=True)
        nats = torch.empty(len(batch.targets), dtype=torch.float32, device=self.device)
        kept = memory.offload(self.device) if self._offloads else nullcontext()
        self.adapters.current = Pass(bank, _spans(parts), dropout)
        try:
            with self.numbers.autocast(self.device), kept:
                hidden = self.loss.hidden(batch)
                # Not each lane's loss is scaled but its gradient: one fused call makes the loss of all.
                hidden.register_hook(lambda grad: (grad * scale).to(grad.dtype))
                summed = head_loss(hidden, self.loss.head, batch.targets, nats=nats)
            summed.backward()
        finally:
            self.adapters.current = None
        return list(zip(parts, nats.split(sizes), batch.domains.split(sizes), strict=True))

    @torch.no_grad()
    def losses(
        self, bank: Bank | None, rows: Mapping[int, Mapping[str, Sequence[Row]]]
    ) -> dict[int, dict[str, tuple[float, int]]]:
        """Of each lane (or of the base, without a bank) on its rows by domain: (nats, supervised tokens)."""
        self.model.eval()
        chunks = {id(r): self._chunks(r, EVALUATED * self.pass_tokens // len(rows)) for r in rows.values()}
        width = max((len(r) for r in rows.values()), default=0)
        totals = torch.zeros(max(rows, default=0) + 1, width, dtype=torch.float64, device=self.device)
        for i in range(max((len(c) for c in chunks.values()), default=0)):
            parts = {lane: (chunks[id(r)][i], 1) for lane, r in rows.items() if i < len(chunks[id(r)])}
            batch = join([batch for batch, _ in parts.values()]).to(self.device)
            self.adapters.current = Pass(bank, _spans(parts)) if bank else None
            try:
                with self.numbers.autocast(self.device):
                    self.loss(batch)
            finally:
                self.adapters.current = None
            assert self.loss.nats is not None
            sizes = [part.supervised for part, _ in parts.values()]
            for lane, nats, domains in zip(
                parts, self.loss.nats.split(sizes), batch.domains.split(sizes), strict=True
            ):
                totals[lane].index_add_(0, domains, nats.double())
        sums = totals.tolist()
        return {
            lane: {
                d: (sums[lane][i], sum(row.supervised for row in rs)) for i, (d, rs) in enumerate(r.items())
            }
            for lane, r in rows.items()
        }

    def _chunks(self, rows: Mapping[str, Sequence[Row]], tokens: int) -> list[Batch]:
        """Batches of about so many tokens."""
        numbers = {domain: i for i, domain in enumerate(rows)}
        chunks: list[list[Row]] = []
        left = 0
        for row in (row for members in rows.values() for row in members):
            if row.tokens > left:
                chunks.append([])
                left = tokens
            chunks[-1].append(row)
            left -= row.tokens
        return [collate(chunk, self.pad_id, domains=numbers) for chunk in chunks]


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of several, on the CPU, their documents end to end."""
    lengths = [batch.input_ids.shape[1] for batch in batches]
    starts = [sum(lengths[:i]) for i in range(len(batches))]
    return Batch(
        input_ids=torch.cat([b.input_ids for b in batches], 1),
        position_ids=torch.cat([b.position_ids for b in batches], 1),
        offsets=torch.cat(
            [batches[0].offsets[:1], *(b.offsets[1:] + s for b, s in zip(batches, starts, strict=True))]
        ),
        lengths=tuple(length for b in batches for length in b.lengths),
        where=torch.cat([b.where + s for b, s in zip(batches, starts, strict=True)]),
        targets=torch.cat([b.targets for b in batches]),
        domains=torch.cat([b.domains for b in batches]),
        tokens=sum(b.tokens for b in batches),
        supervised=sum(b.supervised for b in batches),
    )


def _cut(lengths: Sequence[int], most: int) -> list[int]:
    """Where to cut so that only single ones are longer than ``most``: 0, ..., the number of all."""
    cuts, tokens = [0], 0
    for i, length in enumerate(lengths):
        if i > cuts[-1] and tokens + length > most:
            cuts.append(i)
            tokens = 0
        tokens += length
    return [*cuts, len(lengths)]


def _spans(parts: Parts) -> list[tuple[int, int, int]]:
    spans, start = [], 0
    for lane, (batch, _) in parts.items():
        end = start + batch.input_ids.shape[1]
        spans.append((lane, start, end))
        start = end
    return spans
