"""The verbs `qwen-ray watch` and `qwen-ray canary ...`: what they take and what they do."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import EXIT_FAILED, EXIT_GATE_SAID_NO, EXIT_OK, UserError, did_you_mean
from qwen_ray.options import example, group, positive, reason_option, registry_option, set_option, verb
from qwen_ray.verbs import Output

if TYPE_CHECKING:
    from qwen_ray.lifecycle.history import Entry
    from qwen_ray.lifecycle.watch_spec import WatchSpec

_ASKED = ("history", "status")


def add(verbs: Any) -> None:
    p = verb(
        verbs,
        "watch",
        watch,
        "look for new data, lost accuracy and drift; start pipelines, follow canaries, tell people",
    )
    example(
        p,
        "qwen-ray watch watch/demo.yaml",
        "qwen-ray watch watch/demo.yaml --once",
        "qwen-ray watch status watch/demo.yaml",
        "qwen-ray watch history watch/demo.yaml --last 20",
    )
    p.add_argument(
        "what",
        nargs="+",
        metavar="FILE",
        help="watch (YAML), see docs/watch.md; `history FILE` and `status FILE` tell of it and do not watch",
    )
    p.add_argument("--once", action="store_true", help="look once, and wait for a pipeline that this starts")
    p.add_argument("--last", type=positive, metavar="N", help="history: only the newest (all)")
    p.add_argument("--kind", help="history: only such events, as trigger, alert, run or canary")
    set_option(p, "every_seconds=10")
    canary = group(verbs, "canary", "a version that answers part of the router's traffic, to be watched")
    p = verb(canary, "start", canary_start, "give a version a share of what the router sends to its adapter")
    example(p, "qwen-ray canary start biology@4 --share 0.1 --reason 'new books' --registry registry")
    p.add_argument("ref", help="NAME@VERSION")
    p.add_argument("--share", type=float, required=True, help="above 0 and below 1")
    reason_option(p)
    registry_option(p)
    p = verb(canary, "stop", canary_stop, "end a canary; production answers everything again")
    example(p, "qwen-ray canary stop biology --reason 'wrong dates' --registry registry")
    p.add_argument("name", help="the adapter's name")
    reason_option(p)
    registry_option(p)


def watch(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.lifecycle.watch import Watch
    from qwen_ray.lifecycle.watch_spec import WatchSpec

    asked, spec = _asked(args.what), WatchSpec.read(Path(args.what[-1]), sets=args.set)
    if asked == "history":
        return _history(args, spec, output)
    if asked == "status":
        return _status(spec, output)
    watching = Watch(spec, note=output.note)
    if not args.once:
        watching.forever()
    with watching:
        watching.once()
    entries = watching.entries
    undone = watching.undone
    for text in undone:
        output.note(text)
    output.result([asdict(entry) for entry in entries], _lines(entries) or "nothing has happened")
    return EXIT_FAILED if undone else _code(entries)


def canary_start(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.registry import Registry
    from qwen_ray.registry.version import parse_ref

    if (ref := parse_ref(args.ref)) is None:
        raise UserError(
            f"'{args.ref}' is not NAME@VERSION", fix="`qwen-ray registry list` shows the versions"
        )
    name, version = ref
    Registry(args.registry).start_canary(name, version, args.share, reason=args.reason)
    value = {"name": name, "version": version, "share": args.share}
    output.result(value, f"{args.ref} answers {args.share:.1%} of the router's requests for {name}")
    return EXIT_OK


def canary_stop(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.registry import CANARY, Registry

    registry = Registry(args.registry)
    running = registry.aliases(args.name).get(CANARY)
    if running is None:
        raise UserError(f"'{args.name}' has no canary", where=args.registry, fix="nothing is to be stopped")
    registry.stop_canary(args.name, reason=args.reason)
    output.result({"name": args.name, "version": running}, f"{args.name}@{running} is no canary any more")
    return EXIT_OK


def _asked(words: list[str]) -> str | None:
    if len(words) == 1:
        return None
    if len(words) > 2 or words[0] not in _ASKED:
        raise UserError(
            f"'{' '.join(words)}' is not [history | status] FILE", fix=did_you_mean(words[0], _ASKED)
        )
    return words[0]


def _history(args: argparse.Namespace, spec: WatchSpec, output: Output) -> int:
    from qwen_ray.lifecycle.history import History
    from qwen_ray.storage import open_storage

    entries = History(open_storage(spec.storage)).entries(kind=args.kind, last=args.last)
    output.result([asdict(entry) for entry in entries], _lines(entries) or f"no history in {spec.storage}")
    return EXIT_OK


def _status(spec: WatchSpec, output: Output) -> int:
    from qwen_ray.lifecycle.watch import status
    from qwen_ray.storage import open_storage

    value = status(spec, open_storage(spec.storage), time.time())
    lines = [
        f"{name.replace('_', ' ')}: {json.dumps(found) if isinstance(found, dict) else found}"
        for name, found in value.items()
        if found
    ]
    output.result(value, "\n".join(lines) or "nobody watches, and nothing waits")
    return EXIT_OK


def _lines(entries: list[Entry]) -> str:
    return "\n".join(f"{entry.at} {entry.kind}: {entry.text}" for entry in entries)


def _code(entries: list[Entry]) -> int:
    """Of one look: failed where something could not be looked at or done, else what a gate said."""
    from qwen_ray.lifecycle.runs import REFUSED

    if any(entry.kind in ("failed", "trouble", "unsent", "dropped") for entry in entries):
        return EXIT_FAILED
    refused = any(entry.kind == "run" and entry.value["verdict"] in REFUSED for entry in entries)
    return EXIT_GATE_SAID_NO if refused else EXIT_OK
