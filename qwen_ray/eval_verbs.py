"""The verb `qwen-ray eval`: what it takes and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.fsio import output_path
from qwen_ray.options import count, example, positive, verb
from qwen_ray.verbs import Output, going_on


def add(verbs: Any) -> None:
    p = verb(verbs, "eval", evaluate, "benchmark a model, an adapter or an endpoint through lm-eval")
    example(
        p,
        "qwen-ray eval --model 3b --adapter runs/bio/adapter --suite guide --out runs/bio.json",
        "qwen-ray eval --endpoint http://127.0.0.1:8000 --model tiny:facts --suite tiny --out r.json",
        "qwen-ray eval --endpoint http://127.0.0.1:8000 --models tiny,tiny:facts,tiny+rag,tiny:auto"
        " --suite tiny --out runs/eval",
    )
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="alias, hub id or folder; with --endpoint, an id it serves")
    which.add_argument(
        "--models",
        metavar="ID,ID",
        help="ids of the endpoint, benchmarked together; the first is the base of the table. The same "
        "command again goes on after a break",
    )
    p.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter to put on the model")
    p.add_argument("--endpoint", metavar="URL", help="benchmark what is served there, load no model")
    p.add_argument("--api-key", metavar="KEY", help="key of the endpoint (default: $QWEN_RAY_API_KEY)")
    p.add_argument(
        "--concurrency", type=positive, default=4, help="requests to the endpoint at a time (%(default)s)"
    )
    p.add_argument(
        "--suite",
        required=True,
        help="tiny (embedded), guide (MMLU, GSM8K), or a held-out set's folder",
    )
    p.add_argument("--data-dir", metavar="FOLDER", help="the suite's original files, where there is no hub")
    p.add_argument("--limit", type=positive, help="items of each task (all)")
    p.add_argument("--fewshot", type=count, help="solved examples in the prompt (the suite's own)")
    p.add_argument(
        "--targets",
        help="with --models: comma-separated categories that must gain; the others must not lose"
        " (the suite's)",
    )
    p.add_argument(
        "--out", required=True, help="EvalResult file to write (JSON); with --models the folder of the table"
    )


def evaluate(args: argparse.Namespace, output: Output) -> int:
    settings: dict[str, Any] = {
        "data_dir": Path(args.data_dir) if args.data_dir else None,
        "limit": args.limit,
        "num_fewshot": args.fewshot,
    }
    if args.endpoint and args.adapter:
        raise UserError("--adapter is a folder; an endpoint knows adapters by name", fix="--model BASE:NAME")
    if args.models is None and args.targets:
        raise UserError("--targets goes with --models", fix="for two results: `qwen-ray compare --targets`")
    if args.models is not None:
        return _many(args, settings, output)
    from qwen_ray.evaluation.report_text import result_table
    from qwen_ray.evaluation.run import evaluate_endpoint, evaluate_local

    result: dict[str, Any]
    read = [args.adapter, args.data_dir, args.suite if Path(args.suite).is_dir() else None]
    out = output_path(args.out, inputs=[path for path in read if path])
    if args.endpoint:
        result = evaluate_endpoint(
            args.endpoint,
            args.model,
            args.suite,
            out=out,
            api_key=args.api_key,
            concurrency=args.concurrency,
            **settings,
        )
    else:
        adapter = Path(args.adapter) if args.adapter else None
        result = evaluate_local(args.model, adapter, args.suite, out=out, **settings)
    shown = {key: value for key, value in result.items() if key != "items"}
    output.result(shown, result_table(result))
    return EXIT_OK


def _many(args: argparse.Namespace, settings: dict[str, Any], output: Output) -> int:
    if not args.endpoint:
        raise UserError(
            "--models are ids of a server", fix="--endpoint URL; without a server: --model, once for each"
        )
    out = output_path(args.out, folder=True)
    from qwen_ray.evaluation.many import TABLE_TEXT, evaluate_many
    from qwen_ray.evaluation.report_text import improvements_table

    models = [model.strip() for model in args.models.split(",")]
    if not all(models):
        raise UserError("an id is empty", where=f"--models {args.models}", fix="ids with commas between")
    with going_on():
        table = evaluate_many(
            args.endpoint,
            models,
            args.suite,
            out=out,
            api_key=args.api_key,
            concurrency=args.concurrency,
            targets=args.targets.split(",") if args.targets else None,
            note=output.note,
            **settings,
        )
    output.result(table, f"{improvements_table(table)}\n{out / TABLE_TEXT}")
    return EXIT_OK
