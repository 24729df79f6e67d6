"""What a worker trains with: data, model, optimizer, and all that decides the result. Every worker has the
same, or all are told that they have not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qwen_ray import models
from qwen_ray.config import RunConfig
from qwen_ray.data.dataset import Dataset, build_dataset
from qwen_ray.errors import UserError
from qwen_ray.evaluation.monitor import ForgettingMonitor
from qwen_ray.fsio import sha256_json
from qwen_ray.planner.hardware import peak_flops
from qwen_ray.training import attention, loss, memory, precision
from qwen_ray.training.feed import Feed
from qwen_ray.training.optimizer import make_optimizer
from qwen_ray.training.strategy.base import Strategy
from qwen_ray.training.throughput import Flops, Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass
class Run:
    """What one worker trains with, put together once."""

    config: RunConfig
    strategy: Strategy
    tokenizer: PreTrainedTokenizerBase
    data: Dataset
    numbers: precision.Precision
    model: PreTrainedModel
    loss: loss.TokenLoss
    """The model under its loss; ``strategy.module`` is this, wrapped."""
    feed: Feed
    meter: Meter
    monitor: ForgettingMonitor
    base: str
    """Fingerprint of the weights that training starts from."""
    clock: float = 0.0
    """When the step under way began; data that was waited for counts."""
    failed_saves: int = 0
    unsaved: str | None = None
    """Why the newest checkpoint could not be written, as far as is known."""

    @property
    def rows_a_step(self) -> int:
        """Rows of the global batch. Counted with the configured workers, so fewer make the same steps."""
        return self.config.rows_a_step

    @property
    def identity(self) -> str:
        """A hash of everything that decides the result: a checkpoint goes on only under the same one.

        Where a run is stored, how it is watched, spread and split into micro-batches are left out.
        """
        return identity(self.config, self.base, self.data)


def identity(config: RunConfig, base: str, data: Dataset) -> str:
    """See :attr:`Run.identity`. ``base``: the fingerprint of the base's weights."""
    decides = config.model_dump(
        mode="json",
        include={
            **dict.fromkeys(("model", "method", "optim", "precision", "seed"), True),
            "data": {"packing", "packing_window", "max_epochs", "curriculum"},
        },
        exclude={"optim": {"batch_size", "gradient_accumulation"}},
    )
    decides |= {"base": base, "rows_a_step": config.rows_a_step}
    decides["data"] |= {**data.manifest, "files": sorted(data.manifest["files"].values())}
    return sha256_json(decides)


def plan(config: RunConfig, data: Dataset) -> int:
    """Fix the length of the run in its stream; returns the number of its steps."""
    optim, rows_a_step = config.optim, config.rows_a_step
    rows = optim.max_steps * rows_a_step if optim.max_steps else None
    return max(1, -(-data.stream.plan(rows=rows, passes=optim.epochs) // rows_a_step))


def set_up(config: RunConfig, strategy: Strategy, *, started: Path | None = None) -> Run:
    """Data, model, optimizer: the same on every worker. ``started``: a checkpoint that is restored next."""
    part = agreed(strategy, lambda: _local_part(config, strategy))
    _check_alike(config, strategy, part)
    compute = config.compute
    model = strategy.load(part.ref, config, part.numbers, started and started / "adapter")
    if compute.activation_checkpointing:
        memory.checkpoint_layers(model)
    if compute.compile:
        memory.compile_layers(model)
    module = loss.TokenLoss(model, attention=part.attention, loss=part.loss)
    strategy.join(module, lambda m: make_optimizer(m, config.optim, config.method), config)
    return Run(
        config=config,
        strategy=strategy,
        tokenizer=part.tokenizer,
        data=part.data,
        numbers=part.numbers,
        model=model,
        loss=module,
        feed=Feed(
            strategy.rank,
            strategy.world_size,
            config.optim.batch_size,
            int(part.tokenizer.pad_token_id),
            part.data.manifest["max_length"] if compute.compile else None,
            {domain: i for i, domain in enumerate(part.data.manifest["shares"])},
        ),
        meter=_meter(part.ref, config, strategy),
        monitor=ForgettingMonitor(config.evaluate.tolerance, config.evaluate.on_forgetting),
        base=part.base,
    )


@dataclass
class _Local:
    """What a worker makes of files on its own node, before it talks to the others."""

    ref: models.ModelRef
    tokenizer: PreTrainedTokenizerBase
    data: Dataset
    numbers: precision.Precision
    attention: attention.Kind
    loss: loss.LossKind
    base: str


def _local_part(config: RunConfig, strategy: Strategy) -> _Local:
    ref = models.resolve(config.model.name)
    tokenizer = models.load_tokenizer(ref)
    numbers = precision.choose(config.precision, strategy.device)
    return _Local(
        ref=ref,
        tokenizer=tokenizer,
        data=build_dataset(config.data, tokenizer, seed=config.seed, context=models.context_length(ref)),
        numbers=numbers,
        attention=attention.choose(config.compute.attention, strategy.device, numbers.compute),
        loss=loss.choose(config.compute.loss, strategy.device),
        base=models.fingerprint(ref),
    )


def agreed(strategy: Strategy, work: Callable[[], T]) -> T:
    """``work()`` on every rank; a :class:`UserError` of one is raised on all. No collectives inside.

    A file may be missing on one node only: the others would wait for that rank for ever.
    """
    value: Any = None
    failure: UserError | None = None
    try:
        value = work()
    except UserError as e:
        failure = e
    failures = [f for f in strategy.gather(failure) if f is not None]
    if failures:
        raise failures[0]
    result: T = value
    return result


def _check_alike(config: RunConfig, strategy: Strategy, part: _Local) -> None:
    """Raise :class:`UserError`, on all ranks, where a rank's files are not rank 0's.

    They would train on a mixture of both without a word, or wait for one another for ever.
    """
    found = {**part.data.manifest["files"], config.model.name: part.base}
    found["what is made of data and model"] = identity(config, part.base, part.data)
    first, *others = strategy.gather(found)
    for rank, theirs in enumerate(others, start=1):
        if theirs != first:
            raise UserError(
                f"rank {rank} has another content of this than rank 0, and workers must train on the same",
                where=next(name for name in first if theirs.get(name) != first[name]),
                fix="put data and model on storage that all workers mount, or the same copies on every node",
            )


def _meter(ref: models.ModelRef, config: RunConfig, strategy: Strategy) -> Meter:
    """MFU where the GPU's peak and the architecture's arithmetic are known."""
    if strategy.device.type != "cuda":
        return Meter()
    peak = peak_flops(torch.cuda.get_device_name(strategy.device))
    try:
        flops = Flops.of(models.model_config(ref), config.method)
    except UserError:  # an architecture that is not in the tables trains all the same
        return Meter()
    return Meter(flops, peak and peak * strategy.world_size)
