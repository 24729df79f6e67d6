"""The shape of a decoder-only model: how many weights it has and where. No weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_ray.combinations import HEAD, layers_named, tied_head
from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of a model as its config.json gives them; counts are of weights (not bytes)."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """The output head is the embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Qwen3: a norm over each head's queries and keys."""
    fused_qkv: bool = False
    """Qwen (1): queries, keys and values are one matrix."""
    context: int = 32768
    """The longest sequence the model was made for, in tokens."""

    @property
    def qwen2(self) -> dict[str, Any]:
        """The settings that a Qwen2 model of these sizes has in its config.json."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }

    @property
    def q(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys (and of the values) of all heads."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer of a block, by its name in the block."""
        h, i = self.hidden, self.intermediate
        if self.fused_qkv:
            attention = {"attn.c_attn": (h, self.q + 2 * self.kv), "attn.c_proj": (self.q, h)}
            return {**attention, "mlp.w1": (h, i), "mlp.w2": (h, i), "mlp.c_proj": (i, h)}
        return {
            "self_attn.q_proj": (h, self.q),
            "self_attn.k_proj": (h, self.kv),
            "self_attn.v_proj": (h, self.kv),
            "self_attn.o_proj": (self.q, h),
            "mlp.gate_proj": (h, i),
            "mlp.up_proj": (h, i),
            "mlp.down_proj": (i, h),
        }

    @property
    def layer_matrices(self) -> int:
        """Weights of a block's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer(self) -> int:
        """Weights of a block."""
        small = 2 * self.hidden
        small += (self.q + 2 * self.kv) * self.qkv_bias + self.hidden * self.o_bias
        small += (2 * self.intermediate + self.hidden) * self.mlp_bias + 2 * self.head_dim * self.qk_norm
        return self.layer_matrices + small

    @property
    def matrices(self) -> int:
        """Weights of all blocks' matrices: what QLoRA quantises."""
        return self.layers * self.layer_matrices

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the head has as many."""
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Weights outside of the blocks: embedding, final norm, and the head unless it is tied."""
        return self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        return self.layers * self.layer + self.outside

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with: the matrices and the head."""
        return self.matrices + self.embedding

    def targets(self, method: MethodConfig) -> dict[tuple[int, int], int]:
        """The linear layers that ``method`` puts an adapter on: how many of each (inputs, outputs).

        Raises :class:`UserError` for names that training refuses too.
        """
        sizes = self.linears
        if method.targets == "all-linear":
            return dict(Counter(list(sizes.values()) * self.layers))
        blocks = "transformer.h" if self.fused_qkv else "model.layers"
        names = {f"{blocks}.{i}.{name}": sizes[name] for i in range(self.layers) for name in sizes}
        names[HEAD] = (self.hidden, self.vocabulary)
        qv = ["c_attn"] if self.fused_qkv else ["q_proj", "v_proj"]
        wanted = qv if method.targets == "qv" else method.targets
        found = {name for target in wanted for name in layers_named(target, list(names))}
        if HEAD in found and self.tied:
            raise tied_head(HEAD)
        return dict(Counter(names[name] for name in found))

    def adapter(self, method: MethodConfig) -> int:
        """Weights of a LoRA adapter: r (inputs + outputs) a layer, with DoRA also its outputs."""
        chosen = self.targets(method).items()
        return sum(n * (method.r * (a + b) + (b if method.dora else 0)) for (a, b), n in chosen)


def _qwen25(size: str, sizes: tuple[int, int, int, int, int], *, large: bool) -> Shape:
    hidden, intermediate, layers, heads, kv_heads = sizes
    return Shape(
        name=f"Qwen2.5-{size}",
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocabulary=152064 if large else 151936,
        tied=not large,
        qkv_bias=True,
        context=131072 if large else 32768,
    )


QWEN25 = {
    "0.5b": _qwen25("0.5B", (896, 4864, 24, 14, 2), large=False),
    "1.5b": _qwen25("1.5B", (1536, 8960, 28, 12, 2), large=False),
    "3b": _qwen25("3B", (2048, 11008, 36, 16, 2), large=False),
    "7b": _qwen25("7B", (3584, 18944, 28, 28, 4), large=True),
    "14b": _qwen25("14B", (5120, 13824, 48, 40, 8), large=True),
    "32b": _qwen25("32B", (5120, 27648, 64, 40, 8), large=True),
}
"""Qwen2.5's published shapes (config.json of each model; arXiv 2412.15115, table 1), by alias."""

_KNOWN = ("qwen2", "qwen3", "llama", "mistral", "qwen")


def shape_of(name: str) -> Shape:
    """The shape of a model named as in ``model.name``. Qwen2.5's aliases need no download."""
    alias = name.removesuffix("-instruct")
    if alias in QWEN25:
        return QWEN25[alias]
    from qwen_ray import models

    ref = models.resolve(name)
    for size, shape in QWEN25.items():
        if ref.location.removesuffix("-Instruct") == models.HUB_ALIASES[size]:
            return shape
    return from_config(models.model_config(ref), name=ref.id)


def from_config(config: Mapping[str, Any], *, name: str = "") -> Shape:
    """The shape that a config.json describes. Raises :class:`UserError` for an architecture not known."""
    kind = str(config.get("model_type", ""))
    if kind not in _KNOWN:
        raise UserError(
            f"the planner does not know models of type '{kind}'",
            where="model.name",
            fix=f"it knows {', '.join(_KNOWN)}; name strategy and batch size yourself",
        )
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        # The first Qwen counts the two halves of its gated layer together.
        intermediate = int(config["intermediate_size"]) // (2 if kind == "qwen" else 1)
        bias = bool(config.get("attention_bias", False))
        return Shape(
            name=name or str(config.get("_name_or_path") or kind),
            hidden=hidden,
            intermediate=intermediate,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config.get("kv_channels") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind in {"qwen2", "qwen"} or bias,
            o_bias=bias and kind != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
            qk_norm=kind == "qwen3",
            fused_qkv=kind == "qwen",
            context=int(config.get("max_position_embeddings") or 2048),
        )
    except KeyError as e:
        where = name or "model.name"
        raise UserError(f"config.json lacks {e}", where=where, fix="use the model's own") from e
