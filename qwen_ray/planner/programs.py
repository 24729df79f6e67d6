"""Programs described for :mod:`qwen_ray.planner.memory`: our loop, and others with published peaks."""

from __future__ import annotations

from typing import Any

from qwen_ray.config import RunConfig
from qwen_ray.planner.memory import (
    COMMUNICATOR,
    COMPILED,
    COMPILED_AUTOCAST,
    COMPILED_DROPOUT,
    CONTEXT,
    CONTEXT_EAGER,
    DORA,
    DORA_COMPILED,
    FULL_AUTOCAST,
    FULL_BF16,
    LORA,
    LORA_DROPOUT,
    Program,
    Saved,
)
from qwen_ray.planner.shapes import Shape

LOGITS_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Float32 logits that exist at once in our loss. A GPU needs tall matrices to be busy, a CPU's caches short
ones."""
_BUCKET = 5e8
"""DeepSpeed's default reduce_bucket_size and allgather_bucket_size, in elements."""
_LIVE = 1e9
"""DeepSpeed's default stage3_max_live_parameters and sub_group_size, in elements."""
_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit formats; 256 scales share a second one."""


def four_bit(method_double: bool) -> float:
    """Bytes of a 4-bit weight with its scales (arXiv 2305.14314: 0.5 or, doubly quantised, 0.127 bit)."""
    scale = 1 / _BLOCK + 4 / (_BLOCK * 256) if method_double else 4 / _BLOCK
    return 0.5 + scale


def state_bytes(config: RunConfig) -> float:
    """Bytes of AdamW's two moments for one trained weight."""
    if config.optim.name == "adamw_8bit":
        return 2 + 2 * 4 / 256  # blocks of 256 with a float32 scale
    return 4.0 if config.precision == "pure_bf16" else 8.0


def ours(config: RunConfig, shape: Shape, workers: int) -> Program:
    """Our loop under ``config`` on ``workers`` GPUs. ``strategy.name`` must be decided."""
    strategy, compute, method = config.strategy, config.compute, config.method
    full = method.name == "full"
    narrow = 4.0 if config.precision == "fp32" else 2.0  # the compute format
    master = 2.0 if config.precision == "pure_bf16" else 4.0
    stage = strategy.zero_stage if strategy.name == "deepspeed" else 0
    frozen = 0.0
    if method.name == "lora":
        frozen = shape.parameters * narrow
    elif method.name == "qlora":
        frozen = shape.matrices * four_bit(method.double_quantization)
        frozen += (shape.parameters - shape.matrices) * narrow
    kept_weights = side = 0.0
    if not full and method.dora:
        # Only ddp leaves the adapter in the optimizer's format while it computes.
        kept_weights, side = dora_bytes(config, shape, master if strategy.name == "ddp" else narrow, narrow)
    common: dict[str, Any] = {
        "name": "qwen-ray",
        "trained": shape.parameters if full else shape.adapter(method),
        "frozen": frozen,
        "saved": _saved(config, master > narrow),
        "kept_weights": kept_weights,
        "forward_buffers": side,
        "checkpointing": compute.activation_checkpointing,
        "offload": compute.activation_offload,
        # The product, then its float32 softmax and 16-bit gradient. A head that is gathered for each forward
        # (stage 3) goes through autograd: log-softmax, its gradient and the logits', and a 16-bit copy.
        "logits_fixed": LOGITS_BYTES["cuda"] * (3.5 if stage == 3 else 1 + narrow / 4),
        "head": _head(config, shape, master, narrow),
        "context": CONTEXT,
        "communicator": COMMUNICATOR if workers > 1 else 0.0,
    }
    accumulates = config.optim.gradient_accumulation > 1
    if strategy.name == "deepspeed":
        return _zero(config, shape, workers, common)
    if strategy.name == "fsdp":
        # A layer's gathered parameters and the next layer's, the buffer they arrive in, and in the backward
        # pass the layer's gradients and their float32 copy on its way out.
        layer = shape.layer * (3 * narrow + ((narrow + 4) if full else 0.0))
        return Program(
            **common,
            weight=master,
            gradient=master,
            optimizer=state_bytes(config),
            weight_shards=workers,
            frozen_shards=workers,
            gradient_shards=workers,
            optimizer_shards=workers,
            gradients_stay=accumulates,
            gathered=(shape.outside if strategy.reshard_after_forward else shape.parameters) * narrow,
            layer_buffers=layer,
            end_buffers=shape.outside * (narrow + 4) if full else 0.0,
        )
    return Program(
        **common,
        weight=master,
        gradient=master,
        optimizer=state_bytes(config),
        gradients_stay=accumulates or workers > 1,  # as views of DDP's buckets they are never freed
        autocast=shape.matrices * narrow if full and narrow < master else 0.0,
        # Recomputing a layer casts its weights again, and its gradients are 16-bit before they are added up.
        layer_buffers=shape.layer * narrow * 2 if full and narrow < master else 0.0,
        stream=max(narrow, master) if full else narrow,
    )


