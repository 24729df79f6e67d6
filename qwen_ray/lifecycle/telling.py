"""What a pipeline would do, how far it is, and why a run ended as it did: as JSON and in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qwen_ray.lifecycle.lease import Lease
from qwen_ray.lifecycle.pipeline import STAGES, baseline_of, ends_early, known, opened
from qwen_ray.lifecycle.served import Served
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.lifecycle.stages import Context
from qwen_ray.lifecycle.state import Done, Run, State, now

Json = dict[str, Any]
AS_BEFORE, TO_DO, AFTER = "as before", "to do", "after that"


def plan(spec: PipelineSpec) -> Json:
    """Which stages a run would work on now. Nothing is done, but what lies in object stores is fetched.

    What a stage would find is known only once those before it are done, so after the first one to do the
    rest is left open. Where the run would end before the last stage, ``ends`` says how.

    Raises :class:`UserError` for sources that are not there.
    """
    state, registry = opened(spec)
    baseline = baseline_of(registry, spec.name)
    unfinished = state.unfinished()
    run = unfinished or Run("", now(), baseline, None, {})
    decided = unfinished is not None and state.stage(run.id, "compare") is not None
    lease = Lease(state.storage, state.lease, "")
    context = Context(spec, state, registry, run, _silent, _silent, lease, Served(spec, _silent))
    rows: list[Json] = []
    end = None
    for name in spec.stages:
        what, by = AFTER, None
        if all(row["what"] == AS_BEFORE for row in rows):
            recorded = state.stage(run.id, name) if unfinished else None
            stage = STAGES[name]
            done = recorded if decided else known(context, stage, stage.inputs(context), recorded)
            what, by = (TO_DO, None) if done is None else (AS_BEFORE, done.run)
            if done is not None:
                context.outputs[name] = done.outputs
        rows.append({"stage": name, "what": what, "run": by})
        if what == AS_BEFORE and (end := ends_early(context, name)):
            break
    ends = None if end is None else {"verdict": end.verdict, "version": end.version, "reasons": end.reasons}
    plan = {"name": spec.name, "baseline": baseline, "goes_on_with": run.id or None}
    return {**plan, "stages": rows, "ends": ends}


def _silent(_: str) -> None:
    pass


def plan_text(value: Json) -> str:
    """A plan in words."""
    begins = value["goes_on_with"]
    lines = [f"{value['name']}: {f'goes on with run {begins}' if begins else 'a new run'}"]
    lines[0] += f"; the baseline is {value['baseline']}"
    for row in value["stages"]:
        by = f" (run {row['run']})" if row["run"] else ""
        lines.append(f"  {row['stage']:<10}{row['what']}{by}")
    if ends := value["ends"]:
        lines.append(f"it would end there: {ends['verdict']}; {'; '.join(ends['reasons'])}")
    return "\n".join(lines)


def status(spec: PipelineSpec) -> Json:
    """Who runs the pipeline now, and every run."""
    state, _ = opened(spec)
    holder = Lease(state.storage, state.lease, "").holder()
    rows = []
    for id in state.runs():
        run, end = state.run(id), state.end(id)
        done = [stage for stage in spec.stages if state.stage(id, stage) is not None]
        failures = state.failures(id)
        rows.append(
            {
                "run": id,
                "at": run.at,
                "trigger": run.trigger,
                "baseline": run.baseline,
                "done": done,
                "next": next((stage for stage in spec.stages if stage not in done), None)
                if not end
                else None,
                "failure": failures[-1] if failures and not end else None,
                "end": asdict(end) if end else None,
            }
        )
    return {"name": spec.name, "running": holder.owner if holder else None, "runs": rows}


def status_text(value: Json) -> str:
    """The state of a pipeline in words."""
    running = value["running"]
    lines = [f"{value['name']}: {f'{running} runs it' if running else 'nobody runs it'}"]
    for row in value["runs"]:
        if row["end"]:
            said = _ended(row["end"])
        elif row["failure"]:
            said = f"failed in {row['failure']['stage']}: {_why(row['failure'])}"
        else:
            said = f"{len(row['done'])} stages done, next: {row['next']}"
        lines.append(f"  {row['run']}  {row['at']}  {said}")
    return "\n".join(lines) if value["runs"] else f"{lines[0]}; it has no run yet"


def explain(spec: PipelineSpec, run_id: str | None) -> Json:
    """One run, the last unless named: why it began, what each stage found and made, and how it ended."""
    state, registry = opened(spec)
    run = state.run(run_id or (state.runs() or [""])[-1])
    end, before = state.end(run.id), _before(state, run.id)
    stages = []
    for name in spec.stages:
        done = state.stage(run.id, name)
        if done is None:
            continue
        earlier = state.stage(before, name) if before else None
        stages.append(
            {
                "stage": name,
                "made_by": done.run,
                "at": done.at,
                "seconds": done.seconds,
                "changed": _changed(earlier, done),
                "outputs": done.outputs,
            }
        )
    events = [asdict(event) for event in registry.events(spec.name) if _of(event.value, run.id)]
    return {
        "run": run.id,
        "at": run.at,
        "trigger": run.trigger,
        "baseline": run.baseline,
        "stages": stages,
        "failures": state.failures(run.id),
        "end": asdict(end) if end else None,
        "events": events,
    }


def _before(state: State, run: str) -> str | None:
    runs = state.runs()
    place = runs.index(run)
    return runs[place - 1] if place else None


def _changed(earlier: Done | None, done: Done) -> list[str]:
    """Keys of the inputs that are not as in the run before."""
    if earlier is None:
        return []
    return [key for key in done.inputs if key != "run" and earlier.inputs.get(key) != done.inputs[key]]


def _of(value: Json, run: str) -> bool:
    return value.get("run") == run or run in str(value.get("by")) or run in str(value.get("reason"))


def explain_text(value: Json) -> str:
    """A run in words."""
    trigger = value["trigger"]
    lines = [f"run {value['run']}, begun {value['at']}: {trigger if trigger else 'started by hand'}"]
    lines.append(f"baseline: {value['baseline']}")
    for row in value["stages"]:
        made = f"{row['seconds']:g} s" if row["made_by"] == value["run"] else f"as in run {row['made_by']}"
        changed = f"; changed since the run before: {', '.join(row['changed'])}" if row["changed"] else ""
        lines.append(f"  {row['stage']:<10}{made}{changed}")
    lines += [f"failed in {f['stage']} at {f['at']}: {_why(f)}" for f in value["failures"]]
    if value["end"]:
        lines.append(_ended(value["end"]))
        lines += [f"  - {reason}" for reason in value["end"]["reasons"]]
    else:
        lines.append("it has not ended")
    for event in value["events"]:
        about = {key: event["value"].get(key) for key in ("alias", "version", "verdict", "reason")}
        said = ", ".join(f"{key} {what}" for key, what in about.items() if what is not None)
        lines.append(f"registry: {event['at'][:19]} {event['kind']} of {event['name']}: {said}")
    return "\n".join(lines)


def _why(failure: Json) -> str:
    """The first line of a failure; its kind where it says nothing."""
    return str(next(iter(failure["error"].splitlines()), failure["kind"]))


def _ended(end: Json) -> str:
    version = f" {end['version']}" if end["version"] else ""
    return f"{end['verdict']}{version}{', promoted' if end['promoted'] else ''}"
