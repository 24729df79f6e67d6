"""Peak GPU memory of a training program, part by part, from what the program says it keeps.

A :class:`Program` describes what is kept, in which format, in how many shards. Nothing in it is fitted: each
number follows from the operations of the model and the documented behaviour of the program. The peak is the
largest of five moments:

- ``forward``: the last layer's forward pass: all kept activations, and what the layer makes on the side.
- ``head``: the forward pass is done and the head's backward has begun: all kept activations, the logits.
- ``layer``: the end of the backward pass: all gradients, one layer recomputed, its buffers.
- ``end``: all gradients, and what is exchanged of those outside of the layers.
- ``step``: the optimizer's update: all gradients and what the update makes on the side.

Sizes are in bytes, for one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_ray.planner.shapes import Shape

CONTEXT = 0.5e9
"""The CUDA context with kernels loaded as they are needed (the default since CUDA 12.2) and cuBLAS's
workspace (32 MiB on Hopper, 8 on others; pytorch.org/docs/stable/notes/cuda.html)."""
CONTEXT_EAGER = 1.3e9
"""Before that, all kernels were loaded at once: 1,343 MB in Hugging Face's "Model training anatomy"."""
COMMUNICATOR = 0.4e9
"""NCCL's buffers: 4 MiB (NCCL_BUFFSIZE) for each of up to 32 channels, in and out, and its own code."""


@dataclass(frozen=True)
class Saved:
    """What autograd keeps of one layer, in bytes for a token: so much for each element of the hidden
    state (``h``), queries (``q``), keys or values (``kv``), and inner MLP (``i``)."""

    h: float
    q: float
    kv: float
    i: float

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.h + other.h, self.q + other.q, self.kv + other.kv, self.i + other.i)

    def bytes(self, shape: Shape) -> float:
        return self.h * shape.hidden + self.q * shape.q + self.kv * shape.kv + self.i * shape.intermediate


# Of a Qwen2 block, operation by operation, with flash attention (arXiv 2205.14135: no score is kept); a test
# counts the same with autograd's hooks. Norm:
# the input in float32 (4) and, where its weight is trained, the normed value too. Projections that are
# trained: their input. Attention: rotated queries, keys, values, output (2 each). SwiGLU: gate, its SiLU,
# up (2 each), and the product if the down projection needs it.
FULL_BF16 = Saved(h=2 * (4 + 2) + 2 * 2, q=4, kv=4, i=8)
"""Every weight trained in bf16, no autocast, or autocast that has nothing to do."""
FULL_AUTOCAST = Saved(h=2 * (4 + 4) + 5 * 2, q=4, kv=4, i=8)
"""Float32 weights under autocast: a float32 residual stream, and a bf16 copy of its norm for each of q, k,
v, gate and up, as autocast remembers casts of weights only."""
LORA = Saved(h=2 * 4 + 5 * 2, q=4 + 2, kv=4, i=6 + 2)
"""A frozen base and an adapter everywhere: each of the seven projections keeps a bf16 copy of its input
(PEFT casts it to the adapter's format, autocast back)."""
LORA_DROPOUT = Saved(h=2 * 4 + 5 * 3, q=4 + 3, kv=4, i=6 + 3)
"""And the mask of its dropout, a byte an element."""
COMPILED = Saved(h=8, q=4, kv=4, i=6)
"""The first under torch.compile: what follows by elementwise operations from a kept value is computed again,
as its partitioner chooses (counted with torch 2.13)."""
COMPILED_AUTOCAST = Saved(h=10, q=4, kv=4, i=6)
"""The second, or an adapter, under torch.compile."""
COMPILED_DROPOUT = COMPILED_AUTOCAST + Saved(h=3 * 2 + 5, q=1, kv=0, i=1)
"""An adapter with dropout under torch.compile: the masks, and q, k, v, gate and up share no input now."""
DORA = Saved(h=2 * 4, q=4, kv=2 * 4, i=2 * 4)
"""What DoRA keeps beside its LoRA: of each of the seven outputs the base's and the adapter's part."""
DORA_COMPILED = DORA + Saved(h=3 * 2, q=0, kv=0, i=2)
"""The same under torch.compile (counted with torch 2.13). With dropout it keeps three inputs fewer, which is
left out of account."""


