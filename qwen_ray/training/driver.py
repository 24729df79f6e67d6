"""A training run from outside: its folder, Ray Train around the loop, and the adapter it leaves.

Layout of a run's folder::

    config.yaml    the complete configuration
    run.json       id, state (running | interrupted | failed | done), result
    metrics.jsonl  one line a step
    adapter/       PEFT folder + lineage.json (LoRA), or model/ (full fine-tuning)
    checkpoints/   the newest checkpoints
    ray/           Ray Train's own notes
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import logging
import math
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen_ray import __version__, cluster, combinations, models
from qwen_ray.config import RunConfig, get, put, read_config
from qwen_ray.data.dataset import load_splits, make_mixture
from qwen_ray.errors import UserError
from qwen_ray.evaluation import suites
from qwen_ray.fsio import fsync_tree, read_json, sha256_json, whole_path, write_json, write_text
from qwen_ray.planner.plan import choose_strategy
from qwen_ray.planner.speed import HOST_CPUS
from qwen_ray.registry import LINEAGE
from qwen_ray.training import errors
from qwen_ray.training.nodes import Gpu, check_labels, gpus_a_worker, this_gpu, workers_gpu
from qwen_ray.training.prometheus import failures_counted
from qwen_ray.training.tracking import METRICS, MetricsTail, Tracker, read_metrics
from qwen_ray.training.worker import ARTIFACT, run_rank, work

log = logging.getLogger(__name__)

RUN, CONFIG = "run.json", "config.yaml"
_PATIENCE, _ELASTIC_PATIENCE = 60.0, 10.0  # seconds
_NO_FOLDER = {errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EROFS}
Progress = Callable[[dict[str, Any]], None]
# What may differ between two starts of one run: they decide nothing about its result.
_FREE: dict[str, Any] = {
    "cluster": True,
    "strategy": True,
    "compute": True,
    "checkpoint": True,
    "tracking": True,
    "out": True,
    "optim": {"batch_size", "gradient_accumulation"},
    "data": {"streaming"},
}


@dataclass(frozen=True)
class TrainedRun:
    """A finished run. ``artifact`` is the PEFT folder (LoRA) or model folder (full).

    ``loss`` is the last step's, ``eval_loss`` the last on held-out records, in nats per supervised token.
    """

    out: Path
    artifact: Path
    steps: int
    resumed_from: int
    loss: float
    eval_loss: float | None
    seconds: float = 0.0
    """Of its steps; what was lost to a failure and done again counts once."""
    gpus: float = 0.0
    """How many it trained on, at the most."""
    stopped: str | None = None
    """Why it ended before its last step, if it did."""


def run_training(
    config: RunConfig, *, progress: Progress | None = None, group: str | None = None
) -> TrainedRun:
    """Train as ``config`` says; go on where an earlier start of the same run left off.

    ``progress`` gets each row of metrics as it appears; ``group`` is wandb's group of the run. Raises
    :class:`UserError` for bad input, ``RuntimeError`` when training failed for good, ``KeyboardInterrupt``
    when it was interrupted.
    """
    config = _decided(absolute(config))
    out = Path(config.out)
    _check_input(config)
    with locked(out):
        run = _open_run(out, config)
        if run["state"] == "done":
            return _finished(out, run)
        write_json(out / RUN, {**run, "state": "running"})
        try:
            start = _run_alone if config.cluster.workers == 0 else _run_on_ray
            result = start(config, out, run["id"], progress, group)
            run["result"] = {**result, "artifact": _publish(result, out, config)}
        except BaseException as e:
            state = "interrupted" if isinstance(e, KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):  # the disk may be what failed; what was raised is the reason
                write_json(out / RUN, {**run, "state": state, "error": str(e)[:2000]})
            raise
        write_json(out / RUN, {**run, "state": "done"})
        return _finished(out, run)


def absolute(config: RunConfig) -> RunConfig:
    """Workers run in folders of their own, so every path must be whole."""
    tree = config.model_dump(mode="json")
    for key, lasting in PATHS.items():
        if value := get(tree, key, None):
            whole = [lasting(each) for each in value] if isinstance(value, list) else lasting(value)
            put(tree, key, whole, where=key)
    return RunConfig.model_validate({**tree, "out": whole_path(config.out)})


def _lasting_model(name: str) -> str:
    folder = whole_path(name)  # but for an alias, whatever folders there are
    return folder if models.resolve(name).location == folder else name


PATHS: dict[str, Callable[[str], str]] = {
    "model.name": _lasting_model,
    "data.train": whole_path,
    "data.validation": whole_path,
    "evaluate.suites": suites.lasting,
    "evaluate.suites_data_dir": whole_path,
    "strategy.nvme_path": whole_path,
}
"""Keys of what :func:`absolute` makes whole beside ``out``, and how."""


def _decided(config: RunConfig) -> RunConfig:
    """With the number of workers that its default stands for."""
    asked = config.cluster
    if asked.workers is not None:
        return config
    needs_ray = (
        cluster.prepare(asked.address) != "local"
        or config.strategy.name not in {"auto", "ddp"}
        or bool(asked.gpus_per_worker or asked.labels)
    )
    return config.model_copy(update={"cluster": asked.model_copy(update={"workers": int(needs_ray)})})


def _check_input(config: RunConfig) -> None:
    """Everything that can be seen to be wrong before a cluster is started."""
    models.model_config(models.resolve(config.model.name))
    combinations.check(config)
    train, _ = load_splits(config.data, seed=config.seed)
    counts: dict[str, list[int]] = {}
    for record in train:
        counts.setdefault(record.domain, []).append(1)
    make_mixture(config.data, counts, seed=config.seed)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Two processes writing one run, or one sweep, would ruin it. Makes the folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        if e.errno not in _NO_FOLDER:
            raise
        raise UserError(
            f"there can be no folder here: {e.strerror}", where=str(out), fix="choose another --out"
        ) from None
    with open(out / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another process is writing in this folder",
                where=str(out),
                fix="wait for it, or choose another --out",
            ) from None
        yield


def _open_run(out: Path, config: RunConfig) -> dict[str, Any]:
    if (out / RUN).is_file():
        if decides(absolute(read_config(out / CONFIG))) != decides(config):
            raise UserError(
                "this folder holds a run with another configuration",
                where=str(out / CONFIG),
                fix="choose another --out, or remove the folder to start over",
            )
        write_text(out / CONFIG, config.to_yaml())  # what decides nothing may have changed
        return {key: value for key, value in read_json(out / RUN).items() if key != "error"}
    write_text(out / CONFIG, config.to_yaml())
    run = {"id": uuid.uuid4().hex[:12], "state": "new", "version": __version__, "result": None}
    write_json(out / RUN, run)
    return run


def decides(config: RunConfig) -> str:
    return sha256_json([config.rows_a_step, config.model_dump(mode="json", exclude=_FREE)])


def _finished(out: Path, run: dict[str, Any]) -> TrainedRun:
    result, rows = run["result"], read_metrics(out)
    if not rows:
        raise RuntimeError(f"{out} holds no metrics: is it on storage that every node mounts?")
    return TrainedRun(
        out=out,
        artifact=out / result["artifact"],
        steps=result["steps"],
        seconds=round(sum(row["tokens"] / row["tokens_per_second"] for row in rows), 1),
        gpus=result.get("gpus", 0.0),
        stopped=result.get("stopped"),
        resumed_from=result["resumed_from"],
        loss=rows[-1]["loss"],
        eval_loss=next((row["eval_loss"] for row in reversed(rows) if "eval_loss" in row), None),
    )


def _run_alone(
    config: RunConfig, out: Path, run_id: str, progress: Progress | None, group: str | None
) -> dict[str, Any]:
    """The loop in this process."""
    import torch

    if config.strategy.name not in {"auto", "ddp"}:
        raise UserError(
            f"{config.strategy.name} shards over workers, and cluster.workers is 0",
            where="strategy.name",
            fix="--workers 1 or more, or strategy.name=ddp",
        )
    if torch.cuda.is_available():
        config = _planned_alone(config, this_gpu())
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    tracker = Tracker(out, config, run_id, group=group)

    def on_metrics(row: dict[str, Any]) -> None:
        tracker(row)
        if progress:
            progress(row)

    try:
        result = run_rank("ddp", None, config, out, on_metrics=on_metrics)
        return {**result, "gpus": float(torch.cuda.is_available())}
    except (UserError, FloatingPointError):
        raise
    except Exception as e:
        errors.note(out, 0, e)
        raise RuntimeError(errors.explain(e, out)) from e
    finally:
        tracker.close()


def _planned_alone(config: RunConfig, gpu: Gpu) -> RunConfig:
    """What ``strategy.name: auto`` means in this process, which has ``gpu``: ddp, and what the planner sets
    beside it."""
    chosen, compute, reason = choose_strategy(gpu.planned(config), 1, gpu.memory)
    if chosen.name == "ddp":
        log.info("strategy %s", reason)
    else:
        log.warning("ddp, though the planner would take %s; for that: --workers 1", reason)
    strategy = config.strategy.model_copy(update={"name": "ddp"})
    return config.model_copy(update={"strategy": strategy, "compute": compute})


def _run_on_ray(
    config: RunConfig, out: Path, run_id: str, progress: Progress | None, group: str | None
) -> dict[str, Any]:
    """The loop under Ray Train V2, one process a worker."""
    workers = config.cluster.workers or 1
    fewest = config.cluster.min_workers or workers
    # How long Ray Train waits for room before it tries again, with fewer workers where it may.
    patience = min(config.cluster.start_seconds, _PATIENCE if fewest == workers else _ELASTIC_PATIENCE)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    cluster.prepare(config.cluster.address)
    # Seconds of importing, while the cluster starts.
    imports = threading.Thread(target=importlib.import_module, args=("ray.train.torch",), daemon=True)
    imports.start()
    cluster.connect(config.cluster.address, num_cpus=int(workers * config.cluster.cpus_per_worker) + 1)
    imports.join()
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    check_labels(config.cluster.labels, config.cluster.start_seconds)
    gpus = gpus_a_worker(config.cluster, fewest)
    resources = {"CPU": config.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    if cluster.started_here():  # another may have an autoscaler, and grow
        cluster.check_room(resources, fewest, "workers", where="cluster.workers")
    config = _resolve_strategy(config, gpus)
    scaling: dict[str, Any] = {"num_workers": workers}
    if fewest < workers:
        scaling = {
            "num_workers": (fewest, workers),
            "elastic_resize_monitor_interval_s": config.cluster.resize_seconds,
        }
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "out": str(out),
            "run_id": run_id,
            "group": group,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            use_gpu=bool(gpus),
            resources_per_worker=resources,
            label_selector=config.cluster.labels or None,
            **scaling,
        ),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(out),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures,
                controller_failure_limit=math.ceil(config.cluster.start_seconds / patience),
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    errors.clear(out)
    with failures_counted(config, run_id):
        result = _fit(trainer, out, progress)
        if result.error is not None:
            raise RuntimeError(errors.explain(result.error, out)) from result.error
        returned = result.return_value
        if "raised" in returned:
            raise returned["raised"]
    return {**returned, "gpus": gpus * workers}


def _fit(trainer: Any, out: Path, progress: Progress | None) -> Any:
    """``trainer.fit()``, with ``progress`` called on each row of metrics as it appears."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as e:
            outcome["error"] = e

    # In a thread, so that Ctrl-C reaches us: Ray Train's own handler ends the process with exit code 0.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    tail, shown = MetricsTail(out), 0
    try:
        while thread.is_alive():
            thread.join(timeout=0.5)
            if progress:
                for row in tail.rows():
                    if row["step"] > shown:  # not those repeated after a failure
                        progress(row)
                        shown = row["step"]
    except KeyboardInterrupt:
        cluster.disconnect()
        raise
    if "error" in outcome:
        raise RuntimeError(errors.explain(outcome["error"], out)) from outcome["error"]
    return outcome["result"]


