"""Attention over isolated documents laid end to end, as an implementation that transformers' models call.

A micro-batch is one sequence ``[1, T]`` without padding. A token attends to itself and to earlier tokens of
its own document only, so a document gives the same values whatever its neighbours are. Three kinds:

- ``varlen``: torch's variable-length flash kernel (arXiv 2307.08691). GPU, bf16 or fp16.
- ``documents``: documents of similar length are padded to the longest of their group and run as a batch of
  plain causal attention: a causal query never sees padding on its right, so no mask is needed. Any device.
- ``block_mask``: one ``[T, T]`` mask. Quadratic in T; the reference.

Sliding windows (``sliding_window`` of a layer) are honoured by all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F

from qwen_ray.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "qwen_ray_documents"
"""The name under which transformers knows this implementation (``attn_implementation``)."""

Kind = Literal["varlen", "documents", "block_mask"]

_CALL_COST = {"cpu": 2048, "cuda": 65536}
"""What one more call costs, in attention scores computed in that time: how much padding it is worth."""
_LONGEST_STEP = 512
"""``longest`` only sizes the kernel's grid; rounded up, a compiled layer sees few values of it."""


class Packed(Protocol):
    """What is needed of a batch: where its documents lie."""

    @property
    def offsets(self) -> torch.Tensor:
        """int32 ``[D + 1]``: document i is tokens offsets[i] to offsets[i + 1]."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The same on the host: tokens of each document."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of a micro-batch lie, made once and read by every layer."""

    kind: Kind
    offsets: torch.Tensor
    """int32 ``[D + 1]``, on the model's device."""
    lengths: tuple[int, ...]
    longest: int
    """At least the longest document's tokens."""
    mask: torch.Tensor
    """bool ``[1, 1, T, T]`` for ``block_mask``. Else empty, and only tells the model to make none."""
    gather: torch.Tensor | None = None
    """``documents``: int64 ``[P]``, the token at each place of the padded groups. None: nothing is padded."""
    scatter: torch.Tensor | None = None
    """``documents``: int64 ``[T]``, each token's place in the padded groups."""
    groups: tuple[tuple[int, int], ...] = ()
    """``documents``: (documents, padded length) of each group."""

    @classmethod
    def of(cls, batch: Packed, kind: Kind) -> Documents:
        """Prepare ``batch`` for one kind of attention. Indices are made on the host, without a sync."""
        offsets, lengths = batch.offsets, tuple(batch.lengths)
        device = offsets.device
        longest = -(-max(lengths) // _LONGEST_STEP) * _LONGEST_STEP
        if kind == "block_mask":
            return cls(kind, offsets, lengths, longest, _block_mask(lengths, device))
        mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
        if kind == "varlen":
            return cls(kind, offsets, lengths, longest, mask)
        members = _group(lengths, _CALL_COST.get(device.type, _CALL_COST["cuda"]))
        if all(len(group) == 1 for group in members):
            return cls(kind, offsets, lengths, longest, mask)
        gather, scatter = _indices(lengths, members)
        return cls(
            kind,
            offsets,
            lengths,
            longest,
            mask,
            gather=gather.to(device, non_blocking=True),
            scatter=scatter.to(device, non_blocking=True),
            groups=tuple((len(group), lengths[group[-1]]) for group in members),
        )

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's forward. The 4-D mask keeps transformers from making its own."""
        return {"documents": self, "attention_mask": self.mask}


def register() -> str:
    """Make the implementation known to transformers (as often as one likes); returns its name.

    Without documents in a call (generation, evaluation) it is transformers' own ``sdpa``, masks included.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def use(model: PreTrainedModel) -> None:
    """Let ``model`` (also under PEFT) attend through this module."""
    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation(register())


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Kind:
    """Turn ``compute.attention`` into a kind for matrix products in ``dtype`` on ``device``.

    Raises :class:`UserError` for ``varlen`` where its kernel does not run.
    """
    reason = _varlen_obstacle(device, dtype)
    if name == "auto":
        return "documents" if reason else "varlen"
    if name not in get_args(Kind):
        raise UserError(
            f"unknown attention '{name}'",
            where="compute.attention",
            fix=did_you_mean(name, ["auto", *get_args(Kind)]),
        )
    if name == "varlen" and reason:
        raise UserError(
            f"varlen attention cannot run here: {reason}",
            where="compute.attention",
            fix="use auto or documents",
        )
    kind: Kind = name  # type: ignore[assignment]
    return kind


def _varlen_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"it needs a GPU, and the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, and the precision is {str(dtype).removeprefix('torch.')}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the flash kernel needs compute capability 8.0 (Ampere) or newer"
    return ""


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query ``[1, H, T, D]``, key and value ``[1, K, T, D]``, K divides H.

    Returns ``[1, T, H, D]``. Raises :class:`UserError` for what the kernels lack: soft-capped scores,
    attention sinks, and dropout on the scores with ``varlen``.
    """
    if documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UserError(
                f"this model's attention uses {name}, which packed training does not support",
                where="model.name",
                fix="choose a Qwen2, Qwen3, Llama or Mistral model",
            )
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in float32 when the residual stream is.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if documents.kind == "varlen":
        if dropout:
            raise UserError(
                "the model drops attention scores, which varlen attention cannot",
                where="compute.attention",
                fix="use documents",
            )
        out = _varlen(query, key, value, documents=documents, scaling=scaling, window=sliding_window)
        return out, None
    out = _eager(
        query, key, value, documents=documents, dropout=dropout, scaling=scaling, window=sliding_window
    )
    return out, None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    documents: Documents,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        documents.offsets,
        documents.offsets,
        documents.longest,
        documents.longest,
        scale=scaling,
        # A window of W tokens counts the query's own. (-1, 0) is plain causal.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)  # without return_aux
    return out[None]


@torch.compiler.disable  # the shapes of a batch's groups never repeat: compiling them would not end
def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """``documents`` and ``block_mask``."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        length = q.shape[2]
        if window is not None and window < length:
            near = _near(length, window, q.device)
            mask = near if mask is None else mask & near
        gqa = q.shape[1] != k.shape[1]
        if gqa and _repeats_keys(q.device, q.dtype, masked=mask is not None):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            gqa = False
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )

    if documents.kind == "block_mask":
        return attend(query, key, value, documents.mask).transpose(1, 2)
    if documents.gather is None or documents.scatter is None:
        # split, not slices: its backward is one concatenation, a slice's is a zero tensor of full length.
        parts = (x.split(documents.lengths, dim=2) for x in (query, key, value))
        return torch.cat([attend(q, k, v).transpose(1, 2) for q, k, v in zip(*parts, strict=True)], dim=1)

    sizes = [count * length for count, length in documents.groups]
    padded = [
        x[0].transpose(0, 1).index_select(0, documents.gather).split(sizes) for x in (query, key, value)
    ]
    outs = []
    for (count, length), *tensors in zip(documents.groups, *padded, strict=True):
        q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in tensors)
        outs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, documents.scatter)[None]


def _repeats_keys(device: torch.device, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether each head of queries must be given keys of its own.

    On a GPU only the flash kernel shares keys between heads; the others would fall back to plain maths.
    """
    return device.type == "cuda" and (masked or bool(_varlen_obstacle(device, dtype)))


def _near(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool ``[length, length]``: causal, and no further back than ``window`` tokens with the query's own."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < window)


def _block_mask(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    counts = torch.tensor(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), counts).to(device)
    causal = torch.ones(len(document), len(document), dtype=torch.bool, device=device).tril()
    return ((document[:, None] == document[None, :]) & causal)[None, None]


def _group(lengths: Sequence[int], call_cost: int) -> list[list[int]]:
    """Documents by rising length, cut into groups where padding would cost more than the calls it saves."""
    groups: list[list[int]] = []
    exact = 0  # scores of the current group without padding
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        scores = lengths[i] ** 2
        padded = scores * (len(groups[-1]) + 1) if groups else 0
        if groups and padded - (exact + scores) <= call_cost * len(groups[-1]):
            groups[-1].append(i)
            exact += scores
        else:
            groups.append([i])
            exact = scores
    return groups


def _indices(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(gather, scatter) between tokens in order and padded groups; padding repeats the last token."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    gather, scatter, base = [], torch.empty(int(sizes.sum()), dtype=torch.long), 0
    for group in groups:
        members = torch.tensor(group)
        longest = lengths[group[-1]]
        at = torch.arange(longest)
        token = starts[members, None] + torch.minimum(at, sizes[members, None] - 1)
        gather.append(token.flatten())
        real = at < sizes[members, None]
        scatter[token[real]] = (base + torch.arange(len(group) * longest).view(len(group), longest))[real]
        base += len(group) * longest
    return torch.cat(gather), scatter
