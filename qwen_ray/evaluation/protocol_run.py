"""The protocol's folders: benchmarks what is asked for, and writes results, document and page.

A folder of before holds ``before.json``, ``before.html`` and ``results/SUITE.json``; one of after the same
with ``after``. The document is written last, so a folder that has it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.evaluation import protocol, suites
from qwen_ray.evaluation.gate import Gate, adapter_size
from qwen_ray.evaluation.harness import read_result
from qwen_ray.evaluation.protocol import Part, Questions, flipped_items, result_file, wrong_items
from qwen_ray.evaluation.questions import questions
from qwen_ray.fsio import beside, read_json, write_json

BEFORE, AFTER = "before.json", "after.json"
Note = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is benchmarked: a model loaded here, with a PEFT folder on it or not, or an id of a server."""

    model: str
    adapter: Path | None = None
    endpoint: str | None = None
    api_key: str | None = None
    concurrency: int = 4


def run_before(
    out: Path,
    gate: Gate,
    *,
    subject: Subject | None = None,
    suite: Sequence[str] = (),
    held_out: Sequence[str] = (),
    results: Sequence[Path] = (),
    below: float | None = None,
    failures: int = 10,
    data_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    note: Note,
) -> dict[str, Any]:
    """The protocol before a training: :func:`qwen_ray.evaluation.protocol.before` of ``subject`` on the
    suites ``suite`` and ``held_out``, or of finished ``results``, which those two then only describe.
    """
    asked = {name: suites.load(name) for name in (*suite, *held_out)}
    hidden = {asked[name].name for name in held_out}
    if results:
        found = _named([read_result(path) for path in results])
        for one in asked.values():
            if one.name not in found:
                raise UserError(
                    f"no result of the suite '{one.name}'",
                    where="--result",
                    fix=f"there are: {', '.join(found)}",
                )
    elif subject is None or not asked:
        raise UserError("nothing to benchmark", fix="give --model and --suite, or --result FILE")
    else:
        wanted = [(name, {"limit": limit, "num_fewshot": num_fewshot}) for name in asked]
        found = _named(_benchmark(subject, wanted, out / BEFORE, data_dir, note))
    known = {one.name: suites.lasting(name) for name, one in asked.items()}
    parts = [
        _part(
            known.get(name, name), result, name in hidden, wrong_items(result), data_dir=data_dir, note=note
        )
        for name, result in found.items()
    ]
    document = protocol.before(parts, gate, below=below, failures=failures)
    (out / BEFORE).unlink(missing_ok=True)
    for name, result in found.items():
        write_json(out / result_file(name), result)
    from qwen_ray.report.protocol import write_before

    write_before(out / "before.html", document)
    write_json(out / BEFORE, document)
    return document


def run_after(
    out: Path,
    before: Path,
    gate: Gate | None,
    *,
    subject: Subject | None = None,
    results: Sequence[Path] = (),
    targets: Sequence[str] | None = None,
    latency: tuple[float, float] | None = None,
    adapter: Path | None = None,
    data_dir: Path | None = None,
    note: Note,
) -> dict[str, Any]:
    """The protocol after it: the suites of the folder ``before`` again, with the same settings, on
    ``subject`` (or finished ``results``), compared and judged by ``gate`` (None: that of before).

    ``adapter``: the folder whose size the gate may limit.
    """
    if out.resolve() == before.resolve():
        raise UserError(
            "this is the folder of before, which would be overwritten",
            where=f"--out {out}",
            fix="give another",
        )
    document = read_before(before)
    gate = gate or Gate.model_validate(document["gate"])
    if results:
        found = _named([read_result(path) for path in results])
    elif subject is None:
        raise UserError("nothing to benchmark", fix="give --model, or --result FILE")
    else:
        settings = ("limit", "num_fewshot")
        wanted = [
            (one["asked_for"], {key: one["settings"][key] for key in settings}) for one in document["suites"]
        ]
        found = _named(_benchmark(subject, wanted, out / AFTER, data_dir, note))
    parts = []
    for one in document["suites"]:
        result = read_result(before / one["file"])
        flipped = [old for old, _ in flipped_items(result, found.get(one["suite"], result))]
        parts.append(_part(one["asked_for"], result, one["held_out"], flipped, data_dir=data_dir, note=note))
    after = protocol.after(
        document,
        parts,
        list(found.values()),
        gate,
        targets=targets,
        latency=latency,
        size=None if adapter is None else adapter_size(adapter),
    )
    (out / AFTER).unlink(missing_ok=True)
    for name, result in found.items():
        write_json(out / result_file(name), result)
    from qwen_ray.report.protocol import write_after

    write_after(out / "after.html", after, [part.result for part in parts], list(found.values()))
    write_json(out / AFTER, after)
    return after


