"""Generating: a batch of rows that share a key/value cache and leave it as they finish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import (
    MAX_TOP,
    Alternatives,
    GenerateRequest,
    GenerateResult,
    OnToken,
    OnTokenOf,
    TokenEvent,
)
from qwen_ray.serving.engines.packing import check_ids
from qwen_ray.serving.engines.prefix import BLOCK, past, plain_layers, stacked
from qwen_ray.serving.engines.shared import listener
from qwen_ray.serving.engines.text import TextStream

if TYPE_CHECKING:
    from qwen_ray.serving.backlog import Backlog, Place
    from qwen_ray.serving.engines.torch import TorchEngine

USUAL_TOKENS = 256
"""Counted as an answer's length where more may be generated: most end by themselves long before their limit,
which is all of the context where a client sets none."""
_COLDEST = 1e-6  # a temperature; at it a token 0.0001 nats less likely than another is never chosen


def check_request(request: GenerateRequest, *, vocabulary: int, context_length: int) -> None:
    """Raise :class:`UserError` (400) for a request that cannot be generated from."""
    if not request.prompt:
        raise UserError("the prompt is empty", fix="give at least one token")
    check_ids(request.prompt, "prompt", vocabulary=vocabulary)
    if len(request.prompt) >= context_length:
        raise UserError(
            f"the prompt has {len(request.prompt)} tokens; the context of {context_length} leaves no room",
            fix="shorten it",
        )
    if request.max_tokens < 1:
        raise UserError(f"max_tokens is {request.max_tokens}", fix="1 or more")
    if not 0.0 <= request.temperature <= 100.0:  # also refuses NaN
        raise UserError(f"temperature is {request.temperature}", fix="0 (greedy) or more; 1 is usual")
    if not 0.0 < request.top_p <= 1.0:
        raise UserError(f"top_p is {request.top_p}", fix="above 0, at most 1")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_TOP:
        raise UserError(f"logprobs is {request.logprobs}", fix=f"0 to {MAX_TOP}")


class DecodeRow:
    """One request on its way. It survives the batch it is in: its tokens so far are all its state."""

    def __init__(
        self, engine: TorchEngine, request: GenerateRequest, on_token: OnToken | None = None
    ) -> None:
        self.request, self.on_token = request, on_token
        self.result = GenerateResult([], "", "")
        self.error: Exception | None = None
        self.cancelled = False  # set by any thread; the row then leaves at the next step
        self._text = TextStream(engine.tokenizer, request.prompt, request.stop)
        self._eos = engine.eos_ids
        self._limit = min(request.max_tokens, engine.context_length - len(request.prompt))
        self._random = torch.Generator()
        if request.seed is not None:
            self._random.manual_seed(request.seed)
        else:
            self._random.seed()

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt, *self.result.ids]

    @classmethod
    def enter(
        cls,
        engine: TorchEngine,
        requests: Sequence[GenerateRequest],
        on_token: OnTokenOf | None,
        backlog: Backlog,
    ) -> tuple[list[Self], list[Place]]:
        """Rows of one client's requests, and their places in the backlog. :class:`UserError` for all of them
        if one is invalid or too much waits (429)."""
        for request in requests:
            engine.check_generate(request)
        rows = [cls(engine, request, listener(i, on_token)) for i, request in enumerate(requests)]
        return rows, backlog.enter_all([row.expected_tokens for row in rows])

    @property
    def expected_tokens(self) -> int:
        """Of the prompt and of an answer of usual length."""
        return len(self.request.prompt) + min(self._limit, USUAL_TOKENS)

    @property
    def done(self) -> bool:
        return bool(self.result.finish_reason) or self.error is not None

    def accept(self, logits: torch.Tensor) -> None:
        """Choose the next token from ``logits`` [V] (float32, CPU) and tell the listener."""
        token = self._choose(logits)
        logprob, top = self._describe(logits, token)
        self.result.ids.append(token)
        if logprob is not None and top is not None:
            self.result.logprobs.append(logprob)
            self.result.top.append(top)
        reason: str | None = None
        if token in self._eos:
            shown, reason = self._text.finish(), "stop"
        else:
            shown, stopped = self._text.push(token)
            if stopped:
                reason = "stop"
            elif len(self.result.ids) >= self._limit:
                shown, reason = shown + self._text.finish(), "length"
        self.result.text = self._text.text
        if self.on_token is not None:
            self.on_token(TokenEvent(token, shown, logprob, top, reason))
        self.result.finish_reason = reason or ""

    def _choose(self, logits: torch.Tensor) -> int:
        value, likeliest = logits.max(dim=-1)
        if self.request.temperature == 0:
            return int(likeliest)
        # The likeliest is 0 whatever divides it: a temperature near 0 means greedy, and not 0 / 0.
        temperature = max(self.request.temperature, _COLDEST)
        probabilities = torch.softmax((logits - value) / temperature, dim=-1)
        if self.request.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            # Keep the smallest set whose mass reaches top_p: a token stays if the mass before it is less.
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.request.top_p, 0.0)
            return int(order[torch.multinomial(ordered, 1, generator=self._random)])
        return int(torch.multinomial(probabilities, 1, generator=self._random))

    def _describe(self, logits: torch.Tensor, token: int) -> tuple[float | None, Alternatives | None]:
        if self.request.logprobs is None:
            return None, None
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(min(self.request.logprobs, logprobs.shape[-1]))
        return float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))


class DecodeBatch:
    """Rows decoded together, one token each a :meth:`step`."""

    def __init__(self, engine: TorchEngine, rows: Sequence[DecodeRow]) -> None:
        self._engine = engine
        self.rows = list(rows)
        self._cache: Any = None
        self._mask = torch.empty(0)

    @torch.inference_mode()
    def step(self) -> None:
        """Advance every row by one token; rows that end leave.

        A forward that fails, or gives any row what is not a number, raises, and the rows are unharmed: which
        of them is to blame shows when each runs alone.
        """
        self._drop([row.cancelled for row in self.rows])
        if not self.rows:
            return
        logits = self._prefill() if self._cache is None else self._decode()
        for row, row_logits in zip(self.rows, logits, strict=True):
            try:
                row.accept(row_logits)
            except Exception as e:  # this row's listener; the others go on
                row.error = e
        self._drop([row.done for row in self.rows])

    def _prefill(self) -> torch.Tensor:
        """Prompts (and, after a restart, what was generated), padded on the left: [B, V] logits.

        What the engine's prefix cache knows of a prompt stands before its padding.
        """
        engine, prefixes = self._engine, self._engine.prefixes
        sequences = [row.tokens for row in self.rows]
        chains, known, cache = [], [0] * len(sequences), None
        if prefixes is not None:
            # The last token is always read: it makes the prediction.
            chains = [
                prefixes.find(row.request.adapter, tokens[:-1])
                for row, tokens in zip(self.rows, sequences, strict=True)
            ]
            known = [BLOCK * len(chain) for chain in chains]
            cache = past(chains, known)
        new = [tokens[length:] for tokens, length in zip(sequences, known, strict=True)]
        longest, before = max(map(len, new)), max(known)
        self._mask = torch.tensor(
            [
                [0] * (before - length) + [1] * length + [0] * (longest - len(own)) + [1] * len(own)
                for own, length in zip(new, known, strict=True)
            ],
            device=engine.device,
        )
        ids = torch.tensor([[0] * (longest - len(own)) + own for own in new], device=engine.device)
        positions = (self._mask.cumsum(-1) - 1).clamp_(min=0)[:, before:]
        logits, self._cache = self._forward(ids, positions, cache)
        if prefixes is not None and (kv := stacked(self._cache, before)) is not None:
            for r, (row, tokens) in enumerate(zip(self.rows, sequences, strict=True)):
                own = kv[:, :, r, :, longest - len(new[r]) :]
                prefixes.store(row.request.adapter, tokens, own, known[r])
        return logits

    def _decode(self) -> torch.Tensor:
        device = self._engine.device
        ids = torch.tensor([[row.result.ids[-1]] for row in self.rows], device=device)
        mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        positions = mask.sum(-1, keepdim=True) - 1
        self._mask = mask
        logits, self._cache = self._forward(ids, positions, self._cache)
        return logits

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        mask = None if bool(self._mask.all()) else self._mask
        adapters = [row.request.adapter for row in self.rows]
        logits, cache = self._engine.last_logits(ids, positions, mask, cache, adapters)
        if not logits.amax(-1).isfinite().all():  # NaN is the greatest there is
            raise FloatingPointError("the model's output is not a number")
        return logits, cache

    def _drop(self, leaving: list[bool]) -> None:
        if not any(leaving):
            return
        for row, leaves in zip(self.rows, leaving, strict=True):
            if leaves and not row.done:
                row.result.finish_reason = "cancelled"
        keep = [i for i, leaves in enumerate(leaving) if not leaves]
        self.rows = [self.rows[i] for i in keep]
        if self._cache is not None and keep:
            index = torch.tensor(keep, device=self._engine.device)
            self._cache.batch_select_indices(index)
            self._mask = self._mask[index]
            self._trim()

    def _trim(self) -> None:
        """Drop columns that are padding in every row, left behind by a longer row."""
        first = int(self._mask.any(0).long().argmax())
        layers = plain_layers(self._cache)
        if first and layers:
            self._mask = self._mask[:, first:]
            for layer in layers:
                layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]

    @torch.inference_mode()
    def absorb(self, other: DecodeBatch, *, most: int) -> bool:
        """Take over another batch's rows, if both have started and hold at most ``most`` rows together.

        Padding on the left does not move a row: positions are counted over its own tokens.
        """
        if self._cache is None or other._cache is None or len(self.rows) + len(other.rows) > most:
            return False
        ours, theirs = plain_layers(self._cache), plain_layers(other._cache)
        if not ours or not theirs:
            return False
        length = max(self._mask.shape[1], other._mask.shape[1])

        def widen(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            missing = length - tensor.shape[dim]
            return torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.dim() - 1 - dim), missing, 0))

        for mine, its in zip(ours, theirs, strict=True):
            mine.keys = torch.cat([widen(mine.keys, 2), widen(its.keys, 2)])
            mine.values = torch.cat([widen(mine.values, 2), widen(its.values, 2)])
        self._mask = torch.cat([widen(self._mask, 1), widen(other._mask, 1)])
        self.rows += other.rows
        other.rows = []
        return True
