"""A run's state into checkpoints and out of them, and what it hands over at its end. How a checkpoint comes
onto storage whole is the store's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from qwen_ray import __version__, models
from qwen_ray.config import RunConfig
from qwen_ray.data.dataset import Dataset
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, write_json
from qwen_ray.training import checkpoint, lora
from qwen_ray.training.checkpoint import CheckpointStore
from qwen_ray.training.run import Run, agreed

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Checkpoints in a row that may fail to be written before the run ends rather than risk more work."""


def save(
    run: Run, store: CheckpointStore, step: int, data_state: dict[str, Any], stopped: str | None = None
) -> None:
    """Write a checkpoint; a failure costs only it, until too many have failed in a row.

    That of a best step to roll back to is waited for: without it the best before counts again.
    """
    settings, monitor = run.config.evaluate, run.monitor
    store.protected = {monitor.best_step} if monitor.started else set()
    is_best = settings.on_forgetting == "rollback" and monitor.started and monitor.best_step == step
    before = store.settle()  # first, so that no two copies of the state are in memory
    content = manifest(
        run.config, run.identity, run.strategy.format, run.data, data_state, monitor.state(), stopped
    )
    run.unsaved = store.save(step, snapshot(run), content)
    if is_best:
        run.unsaved = run.unsaved or store.settle()
        if run.unsaved and step == monitor.baseline_step:
            raise RuntimeError(f"the checkpoint to go back to was not written: {run.unsaved}")
        if run.unsaved:
            monitor.take_back()
    failure = run.unsaved or before
    run.failed_saves = run.failed_saves + 1 if failure else 0
    if run.failed_saves >= MAX_FAILED_SAVES:
        raise RuntimeError(f"{run.failed_saves} checkpoints in a row were not written: {failure}")


def snapshot(run: Run) -> checkpoint.Write:
    """Copy what a checkpoint needs out of the live run; the returned function writes it to a folder."""
    write_state = run.strategy.snapshot()
    if run.config.method.name == "full":
        return lambda folder: write_state(folder / "state")
    adapter = run.strategy.weights()

    def write(folder: Path) -> None:
        write_state(folder / "state")
        if run.strategy.rank == 0:
            export_adapter(run, adapter, folder / "adapter")

    return write


def export_adapter(run: Run, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write gathered ``weights`` as a PEFT folder."""
    named = {name.removeprefix("model."): value for name, value in weights.items()}
    lora.export_adapter(run.model, folder, weights=named)


def manifest(  # noqa: PLR0917
    config: RunConfig,
    identity: str,
    state: str,
    data: Dataset,
    data_state: dict[str, Any],
    monitor: dict[str, Any],
    stopped: str | None = None,
) -> dict[str, Any]:
    """What a checkpoint says of itself, beside step, number of ranks and checksums.

    ``state``: the format of the files in its folder of that name (:attr:`Strategy.format`).
    """
    return {
        "identity": identity,
        "state": state,
        "data_state": data_state,
        "data": data.manifest,
        "monitor": monitor,
        "config": config.model_dump(mode="json"),
        "rng": "torch.manual_seed(sha256(seed, step, rank)) before each step",
        "versions": {"qwen-ray": __version__, "torch": torch.__version__},
        "stopped": stopped,
    }


def restore(run: Run, folder: Path, found: dict[str, Any]) -> int:
    """Load a checkpoint with its manifest; returns the number of steps already done."""
    agreed(
        run.strategy,
        lambda: check_fits(folder, found, run.identity, run.strategy.format, run.strategy.name),
    )
    run.strategy.restore(folder / "state")
    run.data.stream.load_state(found["data_state"])
    run.monitor.load_state(found["monitor"])
    return int(found["step"])


def check_fits(folder: Path, found: dict[str, Any], identity: str, state: str, strategy: str) -> None:
    """Raise :class:`UserError` where a checkpoint with the manifest ``found`` is of another run."""
    if found["identity"] != identity:
        raise UserError(
            "the run in this folder was started with another configuration, other data or another base",
            where=str(folder),
            fix="repeat the command it was started with, or train into a new --out folder",
        )
    was = found["config"]["strategy"]
    if found["state"] != state:
        raise UserError(
            f"this checkpoint's state is of format '{found['state']}', which the strategy "
            f"'{strategy}' ({state}) cannot read",
            where=str(folder),
            fix=f"strategy.name={was['name']} and strategy.zero_stage={was['zero_stage']}, or a new --out",
        )


def roll_back(run: Run, store: CheckpointStore) -> int:
    """Put the weights back to the best step that forgot nothing; returns that step."""
    best = run.monitor.best_step
    log.warning("going back to step %d, the best that forgot nothing", best)
    run.strategy.restore(store.check(best) / "state")
    return best


def hand_over(run: Run, folder: Path) -> None:
    """Write what was trained for others to use: a PEFT folder, or a Hugging Face model folder.

    A model is written in the format its base came in.
    """
    weights = run.strategy.weights()
    if run.strategy.rank > 0:
        return
    if run.config.method.name != "full":
        export_adapter(run, weights, folder)
        return
    dtype = models.stored_dtype(models.resolve(run.config.model.name))
    state = {name.removeprefix("model."): value.to(dtype) for name, value in weights.items()}
    run.model.save_pretrained(str(folder), state_dict=state)
    settings = read_json(folder / "config.json")  # which says the dtype of the model in memory
    write_json(folder / "config.json", {**settings, "dtype": str(dtype).removeprefix("torch.")})
    run.tokenizer.save_pretrained(str(folder))