def _saved(config: RunConfig, autocast: bool) -> Saved:
    method, compiled = config.method, config.compute.compile
    if method.name != "full":
        plain = LORA_DROPOUT if method.dropout else LORA
        if compiled:
            plain = COMPILED_DROPOUT if method.dropout else COMPILED_AUTOCAST
        if method.dora:
            plain += DORA_COMPILED if compiled else DORA
    elif config.strategy.name == "ddp" and autocast:
        plain = COMPILED_AUTOCAST if compiled else FULL_AUTOCAST
    else:
        plain = COMPILED if compiled else FULL_BF16
    return plain + plain if config.precision == "fp32" else plain


def dora_bytes(config: RunConfig, shape: Shape, master: float, narrow: float) -> tuple[float, float]:
    """What PEFT's DoRA makes of weights: bytes that a layer keeps, on average, and that it makes on the side.

    ``master``, ``narrow``: bytes of the adapter's format and of products.
    """
    method, chosen = config.method, shape.targets(config.method)
    # It works in the format of its input: the adapter's, or in a 4-bit layer that of products. Weights in
    # another format are copied, and with dropout autograd keeps the copy for a second product with the base.
    width = narrow if method.name == "qlora" else master
    copied = method.name == "qlora" or width > narrow
    kept = sum(n * a * b for (a, b), n in chosen.items()) * narrow * (copied and method.dropout > 0)
    # B A comes from an identity matrix [inputs, inputs]; then the norm of W + s B A: copies of each term.
    eye = master + (narrow if master > narrow else 0.0)
    side = max(
        max(eye * a * a + narrow * a * b, narrow * a * a + (3 + copied) * width * a * b) for a, b in chosen
    )
    return kept / shape.layers, side


def _head(config: RunConfig, shape: Shape, master: float, narrow: float) -> float:
    """Bytes of what the loss makes of a trained head: its copy in the compute format, its gradient."""
    if config.method.name != "full":
        return 0.0
    if config.strategy.name == "ddp":
        return shape.embedding * (master + (narrow if master > narrow else 0.0))
    if config.strategy.name == "deepspeed" and config.strategy.zero_stage == 3:
        return shape.embedding * narrow * 2  # a chunk's gradient and the sum so far
    return shape.embedding * narrow


def _zero(config: RunConfig, shape: Shape, n: int, common: dict[str, Any]) -> Program:
    strategy = config.strategy
    stage = strategy.zero_stage
    full = config.method.name == "full"
    trained = shape.parameters if full else shape.adapter(config.method)
    on_host = strategy.offload_optimizer != "none"
    # Float32 master weights and moments; the host's AdamW knows no 8-bit state.
    state = 12.0 if on_host or config.optim.name == "adamw" else 4 + 2 + 2 * 4 / 256
    weights_out = strategy.offload_parameters != "none"
    live = min(_LIVE, shape.parameters) * 2 if stage == 3 else 0.0
    # Gradients are float32 there.
    host = trained * (state + 4) / n * (strategy.offload_optimizer == "cpu")
    host += shape.parameters * 2 / n * (strategy.offload_parameters == "cpu")
    return Program(
        **common,
        weight=2,
        gradient=2,
        optimizer=state,
        weight_shards=n if stage == 3 else 1,
        frozen_shards=n if stage == 3 else 1,
        gradient_shards=n if stage >= 2 else 1,
        optimizer_shards=n,
        optimizer_on_host=on_host,
        weights_on_host=weights_out,
        gradients_on_host=on_host and stage > 1,
        gradients_stay=config.optim.gradient_accumulation > 1,
        gathered=live,
        # Two buckets, as communication overlaps with computation; in stage 3 one.
        buckets=_BUCKET * 2 * (1 if stage == 3 else 2),
        step=4 if stage == 3 else 6,
        step_limit=_LIVE if stage == 3 else float("inf"),
        host=host,
    )


# ---------------------------------------------------------------- other programs

WHOLE_FLOAT32 = 12.0
"""Cross-entropy over whole logits in transformers: at the start of the backward pass the float32 log-softmax
and two float32 gradients. (Its end of the forward pass is as high: bf16 logits, their shifted copy, the
log-softmax, and the float32 copy that accelerate makes of every output.)"""
WHOLE_FLOAT16 = 8.0
"""The same in a model that is float16 throughout: log-softmax, two gradients and the logits, 2 bytes each."""


