"""Trained weights and optimizer state as files, one a rank, that load at any number of ranks.

A tensor is whole or sharded by rows (its first dimension, as FSDP2 shards). Each rank's file says which rows
it holds, so a reader takes the rows it needs from whichever files have them: ddp and fsdp write the same
format, and two ranks go on where four left off. safetensors, so reading a file runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

_PATTERN = "rank-*.safetensors"


def rows_of(value: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """This rank's part of a tensor: (local tensor, its first row, rows of the whole)."""
    if not isinstance(value, DTensor):
        return value, 0, value.shape[0] if value.dim() else 1
    total = value.shape[0]
    size = -(-total // value.device_mesh.size())
    start = min(value.device_mesh.get_local_rank() * size, total)
    local = value.to_local()
    if local.shape[0] != min(size, total - start):
        raise RuntimeError(
            f"a shard has {local.shape[0]} rows where {min(size, total - start)} were expected"
        )
    return local, start, total


def snapshot(
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    extra: Mapping[str, Any] | None = None,
) -> Callable[[Path], None]:
    """Copy this rank's part of ``parameters`` and their optimizer state to host memory.

    The returned function writes the copy into a folder. What every rank has whole, rank 0 writes. ``extra``
    (JSON) comes back from :meth:`Shards.extra`.
    """
    tensors: dict[str, torch.Tensor] = {}
    layout: dict[str, tuple[int, int]] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in [("", parameter), *sorted(optimizer.state.get(parameter, {}).items())]:
            full_name = f"{name}//{key}"
            if not isinstance(value, torch.Tensor):
                scalars[full_name] = value
            elif rank == 0 or isinstance(value, DTensor):
                local, start, total = rows_of(value.detach())
                if local.numel() or not isinstance(value, DTensor):
                    tensors[full_name] = local.to("cpu", copy=True).contiguous()
                    layout[full_name] = (start, total)
    described = {"layout": layout, "scalars": scalars, "extra": dict(extra or {})}

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"qwen-ray": json.dumps(described)}
        save_file(tensors, folder / f"rank-{rank:05d}.safetensors", metadata=metadata)

    return write


def restore(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, folder: Path
) -> dict[str, Any]:
    """Load what :func:`snapshot` of all ranks wrote into ``folder``; returns ``extra``."""
    shards = Shards(folder)
    missing = [name for name in parameters if f"{name}//" not in shards]
    if missing:
        raise RuntimeError(f"the checkpoint does not fit the model: it has no {missing[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            shards.fill(f"{name}//", parameter)
            state: dict[str, Any] = {}
            for key in shards.keys_of(name):
                full_name = f"{name}//{key}"
                if full_name in shards.scalars:
                    state[key] = shards.scalars[full_name]
                    continue
                shape, dtype = shards.shape(full_name), shards.dtype(full_name)
                if shape == tuple(parameter.shape):
                    state[key] = torch.zeros_like(parameter, dtype=dtype)
                else:
                    state[key] = torch.zeros(shape, dtype=dtype, device=parameter.device)
                shards.fill(full_name, state[key])
            if state:
                optimizer.state[parameter] = state
    return shards.extra


class Shards:
    """The tensors in a folder of shard files, read by rows."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob(_PATTERN))
        if not files:
            raise RuntimeError(f"no {_PATTERN} in {folder}")
        self._where: dict[str, list[tuple[int, int, Any]]] = {}
        self._rows: dict[str, int] = {}
        self.scalars: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        for path in files:
            f = safe_open(path, framework="pt")
            described = json.loads(f.metadata()["qwen-ray"])
            self.scalars |= described["scalars"]
            self.extra |= described["extra"]
            for name, (start, total) in described["layout"].items():
                shape = f.get_slice(name).get_shape()
                self._rows[name] = total
                self._where.setdefault(name, []).append((start, shape[0] if shape else 1, f))
        for name, parts in self._where.items():
            have = sum(rows for _, rows, _ in parts)
            if have != self._rows[name]:
                raise RuntimeError(
                    f"a shard is missing in {folder}: {have} of {self._rows[name]} rows of {name}"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def keys_of(self, parameter: str) -> list[str]:
        """The names of a parameter's optimizer state."""
        prefix = f"{parameter}//"
        names = [*self._where, *self.scalars]
        return sorted({n.removeprefix(prefix) for n in names if n.startswith(prefix) and n != prefix})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = self._where[name][0][2].get_slice(name).get_shape()
        return (self._rows[name], *shape[1:]) if shape else ()

    def dtype(self, name: str) -> torch.dtype:
        f = self._where[name][0][2]
        return torch.as_tensor(f.get_tensor(name) if not self.shape(name) else f.get_slice(name)[:1]).dtype

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Copy the rows that ``target`` holds on this rank into it."""
        local, start, total = rows_of(target.detach())
        if total != self._rows[name] and target.dim():
            raise RuntimeError(f"{name} has {total} rows, in the checkpoint {self._rows[name]}")
        if not target.dim():
            local.copy_(self._where[name][0][2].get_tensor(name))
            return
        for begin, rows, f in self._where[name]:
            low, high = max(start, begin), min(start + local.shape[0], begin + rows)
            if low < high:
                local[low - start : high - start].copy_(f.get_slice(name)[low - begin : high - begin])
