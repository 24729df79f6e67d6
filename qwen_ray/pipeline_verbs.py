"""The verbs `qwen-ray pipeline ...`: what they take and what they do."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK
from qwen_ray.options import example, group, set_option, verb
from qwen_ray.verbs import Output, going_on


def add(verbs: Any) -> None:
    pipeline = group(verbs, "pipeline", "from new data to production, in stages that go on after a break")
    p = verb(
        pipeline,
        "run",
        run,
        "collect, prepare, train, register, benchmark, compare, promote, archive; exit 3: the gate said no",
    )
    example(
        p,
        "qwen-ray pipeline run pipelines/demo.yaml",
        "qwen-ray pipeline run pipelines/demo.yaml --dry-run",
        "qwen-ray pipeline run pipelines/demo.yaml --until register",
    )
    _file(p)
    p.add_argument("--dry-run", action="store_true", help="say which stages there are to do, and do nothing")
    p.add_argument("--until", metavar="STAGE", help="stop after this stage; the next start goes on")
    set_option(p, "train.optim.epochs=2")
    p = verb(pipeline, "status", status, "who runs a pipeline now, and how its runs ended")
    example(p, "qwen-ray pipeline status pipelines/demo.yaml")
    _file(p)
    p = verb(pipeline, "explain", explain, "one run: why it began, what each stage made, why it ended so")
    example(p, "qwen-ray pipeline explain pipelines/demo.yaml", "qwen-ray pipeline explain pipeline.yaml 3")
    _file(p)
    p.add_argument("run", nargs="?", help="a run's id or number (the last)")


def _file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="pipeline (YAML), see docs/pipeline.md")


def run(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.lifecycle.spec import PipelineSpec

    spec = PipelineSpec.read(args.file, sets=args.set)
    if args.dry_run:
        from qwen_ray.lifecycle.telling import plan, plan_text

        value = plan(spec)
        output.result(value, plan_text(value))
        return EXIT_OK
    from qwen_ray.lifecycle.pipeline import run_pipeline

    with going_on():
        done = run_pipeline(spec, note=output.note, until=args.until)
    lines = [f"run {done.run}: {done.verdict or 'goes on'}{f' {done.version}' if done.version else ''}"]
    lines[0] += ", promoted" if done.promoted else ""
    lines += [f"  - {reason}" for reason in done.reasons]
    output.result(asdict(done), "\n".join(lines))
    return EXIT_GATE_SAID_NO if done.verdict in ("hold", "regress") else EXIT_OK


def status(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.lifecycle.spec import PipelineSpec
    from qwen_ray.lifecycle.telling import status, status_text

    value = status(PipelineSpec.read(args.file))
    output.result(value, status_text(value))
    return EXIT_OK


def explain(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.lifecycle.spec import PipelineSpec
    from qwen_ray.lifecycle.telling import explain, explain_text

    value = explain(PipelineSpec.read(args.file), args.run)
    output.result(value, explain_text(value))
    return EXIT_OK
