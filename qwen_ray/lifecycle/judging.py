"""The stages of a pipeline from a registered version on: deploy, benchmark, compare, promote, archive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_ray import models
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.compare import compare as compared
from qwen_ray.evaluation.gate import adapter_size, judge
from qwen_ray.evaluation.harness import read_result
from qwen_ray.evaluation.many import evaluate_many, result_file
from qwen_ray.fsio import sha256_json, write_json
from qwen_ray.lifecycle.stages import Context, Json, Made
from qwen_ray.lifecycle.state import Done, digest, hashes, now
from qwen_ray.registry import CANDIDATE, PRODUCTION, AdapterVersion, Event, Registry
from qwen_ray.registry.records import record_evaluation, record_verdict

EVALUATION = "evaluation"
"""Kind of the registry's events, and what a result is remembered as."""


# -- deploy


def deploy_inputs(context: Context) -> Json:
    return {"version": context.version.ref}


def deploy(context: Context, inputs: Json) -> Made:
    """The version becomes the candidate, which the endpoint serves when it is asked for."""
    version = context.version
    if version.version in context.registry.archived(version.name):
        context.registry.restore(version.name, version.version, reason=f"made again by {context.by}")
    if context.registry.aliases(version.name).get(CANDIDATE) != version.version:
        context.lease.check()
        context.registry.point(
            version.name, CANDIDATE, version.version, reason="to be benchmarked", by=context.by
        )
    context.reached("deploy: pointed")
    if context.spec.endpoint.url is not None:
        context.served.check(_model(context, version))
    return Made({"alias": CANDIDATE})


def _model(context: Context, version: AdapterVersion | None) -> str:
    """A version's id on the API; the base's for None."""
    base = context.spec.model.id
    return base if version is None else f"{base}:{version.ref}"


# -- benchmark


def benchmark_inputs(context: Context) -> Json:
    timed = context.spec.gate.max_latency_ratio is not None
    return {
        "results": [_question(context, suite, v) for suite in _suites(context) for v in _two(context)],
        "latency": context.spec.benchmark.latency_requests if timed else None,
    }


def _two(context: Context) -> list[AdapterVersion | None]:
    """What is compared: what was in production (None: the base model), and the candidate."""
    name, number = context.spec.name, context.baseline
    return [None if number is None else context.registry.get(name, number), context.version]


def _suites(context: Context) -> list[str]:
    return context.spec.benchmark.suites


def _question(context: Context, suite: str, version: AdapterVersion | None) -> Json:
    """All that decides a result."""
    loaded, settings = suites.load(suite), context.spec.benchmark
    return {
        "model": _model(context, version),
        "base": models.fingerprint(context.spec.model),
        "adapter": None if version is None else version.digest,
        "suite": [loaded.name, loaded.version, digest(loaded.folder)],
        "settings": [settings.limit, settings.num_fewshot, settings.data_dir],
        "serve": context.spec.endpoint.serve,
    }


def benchmark(context: Context, inputs: Json) -> Made:
    """Every suite, production and candidate together; what is known of a model is not asked again."""
    settings = context.spec.benchmark
    files: list[list[str]] = []
    for suite in _suites(context):
        versions = _two(context)
        known = {v and v.ref: _known(context, suite, v) for v in versions}
        missing = [v for v in versions if known[v and v.ref] is None]
        if missing:
            asked = [_model(context, v) for v in missing]
            context.note(f"  {Path(suite).name}: {' and '.join(asked)}")
            # Two suites may lie in folders of the same name.
            folder = f"{Path(suite).name}-{digest(suites.load(suite).folder)[:8]}"
            out = context.spec.folder("evaluations", sha256_json(inputs)[:16], folder)
            evaluate_many(
                context.served.url,
                asked,
                suite,
                out=out,
                concurrency=settings.concurrency,
                note=context.note,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                data_dir=Path(settings.data_dir) if settings.data_dir else None,
            )
            context.reached("benchmark: answered")
            for version, model in zip(missing, asked, strict=True):
                known[version and version.ref] = _kept(context, suite, version, out / result_file(model))
        for version in versions:
            if version is not None:
                _record(context.registry, version, Path(str(known[version.ref])))
        context.reached("benchmark: suite done")
        files.append([str(known[v and v.ref]) for v in versions])
    latency = None
    if (requests := inputs["latency"]) is not None:
        latency = context.served.latency([_model(context, v) for v in _two(context)], requests)
    return Made({"results": files, "latency": latency}, hashes(*(Path(f) for two in files for f in two)))


def _known(context: Context, suite: str, version: AdapterVersion | None) -> str | None:
    """The file of a result that an earlier benchmark left."""
    done = context.state.made(EVALUATION, _question(context, suite, version))
    return str(done.outputs["file"]) if done is not None and done.there else None


def _kept(context: Context, suite: str, version: AdapterVersion | None, file: Path) -> str:
    asked = _question(context, suite, version)
    done = Done(EVALUATION, asked, {"file": str(file)}, hashes(file), context.run.id, now(), 0.0)
    context.lease.check()
    context.state.keep(done)
    return str(file)


def _record(registry: Registry, version: AdapterVersion, file: Path) -> None:
    """In the version's lineage, once."""
    result = read_result(file)
    sha256 = sha256_json(result)
    events = registry.events(version.name, version=version.version, kind=EVALUATION)
    if not any(event.value.get("sha256") == sha256 for event in events):
        record_evaluation(registry, version, result, location=str(file))


# -- compare


