"""Time of an optimizer step: arithmetic, exchange between GPUs, the update, transfers to the host.

Arithmetic is counted in FLOPs a token and divided by the share of the peak that training reaches, taken from
published runs: an estimate, good to about a third. A forward pass is 2 FLOPs a weight and token; backward 2
for the inputs' gradients and 2 for the weights', which a frozen base does not need. So 6N for full training,
4N and 6 a weight of the adapter for LoRA, and 2N more to recompute the forward pass. Attention over T tokens
adds 2 T a layer and query element forward (causal), twice that backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.config import RunConfig
from qwen_ray.planner.hardware import Hardware
from qwen_ray.planner.shapes import Shape

EFFICIENCY: dict[str, tuple[float, float]] = {
    "ampere": (0.58, 0.50),
    "hopper": (0.42, 0.42),
}
"""FLOPs done (recomputed ones too) over peak: (full, LoRA). Ampere: Qwen2.5-14B full 45% without and 60% with
the recomputed (ms-swift), Llama3.2-3B full 57% and LoRA 51% (torchtune). Hopper, whose arithmetic outruns its
memory: Qwen2.5-7B LoRA 42.8% (NeMo Automodel), Llama3.1-8B full 33-39% before recomputation (torchtitan)."""
ASSUMED = (0.45, 0.40)
"""For other families, of which no run with known settings was found."""
BUS = 0.8
"""Share of a link's rate that a collective reaches."""
CPU_ADAM = 4.5e9
"""Weights a second that DeepSpeed's CPU-Adam updates on a node (ZeRO-Offload, arXiv 2101.06840, table 4)."""
HOST_CPUS = 16
"""Logical CPUs that a worker should have for it."""
NVME = 6e9
"""Bytes/s of a node's NVMe disks, in either direction."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, by part, and what follows from them."""

    compute: float
    exchange: float
    """Communication that computation does not hide."""
    update: float
    transfer: float
    """To and from the host: offloaded state and activations."""
    tokens: int
    """Of all GPUs in a step."""
    mfu: float
    """By the method's own rule (4N or 6N), without recomputation."""

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange + self.update + self.transfer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def flops(
    shape: Shape, length: float, *, adapter: int = 0, full: bool, recompute: bool
) -> tuple[float, float]:
    """FLOPs a token: (by the method's rule, done). ``length``: tokens that attend to each other."""
    attention = 2 * length * shape.layers * shape.q
    forward = 2 * shape.multiplied + attention
    needed = forward + (4 if full else 2) * shape.multiplied + 2 * attention + 6 * adapter
    # The head is not recomputed: its loss computes gradients at once.
    again = forward - 2 * shape.embedding if recompute else 0.0
    return needed, needed + again


def predict(
    config: RunConfig, shape: Shape, hardware: Hardware, *, kept: float = 0.0, length: int | None = None
) -> Speed:
    """A step of ``config`` (its strategy decided) on ``hardware``, its rows full.

    ``kept``: bytes of activations a GPU keeps in a forward pass, which activation offload moves twice.
    ``length``: of the documents in a row; without it the row's, which costs most.
    """
    optim, strategy, gpu = config.optim, config.strategy, hardware.gpu
    full, n = config.method.name == "full", hardware.gpus
    micro = optim.gradient_accumulation
    tokens = optim.batch_size * config.data.max_length  # one GPU's in a forward pass
    adapter = 0 if full else shape.adapter(config.method)
    trained = shape.parameters if full else adapter
    needed, done = flops(
        shape,
        length or config.data.max_length,
        adapter=adapter,
        full=full,
        recompute=config.compute.activation_checkpointing,
    )
    share = EFFICIENCY.get(gpu.family, ASSUMED)[0 if full else 1]
    peak = gpu.flops / (15 if config.precision == "fp32" else 1)  # no tensor cores
    compute = micro * tokens * done / (peak * share)
    if config.method.name == "qlora":
        # Each pass reads 4 bits and writes and reads 2 bytes of every weight it expands.
        passes = 3 if config.compute.activation_checkpointing else 2
        compute += micro * passes * shape.matrices * 4.5 / gpu.bandwidth
    hidden, open_ = exchanged_bytes(config, shape, trained, n)
    rate = hardware.collective * BUS
    exchange = max(0.0, hidden / rate - compute) + open_ / rate
    shards = n if strategy.name != "ddp" else 1
    on_host = strategy.offload_optimizer != "none"
    update = 0.0 if on_host else trained / shards * 28 / gpu.bandwidth
    transfer = 0.0
    if on_host:
        update = trained / hardware.nodes / CPU_ADAM
        # Gradients are added up on the host: each micro-batch's go there, to the sum so far; then 16-bit
        # weights come back.
        transfer += trained / n * (4 * micro + 2) / gpu.host
        if strategy.offload_optimizer == "nvme":
            transfer += trained / hardware.nodes * 12 * 2 / NVME
    if strategy.offload_parameters != "none":
        moved = micro * 2 * shape.parameters * 2 / n
        rate_in = gpu.host if strategy.offload_parameters == "cpu" else NVME / hardware.gpus_per_node
        transfer += moved / rate_in
    if config.compute.activation_offload:
        transfer += micro * 2 * kept / gpu.host
    speed = Speed(compute, exchange, update, transfer, micro * tokens * n, 0.0)
    mfu = needed * speed.tokens_per_second / n / gpu.flops
    return Speed(compute, exchange, update, transfer, speed.tokens, mfu)


def exchanged_bytes(config: RunConfig, shape: Shape, trained: int, n: int) -> tuple[float, float]:
    """Bytes that a GPU sends in a step: (while computing, after it). Rings: (n - 1) / n of each tensor."""
    if n == 1:
        return 0.0, 0.0
    strategy, micro, ring = config.strategy, config.optim.gradient_accumulation, (n - 1) / n
    full = config.method.name == "full"
    if strategy.name == "fsdp":
        gathers = 2 if strategy.reshard_after_forward else 1
        gradients = trained * 4 * (micro if full else 1)
        return ring * (micro * gathers * shape.parameters * 2 + gradients), 0.0
    if strategy.name == "deepspeed":
        if strategy.zero_stage == 3:
            return ring * micro * (2 * shape.parameters * 2 + trained * 2), 0.0
        reduced = trained * 2 * (micro if strategy.zero_stage == 2 else 1)
        return ring * reduced, ring * trained * 2
    width = 2 if config.precision == "pure_bf16" else 4
    return 2 * ring * trained * width, 0.0
