"""The nodes that a run trains on: their labels, their GPUs, and the memory of those."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_ray.config import ClusterConfig, RunConfig
from qwen_ray.errors import UserError

log = logging.getLogger(__name__)

_GROUP, _ID = "ray.io/node-group", "ray.io/node-id"


def check_labels(labels: Mapping[str, str], seconds: float) -> None:
    """Raise :class:`UserError` where no node has ``labels`` and nothing starts nodes. What starts nodes names
    their groups, and is given ``seconds``."""
    if _labelled(labels):
        return
    what = f"no node of the cluster has {_words(labels)}"
    known = [node["Labels"] for node in _labelled({})]
    if any(_GROUP in node for node in known):
        log.warning("%s yet: waiting up to %g s for one (cluster.start_seconds)", what, seconds)
        return
    have = sorted({_words({key: value}) for node in known for key, value in node.items() if key != _ID})
    raise UserError(
        what,
        where="cluster.labels",
        fix=f"ray start --labels; the labels that nodes have: {', '.join(have) or 'none'}",
    )


def gpus_a_worker(asked: ClusterConfig, fewest: int) -> float:
    """As configured, else 1 if the nodes have that many: a head or driver node has no GPU, as a rule."""
    if asked.gpus_per_worker is not None:
        return asked.gpus_per_worker
    have = sum(node["Resources"].get("GPU", 0) for node in _labelled(asked.labels))
    if have >= fewest:
        return 1
    if have:
        log.warning(
            "the cluster has %g GPUs for %d workers: training on CPUs; ask for as many workers as it has "
            "GPUs, or set cluster.gpus_per_worker=1 to wait for more",
            have,
            fewest,
        )
    return 0


@dataclass(frozen=True)
class Gpu:
    """What a plan depends on of the GPU that trains."""

    memory: int
    """Bytes."""
    bf16: bool
    """Whether it computes in bf16, which ``precision: auto`` then is."""

    def planned(self, config: RunConfig) -> RunConfig:
        """``config`` as it is to be planned for this GPU: its precision decided, if it is not bf16."""
        if self.bf16 or config.precision != "auto":
            return config
        return config.model_copy(update={"precision": "fp16"})


def this_gpu() -> Gpu:
    """The GPU of this process."""
    import torch

    from qwen_ray.training.precision import choose

    auto = choose("auto", torch.device("cuda"))
    return Gpu(int(torch.cuda.get_device_properties(0).total_memory), bf16=not auto.scales_loss)


def workers_gpu(asked: ClusterConfig, gpus: float) -> Gpu:
    """A worker's GPU, asked where one is: the driver's node need not have any."""
    import ray

    @ray.remote(num_cpus=0, num_gpus=gpus, max_calls=1, label_selector=asked.labels)
    def ask() -> Gpu:
        return this_gpu()

    answer = ask.remote()
    try:
        found: Gpu = ray.get(answer, timeout=asked.start_seconds)
        return found
    except ray.exceptions.GetTimeoutError:
        ray.cancel(answer)
        raise RuntimeError(
            f"no GPU became free within {asked.start_seconds:g} s (cluster.start_seconds); see `ray status`"
        ) from None


def _labelled(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """What Ray says of each living node that has all of ``labels``."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and labels.items() <= node["Labels"].items()]


def _words(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())