def compare_inputs(context: Context) -> Json:
    results = context.outputs["benchmark"]
    return {
        "run": context.run.id,
        "results": [[digest(Path(file)) for file in two] for two in results["results"]],
        "latency": results["latency"],
        "gate": context.spec.gate.model_dump(mode="json"),
        "targets": context.spec.benchmark.targets,
    }


def compare(context: Context, inputs: Json) -> Made:
    """The verdict, recorded in the version's lineage once for each run."""
    version, gate = context.version, context.spec.gate
    comparisons = [
        _compared(context, *(read_result(Path(file)) for file in two))
        for two in context.outputs["benchmark"]["results"]
    ]
    latency = inputs["latency"]
    verdict = judge(
        gate,
        comparisons,
        latency=None if latency is None else (latency[0], latency[1]),
        size=adapter_size(version.path),
    )
    if verdict["verdict"] == "promote" and (back := rolled_back(context.registry, version)):
        verdict["verdict"] = "hold"
        verdict["reasons"].append(
            f"{version.ref} was in production and was rolled back on {back.at[:10]} "
            f"({back.value['reason']}): a person decides about it"
        )
    for rows in ("categories", "controls"):
        verdict[rows] = [
            {**row, "suite": one["baseline"]["suite"]} for one in comparisons for row in one[rows]
        ]
    file = context.spec.folder("comparisons", f"{context.run.id}.json")
    write_json(file, {**verdict, "comparisons": comparisons, "latency": latency})
    events = context.registry.events(version.name, version=version.version, kind="verdict")
    if not any(event.value.get("run") == context.run.id for event in events):
        context.lease.check()
        record_verdict(context.registry, version, verdict, baseline=context.run.baseline, run=context.run.id)
    context.reached("compare: recorded in the registry")
    context.note(f"  {verdict['verdict']}")
    outputs = {"verdict": verdict["verdict"], "reasons": verdict["reasons"], "file": str(file)}
    return Made(outputs, hashes(file))


def rolled_back(registry: Registry, version: AdapterVersion) -> Event | None:
    """The rollback that took a version out of production, if that is how it went last."""
    moves = [
        event
        for event in registry.events(version.name, version=version.version, kind="alias")
        if event.value["alias"] == PRODUCTION
    ]
    left = moves and moves[-1].value.get("rollback") and moves[-1].version != version.version
    return moves[-1] if left else None


def _compared(context: Context, before: Json, after: Json) -> Json:
    targets: list[str] | None = context.spec.benchmark.targets
    if targets is not None:
        targets = [target for target in targets if target in before["categories"]]
    return compared(before, after, context.spec.gate, targets=targets)


# -- promote


def promote_inputs(context: Context) -> Json:
    verdict = context.outputs["compare"]["verdict"]
    return {"run": context.run.id, "version": context.version.ref, "verdict": verdict}


def promote(context: Context, inputs: Json) -> Made:
    """Exactly once: who has moved the alias is in the registry's events, whatever happened since.

    Raises :class:`UserError`, status 409, if production is no longer what the candidate was compared with.
    """
    if inputs["verdict"] != "promote" or context.spec.promote == "by hand":
        return Made({"promoted": False})
    version = context.version
    if not promoted(context.registry, version.name, context.by):
        context.lease.check()
        context.registry.point(
            version.name, PRODUCTION, version.version,
            reason=f"better than {context.run.baseline}", by=context.by, was=context.baseline,
        )  # fmt: skip
        context.reached("promote: pointed")
    context.note(f"  {PRODUCTION} is {version.ref}")
    return Made({"promoted": True})


def promoted(registry: Registry, name: str, by: str) -> bool:
    """Whether this run has moved production."""
    return any(
        event.value["alias"] == PRODUCTION and event.value.get("by") == by
        for event in registry.events(name, kind="alias")
    )


# -- archive


def archive_inputs(context: Context) -> Json:
    return {"run": context.run.id, "promoted": context.outputs["promote"]["promoted"]}


def archive(context: Context, inputs: Json) -> Made:
    """What was in production before goes to the archive, all but the last ``keep``; so does a candidate that
    the gate refused. The alias of the candidate ends, unless it waits for somebody's decision."""
    name, registry, version = context.spec.name, context.registry, context.version
    refused = context.outputs["compare"]["verdict"] != "promote"
    aliases = registry.aliases(name)
    if (refused or inputs["promoted"]) and aliases.get(CANDIDATE) == version.version:
        reason = "refused by the gate" if refused else f"it is {PRODUCTION} now"
        registry.unpoint(name, CANDIDATE, reason=reason, by=context.by)
        context.reached("archive: unpointed")
    leaving: list[int] = []
    if refused:
        leaving = [version.version]
    elif inputs["promoted"]:
        before = _before(registry, name, version.version)
        leaving = before[: max(0, len(before) - context.spec.keep)]
    meant = set(registry.aliases(name).values())
    archived = set(registry.archived(name))
    for number in leaving:
        if number not in archived and number not in meant:
            why = "refused by the gate" if refused else f"followed by {version.ref}"
            registry.archive(name, number, reason=f"{why} ({context.by})")
            context.reached("archive: archived")
    return Made({"archived": sorted(leaving)})


def _before(registry: Registry, name: str, now: int) -> list[int]:
    """Versions that were in production and are not archived, in the order in which they came there last."""
    came: Sequence[Any] = [
        event.value["version"]
        for event in registry.events(name, kind="alias")
        if event.value["alias"] == PRODUCTION and event.value["version"] is not None
    ]
    last = {number: place for place, number in enumerate(came)}
    gone = set(registry.archived(name))
    return [n for n in sorted(last, key=lambda number: last[number]) if n != now and n not in gone]
