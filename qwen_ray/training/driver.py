"""A training run from outside: its folder, Ray Train around the loop, and the adapter it leaves.

Layout of a run's folder::

    config.yaml    the complete configuration
    run.json       id, state (running | interrupted | failed | done), result
    metrics.jsonl  one line a step
    adapter/       PEFT folder + lineage.json (LoRA), or model/ (full fine-tuning)
    checkpoints/   of the loop run alone;  ray/: of Ray Train
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_ray import __version__, cluster, models
from qwen_ray.config import RunConfig, read_config
from qwen_ray.data.dataset import load_splits
from qwen_ray.data.mixture import Mixture
from qwen_ray.errors import UserError
from qwen_ray.fsio import fsync_tree, read_json, sha256_json, write_json, write_text
from qwen_ray.registry import LINEAGE
from qwen_ray.training import checkpoint as ckpt
from qwen_ray.training.tracking import METRICS, Tracker, read_metrics

RUN, CONFIG = "run.json", "config.yaml"
Progress = Callable[[dict[str, Any]], None]
# What may differ between two starts of one run: they decide nothing about its result.
_FREE: dict[str, Any] = {"cluster": {"address", "max_failures"}, "tracking": True, "out": True}


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


def run_training(config: RunConfig, *, progress: Progress | None = None) -> TrainedRun:
    """Train as ``config`` says; go on where an earlier start of the same run left off.

    ``progress`` gets each row of metrics as it appears. Raises :class:`UserError` for bad input,
    ``RuntimeError`` when training failed for good, ``KeyboardInterrupt`` when it was interrupted.
    """
    config = _absolute(config)
    out = Path(config.out)
    _check_input(config)
    with _locked(out):
        run = _open_run(out, config)
        if run["state"] == "done":
            return _finished(out, run)
        write_json(out / RUN, {**run, "state": "running"})
        try:
            run["result"] = (
                _run_alone(config, out, run["id"], progress)
                if config.cluster.workers == 0
                else _run_on_ray(config, out, run["id"], progress)
            )
        except BaseException as e:
            state = "interrupted" if isinstance(e, KeyboardInterrupt) else "failed"
            write_json(out / RUN, {**run, "state": state, "error": str(e)[:2000]})
            raise
        write_json(out / RUN, {**run, "state": "done"})
        return _finished(out, run)


def _absolute(config: RunConfig) -> RunConfig:
    """Workers run in folders of their own, so every path must be whole."""
    config = config.model_copy(deep=True)
    config.out = str(Path(config.out).expanduser().resolve())
    config.data.train = [str(Path(p).expanduser().resolve()) for p in config.data.train]
    config.data.validation = [str(Path(p).expanduser().resolve()) for p in config.data.validation]
    if Path(config.model.name).is_dir():
        config.model.name = str(Path(config.model.name).resolve())
    return config


def _check_input(config: RunConfig) -> None:
    """Everything that can be seen to be wrong before a cluster is started."""
    models.model_config(models.resolve(config.model.name))
    train, _ = load_splits(config.data, seed=config.seed)
    counts: dict[str, list[int]] = {}
    for record in train:
        counts.setdefault(record.domain, []).append(1)
    Mixture(counts, config.data.weights)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Two processes writing one run would ruin it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another process is training in this folder",
                where=str(out),
                fix="wait for it, or choose another --out",
            ) from None
        yield


def _open_run(out: Path, config: RunConfig) -> dict[str, Any]:
    if (out / RUN).is_file():
        if _decides(read_config(out / CONFIG)) != _decides(config):
            raise UserError(
                "this folder holds a run with another configuration",
                where=str(out / CONFIG),
                fix="choose another --out, or remove the folder to start over",
            )
        return dict(read_json(out / RUN))
    write_text(out / CONFIG, config.to_yaml())
    run = {"id": uuid.uuid4().hex[:12], "state": "new", "version": __version__, "result": None}
    write_json(out / RUN, run)
    return run


def _decides(config: RunConfig) -> str:
    return sha256_json(config.model_dump(mode="json", exclude=_FREE))


def _finished(out: Path, run: dict[str, Any]) -> TrainedRun:
    result, rows = run["result"], read_metrics(out)
    if not rows:
        raise RuntimeError(f"{out} holds no metrics: is it on storage that every node mounts?")
    return TrainedRun(
        out=out,
        artifact=out / result["artifact"],
        steps=result["steps"],
        resumed_from=result["resumed_from"],
        loss=rows[-1]["loss"],
        eval_loss=next((row["eval_loss"] for row in reversed(rows) if "eval_loss" in row), None),
    )


def _run_alone(config: RunConfig, out: Path, run_id: str, progress: Progress | None) -> dict[str, Any]:
    """The loop in this process."""
    import torch

    from qwen_ray.training.loop import train
    from qwen_ray.training.strategy.ddp import Ddp

    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    store = ckpt.LocalStore(out / "checkpoints", keep=config.checkpoint.keep)
    tracker = Tracker(out, config, run_id)

    def on_metrics(row: dict[str, Any]) -> None:
        tracker(row)
        if progress:
            progress(row)

    try:
        result = train(config, strategy=Ddp(), store=store, on_metrics=on_metrics)
    finally:
        tracker.close()
    with store.latest() as folder:
        assert folder is not None  # the loop saves after its last step
        return {"artifact": _export(folder, out, config), **asdict(result)}


def _run_on_ray(config: RunConfig, out: Path, run_id: str, progress: Progress | None) -> dict[str, Any]:
    """The loop under Ray Train V2, one process a worker."""
    workers = config.cluster.workers
    cluster.connect(config.cluster.address, num_cpus=int(workers * config.cluster.cpus_per_worker) + 1)
    import ray
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    gpus = config.cluster.gpus_per_worker
    if gpus is None:
        # Asked of the cluster, not of this machine: a head or driver node has no GPU, as a rule.
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= workers else 0
    resources = {"CPU": config.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    if cluster.started_here():  # another may have an autoscaler, and grow
        _check_room(resources, workers)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "out": str(out), "run_id": run_id},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(out),
            failure_config=FailureConfig(
                max_failures=config.cluster.max_failures, controller_failure_limit=3
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as e:
            outcome["error"] = e

    # In a thread, so that Ctrl-C reaches us: Ray Train's own handler ends the process with exit code 0.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    shown = 0
    try:
        while thread.is_alive():
            thread.join(timeout=0.5)
            if progress:
                rows = [row for row in read_metrics(out) if row["step"] > shown]
                for row in rows:
                    progress(row)
                    shown = row["step"]
    except KeyboardInterrupt:
        cluster.disconnect()
        raise
    error = outcome.get("error") or outcome["result"].error
    if error is not None:
        if isinstance(error, WorkerGroupError):
            rank, first = min(error.worker_failures.items())
            raise RuntimeError(f"training failed on rank {rank}: {_root(first)}") from error
        raise RuntimeError(f"training failed: {_root(error)}") from error
    result = outcome["result"]
    returned = result.return_value
    if "raised" in returned:
        raise returned["raised"]
    with result.checkpoint.as_directory() as folder:
        return {"artifact": _export(Path(folder), out, config), **returned}


def _check_room(resources: dict[str, float], workers: int) -> None:
    """Ray would wait for ever for resources the cluster does not have."""
    import ray

    have = ray.cluster_resources()
    for name, each in resources.items():
        if have.get(name, 0) < each * workers:
            raise UserError(
                f"{workers} workers with {each:g} {name} each need {each * workers:g}; the cluster has "
                f"{have.get(name, 0):g}",
                where="cluster.workers",
                fix="ask for fewer workers or less for each, or add nodes",
            )


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs."""
    import ray.train.torch
    import torch
    import transformers

    from qwen_ray.training.loop import train
    from qwen_ray.training.strategy.ddp import Ddp

    # A line for each report of each rank, and a bar for each load, would bury what matters. The root, for
    # Ray's logger of reports is named after its file and escapes LoggingConfig.
    logging.getLogger().setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    config = RunConfig.model_validate(settings["config"])
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    # Ray's, for on a node with several GPUs every worker sees them all.
    strategy = Ddp(ray.train.torch.get_device())
    if strategy.rank > 0:  # all see the same data; one need say what is wrong with it
        logging.getLogger("qwen_ray").setLevel(logging.ERROR)
    out = Path(settings["out"])
    tracker = Tracker(out, config, settings["run_id"]) if strategy.rank == 0 else None
    try:
        result = train(config, strategy=strategy, store=_RayStore(), on_metrics=tracker or (lambda _: None))
    except (UserError, FloatingPointError) as e:
        # The same on every rank and at every try: not a failure to start again from.
        return {"raised": e}
    finally:
        if tracker:
            tracker.close()
    return asdict(result)


