"""The training loop: one for LoRA and full fine-tuning, one process or many workers, every strategy.

A step is: take the rows of the global batch, of them this worker's share, sum the loss over the supervised
tokens, divide by the number of supervised tokens in the *global* batch, clip, step. So the loss is the
token mean however rows fall on workers and micro-steps. Every worker draws the whole stream and knows that
count without asking.

Exactness: the stream's state is in the checkpoint, the learning rate is a function of the step, and
dropout's generator is seeded from (seed, step, rank). A run that was killed and resumed is the run that
was not, bit for bit, at the same number of workers on the same kind of device.

The device is waited for once a step, when the loss is read.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_ray.config import RunConfig
from qwen_ray.data.packing import Batch
from qwen_ray.evaluation.monitor import Verdict
from qwen_ray.fsio import sha256_json
from qwen_ray.training import memory
from qwen_ray.training.checkpoint import CheckpointStore
from qwen_ray.training.feed import Step
from qwen_ray.training.run import Run, plan, set_up
from qwen_ray.training.schedule import learning_rate
from qwen_ray.training.state import hand_over, restore, roll_back, save
from qwen_ray.training.strategy.base import Strategy
from qwen_ray.training.throughput import Meter
from qwen_ray.training.tracking import EXAMPLES, Lines

log = logging.getLogger(__name__)

OnMetrics = Callable[[dict[str, Any]], None]
NOTICE_SECONDS = 5.0
"""How often to ask whether this node is about to be taken away: asking waits for every worker."""


@dataclass
class Result:
    """How far a run went, and the step it went on from. Its losses are in its metrics.

    ``step`` is the one whose weights were handed over: the last, or the best after a rollback.
    """

    steps: int
    resumed_from: int
    step: int
    data: dict[str, Any]
    stopped: str | None = None


def train(
    config: RunConfig,
    *,
    strategy: Strategy,
    store: CheckpointStore,
    on_metrics: OnMetrics,
    artifact: Path | None = None,
    preempted: Callable[[], bool] | None = None,
) -> Result:
    """Run ``config`` on this worker, resuming from ``store`` if it holds a checkpoint.

    ``on_metrics`` is called on rank 0 with one flat dict a step (``loss``, ``loss/DOMAIN``,
    ``learning_rate``, ``grad_norm``, ``tokens_per_second`` ...), which has ``eval_loss`` and
    ``eval_loss/DOMAIN`` after an evaluation.
    ``artifact`` is the folder that gets the trained adapter or model. ``preempted``, called on all ranks
    alike, tells whether a worker's node is about to be taken away: then a checkpoint is written at once.
    """
    found = store.newest()
    run = set_up(config, strategy, started=found[0] if found else None)
    stream, total = run.data.stream, plan(config, run.data)
    points = {max(1, round(share * total)) for share in config.evaluate.at}
    first = restore(run, *found) if found else 0
    stopped: str | None = found[1].get("stopped") if found else None
    rolls_back = bool(config.evaluate.suites) and config.evaluate.on_forgetting == "rollback"
    if config.evaluate.suites and not run.monitor.started:
        log.info("%s", run.monitor.update(first, *evaluate_suites(run)).message)
        if rolls_back:
            save(run, store, first, stream.state())

    notice = Notice(preempted)
    steps = run.feed.steps(stream, rows=run.rows_a_step, count=0 if stopped else total - first)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(steps))
        trace = stack.enter_context(_trace(config, strategy.rank)) if config.tracking.examples else None
        step, run.clock = first, time.perf_counter()
        for step, data in enumerate(steps, start=first + 1):
            metrics = take_step(run, step, total, data, notice)
            if trace:
                trace.write({"step": step, "start": store.start, "ids": data.ids})
            must_save = notice.given(step)
            if step == total or step % config.evaluate.every_steps == 0 or step in points:
                metrics |= validation_loss(run)
                # The last update may have ruined the weights: nothing of them is reported or saved.
                check_finite(metrics.get("eval_loss", 0.0), "held-out loss", step)
            if config.evaluate.suites and (step == total or step % config.evaluate.suites_every_steps == 0):
                verdict = judge(run, step, metrics)
                stopped = verdict.message if verdict.action in {"stop", "rollback"} else None
                must_save = must_save or (rolls_back and verdict.is_best)
            if strategy.rank == 0:
                on_metrics(metrics)
            done = step == total or stopped is not None
            if done or must_save or step % config.checkpoint.every_steps == 0:
                save(run, store, step, data.state, stopped)
            if done:
                break
            run.clock = time.perf_counter()
    if failure := store.settle() or run.unsaved:
        raise RuntimeError(f"the last checkpoint was not written: {failure}")
    kept = roll_back(run, store) if rolls_back and stopped else step
    if artifact is not None:
        hand_over(run, artifact)
    return Result(steps=step, resumed_from=first, step=kept, data=run.data.manifest, stopped=stopped)


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    """Of the generator that drops out in step number ``step`` (from 1)."""
    return int(sha256_json([seed, step - 1, rank])[:15], 16)


class Notice:
    """Asks now and then whether a worker's node is about to be taken away. All ranks ask together."""

    def __init__(self, preempted: Callable[[], bool] | None) -> None:
        self._preempted, self._asked, self._given = preempted, time.monotonic(), False
        self.due = False
        """Whether all ranks have agreed to ask now."""

    @property
    def wanted(self) -> bool:
        """Whether this rank would ask."""
        return self._preempted is not None and time.monotonic() - self._asked > NOTICE_SECONDS

    def given(self, step: int) -> bool:
        """Whether notice has just been given; once true, then false."""
        if not self.due or self._preempted is None:
            return False
        self._asked = time.monotonic()
        if self._given or not self._preempted():
            return False
        log.warning("a node is about to be taken away: writing a checkpoint at step %d", step)
        self._given = True
        return True


