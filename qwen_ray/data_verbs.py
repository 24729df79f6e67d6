"""The verbs of ``qwen-ray data``: what they take and what they do."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.fsio import output_path
from qwen_ray.options import example, group, pair, positive, set_option, verb
from qwen_ray.verbs import Output, going_on


def add(verbs: Any) -> None:
    data = group(verbs, "data", "prepare training data")
    p = verb(
        data, "prepare", prepare, "read sources, check and decontaminate every record, write Record JSONL"
    )
    example(
        p,
        "qwen-ray data prepare --domain biology --source openstax_biology=FOLDER --benchmarks FOLDER "
        "--size 5000 --out data/biology.jsonl",
        "qwen-ray data prepare --config configs/data/biology.yaml --workers 16",
    )
    p.add_argument("--config", metavar="FILE", help="settings (YAML); the options below override it")
    p.add_argument("--domain", help="domain of the records, the name mixture weights use")
    _sources(p, required=False)
    p.add_argument("--size", type=positive, help="records to keep, spread over sources and sections (all)")
    p.add_argument("--out", metavar="FILE", help="file to write; its card and manifest go beside it")
    p.add_argument("--seed", type=int, help="decides which records are kept (0)")
    p.add_argument("--benchmarks", metavar="FOLDER", help="benchmark files whose items must not be in it")
    p.add_argument(
        "--heldout", action="append", metavar="FOLDER", help="held-out set to keep apart; may be repeated"
    )
    p.add_argument("--difficulty", metavar="MODEL", help="note this model's loss on each answer")
    p.add_argument("--workers", type=int, help="Ray Data tasks at once; 0 works in this process (0)")
    p.add_argument("--dry-run", action="store_true", help="print the settings and do nothing")
    set_option(p, "limits.min_answer=1")
    p = verb(data, "heldout", heldout, "make a multiple-choice test of sources that are not trained on")
    example(
        p,
        "qwen-ray data heldout --domain security --source mitre_capec=FOLDER --benchmarks FOLDER "
        "--out heldout/security",
    )
    p.add_argument("--domain", required=True, help="what the questions are about")
    _sources(p, required=True)
    p.add_argument("--out", required=True, metavar="FOLDER", help="the suite's folder")
    p.add_argument("--size", type=positive, help="items to keep (all)")
    p.add_argument("--seed", type=int, default=0, help="decides which, and their order (%(default)s)")
    p.add_argument("--benchmarks", metavar="FOLDER", help="benchmarks whose items must not be among them")
    p = verb(data, "generate", generate, "let a served model write questions, each checked with its text")
    example(
        p,
        "qwen-ray data generate --domain biology --passages notes/ --license CC-BY-4.0 "
        "--endpoint http://localhost:8000/v1 --model qwen2.5-14b --out data/generated.jsonl",
    )
    p.add_argument("--domain", required=True, help="domain of the records")
    p.add_argument(
        "--passages", required=True, metavar="PATH", help="Markdown or text: a folder, archive or file"
    )
    p.add_argument("--license", default="unknown", help="of the passages (%(default)s)")
    p.add_argument("--endpoint", required=True, metavar="URL", help="OpenAI-compatible, with its /v1")
    p.add_argument("--model", required=True, help="a model that the endpoint serves")
    p.add_argument("--key-variable", metavar="NAME", help="environment variable that holds the API key")
    p.add_argument("--questions", type=positive, help="questions to ask for, of each passage (3)")
    p.add_argument("--concurrency", type=positive, help="requests at a time (4)")
    p.add_argument("--out", required=True, metavar="FILE", help="Record JSONL; replies are kept beside it")
    p = verb(data, "export", export, "write records in another format")
    example(p, "qwen-ray data export data/biology.jsonl --format sharegpt --out biology.json")
    p.add_argument("file", help="Record JSONL, or any format that is read")
    p.add_argument("--format", required=True, help="alpaca, sharegpt, openai, record, dolly, csv or parquet")
    p.add_argument("--out", required=True, metavar="FILE", help="file to write")
    p = verb(data, "sources", sources, "list the sources, their licences and where to get them")
    example(p, "qwen-ray data sources")


def _sources(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--source",
        required=required,
        action="append",
        metavar="NAME=PATH",
        help="a source (see `data sources`) and where its files are; may be repeated",
    )


def prepare(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.config import read_settings, validate
    from qwen_ray.data.preparation.prepare import PrepareConfig
    from qwen_ray.data.preparation.prepare import prepare as run_prepare

    names = ("domain", "size", "out", "seed", "benchmarks", "heldout", "difficulty", "workers")
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.source:
        flags["sources"] = source_paths(args.source)
    file = Path(args.config) if args.config else None
    tree, origin = read_settings(file, flags=flags, sets=args.set)
    for name, option in (("domain", "--domain"), ("sources", "--source"), ("out", "--out")):
        if name not in tree:
            raise UserError(f"no {name} given", where=option, fix=f"give {option}, or {name} in --config")
    config = validate(PrepareConfig, tree, where=str(file) if file else "options", origin=origin)
    if args.dry_run:
        value = config.model_dump(mode="json")
        output.result(value, yaml.safe_dump(value, sort_keys=False).rstrip())
        return EXIT_OK

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty():
            output.note(f"{done} of {of} parts")

    with going_on():
        prepared = run_prepare(config, progress=progress)
    output.result(prepared.to_dict(), str(prepared))
    return EXIT_OK


def source_paths(items: list[str]) -> dict[str, list[str]]:
    """``NAME=PATH`` options; a name may have several paths."""
    paths: dict[str, list[str]] = {}
    for item in items:
        name, path = pair(item, "--source")
        paths.setdefault(name, []).append(path)
    return paths


def heldout(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.data.heldout.build import build_heldout

    report = build_heldout(
        args.domain,
        {name: [Path(path) for path in paths] for name, paths in source_paths(args.source).items()},
        output_path(args.out, folder=True),
        size=args.size,
        seed=args.seed,
        benchmarks=Path(args.benchmarks) if args.benchmarks else None,
    )
    output.result(report.to_dict(), str(report))
    return EXIT_OK


def generate(args: argparse.Namespace, output: Output) -> int:
    from itertools import chain

    from qwen_ray.config import validate
    from qwen_ray.data.generation.documents import read_passages
    from qwen_ray.data.generation.generate import Endpoint
    from qwen_ray.data.generation.generate import generate as run_generate
    from qwen_ray.data.records import write_records
    from qwen_ray.data.sources import Drops
    from qwen_ray.fsio import beside

    given = {"url": args.endpoint}
    for name in ("model", "key_variable", "questions", "concurrency"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    endpoint = validate(Endpoint, given, where="options", origin={"url": "--endpoint"})
    # Of a folder only the documents are read, so the records may lie among them.
    out = output_path(args.out, inputs=[args.passages] if Path(args.passages).is_file() else [])
    drops = Drops()
    passages = read_passages(Path(args.passages), domain=args.domain, license=args.license, drops=drops)
    first = next(passages, None)
    if first is None:
        raise UserError(
            f"no passage to ask about ({drops.counts.total()} left out as too short or unreadable)",
            where=args.passages,
            fix="give longer documents",
        )
    asked = chain([first], passages)
    records = (found.record for found in run_generate(asked, endpoint, beside(out, "replies"), drops))
    with going_on():
        written = write_records(out, records)
    value = {"out": str(out), "written": written, "dropped": drops.to_dict()}
    lines = [f"{written} records in {out}"]
    lines += [f"  left out: {count} x {why}" for why, count in drops.counts.most_common()]
    output.result(value, "\n".join(lines))
    return EXIT_OK


def export(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.data.formats import load_examples
    from qwen_ray.data.formats.export import export as run_export

    out = output_path(args.out, inputs=[args.file])
    written = run_export(load_examples(Path(args.file)), out, args.format)
    value = {"out": str(out), "format": args.format, "written": written}
    output.result(value, f"{written} records in {out}")
    return EXIT_OK


def sources(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.data.sources import SOURCES

    rows = [
        {
            "name": s.name,
            "title": s.title,
            "license": s.licence,
            "domain": s.domain_hint,
            "size": s.size,
            "requires": s.requires,
            "where_to_get": s.where_to_get,
        }
        for s in SOURCES.values()
    ]
    lines = []
    for row in rows:
        lines.append(f"{row['name']}: {row['title']} ({row['license']}; {row['domain']})")
        lines += [f"    {row[key]}" for key in ("size", "where_to_get") if row[key]]
        lines += [f"    needs {row['requires']}"] if row["requires"] else []
    output.result(rows, "\n".join(lines))
    return EXIT_OK
