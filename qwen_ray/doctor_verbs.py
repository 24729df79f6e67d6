"""The verb `qwen-ray doctor`: what it takes and what it does."""

from __future__ import annotations

import argparse
from typing import Any

from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK
from qwen_ray.options import example, verb
from qwen_ray.verbs import Output


def add(verbs: Any) -> None:
    p = verb(verbs, "doctor", doctor, "check this machine or a cluster, and say what to do; exit 3: unfit")
    example(
        p,
        "qwen-ray doctor",
        "qwen-ray doctor --address http://HEAD:8265 --storage /mnt/shared/runs --env WANDB_API_KEY",
    )
    p.add_argument(
        "--address",
        help="cluster whose every node is checked: http://HEAD:8265 from anywhere, HOST:6379 or auto on one "
        "of its nodes ($RAY_ADDRESS; without: this machine alone)",
    )
    p.add_argument(
        "--storage",
        metavar="URI",
        help="folder or s3://, gs://, az:// that one node writes and the others read",
    )
    p.add_argument(
        "--env", action="append", metavar="NAME", help="secret that every node must have; may be repeated"
    )
    p.add_argument("--python", default="python", help="Python on the nodes, for http:// (%(default)s)")


def doctor(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.doctor.run import examine
    from qwen_ray.jobs.secrets import check_names

    needed = args.env or []
    check_names(needed)
    found = examine(args.address, storage=args.storage, needed=needed, note=output.note, python=args.python)
    failed = [check for check in found if check.state == "fail"]
    warned = sum(check.state == "warn" for check in found)
    lines = [*map(str, found), f"{len(found)} checks: {len(failed)} failed, {warned} to look at"]
    output.result([check.to_dict() for check in found], "\n".join(lines))
    return EXIT_GATE_SAID_NO if failed else EXIT_OK