@dataclass(frozen=True)
class Program:
    """What a training program keeps. Formats are bytes an element; shards: the number of GPUs that share."""

    name: str
    trained: int
    """Weights that get gradients."""
    frozen: float = 0.0
    """Bytes of the frozen weights, all shards together."""
    weight: float = 2.0
    gradient: float = 2.0
    optimizer: float = 12.0
    """Optimizer state and master weights."""
    weight_shards: int = 1
    frozen_shards: int = 1
    gradient_shards: int = 1
    optimizer_shards: int = 1
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    gradients_on_host: bool = False
    gradients_stay: bool = True
    """Gradients exist while the head computes: of earlier micro-batches, or in buckets that persist."""
    step_in_backward: bool = False
    """Each weight is updated as soon as its gradient is there, which is then freed."""
    autocast: float = 0.0
    """Bytes of 16-bit copies of weights that autocast keeps until the end of the forward pass."""
    stream: float = 2.0
    """Of the residual stream, which is what checkpointing keeps of a layer."""
    saved: Saved = FULL_BF16
    kept_weights: float = 0.0
    """Bytes that a layer keeps of copies of its weights, however many tokens there are."""
    forward_buffers: float = 0.0
    """Bytes that a layer's forward pass makes on the side and frees."""
    checkpointing: bool = False
    offload: bool = False
    """Kept activations wait in host memory."""
    logits: float = 0.0
    """Bytes at the worst moment for each element of the whole logits ``[tokens, vocabulary]``."""
    logits_fixed: float = 0.0
    """Bytes of the logits of one chunk, where not all exist."""
    head: float = 0.0
    """Bytes of copies of the head's weight and of its gradient that exist beside the above."""
    gathered: float = 0.0
    """Bytes of gathered parameters outside of the layers, kept through the step."""
    layer_buffers: float = 0.0
    """Bytes gathered or exchanged around one layer's backward."""
    end_buffers: float = 0.0
    """Bytes exchanged at the end of the backward pass for what is outside of the layers."""
    buckets: float = 0.0
    """Bytes of communication buckets."""
    step: float = 0.0
    """Bytes of a weight's share that the update makes on the side; ``step_limit`` weights at a time."""
    step_limit: float = float("inf")
    context: float = CONTEXT
    communicator: float = 0.0
    host: float = field(default=0.0)
    """Bytes of host memory a GPU's process needs beside activations."""


PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "context")


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part, at the moment of the peak."""

    parts: dict[str, float]
    moment: str
    host: float = 0.0
    """Bytes of host memory for this GPU's process: offloaded state and activations."""
    moved: float = 0.0
    """Of these, activations: they go to the host and back in each forward pass."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def predict(shape: Shape, program: Program, tokens: int) -> Memory:
    """Peak memory with ``tokens`` (padding included) in a forward pass of one GPU."""
    p = program
    parameters = p.trained * p.weight / p.weight_shards * (not p.weights_on_host)
    frozen = p.frozen / p.frozen_shards * (not p.weights_on_host)
    optimizer = p.trained * p.optimizer / p.optimizer_shards * (not p.optimizer_on_host)
    gradients = p.trained * p.gradient / p.gradient_shards
    if p.step_in_backward or p.gradients_on_host:  # they leave as they are made
        gradients = 0.0
    base = {
        "parameters": parameters + frozen,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": 0.0,
        "logits": 0.0,
        "buffers": p.buckets + p.gathered,
        "context": p.context + p.communicator,
    }
    layer = p.saved.bytes(shape) * tokens + p.kept_weights
    inputs = p.stream * shape.hidden * tokens
    # What the backward pass of a layer makes: gradients of the three inner MLP values and of a norm.
    working = layer + (6 * shape.intermediate + 4 * shape.hidden) * tokens
    kept = shape.layers * (inputs if p.checkpointing else layer)
    on_gpu = 2 * (inputs if p.checkpointing else layer) if p.offload else kept
    hidden = 2 * inputs  # of the final norm: the head's input and its gradient
    forward = {
        **base,
        "gradients": gradients if p.gradients_stay else 0.0,
        "activations": on_gpu,
        "buffers": base["buffers"] + p.autocast + p.forward_buffers,
    }
    head = {
        **forward,
        "activations": on_gpu + hidden,
        "logits": p.logits * shape.vocabulary * tokens + p.logits_fixed,
        "buffers": base["buffers"] + p.autocast + p.head,
    }
    backward = {
        **base,
        "activations": working + inputs,
        "buffers": base["buffers"] + p.layer_buffers + (p.head if p.step_in_backward else 0.0),
    }
    if p.checkpointing:  # the layer's forward pass once more
        backward["buffers"] += p.forward_buffers
    end = {**base, "activations": inputs, "buffers": base["buffers"] + p.end_buffers}
    side = p.step * min(p.trained / p.optimizer_shards, p.step_limit) * (not p.optimizer_on_host)
    step = {**base, "buffers": base["buffers"] + side}
    moments = {"forward": forward, "head": head, "layer": backward, "end": end, "step": step}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    moved = kept if p.offload else 0.0
    return Memory(moments[moment], moment, p.host + moved, moved)