def take_step(run: Run, step: int, total: int, data: Step, notice: Notice) -> dict[str, Any]:
    """Step number ``step`` (from 1) and its metrics. Sets ``notice.due``."""
    config, strategy = run.config, run.strategy
    rate = learning_rate(step - 1, total, config.optim)
    torch.manual_seed(dropout_seed(config.seed, step, strategy.rank))
    losses, norm = train_step(run, data, rate)
    wanted = losses.new_full((1,), float(notice.wanted and strategy.rank == 0))
    # Rank 0's; but what is not finite on any rank is so for all, which must agree whether to go on.
    norm = norm.to(losses).reshape(1) * (strategy.rank == 0)
    # The step's one wait for the device.
    asked, norm_before, total_loss, *sums = strategy.sum(torch.cat([wanted, norm, losses])).tolist()
    notice.due = asked > 0
    check_finite(total_loss / data.supervised, "loss", step)
    if not run.numbers.scales_loss:  # else such a step was skipped, and the scale is lowered
        # The update is done, so nothing of these weights is reported or saved. DeepSpeed says -1.
        check_finite(norm_before if norm_before >= 0 else math.nan, "gradient's norm", step)
    of_domains = {}
    if run.loss.nats is not None:
        of_domains = {domain: sums[i] for domain, i in run.feed.domains.items()}
    return {
        "step": step,
        "total_steps": total,
        **losses_of(data, total_loss, of_domains),
        "learning_rate": rate,
        "grad_norm": norm_before,
        "workers": strategy.world_size,
        **rates_of(data, run.meter, time.perf_counter() - run.clock),
    }


