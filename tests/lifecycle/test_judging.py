"""What decides a benchmark, what goes to the archive, and what a plan knows: without a model or a server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.evaluation import suites
from qwen_ray.lifecycle import judging, telling
from qwen_ray.lifecycle.lease import Lease
from qwen_ray.lifecycle.pipeline import STAGES, baseline_of, opened
from qwen_ray.lifecycle.served import Served
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.lifecycle.stages import Context
from qwen_ray.lifecycle.state import Done, now
from qwen_ray.registry import PRODUCTION
from tests.conftest import ROOT
from tests.lifecycle.test_pipeline_spec import written
from tests.lifecycle.watching import evaluation, publish


def context_of(spec: PipelineSpec) -> Context:
    """A run that has just begun, with the lease of its pipeline."""
    state, registry = opened(spec)
    run = state.begin(baseline=baseline_of(registry, spec.name), trigger=None, spec={})
    lease = Lease(state.storage, state.lease, "test")
    assert lease.acquire()
    return Context(spec, state, registry, run, lambda _: None, lambda _: None, lease, Served(spec, print))


def judged(folder: Path, **changes: Any) -> Context:
    """Versions 1 to 3 of ``sums`` were in production one after another, and 3 is."""
    context = context_of(PipelineSpec.read(written(folder, **changes)))
    for number in (1, 2, 3):
        publish(context.registry, folder, "sums", number)
        context.registry.point("sums", PRODUCTION, number, reason="test")
    context.outputs |= {"register": {"version": 3}, "compare": {"verdict": "promote"}}
    return context


@pytest.mark.parametrize(("keep", "archived"), [(0, [1, 2]), (1, [1]), (2, []), (3, []), (9, [])])
def test_the_last_ones_that_were_in_production_stay(tmp_path: Path, keep: int, archived: list[int]) -> None:
    context = judged(tmp_path, keep=keep)
    assert judging.archive(context, {"promoted": True}).outputs == {"archived": archived}
    assert context.registry.archived("sums") == archived


def test_what_decides_a_benchmark(tmp_path: Path) -> None:
    """A limit of latency has to be measured; what it is does not decide."""
    context = judged(tmp_path)

    def inputs(**changes: Any) -> dict[str, Any]:
        context.spec = PipelineSpec.read(written(tmp_path, **changes))
        return judging.benchmark_inputs(context)

    assert inputs() == inputs(gate={"min_gain": 0.5}) == inputs(endpoint={"url": "http://127.0.0.1:1"})
    timed = inputs(gate={"max_latency_ratio": 2})
    assert timed == inputs(gate={"max_latency_ratio": 3}) != inputs()
    assert inputs(endpoint={"serve": {"threads": 2}}) != inputs()


def test_suites_in_folders_of_the_same_name_keep_their_results_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / one / "suite" for one in ("first", "second")]
    for place in places:
        shutil.copytree(suites.folder("tiny"), place)
        (place / "notes.txt").write_text(place.parent.name)
    bench = {"suites": [str(place) for place in places]}
    context = judged(tmp_path, benchmark=bench, endpoint={"url": "http://127.0.0.1:1"})
    written_to: list[Path] = []

    def evaluate(url: str, models: list[str], suite: str, *, out: Path, **_: Any) -> None:
        """Stands for a server that answers."""
        out.mkdir(parents=True, exist_ok=True)
        for model in models:
            written_to.append(out / judging.result_file(model))
            judging.write_json(written_to[-1], evaluation())

    monkeypatch.setattr(judging, "evaluate_many", evaluate)
    made = judging.benchmark(context, judging.benchmark_inputs(context))
    assert len(set(written_to)) == len(written_to) == len(made.files)


def plan_of(spec: PipelineSpec, outputs: dict[str, Any]) -> dict[str, Any]:
    """The plan of a run whose stages up to those in ``outputs`` are done."""
    context = context_of(spec)
    for name in spec.stages[: spec.stages.index(list(outputs)[-1]) + 1]:
        inputs = STAGES[name].inputs(context)
        if name in outputs:
            done = Done(name, inputs, outputs[name], {}, context.run.id, now(), 0.0)
        else:
            made = STAGES[name].work(context, inputs)
            done = Done(name, inputs, made.outputs, made.files, context.run.id, now(), 0.0)
        context.state.record(context.run.id, done)
        context.outputs[name] = done.outputs
    return telling.plan(spec)


def test_a_plan_ends_where_a_sweep_had_no_winner(tmp_path: Path) -> None:
    places = [f"work={tmp_path / 'work'}", f"registry={tmp_path / 'registry'}"]
    spec = PipelineSpec.read(ROOT / "pipelines" / "sweep-demo.yaml", sets=places)
    plan = plan_of(spec, {"sweep": {"adapter": None}})
    assert [row["stage"] for row in plan["stages"]] == ["collect", "prepare", "sweep"]
    assert "it would end there: hold; no trial of the sweep kept" in telling.plan_text(plan)


def test_a_plan_ends_where_the_candidate_is_in_production(tmp_path: Path) -> None:
    spec = PipelineSpec.read(written(tmp_path, data={}, embedded_data=True))
    _, registry = opened(spec)
    version = publish(registry, tmp_path, "sums", 1)
    registry.point("sums", PRODUCTION, 1, reason="test")
    trained = {"adapter": str(version.path)}
    plan = plan_of(spec, {"train": trained, "register": {"version": 1}})
    assert [row["stage"] for row in plan["stages"]] == ["collect", "prepare", "train", "register"]
    assert plan["ends"]["verdict"] == "unchanged"


def test_a_failure_that_says_nothing_is_told_by_its_kind(tmp_path: Path) -> None:
    spec = PipelineSpec.read(written(tmp_path))
    context = context_of(spec)
    context.state.failed(context.run.id, "collect", RuntimeError())
    assert "failed in collect: RuntimeError" in telling.status_text(telling.status(spec))
    assert "failed in collect at" in telling.explain_text(telling.explain(spec, None))
