"""The verbs of ``qwen-ray keys``: what they take and what they do."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path
from typing import Any

from qwen_ray.errors import EXIT_OK
from qwen_ray.options import example, group, positive, verb
from qwen_ray.verbs import Output


def add(verbs: Any) -> None:
    keys = group(verbs, "keys", "API keys of a server")
    p = verb(keys, "create", create, "make a key and print it, this once; its file gets only a hash of it")
    example(
        p,
        "qwen-ray keys create laptop --keys keys.json",
        "qwen-ray keys create evaluation --keys keys.json --tokens-per-minute 200000 --days 30",
    )
    p.add_argument("name", help="whose key it is; appears in the list and in messages")
    _keys(p)
    p.add_argument("--requests-per-minute", type=positive, metavar="N", help="(as the server's limits say)")
    p.add_argument("--tokens-per-minute", type=positive, metavar="N", help="(as the server's limits say)")
    p.add_argument(
        "--concurrent", type=positive, metavar="N", help="requests at one time (as the server's limits say)"
    )
    p.add_argument("--days", type=positive, metavar="N", help="after which it is no longer valid (never)")
    p = verb(keys, "list", list_keys, "names, dates and limits")
    example(p, "qwen-ray keys list --keys keys.json")
    _keys(p)
    p = verb(keys, "revoke", revoke, "take a key back; a running server refuses it at once")
    example(p, "qwen-ray keys revoke laptop --keys keys.json")
    p.add_argument("name", help="the key's name")
    _keys(p)


def _keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keys", metavar="FILE", required=True, help="file of the keys, which `qwen-ray serve --keys` reads"
    )


def create(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.serving.auth import create_key
    from qwen_ray.serving.limits import Rates

    rates = Rates(
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        concurrent=args.concurrent,
    )
    lifetime = None if args.days is None else timedelta(days=args.days)
    secret = create_key(Path(args.keys), args.name, limits=rates, lifetime=lifetime)
    output.note(f"key '{args.name}' is in {args.keys}; keep what is printed now, it cannot be shown again")
    output.result({"name": args.name, "key": secret}, secret)
    return EXIT_OK


def list_keys(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.serving.auth import read_keys

    listed = [key.model_dump(mode="json", exclude={"sha256"}) for key in read_keys(Path(args.keys))]
    lines = [f"{'name':24} {'created':20} {'expires':20} limits"]
    for key in listed:
        limits = ", ".join(f"{name} {value}" for name, value in key["limits"].items() if value) or "-"
        lines.append(f"{key['name']:24} {key['created']:20} {key['expires'] or 'never':20} {limits}")
    output.result({"keys": listed}, "\n".join(lines))
    return EXIT_OK


def revoke(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.serving.auth import revoke_key

    revoke_key(Path(args.keys), args.name)
    output.result({"name": args.name, "revoked": True}, f"key '{args.name}' is revoked")
    return EXIT_OK
