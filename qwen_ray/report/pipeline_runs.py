"""What the pipelines' state says of their runs, as rows for the registry's site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_ray.errors import UserError

if TYPE_CHECKING:
    from qwen_ray.lifecycle.state import State


@dataclass(frozen=True)
class RunRow:
    """One run of a pipeline. ``seconds`` is what the stages took that it did itself."""

    id: str
    at: str
    trigger: str
    stages: list[str]
    verdict: str
    version: str | None
    promoted: bool
    reasons: list[str]
    failures: list[str]
    seconds: float


def pipeline_runs(location: str | Path) -> dict[str, list[RunRow]]:
    """Pipeline name to its runs, oldest first, from the folder or URI of their state.

    Raises :class:`UserError` where there is none.
    """
    from qwen_ray.lifecycle.state import State
    from qwen_ray.storage import open_storage

    storage = open_storage(location)
    parts = [key.split("/") for key in storage.keys("")]
    names = sorted({p[0] for p in parts if len(p) == 4 and p[1] == "runs" and p[3] == "run.json"})
    if not names:
        raise UserError(
            "no pipeline has run here", where=str(location), fix="name the `state` of a pipeline (WORK/state)"
        )
    states = [State(storage, name) for name in names]
    return {state.name: [_row(state, run) for run in state.runs()] for state in states}


def _row(state: State, ident: str) -> RunRow:
    run, end = state.run(ident), state.end(ident)
    keys = state.storage.keys(f"{state.name}/runs/{ident}/stages/")
    names = [key.rpartition("/")[2].removesuffix(".json") for key in keys]
    done = [found for name in names if (found := state.stage(ident, name)) is not None]
    done.sort(key=lambda stage: stage.at)
    trigger = run.trigger or {}
    return RunRow(
        id=ident,
        at=run.at,
        trigger=", ".join(f"{key}: {value}" for key, value in trigger.items()) or "started by hand",
        stages=[stage.stage for stage in done],
        verdict=end.verdict if end else "",
        version=end.version if end else None,
        promoted=end.promoted if end else False,
        reasons=end.reasons if end else [],
        failures=[f"{f['stage']}: {f['error']}" for f in state.failures(ident)],
        seconds=sum(stage.seconds for stage in done if stage.run == ident),
    )