class _RayStore:
    """Checkpoints through ``ray.train.report``, in the run's storage."""

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        import ray.train

        newest = ray.train.get_checkpoint()
        if newest is None:
            yield None
        else:
            with newest.as_directory() as folder:
                yield Path(folder)

    def save(self, step: int, write: Callable[[Path], None] | None, metrics: dict[str, Any]) -> None:
        import ray.train
        from ray.train import CheckpointConsistencyMode

        with tempfile.TemporaryDirectory(prefix="qwen-ray-checkpoint-") as folder:
            stored = None
            if write is not None:
                write(Path(folder))
                stored = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step, "loss": metrics["loss"]}, checkpoint=stored)
            # `report` returns before the checkpoint is registered; a crash just after would go unnoticed
            # back to the one before.
            ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)


def _export(checkpoint: Path, out: Path, config: RunConfig) -> str:
    """Copy what was trained out of the last checkpoint, with its lineage; returns its folder's name."""
    manifest = ckpt.verify(checkpoint)
    name = "adapter" if config.method.name == "lora" else "model"
    staging = out / f".{name}"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(checkpoint / name, staging)
    (staging / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    ref = models.resolve(config.model.name)
    write_json(
        staging / LINEAGE,
        {
            "base": {"id": ref.id, "location": config.model.name, "fingerprint": models.fingerprint(ref)},
            "config": config.model_dump(mode="json"),
            "data": manifest["data"],
            "step": manifest["step"],
            "versions": manifest["versions"],
        },
    )
    fsync_tree(staging)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(out / name)
    staging.rename(out / name)
    return name


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
