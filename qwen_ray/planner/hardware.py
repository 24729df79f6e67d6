"""GPUs and how they are joined: memory, speed, links and typical prices.

Sources: the makers' data sheets (dense bf16 with float32 accumulation, no sparsity; memory bandwidth; NVLink
and PCIe in one direction). Memory is what CUDA reports as total, a little under the name's figure. Prices
are typical on-demand prices of one GPU in a cloud, in US dollars an hour, as listed in 2025; they differ by
a factor of two and fall, so ``price`` should be set. Network: 8 ports of 400 Gb/s for a node of 8 H100 or
later, of 200 Gb/s for A100 80 GB, else a usual 100 Gb/s a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qwen_ray.errors import UserError, did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU. Bytes, FLOP/s, bytes/s, $/h."""

    name: str
    memory: int
    flops: float
    """Peak dense bf16."""
    bandwidth: float
    """Of its memory."""
    link: float
    """To other GPUs of the node, one direction."""
    network: float
    """To other nodes, its share of the node's ports."""
    host: float
    """To host memory."""
    host_memory: int
    """Its share of a node's memory, as nodes are usually sold."""
    price: float
    family: str


# Dense bf16 FLOP/s with float32 accumulation, by a part of the name that CUDA gives; the first match counts.
# Sources: NVIDIA's data sheets.
_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(gpu: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by the name CUDA gives it; None if it is not in the table."""
    words = gpu.replace("-", " ").split()
    for name, peak in _PEAKS.items():
        wanted = name.split()
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return peak
    return None


# CUDA's name; memory GiB; memory, link, network and host GB/s; host memory GB; $/h; family.
_ROWS: dict[str, tuple[str, float, float, float, float, float, float, float, str]] = {
    "a100-40gb": ("A100", 39.4, 1555, 300, 6.25, 25, 130, 1.8, "ampere"),
    "a100-80gb": ("A100", 79.2, 2039, 300, 25, 25, 240, 2.2, "ampere"),
    "h100-80gb": ("H100", 79.2, 3350, 450, 50, 50, 240, 3.0, "hopper"),
    "h200-141gb": ("H200", 139.8, 4800, 450, 50, 50, 240, 3.8, "hopper"),
    "l40s-48gb": ("L40S", 44.4, 864, 25, 6.25, 25, 120, 1.4, "ada"),
    "a10g-24gb": ("A10G", 22.1, 600, 25, 3.1, 25, 48, 1.0, "other"),
    "l4-24gb": ("L4", 22.0, 300, 12, 3.1, 12, 48, 0.7, "ada"),
    "rtx4090-24gb": ("RTX 4090", 23.6, 1008, 25, 3.1, 25, 60, 0.5, "ada"),
    "b200-192gb": ("B200", 178.0, 8000, 900, 50, 50, 350, 5.5, "blackwell"),
}


def _gpu(name: str) -> Gpu:
    cuda, gib, memory_speed, link, network, host, ram, price, family = _ROWS[name]
    return Gpu(
        name=name,
        memory=int(gib * GIB),
        flops=_PEAKS[cuda],
        bandwidth=memory_speed * 1e9,
        link=link * 1e9,
        network=network * 1e9,
        host=host * 1e9,
        host_memory=int(ram * 1e9),
        price=price,
        family=family,
    )


GPUS = {name: _gpu(name) for name in _ROWS}


@dataclass(frozen=True)
class Hardware:
    """Equal nodes with equal GPUs."""

    gpu: Gpu
    gpus_per_node: int = 1
    nodes: int = 1

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def collective(self) -> float:
        """Bytes/s of a collective over all of them.

        A ring over all GPUs enters and leaves a node once, and NCCL lays one ring through each port, so that
        a collective has the node's ports together, at most the links within it.
        """
        if self.nodes > 1:
            return min(self.gpu.link, self.gpu.network * self.gpus_per_node)
        return self.gpu.link

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes x " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node} x {self.gpu.name}"


def hardware(
    gpu: str,
    *,
    gpus_per_node: int = 1,
    nodes: int = 1,
    price: float | None = None,
    network: float | None = None,
) -> Hardware:
    """From the catalogue, with another ``price`` ($/h of one GPU) or ``network`` (Gb/s of all
    ports of a node together, one direction) if given. Unknown: :class:`UserError`."""
    if gpu not in GPUS:
        raise UserError(f"unknown GPU '{gpu}'", where="--gpu", fix=did_you_mean(gpu, GPUS))
    if gpus_per_node < 1 or nodes < 1:
        raise UserError("there must be at least one GPU and one node", where="--gpus, --nodes")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"a price is a number from 0 on, not {price:g}", where="--price")
    if network is not None and not 0 < network < math.inf:
        raise UserError(f"a network that carries {network:g} Gb/s trains nothing", where="--network")
    chosen = GPUS[gpu]
    if price is not None:
        chosen = replace(chosen, price=price)
    if network is not None:
        chosen = replace(chosen, network=network / 8 * 1e9 / gpus_per_node)
    return Hardware(chosen, gpus_per_node, nodes)


def nearest(memory: int) -> Gpu:
    """The catalogue's GPU nearest in memory (bytes), with that memory: for hardware found on a cluster."""
    gpu = min(GPUS.values(), key=lambda g: abs(g.memory - memory))
    return replace(gpu, memory=memory)
