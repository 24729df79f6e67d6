"""The verbs of ``qwen-ray router``: what they take and what they do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.data.records import Record
from qwen_ray.errors import EXIT_OK, UserError, did_you_mean
from qwen_ray.fsio import output_path
from qwen_ray.options import example, group, pairs, positive, verb
from qwen_ray.verbs import Output

if TYPE_CHECKING:
    from qwen_ray.embedder import Embedder
    from qwen_ray.routing.router import Router


def add(verbs: Any) -> None:
    router = group(verbs, "router", "choose the adapter by the question, for MODEL:auto")
    p = verb(router, "train", train, "learn the domains from prepared data")
    example(
        p,
        "qwen-ray router train data/biology.jsonl data/history.jsonl data/mathematics.jsonl "
        "--adapter biology=bio --adapter history=hist --out router",
    )
    _data(p)
    p.add_argument(
        "--adapter",
        action="append",
        metavar="DOMAIN=NAME",
        help="what answers a domain's questions (the base); may be repeated",
    )
    _others(p, "records of other subjects, to set the threshold by (the built-in background)")
    p.add_argument(
        "--without",
        action="append",
        metavar="SUBJECT",
        help="leave this out of the background: a domain covers it; may be repeated",
    )
    p.add_argument("--embedder", metavar="NAME", help="sentence-transformers model, name or folder (MiniLM)")
    p.add_argument("--method", default="knn", help="knn or centroid (%(default)s)")
    p.add_argument("--examples", type=positive, help="questions of a domain to keep (300)")
    p.add_argument("--false-accepts", type=float, help="share of others that may be let in (0.2)")
    p.add_argument("--seed", type=int, default=0, help="decides which questions (%(default)s)")
    p.add_argument("--out", required=True, metavar="FOLDER", help="the router's folder")
    p = verb(router, "eval", evaluate, "accuracy, abstention and confusions on questions not trained on")
    example(p, "qwen-ray router eval router heldout.jsonl --others other.jsonl --json")
    p.add_argument("router", help="folder of the router")
    _data(p)
    _others(p, "records on which it should abstain")
    p = verb(router, "route", route, "say which adapter would answer")
    example(p, 'qwen-ray router route router "Which organelle makes ATP?"')
    p.add_argument("router", help="folder of the router")
    p.add_argument("question", nargs="+", help="one or more questions")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA", help="records with their domains, any format read")


def _others(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--others", action="append", metavar="FILE", help=f"{help_text}; may be repeated")


def train(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.routing.router import Router
    from qwen_ray.routing.training import check

    out = output_path(args.out, folder=True)
    adapters: dict[str, str | None] = {**pairs(args.adapter or [], "--adapter", "DOMAIN=NAME")}
    names = ("method", "false_accepts", "without", "examples")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    check(**{name: settings[name] for name in names[:3] if name in settings})
    records, others = _read(args.data), _read(args.others or [])
    router = Router.train(
        records,
        embedder=_embedder(args.embedder),
        adapters=adapters,
        others=others,
        seed=args.seed,
        **settings,
    )
    router.save(out)
    about = router.describe()
    lines = [f"{'domain':16}{'answered by':16}{'examples':>9}{'recall on held-out':>20}"]
    lines += [
        f"{d.name:16}{d.adapter or 'the base':16}{d.examples:9}{d.recall:14.3f} of {d.heldout}"
        for d in router.domains
    ]
    found = router.calibration
    lines.append(
        f"threshold {found.threshold:.4f}: {found.false_accepts:.1%} of {found.others} others are let in"
    )
    output.result({"out": args.out, **about}, "\n".join([*lines, args.out]))
    return EXIT_OK


def evaluate(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.routing.evaluation import evaluate as run_evaluate
    from qwen_ray.routing.questions import OTHER, asked

    router, embedder = _loaded(args.router)
    records, others = _read(args.data), _read(args.others or [])
    known = [domain.name for domain in router.domains]
    for record in records:
        if record.domain not in known:
            raise UserError(
                f"the router does not know the domain '{record.domain}'",
                where=f"record {record.id}",
                fix=f"{did_you_mean(record.domain, known)}; other subjects go to --others",
            )
    routes = router.route(embedder.embed([asked(record) for record in [*records, *others]]))
    found = run_evaluate(router, routes, [r.domain for r in records] + [OTHER] * len(others))
    output.result(found.to_dict(), str(found))
    return EXIT_OK


def route(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.routing.questions import ending

    router, embedder = _loaded(args.router)
    rows, lines = [], []
    routes = router.route(embedder.embed([ending(question) for question in args.question]))
    for question, found in zip(args.question, routes, strict=True):
        domain = router.chosen(found)
        rows.append({"question": question, "adapter": found.adapter, "domain": domain, "score": found.score})
        why = domain or f"no domain; nearest: {found.domain}"
        lines.append(f"{found.adapter or 'the base':16} {found.score:+.3f}  {why}")
    output.result(rows, "\n".join(lines))
    return EXIT_OK


def _read(files: list[str]) -> list[Record]:
    from qwen_ray.data.formats import load_examples

    return [record for file in files for record in load_examples(Path(file))]


def _embedder(name: str | None) -> Embedder:
    from qwen_ray.embedder import Embedder

    return Embedder.load(name)


def _loaded(folder: str) -> tuple[Router, Embedder]:
    """The router and the embedder it was trained with."""
    from qwen_ray.routing.router import Router

    router = Router.load(Path(folder))
    embedder = _embedder(router.embedder_name)
    if embedder.id != router.embedder:
        raise UserError(
            f"the router was trained with the embedder '{router.embedder}', this is '{embedder.id}'",
            where=folder,
            fix="train it again",
        )
    return router, embedder
