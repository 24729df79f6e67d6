"""The embedded engine: a transformers model in this process, on a CPU or one GPU, adapters mixed in a batch.

Knows nothing of Ray or HTTP. One thread at a time may call it; :mod:`qwen_ray.serving.scheduler` puts a
thread and queues around it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import (
    ContinuationScore,
    GenerateRequest,
    GenerateResult,
    ScoreItem,
    ScoreResult,
    TokenEvent,
)
from qwen_ray.serving.engines.decode import DecodeBatch, DecodeRow, check_request
from qwen_ray.serving.engines.packing import NEXT, ScoreBatch, Want, check_item, plan, tensors, truncated
from qwen_ray.serving.lora_weights import LoraWeights, read_lora
from qwen_ray.serving.multilora import LoraLinear, MultiLora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_LOGITS_AT_ONCE = 2**24  # float32 values, 64 MiB: a 152k vocabulary times a long prompt would be gigabytes
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
    ) -> None:
        """Take over ``model``: it is put in eval mode and its linear layers are wrapped as adapters need it.

        Without a ``fingerprint`` adapters are not checked against the base they were trained on.
        """
        self.model, self.tokenizer, self.id, self.fingerprint = model.eval(), tokenizer, id, fingerprint
        config = model.config
        self.context_length = int(context_length or getattr(config, "max_position_embeddings", None) or 2048)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.device = next(model.parameters()).device
        self.eos_ids = _eos_ids(model, tokenizer)
        self.lora = MultiLora(model)
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
        )

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
        from qwen_ray.fsio import read_json
        from qwen_ray.registry import LINEAGE

        path = folder / LINEAGE
        base = read_json(path).get("base") or {} if path.is_file() else {}
        trained_on = base.get("fingerprint")
        if trained_on and self.fingerprint and trained_on != self.fingerprint:
            raise UserError(
                f"the adapter was trained on {base.get('id', 'another model')} ({trained_on[:12]}), "
                f"this server runs {self.id} ({self.fingerprint[:12]})",
                where=str(folder),
                fix="serve it on its own base model, or train it again on this one",
                status=409,
            )

    def remove_adapter(self, key: str) -> None:
        self.lora.remove(key)

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
        return plan(items, context_length=self.context_length, budget=budget, share=self._share)

    @torch.inference_mode()
    def run_score(self, batch: ScoreBatch, results: list[ScoreResult]) -> None:
        """One forward; writes what it gives into ``results`` (indexed by item) once all of it is known."""
        ids, positions, mask = tensors(batch, self.device)
        adapters = [row.adapter for row in batch.rows]
        wants = [(r, want) for r, row in enumerate(batch.rows) for want in row.wants]
        found: list[tuple[Want, float, bool, list[tuple[int, float]]]] = []
        top = max(row.top for row in batch.rows)
        step = max(1, _LOGITS_AT_ONCE // self.vocabulary)
        with self.lora.select(adapters):
            hidden, logits = self._hidden(ids, positions, mask)
        for start in range(0, len(wants), step):
            part = wants[start : start + step]
            rows = torch.tensor([r for r, _ in part], device=self.device)
            at = torch.tensor([want.position for _, want in part], device=self.device)
            values = self._head(hidden[rows, at], adapters, rows) if logits is None else logits[rows, at]
            found.extend(_read_out(values, [w for _, w in part], [batch.rows[r].top for r, _ in part], top))
        for want, logprob, greedy, alternatives in found:
            if want.target == NEXT:
                results[want.item].next_token = alternatives
                continue
            score = results[want.item].continuations[want.continuation]
            score.logprobs.append(logprob)
            score.greedy = score.greedy and greedy
            if alternatives:
                score.top.append(alternatives)

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
        rows = [DecodeRow(self, request, _listener(i, on_token)) for i, request in enumerate(requests)]
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
        self, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden states [B, T, H], None), or, if the head is more than a matrix, (_, logits [B, T, V])."""
        inputs = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
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

        Some models scale or cap the logits after the head; some take no block mask or ignore position ids.
        """
        limit = min(self.vocabulary, 50)
        context, choices = (
            [i % limit for i in (3, 7, 11, 2, 5)],
            [[i % limit for i in c] for c in ((9, 4), (13, 6))],
        )
        plain = [
            self.model(torch.tensor([context + c], device=self.device)).logits[0].float() for c in choices
        ]
        want = [
            p[4:6].log_softmax(-1).gather(1, torch.tensor([c], device=self.device).T).sum()
            for p, c in zip(plain, choices, strict=True)
        ]
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.2

        def exact() -> bool:
            try:
                got = self.score([ScoreItem(None, context, choices)])[0].continuations
            except Exception as e:
                log.info("scoring with split=%s share=%s: %r", self._split, self._share, e)
                return False
            return all(abs(g.total - float(w)) < tolerance for g, w in zip(got, want, strict=True))

        share = self._share
        for self._split, self._share in ((True, share), (True, False), (False, share), (False, False)):
            if exact():
                return
        raise UserError(
            f"{type(self.model).__name__} gives other results in a batch than alone, so it cannot be served",
            fix="use a decoder-only causal language model",
        )


def prompt_item(
    adapter: str | None, ids: Sequence[int], *, top: int = 0, prefix: Sequence[int] = ()
) -> ScoreItem:
    """The item that asks for the log-probabilities of a whole prompt and of the token after it.

    ``prefix``: what the model reads before, whose log-probabilities are not wanted."""
    rest = (tuple(ids[1:]),) if len(ids) > 1 else ()
    return ScoreItem(adapter, (*prefix, *ids[:1]), rest, top=top, next_token=True)


def _read_out(
    logits: torch.Tensor, wants: Sequence[Want], tops: Sequence[int], top: int
) -> list[tuple[Want, float, bool, list[tuple[int, float]]]]:
    """(want, log-probability, was it the likeliest, alternatives) for logits [N, V].

    Token and alternatives come from the same tensor, so the likeliest token's two figures are the same
    bits: lm-eval's client tests them for equality.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    targets = torch.tensor([max(want.target, 0) for want in wants], device=logits.device)
    own = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
    if any(map(math.isnan, own)):
        raise FloatingPointError("the model's output is not a number")
    best = logprobs.argmax(-1).tolist()
    needs = max(top, 1 if any(want.target == NEXT for want in wants) else 0)
    values: list[list[float]] = [[]] * len(wants)
    ids: list[list[int]] = [[]] * len(wants)
    if needs:
        k = min(needs, logprobs.shape[-1])
        top_values, top_ids = logprobs.topk(k, dim=-1)
        values, ids = top_values.tolist(), top_ids.tolist()
    out = []
    for i, want in enumerate(wants):
        k = max(tops[i], 1 if want.target == NEXT else 0)
        alternatives = list(zip(ids[i][:k], values[i][:k], strict=True))
        out.append((want, own[i], best[i] == want.target, alternatives))
    return out


def _listener(
    index: int, on_token: Callable[[int, TokenEvent], None] | None
) -> Callable[[TokenEvent], None] | None:
    if on_token is None:
        return None
    return lambda event: on_token(index, event)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a generation: what the model's generation config says, else the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return frozenset()
    return frozenset([configured] if isinstance(configured, int) else configured)


def _full_attention(config: Any, context_length: int) -> bool:
    """Whether every layer sees the whole sequence; only then does one block mask serve them all."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return all(kind == "full_attention" for kind in kinds)
    window = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    return not (window and used and window < context_length)
