"""The verbs `qwen-ray protocol ...`: what they take and what they do."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK, UserError
from qwen_ray.options import count, example, group, positive, verb
from qwen_ray.verbs import Output

if TYPE_CHECKING:
    from qwen_ray.evaluation.protocol_run import Subject


def add(verbs: Any) -> None:
    protocol = group(verbs, "protocol", "what to measure before, during and after a training")
    p = verb(
        protocol,
        "before",
        before,
        "baseline by category, weak categories, failures to read, what can be seen",
    )
    example(
        p,
        "qwen-ray protocol before --model 3b --suite guide --held-out data/biology-heldout --out runs/before",
        "qwen-ray protocol before --endpoint http://127.0.0.1:8000 --model tiny --suite tiny --out before",
        "qwen-ray protocol before --result runs/base.json --out runs/before",
    )
    _subject_options(p)
    p.add_argument(
        "--suite", action="append", default=[], help="tiny, guide, or a suite's folder; may be repeated"
    )
    p.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="SUITE",
        help="a suite of which only scores are shown, never an item; may be repeated",
    )
    p.add_argument("--limit", type=positive, help="items of each task (all)")
    p.add_argument("--fewshot", type=count, help="solved examples in the prompt (the suite's own)")
    p.add_argument(
        "--weak-below",
        type=float,
        metavar="POINTS",
        help="a category certainly below this is weak (the mean of its suite's categories)",
    )
    p.add_argument(
        "--failures", type=positive, default=10, help="wrong answers shown of a weak category (%(default)s)"
    )
    gate_options(p)
    p.add_argument("--out", required=True, metavar="FOLDER", help="for results, before.json and before.html")
    p = verb(
        protocol, "during", during, "scores and forgetting of a run so far; exit 3: beyond its tolerance"
    )
    example(p, "qwen-ray protocol during runs/bio")
    p.add_argument("run", metavar="RUN", help="folder of a training run with evaluate.suites")
    p = verb(
        protocol,
        "after",
        after,
        "the suites of before again: verdict, regressions, flips; exit 3: not better",
    )
    example(
        p,
        "qwen-ray protocol after --before runs/before --model 3b --adapter runs/bio/adapter --out runs/after",
        "qwen-ray protocol after --before runs/before --result runs/bio.json --targets weak --out runs/after",
    )
    p.add_argument("--before", required=True, metavar="FOLDER", help="folder of `protocol before`")
    _subject_options(p)
    p.add_argument(
        "--targets",
        metavar="NAMES",
        help="comma-separated categories that must gain, the others must not lose; "
        "weak: those that were weak before (the suites')",
    )
    p.add_argument(
        "--latency",
        type=float,
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="seconds a request at p95, where the gate limits it",
    )
    gate_options(p)
    p.add_argument("--out", required=True, metavar="FOLDER", help="for results, after.json and after.html")


def gate_options(parser: argparse.ArgumentParser) -> None:
    """What :func:`qwen_ray.evaluation.gate.given_gate` takes."""
    parser.add_argument(
        "--gate", metavar="FILE", help="gate (YAML), see docs/protocol.md; the options below go over it"
    )
    parser.add_argument("--min-gain", type=float, metavar="POINTS", help="points every target must gain (5)")
    parser.add_argument("--tolerance", type=float, metavar="POINTS", help="points a strength may lose (4)")


def before(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.evaluation.gate import given_gate
    from qwen_ray.evaluation.protocol_run import run_before
    from qwen_ray.evaluation.protocol_text import before_text

    if args.weak_below is not None and not 0 <= args.weak_below <= 100:
        raise UserError(f"{args.weak_below:g} points", where="--weak-below", fix="from 0 to 100")
    out = Path(args.out)
    document = run_before(
        out,
        given_gate(args.gate, min_gain=args.min_gain, tolerance=args.tolerance),
        subject=_subject(args),
        suite=args.suite,
        held_out=args.held_out,
        results=[Path(file) for file in args.result],
        below=None if args.weak_below is None else args.weak_below / 100,
        failures=args.failures,
        data_dir=Path(args.data_dir) if args.data_dir else None,
        limit=args.limit,
        num_fewshot=args.fewshot,
        note=output.note,
    )
    output.result(document, f"{before_text(document)}\n{out / 'before.html'}")
    return EXIT_OK


def during(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.evaluation.protocol_run import run_during
    from qwen_ray.evaluation.protocol_text import during_text

    seen = run_during(Path(args.run))
    output.result(seen, during_text(seen))
    return EXIT_GATE_SAID_NO if seen["broken"] else EXIT_OK


def after(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.evaluation.gate import given_gate
    from qwen_ray.evaluation.protocol_run import run_after
    from qwen_ray.evaluation.protocol_text import after_text

    out = Path(args.out)
    if args.latency and not all(math.isfinite(seconds) and seconds > 0 for seconds in args.latency):
        raise UserError("not seconds above 0", where="--latency", fix="for example --latency 0.8 0.9")
    own = args.gate or args.min_gain is not None or args.tolerance is not None
    document = run_after(
        out,
        Path(args.before),
        given_gate(args.gate, min_gain=args.min_gain, tolerance=args.tolerance) if own else None,
        subject=_subject(args),
        results=[Path(file) for file in args.result],
        targets=args.targets.split(",") if args.targets else None,
        latency=(args.latency[0], args.latency[1]) if args.latency else None,
        adapter=Path(args.adapter) if args.adapter else None,
        data_dir=Path(args.data_dir) if args.data_dir else None,
        note=output.note,
    )
    output.result(document, f"{after_text(document)}\n{out / 'after.html'}")
    return EXIT_OK if document["verdict"] == "promote" else EXIT_GATE_SAID_NO


def _subject_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="alias, hub id or folder; with --endpoint, an id it serves")
    which.add_argument(
        "--result",
        action="append",
        default=[],
        metavar="FILE",
        help="finished EvalResult; one for each suite",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter: put on the model, and weighed")
    parser.add_argument("--endpoint", metavar="URL", help="benchmark what is served there, load no model")
    parser.add_argument("--api-key", metavar="KEY", help="key of the endpoint (default: $QWEN_RAY_API_KEY)")
    parser.add_argument("--concurrency", type=positive, default=4, help="requests at a time (%(default)s)")
    parser.add_argument(
        "--data-dir", metavar="FOLDER", help="the suites' original files, where there is no hub"
    )


def _subject(args: argparse.Namespace) -> Subject | None:
    from qwen_ray.evaluation.protocol_run import Subject

    adapter = Path(args.adapter) if args.adapter else None
    if adapter is not None and not adapter.is_dir():
        raise UserError(
            "no such folder", where=f"--adapter {adapter}", fix="name the adapter/ folder of a run"
        )
    if args.model is None:
        return None
    return Subject(
        args.model, None if args.endpoint else adapter, args.endpoint, args.api_key, args.concurrency
    )
