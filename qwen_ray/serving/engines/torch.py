"""The embedded engine: a transformers model in this process, on a CPU or one GPU, adapters mixed in a batch.

Knows nothing of Ray or HTTP. One thread at a time may call it; :mod:`qwen_ray.serving.scheduler` puts a
thread and queues around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines import scoring
from qwen_ray.serving.engines.base import (
    ContinuationScore,
    GenerateRequest,
    GenerateResult,
    ScoreItem,
    ScoreResult,
    TokenEvent,
    prompt_item,
)
from qwen_ray.serving.engines.decode import DecodeBatch, DecodeRow, check_request
from qwen_ray.serving.engines.packing import ScoreBatch, check_item, plan, truncated
from qwen_ray.serving.engines.prefix import BLOCK, PrefixCache
from qwen_ray.serving.engines.prefix import DEFAULT_BYTES as PREFIX_BYTES
from qwen_ray.serving.engines.shared import check_lineage, eos_ids, listener
from qwen_ray.serving.lora_weights import LoraWeights, read_lora
from qwen_ray.serving.multilora import LoraLinear, MultiLora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwen_ray.serving.scheduler import Scheduler

log = logging.getLogger(__name__)

SCORE_TOKENS = 4096  # tokens of one scoring forward, padding counted
PREFILL_TOKENS = 8192
MAX_ROWS = 32  # sequences decoded together


class TorchEngine:
    """See :class:`qwen_ray.serving.engines.base.Engine` for the contract."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        id: str = "model",
        fingerprint: str = "",
        context_length: int | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        """Take over ``model``: it is put in eval mode and its linear layers are wrapped as adapters need it.

        Without a ``fingerprint`` adapters are not checked against the base they were trained on.
        ``prefix_bytes``: of the cache of prompts' beginnings, on the model's device; 0 for none, as a model
        whose weights change needs it.
        """
        self.model, self.tokenizer, self.id, self.fingerprint = model.eval(), tokenizer, id, fingerprint
        config = model.config
        self.context_length = int(context_length or getattr(config, "max_position_embeddings", None) or 2048)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.device = next(model.parameters()).device
        self.eos_ids = eos_ids(model, tokenizer)
        self.prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None
        self.lora = MultiLora(model, on_remove=self._forget)
        self._split = True
        self._share = _full_attention(config, self.context_length)
        self._probe()

    @classmethod
    def load(
        cls,
        ref: models.ModelRef,
        *,
        threads: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> TorchEngine:
        """Load a model and its tokenizer: in bfloat16 on a GPU where there is one, else float32 on the CPU.

        ``threads``: torch threads of this whole process.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        model = models.load_model(ref, dtype=dtype).to(device)
        return cls(
            model,
            models.load_tokenizer(ref),
            id=ref.id,
            fingerprint=models.fingerprint(ref),
            context_length=models.context_length(ref),
            prefix_bytes=prefix_bytes,
        )

    def queue(self, *, max_waiting_tokens: int | None = None) -> Scheduler:
        """A queue of its own, and the thread that works it off."""
        from qwen_ray.serving.scheduler import Scheduler

        return Scheduler(self, max_waiting_tokens=max_waiting_tokens)

    # -- adapters

    def read_adapter(self, folder: Path, *, within: Path | None = None) -> LoraWeights:
        """The slow part of :meth:`add_adapter`; touches the disk and not the model, so any thread may."""
        return read_lora(folder, within=within)

    def add_adapter(
        self, key: str, folder: Path | LoraWeights, *, within: Path | None = None, check: bool = True
    ) -> int:
        """Load a PEFT folder under ``key``; returns its size in bytes."""
        if isinstance(folder, LoraWeights):
            self.lora.add(key, folder)
        else:
            if check:
                self.check_lineage(folder)
            self.lora.add(key, self.read_adapter(folder, within=within))
        return self.lora.nbytes(key)

    def check_lineage(self, folder: Path) -> None:
        """:class:`UserError` (409) if the folder says that it was trained on another base model."""
        check_lineage(folder, self.id, self.fingerprint)

    def remove_adapter(self, key: str) -> None:
        self.lora.remove(key)

    def _forget(self, key: str) -> None:
        if self.prefixes is not None:
            self.prefixes.forget(key)

    # -- scoring

    def check_score(self, item: ScoreItem) -> None:
        """Raise :class:`UserError` for an item that cannot be scored."""
        check_item(item, vocabulary=self.vocabulary, context_length=self.context_length)
        self._check_adapter(item.adapter)

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """Log-probabilities of each item's continuations, in order. All items are checked first."""
        for item in items:
            self.check_score(item)
        results = self.blank_results(items)
        for batch in self.plan_score(items):
            self.run_score(batch, results)
        return results

    def blank_results(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """Results to be filled by :meth:`run_score`."""
        return [
            ScoreResult(
                [ContinuationScore([], True) for _ in item.continuations],
                truncated=truncated(item, context_length=self.context_length),
            )
            for item in items
        ]

    def plan_score(self, items: Sequence[ScoreItem], *, budget: int = SCORE_TOKENS) -> list[ScoreBatch]:
        """Cut checked items into forwards of at most ``budget`` tokens."""
        prefixes = self.prefixes
        return plan(
            items,
            context_length=self.context_length,
            budget=budget,
            share=self._share,
            known=None if prefixes is None else lambda *trunk: scoring.known(prefixes, *trunk).length,
        )

    def run_score(self, batch: ScoreBatch, results: list[ScoreResult]) -> None:
        """One forward; writes what it gives into ``results`` (indexed by item) once all of it is known."""
        scoring.run(self, batch, results)

    def prompt_logprobs(self, adapter: str | None, ids: Sequence[int], *, top: int = 0) -> ScoreResult:
        """Log-probabilities of ``ids[1:]`` given what precedes each, and of the token that would follow."""
        return self.score([prompt_item(adapter, ids, top=top)])[0]

    # -- generating

    def check_generate(self, request: GenerateRequest) -> None:
        """Raise :class:`UserError` for a request that cannot be generated from."""
        check_request(request, vocabulary=self.vocabulary, context_length=self.context_length)
        self._check_adapter(request.adapter)

    def generate(
        self, requests: Sequence[GenerateRequest], on_token: Callable[[int, TokenEvent], None] | None = None
    ) -> list[GenerateResult]:
        """Continue every prompt; ``on_token(i, event)`` is called as request ``i`` gets a token."""
        for request in requests:
            self.check_generate(request)
        rows = [DecodeRow(self, request, listener(i, on_token)) for i, request in enumerate(requests)]
        for group in self.group_rows(rows):
            batch = DecodeBatch(self, group)
            while batch.rows:
                batch.step()
        for row in rows:
            if row.error is not None:
                raise row.error
        return [row.result for row in rows]

    def group_rows(self, rows: Sequence[DecodeRow], *, most: int = MAX_ROWS) -> list[list[DecodeRow]]:
        """Rows of like prompt length in groups whose prefill stays within a token budget."""
        groups: list[list[DecodeRow]] = []
        for row in sorted(rows, key=lambda row: len(row.tokens), reverse=True):
            full = groups and (
                len(groups[-1]) >= most or (len(groups[-1]) + 1) * len(groups[-1][0].tokens) > PREFILL_TOKENS
            )
            if not groups or full:
                groups.append([])
            groups[-1].append(row)
        return groups

    def last_logits(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Any,
        adapters: Sequence[str | None],
    ) -> tuple[torch.Tensor, Any]:
        """Logits [B, V] (float32, CPU) after the last column of ``ids`` [B, T], and the grown cache."""
        inputs = {
            "position_ids": positions,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        with self.lora.select(adapters):
            if self._split:
                out = self.model.base_model(input_ids=ids, **inputs)
                rows = torch.arange(len(adapters), device=self.device)
                logits = self._head(out.last_hidden_state[:, -1], adapters, rows)
            else:
                out = self.model(input_ids=ids, logits_to_keep=1, **inputs)
                logits = out.logits[:, -1]
        return logits.float().cpu(), out.past_key_values

    # -- the model

    def _check_adapter(self, key: str | None) -> None:
        if key is not None and key not in self.lora:
            raise UserError(f"adapter '{key}' is not loaded", fix="add_adapter it first", status=404)

    def _hidden(
        self, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden states [B, T, H], None), or, if the head is more than a matrix, (_, logits [B, T, V]).

        ``cache``: what the rows have read before, which grows; None: nothing, and nothing is kept."""
        inputs = {
            "position_ids": positions,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if self._split:
            return self.model.base_model(input_ids=ids, **inputs).last_hidden_state, None
        return ids, self.model(input_ids=ids, **inputs).logits

    def _head(self, hidden: torch.Tensor, adapters: Sequence[str | None], rows: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of hidden states [N, H] taken from the given rows of the batch."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, LoraLinear):
            logits: torch.Tensor = head(hidden)
            return logits
        with self.lora.select(adapters, rows.unsqueeze(0)):
            return torch.as_tensor(head(hidden.unsqueeze(0)).squeeze(0))

    @torch.inference_mode()
    def _probe(self) -> None:
        """Find out, by trying, which shortcuts are exact for this architecture.

        Some models scale or cap the logits after the head; some take no block mask, ignore position ids or
        keep something else than keys and values.
        """
        limit = min(self.vocabulary, 50)
        length = min(2 * BLOCK + 5, self.context_length - 2)
        context, choices = (
            [(3 + i * i) % limit for i in range(length)],
            [[i % limit for i in c] for c in ((9, 4), (13, 6))],
        )
        plain = [
            self.model(torch.tensor([context + c], device=self.device)).logits[0].float() for c in choices
        ]
        want = [
            p[length - 1 : length + 1]
            .log_softmax(-1)
            .gather(1, torch.tensor([c], device=self.device).T)
            .sum()
            for p, c in zip(plain, choices, strict=True)
        ]
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.2

        def exact() -> bool:
            try:  # twice: the second finds what the first has read
                got = [self.score([ScoreItem(None, context, choices)])[0].continuations for _ in range(2)]
            except Exception as e:
                cached = self.prefixes is not None
                log.info("scoring with split=%s share=%s cache=%s: %r", self._split, self._share, cached, e)
                return False
            return all(
                abs(g.total - float(w)) < tolerance for row in got for g, w in zip(row, want, strict=True)
            )

        share, limit_bytes = self._share, 0 if self.prefixes is None else self.prefixes.max_bytes
        for self._split, self._share, cached in (
            *((split, share, share) for split in (True, False)),
            *((split, shared, False) for split in (True, False) for shared in (share, False)),
        ):
            self.prefixes = PrefixCache(limit_bytes) if cached and limit_bytes else None
            if exact():
                self.prefixes = None if self.prefixes is None else PrefixCache(limit_bytes)
                return
        raise UserError(
            f"{type(self.model).__name__} gives other results in a batch than alone, so it cannot be served",
            fix="use a decoder-only causal language model",
        )


def _full_attention(config: Any, context_length: int) -> bool:
    """Whether every layer sees the whole sequence; only then does one block mask serve them all."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return not (window and used and window < context_length)
