"""Running a pipeline: its stages in order, each once for the same inputs; killed anywhere, it goes on.

What is done is in storage (state.py). A run that did not end is gone on with by the next start; stages whose
inputs are as before, and whose files are there, are not worked on again. Once a verdict is written down, a
run is only brought to its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.fsio import sha256_json
from qwen_ray.lifecycle import judging, making, stages
from qwen_ray.lifecycle.served import Served
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.lifecycle.stages import Context, Stage
from qwen_ray.lifecycle.state import UNDER_WAY, Done, End, Run, State, now
from qwen_ray.lifecycle.turn import turn
from qwen_ray.registry import PRODUCTION, Registry
from qwen_ray.storage import open_storage

Note = Callable[[str], None]

STAGES = {
    stage.name: stage
    for stage in (
        Stage("collect", stages.collect_inputs, stages.collect),
        Stage("knowledge", stages.knowledge_inputs, stages.knowledge, shared=False),
        Stage("prepare", stages.prepare_inputs, stages.prepare),
        Stage("train", making.train_inputs, making.train),
        Stage("sweep", making.sweep_inputs, making.sweep),
        Stage("register", making.register_inputs, making.register),
        Stage("deploy", judging.deploy_inputs, judging.deploy, shared=False),
        Stage("benchmark", judging.benchmark_inputs, judging.benchmark),
        Stage("compare", judging.compare_inputs, judging.compare, shared=False),
        Stage("promote", judging.promote_inputs, judging.promote, shared=False),
        Stage("archive", judging.archive_inputs, judging.archive, shared=False),
    )
}


@dataclass(frozen=True)
class PipelineResult:
    """What came of a run. ``verdict``: promote, hold or regress; ``unchanged`` where production is already
    what the run would make; empty where it stopped after ``until``. ``version``: ``NAME@N``."""

    run: str
    verdict: str
    version: str | None
    promoted: bool
    reasons: list[str]


def run_pipeline(
    spec: PipelineSpec,
    *,
    note: Note,
    trigger: dict[str, Any] | None = None,
    until: str | None = None,
    reached: Callable[[str], None] = lambda _: None,
) -> PipelineResult:
    """Run the pipeline, or go on with the run that did not end.

    ``trigger`` says why, in the run's record. ``until``: the last stage; the next call goes on after it.
    ``reached`` is told where the run is, between and inside stages.

    Raises :class:`UserError` for bad input, where somebody else runs it (status 409), and where storage or
    the endpoint is away (503); ``RuntimeError`` for a stage that failed. Both name the stage.
    """
    if until is not None and until not in spec.stages:
        raise UserError(f"no stage '{until}'", where="--until", fix=did_you_mean(until, spec.stages))
    state, registry = opened(spec)
    with turn(state, spec.lease_seconds, note) as lease:
        run = _run(state, registry, spec, trigger, note)
        served = Served(spec, note)
        context = Context(spec, state, registry, run, note, reached, lease, served)
        try:
            return _go(context, until)
        finally:
            served.stop()


def opened(spec: PipelineSpec) -> tuple[State, Registry]:
    """What is known of the pipeline, and its registry."""
    return State(open_storage(str(spec.state)), spec.name), Registry(spec.registry)


def _run(
    state: State, registry: Registry, spec: PipelineSpec, trigger: dict[str, Any] | None, note: Note
) -> Run:
    """The run that did not end, unless production was moved by somebody else meanwhile; else a new one."""
    baseline = baseline_of(registry, spec.name)
    known = state.unfinished()
    if known is not None:
        if known.baseline == baseline or judging.promoted(registry, spec.name, f"pipeline run {known.id}"):
            note(f"going on with run {known.id}")
            return known
        reason = f"{PRODUCTION} was {known.baseline} when it began, and is {baseline} now"
        state.finish(known.id, End("superseded", None, False, [reason], now()))
        note(f"run {known.id} ends: {reason}")
    run = state.begin(baseline=baseline, trigger=trigger, spec=spec.model_dump(mode="json"))
    note(f"run {run.id}; the baseline is {baseline}")
    return run


def baseline_of(registry: Registry, name: str) -> str:
    """What is in production now, as ``NAME@VERSION``; ``base``: nothing, so the base model answers."""
    version = registry.aliases(name).get(PRODUCTION) if registry.history(name) else None
    return "base" if version is None else f"{name}@{version}"


def _go(context: Context, until: str | None) -> PipelineResult:
    decided = context.state.stage(context.run.id, "compare") is not None
    for name in context.spec.stages:
        done = context.state.stage(context.run.id, name) if decided else None
        try:
            context.outputs[name] = (done or _stage(context, STAGES[name])).outputs
        except UserError as e:
            context.state.failed(context.run.id, name, e)
            where = f"stage {name}: {e.where}".removesuffix(": ")
            status = 400 if e.status == 409 else e.status  # 409: somebody else runs the pipeline
            raise UserError(e.what, where=where, fix=e.fix, status=status, retry_after=e.retry_after) from e
        except (RuntimeError, FloatingPointError, OSError) as e:
            context.state.failed(context.run.id, name, e)
            raise RuntimeError(f"stage {name}: {e}\nthe same command goes on from there") from e
        if end := ends_early(context, name):
            return _end(context, end)
        if name == until:
            return PipelineResult(context.run.id, UNDER_WAY, None, False, [f"stopped after {name}"])
    verdict = context.outputs["compare"]
    promoted = context.outputs["promote"]["promoted"]
    return _end(context, End(verdict["verdict"], context.version.ref, promoted, verdict["reasons"], now()))


def _stage(context: Context, stage: Stage) -> Done:
    """The stage as it was done before with the same inputs, or done now."""
    inputs = stage.inputs(context)
    recorded = context.state.stage(context.run.id, stage.name)
    found = known(context, stage, inputs, recorded)
    if found is None:
        context.note(stage.name)
        found = _work(context, stage, inputs)
    elif recorded is None:
        context.note(f"{stage.name}: as in run {found.run}")
    if recorded is None or recorded != found:
        context.lease.check()
        context.state.record(context.run.id, found)
        context.reached(f"{stage.name}: recorded")
    return found


def known(context: Context, stage: Stage, inputs: dict[str, Any], recorded: Done | None) -> Done | None:
    """What the stage made of these inputs, in this run or, where that will do, in another; None if there is
    nothing, or what it left is not there any more."""
    if recorded is not None and recorded.hash != sha256_json(inputs):
        recorded = None
    found = recorded or (context.state.made(stage.name, inputs) if stage.shared else None)
    if found is None or not found.there:
        return None
    if stage.name == "register" and not making.there(context, str(found.outputs["version"])):
        return None
    return found


def _work(context: Context, stage: Stage, inputs: dict[str, Any]) -> Done:
    context.reached(f"{stage.name}: begun")
    began = time.monotonic()
    made = stage.work(context, inputs)
    context.reached(f"{stage.name}: worked")
    seconds = round(time.monotonic() - began, 2)
    done = Done(stage.name, inputs, made.outputs, made.files, context.run.id, now(), seconds)
    if stage.shared:
        context.lease.check()
        context.state.keep(done)
        context.reached(f"{stage.name}: kept")
    return done


def ends_early(context: Context, stage: str) -> End | None:
    """How a run ends after ``stage`` where there is nothing to compare; else None."""
    if stage == "sweep" and context.outputs["sweep"]["adapter"] is None:
        return End("hold", None, False, ["no trial of the sweep kept the strengths"], now())
    if stage == "register" and context.version.version == context.baseline:
        ref = context.version.ref
        return End("unchanged", ref, False, [f"{PRODUCTION} is {ref} already, made of the same"], now())
    return None


def _end(context: Context, end: End) -> PipelineResult:
    context.reached("end: begun")
    context.lease.check()
    end = context.state.finish(context.run.id, end)
    context.reached("end: recorded")
    return PipelineResult(context.run.id, end.verdict, end.version, end.promoted, end.reasons)
