"""Packed trials as Ray Tune sees them: ordinary trials, each with its own metrics, checkpoints and end.

A trial is a small process that asks an engine for its reports, one after another. What it knows is only how
many it has had: the rest is in the sweep's folder, so it may die and be started again at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayActorError

from qwen_ray import cluster
from qwen_ray.fsio import read_json, write_json
from qwen_ray.sweeps.journal import DIED, GOES_ON, forget_failures

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.tune import ResultGrid

    from qwen_ray.sweeps.ledger import Ledger
    from qwen_ray.sweeps.searcher import TuneSearcher
    from qwen_ray.sweeps.spec import SweepConfig

STATE = "packed.json"
CPUS = 0.01
"""Of a trial: it only waits. Ray Tune refuses none at all."""
_LEAVE_SECONDS = 10.0


class PackedTrial(tune.Trainable):
    """One trial. ``config["trial"]`` is its index; engine ``index % engines`` trains it."""

    def setup(self, config: dict[str, Any], engines: list[ActorHandle]) -> None:
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # a line for each checkpoint
        self._engines, self._me = engines, ray.get_runtime_context().get_actor_id()
        self._join(config)

    def _join(self, config: dict[str, Any]) -> None:
        self._index, self._had = int(config["trial"]), 0
        self._engine = self._engines[self._index % len(self._engines)]
        ray.get(self._engine.join.remote(self._index))

    def step(self) -> dict[str, Any]:
        """The next report: at the next point of the trial's own length."""
        report = ray.get(self._engine.advance.remote(self._index, self._had, self._me))
        self._had += 1
        return {**report, "done": report["decision"] != GOES_ON}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The adapter as of the last report. What training goes on from stays in the sweep's folder."""
        write_json(Path(checkpoint_dir) / STATE, {"trial": self._index, "reports": self._had})
        if (saved := ray.get(self._engine.saved.remote(self._index))) is not None:
            shutil.copytree(saved, checkpoint_dir, dirs_exist_ok=True)

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._had = int(read_json(Path(checkpoint) / STATE)["reports"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial: to start a process takes seconds."""
        self.cleanup()
        self._join(new_config)
        return True

    def cleanup(self) -> None:
        with contextlib.suppress(RayActorError, GetTimeoutError):  # the engine may be gone before its trials
            ray.get(self._engine.leave.remote(self._index, self._me), timeout=_LEAVE_SECONDS)


def tune_packed(
    spec: SweepConfig, out: Path, *, searcher: TuneSearcher, ledger: Ledger, group: str
) -> ResultGrid:
    """Run the trials that ``searcher`` proposes in packs, in the Tune experiment ``OUT/tune``.

    Trials of which ``ledger`` holds reports give them again and go on from their checkpoints. ``group``: id
    of the sweep, for what tracks its runs. Raises :class:`UserError` for input that no trial can be trained
    on, ``RuntimeError`` if an engine failed for good, and ``KeyboardInterrupt`` at once.
    """
    from qwen_ray.sweeps.engine_actor import engine_actor
    from qwen_ray.training import errors

    trials = spec.trials
    if cluster.started_here():  # another may have an autoscaler, and grow
        needs = {"CPU": trials.cpus, "GPU": trials.gpus or 0.0}
        cluster.check_room(needs, trials.engines, "engines", where="trials.engines")
    errors.clear(out)
    forget_failures(ledger)
    # A snapshot each time a trial drops its older checkpoint is what is wanted.
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    at_once = trials.slots * trials.engines
    searcher.ahead(at_once)
    engines = [engine_actor(spec, out, number=i, group=group) for i in range(trials.engines)]
    searcher.on_error = lambda index: ray.get(engines[index % len(engines)].give_up.remote(index))
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(PackedTrial, engines=engines), {"cpu": CPUS}),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=searcher,
            num_samples=-1,  # the searcher says when it is done
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(out),
            failure_config=tune.FailureConfig(max_failures=trials.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=1),
        ),
    )
    # Engines train while the trials' processes start: these must leave them their CPUs.
    spare = int(ray.cluster_resources().get("CPU", 1) - trials.engines * trials.cpus)
    try:
        grid = fit(tuner, starting=min(at_once, max(1, spare)))
        failures = [f for f in ray.get([engine.failure.remote() for engine in engines]) if f is not None]
        if failures:
            raise failures[0]
    finally:
        if ray.is_initialized():
            for engine in engines:
                ray.kill(engine)
    for result in grid:
        # Of a trial that died before its first report Tune knows no more than its folder's name.
        index = int(Path(result.path).name.rpartition("-")[2])
        if result.error is not None and ledger.trial(index).error == DIED:
            ledger.set_state(index, "failed", str(result.error))
    return grid


def _name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:04d}"


def fit(tuner: tune.Tuner, *, starting: int | None = None) -> ResultGrid:
    """``tuner.fit()``, its table on stderr, with at most so many trials ``starting`` at a time (default: as
    many as may run). Ctrl-C ends the cluster that was started here, and is raised: Tune's own handler would
    wait for every trial to come to its next report."""
    settings = {"TUNE_DISABLE_SIGINT_HANDLER": "1"}
    if starting is not None:
        settings["TUNE_MAX_PENDING_TRIALS_PG"] = str(starting)
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(settings)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return tuner.fit()
        except KeyboardInterrupt:
            cluster.disconnect()
            raise
        finally:
            for name in settings:
                del os.environ[name]
