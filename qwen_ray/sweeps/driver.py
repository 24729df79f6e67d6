"""A sweep from outside: its folder, the trials in Ray Tune, and the outcome.

What is known is in the folder (``sweep.yaml``, ``sweep.json``, ``trials/``), each file whole or absent. A
sweep that was killed is resumed by a new Tune experiment in which recorded trials report again what is
recorded, at once, and the others go on from their checkpoints.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray import cluster
from qwen_ray.config import RunConfig
from qwen_ray.fsio import read_json, write_json
from qwen_ray.sweeps.folder import SOURCES, STATE, check_state, open_sweep, prepared, with_data
from qwen_ray.sweeps.ledger import BASE_LOSSES, Ledger
from qwen_ray.sweeps.once import on_cluster
from qwen_ray.sweeps.spec import SweepConfig, trial_config
from qwen_ray.training.driver import locked

if TYPE_CHECKING:
    from qwen_ray.sweeps.proposals import Source
    from qwen_ray.sweeps.simplex import Mix

log = logging.getLogger(__name__)

REGISTRY = "registry"
_SCORER_CPU, _SCORER_GPU = 0.5, 0.1
"""What scores mixes shares the engine's GPU, which is idle meanwhile; of a CPU the trials take a part."""
Note = Callable[[str], None]


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has ended. ``result`` is what ``OUT/result.json`` holds (docs/sweeps.md)."""

    out: Path
    result: dict[str, Any]

    @property
    def winner(self) -> int | None:
        """The trial that won; None if none kept the strengths."""
        index: int | None = self.result["winner"]
        return index


def run_sweep(
    spec: SweepConfig,
    *,
    resume: bool,
    note: Note,
    registry: Path | str | None = None,
    address: str | None = None,
) -> SweepResult:
    """Search, confirm and register as ``spec`` says; ``resume`` goes on with the sweep in its folder, and
    starts it where there is none.

    ``registry``: where the winner is published (``OUT/registry``). ``address``: Ray cluster to join. Raises
    :class:`UserError` for bad input, ``RuntimeError`` when trials could not be run, ``KeyboardInterrupt``
    when it was interrupted.
    """
    spec = prepared(spec)
    out = Path(spec.out)
    check_state(out, resume)
    with locked(out):
        spec, sources = with_data(spec)
        sweep = open_sweep(out, spec, sources)
        if resume and sweep["state"] == "new":
            note("no sweep to resume here: starting it")
        if sweep["state"] == "done":
            note("this sweep is done")
            return SweepResult(out, read_json(out / "result.json"))
        try:
            result = _run(spec, sweep, registry=registry or out / REGISTRY, address=address, note=note)
        except Exception as e:
            known = read_json(out / STATE)
            during = known.get("during", known["state"])
            write_json(out / STATE, {**known, "state": "failed", "during": during, "error": str(e)[:2000]})
            raise
        return SweepResult(out, result)


def _run(
    spec: SweepConfig, sweep: dict[str, Any], *, registry: Path | str, address: str | None, note: Note
) -> dict[str, Any]:
    out = Path(spec.out)

    def enter(state: str) -> None:
        kept = {key: sweep[key] for key in ("id", "version", SOURCES)}
        write_json(out / STATE, {**kept, "state": state})

    note("starting Ray on this machine" if cluster.prepare(address) == "local" else "joining the cluster")
    cluster.connect(address, num_cpus=_cpus(spec))
    spec = _with_gpus(spec, _gpus(spec))
    if sweep.get("during", sweep["state"]) != "confirming":
        enter("searching")
        how = "mixes by merged experts" if spec.mix_search else f"{spec.search.trials} by {spec.search.name}"
        note(f"{spec.trials.kind} trials, {how}")
        shutil.rmtree(out / "tune", ignore_errors=True)  # Tune's view is made anew from the ledger
        _search(spec, out, sweep["id"])
        _check_ended(out)
        enter("confirming")
    from qwen_ray.sweeps.outcome import conclude

    if spec.objective.confirm is not None:
        note("benchmarking the base, the reference and the best trials")
    result = conclude(spec, out, sweep_id=sweep["id"], registry=registry)
    _report(out, note)
    enter("done")
    return result


def _search(spec: SweepConfig, out: Path, sweep_id: str) -> None:
    """Run all trials in Ray Tune, as far as they have not been run."""
    from qwen_ray.sweeps.searcher import TuneSearcher

    ledger, group = Ledger(out), f"{spec.name}-{sweep_id}"
    if spec.mix_search is not None and spec.trials.gpus == 1:
        spec = _with_gpus(spec, 1 - _SCORER_GPU)
    searcher = TuneSearcher(_source(spec, ledger))
    if spec.trials.kind == "packed":
        from qwen_ray.sweeps.trial import tune_packed

        tune_packed(spec, out, searcher=searcher, ledger=ledger, group=group)
    else:
        from qwen_ray.sweeps.plain import tune_plain

        tune_plain(spec, out, searcher=searcher, base=_base(spec, out), group=group)


def _source(spec: SweepConfig, ledger: Ledger) -> Source:
    """Where the trials come from."""
    from qwen_ray.sweeps.proposals import Proposals

    if spec.mix_search is None:
        return Proposals(spec, ledger)
    from qwen_ray.sweeps.mixsearch import MixSearch

    settings, run = spec.mix_search, trial_config(spec, {}, out=spec.out)
    gpus = _SCORER_GPU if spec.trials.gpus else 0.0

    def score(experts: Mapping[str, str], mixes: Sequence[Mix]) -> dict[str, Any]:
        asked = run, dict(experts), list(mixes), settings.held_out_tokens
        return on_cluster(spec, _scored, *asked, cpus=_SCORER_CPU, gpus=gpus)

    return MixSearch(spec, ledger, score)


def _scored(
    run: RunConfig, experts: dict[str, str], mixes: list[Mix], held_out_tokens: int
) -> dict[str, Any]:
    """Scores of mixes by merged experts, in a process of their own."""
    from qwen_ray.sweeps.mixproxy import score_folders
    from qwen_ray.training.packed import Pack

    return score_folders(Pack(run), run, experts, mixes, held_out_tokens=held_out_tokens)


def _with_gpus(spec: SweepConfig, gpus: float) -> SweepConfig:
    """The sweep with so many GPUs an engine."""
    return spec.model_copy(update={"trials": spec.trials.model_copy(update={"gpus": gpus})})


def _base(spec: SweepConfig, out: Path) -> dict[str, float]:
    """Held-out losses of the base, computed once, where a trial would be."""
    from qwen_ray.sweeps.plain import base_losses

    if not (out / BASE_LOSSES).is_file():
        write_json(out / BASE_LOSSES, on_cluster(spec, base_losses, trial_config(spec, {}, out=out)))
    return dict(read_json(out / BASE_LOSSES))


def _cpus(spec: SweepConfig) -> int:
    """Logical CPUs of a cluster started for the sweep. Packed trials take a hundredth each."""
    if spec.trials.kind == "packed":
        return math.ceil(spec.trials.engines * spec.trials.cpus) + 1
    run = trial_config(spec, {}, out=spec.out).cluster
    return math.ceil(run.cpus_per_worker * max(1, run.workers or 0) * (spec.trials.max_concurrent or 1))


def _gpus(spec: SweepConfig) -> float:
    """Of an engine, and of what is computed once: as asked for, else 1 where there is one for each engine."""
    import ray

    if spec.trials.gpus is not None:
        return spec.trials.gpus
    have = ray.cluster_resources().get("GPU", 0)
    engines = spec.trials.engines if spec.trials.kind == "packed" else 1
    if 0 < have < engines:
        log.warning("%g GPUs for %d engines: training on CPUs; ask for fewer trials.engines", have, engines)
    return float(have >= engines)


def _check_ended(out: Path) -> None:
    trials = Ledger(out).trials()
    if errors := [t for t in trials if t.state == "failed"]:
        log.warning(
            "%d of %d trials failed; trial %d: %s", len(errors), len(trials), errors[0].index, errors[0].error
        )
    if len(errors) == len(trials):
        raise RuntimeError(f"every trial failed, the first: {errors[0].error if errors else 'none was made'}")
    if unfinished := [str(t.index) for t in trials if t.state in {"new", "running"}]:
        raise RuntimeError(f"trials {', '.join(unfinished)} did not end; --resume goes on with them")


def _report(out: Path, note: Note) -> None:
    from qwen_ray.report.sweep import write_sweep_report

    note(f"report: {write_sweep_report(out)}")
