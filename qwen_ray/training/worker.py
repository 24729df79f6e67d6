"""One rank of a run: the loop with its checkpoints and its artifact, by itself or as a Ray Train worker.

Light to import: Ray's controller imports it too, and has no use for torch.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError
from qwen_ray.training import errors

CHECKPOINTS, ARTIFACT = "checkpoints", ".artifact"


def run_rank(
    strategy_name: str,
    device: Any,
    config: RunConfig,
    out: Path,
    *,
    on_metrics: Callable[[dict[str, Any]], None],
    preempted: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The loop on this rank, with its checkpoints and what it leaves in the run's folder."""
    from qwen_ray.training import strategy as strategies
    from qwen_ray.training.checkpoint import CheckpointStore
    from qwen_ray.training.loop import train

    strategy = strategies.make(strategy_name, device)
    store = CheckpointStore(
        out / CHECKPOINTS,
        strategy,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous and strategy.asynchronous,
    )
    shutil.rmtree(out / ARTIFACT, ignore_errors=True)
    with contextlib.closing(store):
        result = train(
            config,
            strategy=strategy,
            store=store,
            on_metrics=on_metrics,
            artifact=out / ARTIFACT,
            preempted=preempted,
        )
    return asdict(result)


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs. ``settings``: the configuration, the run's folder, its id, and its
    group for wandb."""
    import ray.train
    import ray.train.torch
    import torch
    import transformers

    from qwen_ray.training.prometheus import RunMetrics
    from qwen_ray.training.tracking import Tracker

    # A line for each report of each rank, and a bar for each load, would bury what matters. The root, for
    # Ray's logger of reports is named after its file and escapes LoggingConfig.
    logging.getLogger().setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    config, out = RunConfig.model_validate(settings["config"]), Path(settings["out"])
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    rank = ray.train.get_context().get_world_rank()
    if rank > 0:  # all see the same data; one need say what is wrong with it
        logging.getLogger("qwen_ray").setLevel(logging.ERROR)
    tracker = Tracker(out, config, settings["run_id"], group=settings["group"]) if rank == 0 else None
    try:
        # The device is Ray's, for on a node with several GPUs every worker sees them all.
        device = ray.train.torch.get_device()
        with contextlib.closing(RunMetrics(config, settings["run_id"], rank=rank, device=device)) as metrics:

            def on_metrics(row: dict[str, Any]) -> None:
                if tracker:
                    tracker(row)
                metrics(row)

            return run_rank(
                config.strategy.name,
                device,
                config,
                out,
                on_metrics=on_metrics,
                preempted=lambda: ray.train.get_preemption_info() is not None,
            )
    except (UserError, FloatingPointError) as e:
        # The same on every rank and at every try: not a failure to start again from.
        return {"raised": e}
    except BaseException as e:
        errors.note(out, rank, e)
        raise
    finally:
        if tracker:
            tracker.close()