def check_finite(value: float, name: str, step: int) -> None:
    """Raise ``FloatingPointError`` where ``value``, called ``name``, is NaN or infinite after ``step``."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} is {value} at step {step}; lower optim.learning_rate")


def losses_of(data: Step, total: float, of_domains: Mapping[str, float]) -> dict[str, float]:
    """Token means of a step, from its summed loss and that of each domain, where it is known."""
    parts = {d: of_domains[d] / n for d, n in data.supervised_of.items() if d in of_domains}
    return {"loss": total / data.supervised, **{f"loss/{domain}": mean for domain, mean in parts.items()}}


def rates_of(data: Step, meter: Meter, seconds: float) -> dict[str, float]:
    """How much data a step took, and how fast."""
    return {
        "passes": data.passes,
        "tokens": data.tokens,
        **meter.step(
            seconds,
            padded=data.padded,
            tokens=data.tokens,
            supervised=data.supervised,
            length=data.attended,
        ),
    }


def judge(run: Run, step: int, metrics: dict[str, Any]) -> Verdict:
    """Benchmark the live weights: adds the scores to ``metrics`` and says what has been forgotten."""
    results = evaluate_suites(run)
    verdict = run.monitor.update(step, *results)
    metrics |= run.monitor.metrics(*results)
    if verdict.fallen:
        log.warning("%s", verdict.message)
    return verdict


def train_step(run: Run, data: Step, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, backward and update; returns this rank's summed loss, followed by that of each domain, and
    the gradient's norm, on the device and not waited for."""
    strategy = run.strategy
    strategy.module.train()
    total = torch.zeros(1, device=strategy.device)
    of_domains = torch.zeros(len(run.feed.domains), device=strategy.device)
    offloads = run.config.compute.activation_offload
    for i, host in enumerate(data.batches):
        with strategy.accumulate(last=i + 1 == len(data.batches)):
            kept = memory.offload(strategy.device) if offloads else nullcontext()
            batch = host.to(strategy.device)
            with run.numbers.autocast(strategy.device), kept:
                summed: torch.Tensor = strategy.module(batch)
            # Gradients are averaged over workers; times their number, that is the sum, divided by tokens.
            strategy.backward(summed * (strategy.world_size / data.supervised))
        total += summed.detach()
        if run.loss.nats is not None:
            of_domains.index_add_(0, batch.domains, run.loss.nats)
    return torch.cat([total, of_domains]), strategy.step(rate, run.config.optim.max_grad_norm)


@torch.no_grad()
def validation_loss(run: Run) -> dict[str, float]:
    """Token-mean loss on the held-out rows: ``eval_loss`` over all, ``eval_loss/DOMAIN`` for each."""
    validation, strategy = run.data.validation, run.strategy
    if not validation:
        return {}
    strategy.module.eval()
    totals = torch.zeros(len(validation), 2, dtype=torch.float64, device=strategy.device)
    for d, rows in enumerate(validation.values()):
        for batch in run.feed.batches(rows):
            totals[d, 0] += forward(run, batch)
            totals[d, 1] += batch.supervised
    totals = strategy.sum(totals)
    losses = {f"eval_loss/{d}": float(t[0] / t[1]) for d, t in zip(validation, totals, strict=True)}
    return {"eval_loss": float(totals[:, 0].sum() / totals[:, 1].sum()), **losses}


def forward(run: Run, batch: Batch) -> torch.Tensor:
    """The summed loss of a batch; with sharded parameters every rank must take part."""
    with run.numbers.autocast(run.strategy.device):
        summed: torch.Tensor = run.strategy.module(batch.to(run.strategy.device))
    return summed


def evaluate_suites(run: Run) -> list[dict[str, Any]]:
    """EvalResults of the configured suites on the live weights."""
    from qwen_ray.evaluation.live import evaluate_live

    settings, strategy = run.config.evaluate, run.strategy
    with run.numbers.autocast(strategy.device):
        return [
            evaluate_live(
                run.model,
                run.tokenizer,
                suite,
                device=strategy.device,
                limit=settings.suites_limit,
                data_dir=Path(settings.suites_data_dir) if settings.suites_data_dir else None,
                id=run.config.model.name,
                lockstep=strategy.lockstep,
                inside=strategy.module if strategy.lockstep else None,
            )
            for suite in settings.suites
        ]


def _trace(config: RunConfig, rank: int) -> contextlib.closing[Lines]:
    return contextlib.closing(Lines(Path(config.out) / EXAMPLES.format(rank=rank)))