def run_during(run: Path) -> dict[str, Any]:
    """What the forgetting monitor of a run saw so far: :func:`qwen_ray.evaluation.protocol.during`."""
    from qwen_ray.config import read_config
    from qwen_ray.training.driver import CONFIG
    from qwen_ray.training.tracking import METRICS, read_metrics

    if not (run / CONFIG).is_file():
        raise UserError(f"no {CONFIG} here", where=str(run), fix="name the folder of a training run")
    config = read_config(run / CONFIG)
    seen = protocol.during(read_metrics(run), config.evaluate.tolerance)
    if not seen["steps"]:
        fix = "train with evaluate.suites" if not config.evaluate.suites else "wait for the first evaluation"
        raise UserError("no suite was evaluated in this run", where=str(run / METRICS), fix=fix)
    return {"run": str(run), **seen}


def read_before(folder: Path) -> dict[str, Any]:
    """The document of a folder of before; :class:`UserError` if it is something else."""
    document = read_json(folder / BEFORE)
    if not isinstance(document, dict) or document.get("schema") != protocol.BEFORE:
        raise UserError(
            "not a folder of `qwen-ray protocol before`", where=str(folder), fix="make one with --out FOLDER"
        )
    return document


def _benchmark(
    subject: Subject,
    wanted: Sequence[tuple[str, Mapping[str, Any]]],
    document: Path,
    data_dir: Path | None,
    note: Note,
) -> list[dict[str, Any]]:
    """Each suite with its settings; the results are beside ``document`` when it returns. A model is loaded
    once. A document of an earlier run goes before its results do.
    """
    from qwen_ray import models
    from qwen_ray.evaluation.run import evaluate_endpoint, evaluate_local

    engine, results = None, []
    for name, settings in wanted:
        file = document.parent / result_file(suites.load(name).name)
        note(f"{name}: benchmarking {subject.model}")
        made = beside(file, "new")
        if subject.endpoint is not None:
            result = evaluate_endpoint(
                subject.endpoint,
                subject.model,
                name,
                out=made,
                api_key=subject.api_key,
                concurrency=subject.concurrency,
                data_dir=data_dir,
                **settings,
            )
        else:
            if engine is None:
                from qwen_ray.serving.engines.torch import TorchEngine

                engine = TorchEngine.load(models.resolve(subject.model))
            result = evaluate_local(
                subject.model, subject.adapter, name, out=made, engine=engine, data_dir=data_dir, **settings
            )
        document.unlink(missing_ok=True)
        made.replace(file)
        results.append(result)
    return results


def _named(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by suite: one each, all of one model."""
    named: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["suite"] in named:
            raise UserError(f"two results of the suite '{result['suite']}'", where="--result", fix="give one")
        named[result["suite"]] = result
    who = [(result["model"], result["adapter"]) for result in results]
    if any(one != who[0] for one in who):
        raise UserError(
            "the results are of different models", where="--result", fix="give those of one model"
        )
    return named


def _part(
    suite: str,
    result: dict[str, Any],
    held_out: bool,
    items: Sequence[dict[str, Any]],
    *,
    data_dir: Path | None,
    note: Note,
) -> Part:
    """``items``: those whose questions may be shown."""
    asked: Questions = {}
    if not held_out:  # nobody is to see them
        try:
            asked = questions(suites.load(suite), data_dir, of=items)
        except UserError as e:
            note(f"{result['suite']}: shown without the texts of its questions: {e}")
    return Part(suite, result, held_out, asked)
