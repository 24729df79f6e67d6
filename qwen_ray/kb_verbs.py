"""The verbs `qwen-ray kb ...`: what they take and what they do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.data_verbs import source_paths
from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.fsio import output_path
from qwen_ray.options import example, group, positive, verb
from qwen_ray.storage import is_uri
from qwen_ray.verbs import Output

if TYPE_CHECKING:
    from qwen_ray.retrieval.documents import Origin, Question
    from qwen_ray.retrieval.manifest import Manifest


def add(verbs: Any) -> None:
    kb = group(verbs, "kb", "knowledge bases: passages that a model reads before it answers (+rag)")
    p = verb(kb, "build", build, "make a knowledge base of documents, or all of it again as the next version")
    example(
        p,
        "qwen-ray kb build biology --source openstax_biology=books/biology.tar.gz --source text=notes/",
        "qwen-ray kb build biology --embedded",
    )
    p.add_argument("name", help="lower-case letters, digits, dot, dash; an adapter's name for ADAPTER+rag")
    _source_options(p)
    p.add_argument(
        "--embedder", metavar="NAME", help="sentence-transformers model or folder (all-MiniLM-L6-v2)"
    )
    _work_options(p)
    p = verb(kb, "update", update, "read the sources again: embed what is new, remove what is gone")
    example(p, "qwen-ray kb update biology", "qwen-ray kb update biology --source text=notes/2026-12")
    p.add_argument("name", help="an existing knowledge base")
    _source_options(p)
    _work_options(p)
    p = verb(kb, "rollback", rollback, "make another version of a knowledge base the current one")
    example(p, "qwen-ray kb rollback biology@3")
    p.add_argument("ref", help="NAME@VERSION")
    _root_option(p)
    p = verb(kb, "list", listing, "knowledge bases and their versions")
    example(p, "qwen-ray kb list", "qwen-ray kb list --root s3://bucket/knowledge")
    _root_option(p)
    p = verb(kb, "query", query, "the passages for a question")
    example(p, 'qwen-ray kb query biology "What does the pancreas make?" -k 5')
    p.add_argument("name", help="a knowledge base")
    p.add_argument("question", help="in plain words")
    p.add_argument("-k", type=positive, default=5, help="passages (%(default)s)")
    p.add_argument("--by", choices=["vector", "text", "hybrid"], default="hybrid", help="(%(default)s)")
    _root_option(p)
    p = verb(kb, "eval", evaluate, "recall@1/5/10 and MRR by vector, words and both, with intervals")
    example(
        p,
        "qwen-ray kb eval biology questions.jsonl",
        "qwen-ray kb eval biology --embedded",
        "qwen-ray kb eval biology --book openstax_biology=books/biology.tar.gz",
    )
    p.add_argument("name", help="a knowledge base")
    asked = p.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "questions",
        nargs="?",
        help='JSON lines {"question": ..., "relevant": [document keys or passage ids]}',
    )
    asked.add_argument("--embedded", action="store_true", help="the embedded domain's held-out questions")
    asked.add_argument(
        "--book", metavar="NAME=PATH", help="a textbook's own exercises and glossary; the page answers them"
    )
    _root_option(p)


def _root_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", default="knowledge", metavar="FOLDER", help="folder or URI of all of them (%(default)s)"
    )


def _source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="KIND=PATH",
        help="text (.md and .txt files), file (records), or a source of `data sources`; may be repeated",
    )
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="the embedded model's facts; NAME is biology, history or security",
    )
    parser.add_argument("--license", default="unknown", help="of text sources (%(default)s)")


def _work_options(parser: argparse.ArgumentParser) -> None:
    _root_option(parser)
    parser.add_argument("--workers", type=positive, help="embed on this many Ray actors (this process)")
    parser.add_argument("--address", help="Ray cluster to join (default: $RAY_ADDRESS, else one of its own)")


def build(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.embedder import Embedder
    from qwen_ray.retrieval import build as kb
    from qwen_ray.retrieval.store import Store

    origins = _origins(args)
    if not origins:
        raise UserError("no documents given", where="--source", fix="give --source KIND=PATH, or --embedded")
    if not is_uri(args.root):
        output_path(args.root, folder=True)
    store, embedder = Store(args.root), Embedder.load(args.embedder)
    return _done(
        kb.build(store, args.name, origins, embedder, embed=_embed(args, embedder.name)), output, args.root
    )


def update(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.embedder import Embedder
    from qwen_ray.retrieval import build as kb
    from qwen_ray.retrieval.store import Store

    store = Store(args.root)
    before = store.open(args.name).manifest
    embedder = Embedder.load(before.embedder_name)
    after = kb.update(store, args.name, embedder, origins=_origins(args), embed=_embed(args, embedder.name))
    if after == before:
        output.note("nothing changed")
    return _done(after, output, args.root)


def rollback(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.retrieval.store import Store

    name, _, version = args.ref.partition("@")
    if not version.isdecimal():
        raise UserError(f"'{args.ref}' is not NAME@VERSION", fix="`qwen-ray kb list` shows the versions")
    manifest = Store(args.root).rollback(name, int(version))
    output.result(manifest.to_dict(), f"{name} is version {manifest.version}, made {manifest.created}")
    return EXIT_OK


def listing(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.retrieval.store import Store

    store = Store(args.root)
    rows, lines = [], []
    for name in store.names():
        current = store.open(name).manifest.version
        versions = store.versions(name)
        rows.append({"name": name, "current": current, "versions": [m.to_dict() for m in versions]})
        lines.append(name)
        for manifest in versions:
            mark = "*" if manifest.version == current else " "
            lines.append(f"  {mark} {_line(manifest)}")
    output.result(rows, "\n".join(lines) or f"no knowledge base in {args.root}")
    return EXIT_OK


def query(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.embedder import Embedder
    from qwen_ray.retrieval.knowledge_base import KnowledgeBases

    bases = KnowledgeBases(args.root)
    embedder = Embedder.load(bases.store.open(args.name).manifest.embedder_name)
    vectors = embedder.embed([args.question])
    (passages,) = bases.search(args.name, [args.question], vectors, args.k, by=args.by)
    lines = []
    for number, passage in enumerate(passages, start=1):
        lines.append(f"[{number}] {passage.title or passage.id} ({passage.source}, {passage.license})")
        lines += [f"    {line}" for line in passage.text.splitlines()]
    output.result([passage.citation() for passage in passages], "\n".join(lines))
    return EXIT_OK


def evaluate(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.embedder import Embedder
    from qwen_ray.retrieval import evaluate as quality
    from qwen_ray.retrieval.knowledge_base import KnowledgeBases

    bases = KnowledgeBases(args.root)
    manifest = bases.store.open(args.name).manifest
    questions = _questions(args)
    found = quality.evaluate(bases, args.name, questions, Embedder.load(manifest.embedder_name))
    value = {"name": args.name, "version": manifest.version, "ways": [one.to_dict() for one in found]}
    output.result(value, quality.table(found))
    return EXIT_OK


def _origins(args: argparse.Namespace) -> list[Origin]:
    from qwen_ray.retrieval.documents import EMBEDDED, TEXT, Origin

    origins = [Origin(EMBEDDED, args.name)] if args.embedded else []
    for kind, paths in source_paths(args.source).items():
        for path in paths:
            where = path if kind == EMBEDDED else str(Path(path).resolve())
            origins.append(Origin(kind, where, args.license) if kind == TEXT else Origin(kind, where))
    return origins


def _questions(args: argparse.Namespace) -> list[Question]:
    from qwen_ray.retrieval.documents import book_questions, embedded_questions, question_from

    if args.embedded:
        return embedded_questions(args.name)
    if args.book:
        ((name, (path, *_)),) = list(source_paths([args.book]).items())
        return book_questions(name, Path(path))
    file = Path(args.questions)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [
            question_from(json.loads(line), f"{file}:{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    except OSError:
        raise UserError("no such file", where=str(file), fix="check the path") from None
    except ValueError as e:
        raise UserError(f"not JSON lines ({e})", where=str(file), fix="one JSON object a line") from None


def _embed(args: argparse.Namespace, embedder: str) -> Any:
    """What embeds: None for this process."""
    from qwen_ray.retrieval.at_scale import on_cluster

    return on_cluster(embedder, workers=args.workers, address=args.address) if args.workers else None


def _done(manifest: Manifest, output: Output, root: str) -> int:
    lines = [f"{manifest.name} in {root}: {_line(manifest)}"]
    lines += [
        f"  {source}: {facts['chunks']} passages, {facts['license']}"
        for source, facts in manifest.sources.items()
    ]
    lines += [f"  left out: {count} x {why}" for why, count in manifest.dropped.items()]
    output.result(manifest.to_dict(), "\n".join(lines))
    return EXIT_OK


def _line(manifest: Manifest) -> str:
    return (
        f"version {manifest.version} ({manifest.action}, {manifest.created}): {manifest.chunks} passages of "
        f"{manifest.documents} documents, {manifest.embedded} embedded, {manifest.removed} removed"
    )