def hf_deepspeed(
    shape: Shape, *, gpus: int, stage: int, bucket: float, context: float = CONTEXT, live: float = _LIVE
) -> Program:
    """Hugging Face's Trainer with DeepSpeed bf16 ZeRO, every weight trained, gradient checkpointing,
    gradient accumulation. ``bucket``: reduce_bucket_size, in elements."""
    return Program(
        name=f"transformers + DeepSpeed ZeRO-{stage}",
        trained=shape.parameters,
        weight=2,
        gradient=2,
        optimizer=12,
        weight_shards=gpus if stage == 3 else 1,
        gradient_shards=gpus if stage >= 2 else 1,
        optimizer_shards=gpus,
        checkpointing=True,
        logits=WHOLE_FLOAT32,
        # The head's gradient, whole before it is reduced, and in stage 3 its gathered weight.
        head=shape.embedding * (4 if stage == 3 else 2),
        gathered=min(live, shape.parameters) * 2 if stage == 3 else 0.0,
        buckets=bucket * 2 * (1 if stage == 3 else 2),
        step=4 if stage == 3 else 6,
        step_limit=_LIVE if stage == 3 else float("inf"),
        context=context,
        communicator=COMMUNICATOR,
    )


def hf_lora(shape: Shape, *, adapter: int) -> Program:
    """Hugging Face's Trainer, bf16 autocast, PEFT before 0.8 (an adapter in the base's bf16), gradient
    checkpointing, torch's AdamW in its foreach form, whose update makes a copy of a moment; CUDA 11."""
    return Program(
        name="transformers + PEFT",
        trained=adapter,
        frozen=shape.parameters * 2,
        optimizer=4,
        step=2,
        saved=LORA_DROPOUT,
        checkpointing=True,
        logits=WHOLE_FLOAT32,
        context=CONTEXT_EAGER,
    )


def hf_qlora_gptq(shape: Shape, *, adapter: int, group: int = 128) -> Program:
    """The same on a GPTQ 4-bit base under DeepSpeed float16 ZeRO-2 on one GPU. ``group`` weights share a
    float16 scale and a 4-bit zero. A layer's weights are expanded to float16 for its backward."""
    bits = 4 + (16 + 4) / group
    return Program(
        name="transformers + PEFT + GPTQ",
        trained=adapter,
        frozen=shape.matrices * bits / 8 + (shape.parameters - shape.matrices) * 2,
        optimizer=12,
        step=6,
        saved=LORA_DROPOUT,
        checkpointing=True,
        logits=WHOLE_FLOAT16,
        layer_buffers=shape.layer_matrices * 2,
        buckets=min(2e8, adapter) * 2 * 2,
        context=CONTEXT_EAGER,
    )


def torchtune(
    shape: Shape,
    *,
    tokens: int,
    adapter: int = 0,
    base: float = 2.0,
    compiled: bool = True,
    chunked: bool = True,
    checkpointing: bool = True,
    offload: bool = False,
    in_backward: bool = False,
    optimizer: float = 4.0,
) -> Program:
    """torchtune's single-device recipes, bf16 throughout, no gradient accumulation, fused AdamW; its peaks
    are of allocated tensors, so without a CUDA context.

    Its chunked loss computes all logits in bf16, in eight chunks, and frees each as its gradient is made
    (2 bytes an element and a chunk more); ``base``: bytes of a frozen matrix weight; ``optimizer``: bytes of
    the moments of a weight, 0 where paged out of the GPU's allocator. Keys and values are expanded to all
    heads before attention, rotations are in float32.
    """
    expanded = 4 * shape.q / shape.kv
    eager = Saved(h=2 * (4 + 2 + 2), q=4 + 2 + 2, kv=4 + expanded, i=8)
    fused = Saved(h=COMPILED.h, q=COMPILED.q, kv=expanded, i=COMPILED.i)
    frozen = shape.matrices * base + (shape.parameters - shape.matrices) * 2 if adapter else 0.0
    return Program(
        name="torchtune",
        trained=adapter or shape.parameters,
        frozen=frozen,
        optimizer=optimizer,
        gradients_stay=False,
        step_in_backward=in_backward,
        saved=fused if compiled else eager,
        checkpointing=checkpointing,
        offload=offload,
        logits=2.0 if chunked else WHOLE_FLOAT32,
        logits_fixed=2 * shape.vocabulary * tokens / 8 if chunked else 0.0,
        head=0.0 if adapter else shape.embedding * 2,
        context=0.0,
    )
