"""Tokens a second and model FLOPs utilisation (MFU) of a training step.

MFU is the FLOPs that the method needs over what the GPUs could do at their peak (arXiv 2204.02311, appendix
B). Recomputed layers are not needed: they count in HFU (hardware utilisation) only. Padding counts in
neither. Two rules are in use for an adapter over a frozen base, so both are printed: 4N, forward and the
gradient of activations, plus 6 a weight of the adapter; and 6N, as if every weight were trained. For full
training 6N is the rule and 4N is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen_ray.config import MethodConfig
from qwen_ray.planner import speed
from qwen_ray.planner.shapes import Shape, from_config

Rule = Literal["4n", "6n"]


@dataclass(frozen=True)
class Flops:
    """What a model's arithmetic costs, from its shape: weights, and FLOPs a token."""

    embedding: int
    """Weights that are looked up, not multiplied; of a tied model they are the head's."""
    matrices: int
    """Weights of the layers' linear maps."""
    head: int
    """Weights of the output projection, multiplied whether tied or not."""
    adapter: int
    """Trained weights of the adapter; 0 for full training."""
    full: bool
    """Every weight is trained."""
    attention: float
    """Forward FLOPs a token for one token of document length: scores and values, causal."""
    shape: Shape

    @classmethod
    def of(cls, config: Mapping[str, Any], method: MethodConfig) -> Flops:
        """From a config.json (:func:`qwen_ray.models.model_config`); UserError if the model is not known."""
        shape = from_config(config)
        full = method.name == "full"
        return cls(
            embedding=shape.embedding,
            matrices=shape.matrices,
            head=shape.embedding,
            adapter=0 if full else shape.adapter(method),
            full=full,
            attention=2.0 * shape.layers * shape.q,
            shape=shape,
        )

    def forward(self, length: float) -> float:
        """FLOPs of a token's forward pass where a token's document has ``length`` tokens."""
        return 2.0 * (self.matrices + self.head + self.adapter) + self.attention * length

    def needed(self, length: float, rule: Rule) -> float:
        """FLOPs a token of a training step by ``rule``."""
        return speed.flops(self.shape, length, adapter=self.adapter, full=rule == "6n", recompute=False)[0]

    def done(self, length: float, *, recompute: bool) -> float:
        """FLOPs a token that the GPU really does, recomputed layers included: what HFU counts."""
        return speed.flops(self.shape, length, adapter=self.adapter, full=self.full, recompute=recompute)[1]


def mfu(tokens_per_second: float, flops: Flops, *, length: float, peak: float, rule: Rule) -> float:
    """Share of ``peak`` FLOP/s, all GPUs together, that the needed FLOPs of non-padding tokens make."""
    return tokens_per_second * flops.needed(length, rule) / peak


def hfu(tokens_per_second: float, flops: Flops, *, length: float, peak: float, recompute: bool) -> float:
    """Share of ``peak`` that the FLOPs done make; equals the method's own MFU without recomputation."""
    return tokens_per_second * flops.done(length, recompute=recompute) / peak


@dataclass(frozen=True)
class Meter:
    """Turns what a step did into metrics. Counts are of all workers."""

    flops: Flops | None = None
    """None: no MFU (an architecture whose FLOPs are not known)."""
    peak: float | None = None
    """FLOP/s of all GPUs together; None: no MFU."""

    def step(
        self, seconds: float, *, padded: int, tokens: int, supervised: int, length: float
    ) -> dict[str, float]:
        """Rates of one step: ``padded`` counts every token computed, ``tokens`` all but padding.

        ``length`` is the document length that a token sees on average: sum of squares over sum
        (:func:`attended_length`).
        """
        metrics = {
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "padded_tokens_per_second": padded / seconds,
        }
        if self.flops is not None and self.peak is not None:
            rules: tuple[Rule, ...] = ("6n",) if self.flops.full else ("4n", "6n")
            for rule in rules:
                metrics[f"mfu_{rule}"] = mfu(
                    tokens / seconds, self.flops, length=length, peak=self.peak, rule=rule
                )
        return metrics


def attended_length(lengths: Iterable[int]) -> float:
    """Mean over tokens of the length of their document, from documents' lengths: squares over sum."""
    total = squares = 0
    for length in lengths:
        total += length
        squares += length * length
    return squares / total if total else 0.0
