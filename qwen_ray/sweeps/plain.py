"""Plain trials: each a training run of its own, with or without Ray Train workers, run by Ray Tune.

For what cannot share a base with other trials: full fine-tuning, several workers, other bases. A trial
reports when its run has evaluated at one of the sweep's points; Ray's ASHA (arXiv 1810.05934) decides, and
the driver writes report and decision into the ledger. A trial that is started again reports what is recorded
first and then goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from qwen_ray.config import (
    ClusterConfig,
    ComputeConfig,
    MethodConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
)
from qwen_ray.errors import UserError
from qwen_ray.sweeps.ledger import Ledger, State
from qwen_ray.sweeps.objective import FAILED, judge
from qwen_ray.sweeps.spec import REFERENCE, SweepConfig, points, trial_config
from qwen_ray.sweeps.trial import fit
from qwen_ray.training.driver import run_training
from qwen_ray.training.tracking import read_metrics

log = logging.getLogger(__name__)

_CONTROLLER, _LEFTOVER_SECONDS = "TrainController", 30.0
"""Ray Train's actor that reserves what a run's workers need; how long to wait till the stopped ones end."""
_DRIVER_MEMORY = 256 * 1024**2
"""What the driver of a run with workers reserves, in bytes. A CPU would be one that its workers lack."""
_REPORTED = (
    "step", "total_steps", "share", "loss", "gain", "violation", "feasible", "score", "rung", "tokens",
    "seconds",
)  # fmt: skip


def tune_plain(spec: SweepConfig, out: Path, *, searcher: Any, base: dict[str, float], group: str) -> Any:
    """Run the trials that ``searcher`` proposes, each in ``OUT/trials/NNNN``; Tune's ResultGrid.

    ``base``: held-out losses without training (:func:`base_losses`); ``group``: wandb's group of the trials.
    Raises :class:`UserError` where the cluster cannot hold a trial.
    """
    needs, at_once = _room(spec, trial_config(spec, {}, out=str(out)))
    trainable = tune.with_parameters(run_trial, spec=spec, out=out, base=base, group=group)
    tuner = tune.Tuner(
        tune.with_resources(trainable, needs),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=searcher,
            scheduler=Asha(spec, Ledger(out)),
            num_samples=-1,
            max_concurrent_trials=at_once,
            trial_name_creator=lambda trial: f"trial-{trial.config['trial']:04d}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(out),
            failure_config=tune.FailureConfig(max_failures=spec.trials.max_failures),
        ),
    )
    try:
        return fit(tuner)
    finally:
        _remove_leftovers()


def _remove_leftovers() -> None:
    """Give back what runs with workers held when they were stopped.

    Ray Train leaves that to a process which looks for the cluster by itself, and gives up where there are
    several on the machine (Ray 2.60). All trials have ended by now, and a placement group's id ends with that
    of the job, so whatever there is of this job is left over. A run's controller may outlive its trial by a
    moment, and would reserve again what is taken from it: so until none is left.
    """
    import ray
    from ray._private.state import actors
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if not ray.is_initialized():  # after Ctrl-C
        return
    job = ray.get_runtime_context().get_job_id()
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while True:
        controllers = any(
            actor["ActorClassName"] == _CONTROLLER and actor["State"] != "DEAD"
            for actor in actors(job_id=ray.JobID.from_hex(job)).values()
        )
        groups = [
            group["placement_group_id"]
            for group in placement_group_table().values()
            if group["state"] != "REMOVED" and group["placement_group_id"].endswith(job)
        ]
        for group in groups:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))
        if not (controllers or groups):
            return
        if time.monotonic() > deadline:
            log.warning("after %g s runs that were stopped still hold resources", _LEFTOVER_SECONDS)
            return
        time.sleep(0.2)


def _room(spec: SweepConfig, run: RunConfig) -> tuple[dict[str, float], int]:
    """What Tune reserves for a trial, and how many trials the cluster can hold at once.

    Ray would wait for ever for a trial that does not fit; and runs with workers that fit one by one may, all
    started, each wait for what another holds. So their number is bounded.
    """
    import ray

    have = ray.cluster_resources()
    workers = run.cluster.workers or 0
    gpus = run.cluster.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if have.get("GPU", 0) >= max(1, workers) else 0.0
    each = {"CPU": run.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    whole = {name: amount * max(1, workers) for name, amount in each.items()}
    holds = min(math.floor(have.get(name, 0) / amount) for name, amount in whole.items())
    if not holds:
        raise UserError(
            f"a trial needs {_words(whole)}; the cluster has "
            f"{_words({name: have.get(name, 0) for name in whole})}",
            where="run.cluster",
            fix="ask for fewer workers or less for each, or add nodes",
        )
    at_once = min(holds, spec.trials.max_concurrent or holds)
    return ({"memory": _DRIVER_MEMORY} if workers else each), at_once


def _words(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


class Asha(AsyncHyperBandScheduler):
    """Ray's ASHA with the sweep's rungs. Writes every report into the ledger, with what was decided.

    ASHA's rungs are powers of eta of its time; a trial's k-th report is at time ``eta^k`` whatever its share,
    so its rungs are the sweep's. The reference is never stopped early; nor is any, where stopping is none.
    """

    def __init__(self, spec: SweepConfig, ledger: Ledger) -> None:
        rungs, eta = len(points(spec)) - 1, spec.stopping.eta
        super().__init__(time_attr="level", max_t=eta**rungs, grace_period=1, reduction_factor=eta)
        self._ledger, self._stops = ledger, spec.stopping.name != "none"

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        index = trial.config["trial"]
        known = self._ledger.reports(index)
        if not known or known[-1]["decision"] == "continue":
            self._ledger.set_state(index, "running")

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decided: str = super().on_trial_result(tune_controller, trial, result)
        index = trial.config["trial"]
        if recorded := result["recorded"]:  # decided before
            if recorded == "continue":
                return TrialScheduler.CONTINUE
            if self._ledger.trial(index).state == "running":  # the driver died before it said so
                self._end(index, recorded, result["error"])
            return TrialScheduler.STOP
        worse = decided == TrialScheduler.STOP and self._stops and index != REFERENCE
        if not result["error"] and result["share"] >= 1:
            decision = "done"
        else:
            decision = "stop" if result["error"] or worse else "continue"
        losses = {k: v for k, v in result.items() if k.startswith("eval_loss")}
        report = {k: result[k] for k in _REPORTED} | losses | {"decision": decision}
        if result["error"]:
            report["error"] = result["error"]
        self._ledger.append_report(index, report)
        if decision == "continue":
            return TrialScheduler.CONTINUE
        self._end(index, decision, result["error"])
        return TrialScheduler.STOP

    def _end(self, index: int, decision: str, error: str | None) -> None:
        state: State = "failed" if error else "done" if decision == "done" else "stopped"
        self._ledger.set_state(index, state, error)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_error(tune_controller, trial)
        lines = str(trial.get_error() or "the trial's process died").strip().splitlines()
        self._ledger.set_state(trial.config["trial"], "failed", lines[-1][:2000])


def run_trial(
    config: dict[str, Any], *, spec: SweepConfig, out: Path, base: dict[str, float], group: str
) -> None:
    """What a trial's process runs. ``config`` is Tune's; the values are in the ledger."""
    ledger = Ledger(out)
    trial = ledger.trial(config["trial"])
    known = ledger.reports(trial.index)
    for number, report in enumerate(known):
        tune.report(
            {**report, "level": spec.stopping.eta**number, "recorded": report["decision"]}
            | {"error": report.get("error")}
        )
    if known and known[-1]["decision"] != "continue":
        return
    run = trial_config(spec, trial.values, out=str(trial.folder))
    run.evaluate.at = points(spec)
    run.cluster.workers = run.cluster.workers or 0
    reporter = _Reporter(spec, trial.folder, base, known)
    try:
        for row in read_metrics(trial.folder):  # those that an earlier start made and nobody heard of
            reporter(row)
        stopped = run_training(run, progress=reporter, group=group).stopped
    except (UserError, FloatingPointError) as e:  # the same at every try
        reporter.failed(str(e))
    else:
        if stopped is None:
            reporter.finished()
        else:  # it forgot more than run.evaluate allows: whatever its gain, it is not to win
            reporter.failed(stopped)


class _Reporter:
    """Turns rows of metrics into reports to Tune, one at each point of the sweep."""

    def __init__(
        self, spec: SweepConfig, folder: Path, base: dict[str, float], known: list[dict[str, Any]]
    ) -> None:
        self._spec, self._folder, self._base = spec, folder, base
        self._points, self._reached = points(spec), len(known)
        self._before = known[-1]["seconds"] if known else 0.0
        self._started = time.monotonic()

    def __call__(self, row: dict[str, Any]) -> None:
        """Report ``row`` if it is the evaluation at the next rung."""
        if "eval_loss" not in row or self._reached + 1 == len(self._points):
            return
        if row["step"] == max(1, round(self._points[self._reached] * row["total_steps"])):
            self._reached += 1
            self._report(row, row["step"] / row["total_steps"], rung=self._reached - 1)

    def finished(self) -> None:
        """Report the end, once the run has left its artifact: Tune ends the process on it."""
        row = next(row for row in reversed(read_metrics(self._folder)) if "eval_loss" in row)
        self._reached = len(self._points)
        self._report(row, 1.0, rung=None)

    def failed(self, error: str) -> None:
        """Report an error that another try would only repeat."""
        rows = read_metrics(self._folder)
        row: dict[str, Any] = rows[-1] if rows else {"step": 0, "total_steps": 1, "loss": None}
        share = row["step"] / row["total_steps"]
        self._send({**self._progress(row), **vars(FAILED), "share": share, "rung": None, "error": error})

    def _report(self, row: dict[str, Any], share: float, *, rung: int | None) -> None:
        losses = {k: v for k, v in row.items() if k.startswith("eval_loss")}
        judged = vars(judge(losses, self._base, self._spec.objective))
        self._send({**self._progress(row), **losses, **judged, "share": share, "rung": rung, "error": None})

    def _progress(self, row: dict[str, Any]) -> dict[str, Any]:
        rows = [r for r in read_metrics(self._folder) if r["step"] <= row["step"]]
        return {
            "step": row["step"],
            "total_steps": row["total_steps"],
            "loss": row["loss"],
            "tokens": sum(r["tokens"] for r in rows),
            "seconds": self._before + time.monotonic() - self._started,
        }

    def _send(self, report: dict[str, Any]) -> None:
        level = self._spec.stopping.eta ** max(0, self._reached - 1)
        tune.report({**report, "level": level, "recorded": None})


def base_losses(config: RunConfig) -> dict[str, float]:
    """Held-out loss of each domain, ``eval_loss/DOMAIN``, before any training: what gain is measured from.

    It is what a run would measure before its first step, its base in 4 bits where the method has it so. Runs
    where a worker would, so it imports torch.
    """
    from qwen_ray.training import loop, run, strategy

    held = {"name", "quantization", "double_quantization"} if config.method.name == "qlora" else set()
    bare = config.model_copy(
        update={
            "method": MethodConfig.model_validate(config.method.model_dump(include=held)),
            "optim": OptimConfig(batch_size=config.optim.batch_size),
            "strategy": StrategyConfig(name="ddp"),
            "compute": ComputeConfig(attention=config.compute.attention),
            "cluster": ClusterConfig(workers=0),
        }
    )
    return loop.validation_loss(run.set_up(bare, strategy.make("ddp")))