def _resolve_strategy(config: RunConfig, gpus: float) -> RunConfig:
    """``strategy.name: auto`` asks the planner, which asks the cluster what its GPUs are."""
    asks = gpus and config.strategy.name == "auto"
    gpu = workers_gpu(config.cluster, gpus) if asks else Gpu(0, bf16=True)
    count = int(gpus * (config.cluster.workers or 1))
    chosen, compute, reason = choose_strategy(gpu.planned(config), count, gpu.memory)
    log.info("strategy %s", reason)
    threads = config.cluster.cpus_per_worker
    if gpus and chosen.offload_optimizer != "none" and threads < HOST_CPUS:
        log.warning(
            "the optimizer steps on the host, on %g CPUs (cluster.cpus_per_worker); the planner counts on %d",
            threads,
            HOST_CPUS,
        )
    resolved = config.model_copy(update={"strategy": chosen, "compute": compute})
    combinations.check(resolved)
    return resolved


def _publish(result: dict[str, Any], out: Path, config: RunConfig) -> str:
    """Give what the loop left its lineage and its name; returns the folder's name."""
    name = "model" if config.method.name == "full" else "adapter"
    publish(out / ARTIFACT, out / name, config, data=result["data"], step=result["step"])
    return name


def publish(staging: Path, final: Path, config: RunConfig, *, data: dict[str, Any], step: int) -> None:
    """Give the adapter or model in ``staging`` its lineage, and the name ``final`` once it is whole.

    ``data`` is the manifest of what it was trained on, ``step`` the one whose weights it holds.
    """
    ref = models.resolve(config.model.name)
    write_json(
        staging / LINEAGE,
        {
            "base": {"id": ref.id, "location": config.model.name, "fingerprint": models.fingerprint(ref)},
            "config": config.model_dump(mode="json"),
            "data": data,
            "step": step,
            "versions": {"qwen-ray": __version__, "torch": version("torch")},
        },
    )
    fsync_tree(staging)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(final)
    staging.rename(final)


class ProgressBar:
    """A live bar on stderr: step, loss, tokens/s and time left. Silent when stderr is no terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, row: dict[str, Any]) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=row["total_steps"], unit="step", disable=not sys.stderr.isatty(), file=sys.stderr
            )
        self._bar.update(row["step"] - self._bar.n)
        shown = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_second']:.0f}"}
        if "eval_loss" in row:
            shown["eval"] = f"{row['eval_loss']:.3f}"
        self._bar.set_postfix(shown)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


__all__ = ["CONFIG", "METRICS", "RUN", "ProgressBar", "TrainedRun", "run_training"]
