"""The verb `qwen-ray report`: what it takes and what it does."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.fsio import output_path
from qwen_ray.options import example, targets_option, verb
from qwen_ray.verbs import Output


def add(verbs: Any) -> None:
    p = verb(
        verbs,
        "report",
        report,
        "two results as one HTML page, or a registry as a site; neither needs a network",
    )
    example(
        p,
        "qwen-ray report runs/base.json runs/bio.json --run runs/bio --out runs/report.html",
        "qwen-ray report --registry registry --pipelines runs/pipeline/state --out site",
    )
    p.add_argument("baseline", nargs="?", help="EvalResult before")
    p.add_argument("candidate", nargs="?", help="EvalResult after")
    targets_option(p)
    p.add_argument(
        "--run", action="append", metavar="FOLDER", help="training run whose curve to show; may be repeated"
    )
    p.add_argument(
        "--registry", metavar="FOLDER", help="folder or URI: a site on what is in production and why"
    )
    p.add_argument("--pipelines", metavar="FOLDER", help="folder or URI of pipelines' state: their runs, too")
    p.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU-hour: the site's costs in money")
    p.add_argument("--title", help="of the page or site")
    p.add_argument("--out", required=True, help="HTML file to write; with --registry, folder")


def report(args: argparse.Namespace, output: Output) -> int:
    of_results = {"BASELINE": args.baseline, "--targets": args.targets, "--run": args.run}
    of_registry = {"--registry": args.registry, "--pipelines": args.pipelines, "--price": args.price}
    mixed = [name for name, value in of_results.items() if value is not None]
    alone = [name for name, value in of_registry.items() if value is not None]
    if mixed and alone:
        raise UserError(
            f"{mixed[0]} is for a report on two results, {alone[0]} for one on a registry",
            fix="give one or the other",
        )
    if args.registry is not None:
        return _site(args, output)
    if args.candidate is None:
        raise UserError(
            "nothing to report on", fix="name two results, before and after, or --registry FOLDER"
        )
    return _before_after(args, output)


def _site(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.registry import Registry
    from qwen_ray.report.site import write_site

    if args.price is not None and not 0 <= args.price < math.inf:
        raise UserError(f"{args.price:g} is no price", where="--price", fix="dollars of a GPU-hour")
    registry, out = Registry(args.registry), output_path(args.out, folder=True)
    if not registry.reachable():
        raise UserError("no such registry", where=args.registry, fix="check the path")
    site = write_site(registry, out, pipelines=args.pipelines, title=args.title, price=args.price)
    value = {"report": str(site.index), "pages": len(site.pages), "adapters": site.names}
    output.result(value, str(site.index))
    return EXIT_OK


def _before_after(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.evaluation.compare import compare
    from qwen_ray.evaluation.harness import read_result
    from qwen_ray.report.build import build_report

    out = output_path(args.out, inputs=[args.baseline, args.candidate])
    baseline, candidate = read_result(Path(args.baseline)), read_result(Path(args.candidate))
    targets = args.targets.split(",") if args.targets else None
    comparison = compare(baseline, candidate, targets=targets)
    command = f"qwen-ray report {args.baseline} {args.candidate} --out {args.out}"
    build_report(
        out, comparison=comparison, baseline=baseline, candidate=candidate,
        runs=[Path(r) for r in args.run or []], commands=[command], title=args.title,
    )  # fmt: skip
    output.result({"report": args.out, "verdict": comparison["verdict"]}, args.out)
    return EXIT_OK
