"""What a sweep computes once, where its trials would be: the driver's node need not have a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from qwen_ray.sweeps.spec import SweepConfig, trial_config

T = TypeVar("T")


def on_cluster(
    spec: SweepConfig,
    work: Callable[..., T],
    *args: Any,
    cpus: float | None = None,
    gpus: float | None = None,
) -> T:
    """``work(*args)`` in a process of its own, which has the CPUs (also its threads) and GPUs of an engine,
    or of a plain trial's worker, unless told otherwise."""
    import ray

    if cpus is None:
        packed = spec.trials.kind == "packed"
        cpus = spec.trials.cpus if packed else trial_config(spec, {}, out=spec.out).cluster.cpus_per_worker
    if gpus is None:
        gpus = spec.trials.gpus or 0.0
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1)(_threaded)
    result: T = ray.get(remote.remote(work, args, max(1, int(cpus))))
    return result


def _threaded(work: Callable[..., T], args: tuple[Any, ...], threads: int) -> T:
    import torch

    torch.set_num_threads(threads)
    return work(*args)
