"""Several ranks on this machine, over gloo: what a test runs where Ray would only take time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qwen_ray.config import RunConfig
from qwen_ray.training import strategy as strategies
from qwen_ray.training.checkpoint import CheckpointStore
from qwen_ray.training.loop import Result, train

# Ranks are forked from a process that has imported what takes seconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.training.ranks", "peft", "transformers.models.qwen2.modeling_qwen2"])


def launch(world_size: int, work: Callable[..., None], *args: Any) -> None:
    """Run ``work(*args)`` on every rank of a fresh process group; an error on any is an error here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            start_rank, (world_size, folder, work, args), nprocs=world_size, start_method="forkserver"
        )


def start_rank(
    rank: int, world_size: int, folder: str, work: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """What one of ``world_size`` processes runs; ``folder`` is where they meet."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # read by DeepSpeed, not used
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    try:
        work(*args)
    finally:
        dist.destroy_process_group()


def run(
    config: RunConfig,
    out: Path,
    *,
    handed: str = "trained",
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[list[dict[str, Any]], Result]:
    """Train as ``config`` says on this rank, with checkpoints below ``out`` and the artifact in it."""
    name = "ddp" if config.strategy.name == "auto" else config.strategy.name
    strategy = strategies.make(name)
    store = CheckpointStore(
        out / "checkpoints",
        strategy,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous and strategy.asynchronous,
    )
    rows: list[dict[str, Any]] = []
    result = train(
        config,
        strategy=strategy,
        store=store,
        on_metrics=on_metrics or rows.append,
        artifact=out / handed,
    )
    return rows, result
