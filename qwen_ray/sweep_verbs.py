"""The verb `qwen-ray sweep`: what it takes and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK
from qwen_ray.options import example, set_option, verb
from qwen_ray.verbs import Output, going_on


def add(verbs: Any) -> None:
    p = verb(
        verbs, "sweep", sweep, "search hyperparameters and domain mixes; exit 3: no trial kept the strengths"
    )
    example(
        p,
        "qwen-ray sweep sweeps/demo.yaml",
        "qwen-ray sweep sweeps/learning-rate.yaml --dry-run",
        "qwen-ray sweep sweeps/demo.yaml --resume",
    )
    p.add_argument("file", help="sweep (YAML), see docs/sweeps.md")
    p.add_argument("--out", metavar="FOLDER", help="the sweep's folder (the file's out)")
    p.add_argument(
        "--resume", action="store_true", help="go on with the sweep in its folder, if one is there"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="print trials, packs, predicted time and memory; run nothing"
    )
    p.add_argument(
        "--registry", metavar="PLACE", help="folder or URI where the winner is registered (OUT/registry)"
    )
    p.add_argument("--address", help="Ray cluster to join (default: $RAY_ADDRESS, else one of its own)")
    set_option(p, "search.trials=16")


def sweep(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.sweeps.driver import REGISTRY, run_sweep
    from qwen_ray.sweeps.folder import prepared
    from qwen_ray.sweeps.spec import load_sweep
    from qwen_ray.sweeps.summary import summary

    spec = load_sweep(Path(args.file), sets=args.set, out=args.out)
    if args.dry_run:
        from qwen_ray.sweeps.forecast import forecast

        expected = forecast(prepared(spec))
        output.result(expected.to_dict(), str(expected))
        return EXIT_OK
    with going_on(lambda: "the same command with --resume goes on"):
        done = run_sweep(
            spec, resume=args.resume, note=output.note, registry=args.registry, address=args.address
        )
    model = str(spec.run.get("model", {}).get("name", "tiny"))
    output.result(
        done.result,
        summary(done.out, done.result, model=model, registry=args.registry or done.out / REGISTRY),
    )
    return EXIT_OK if done.winner is not None else EXIT_GATE_SAID_NO
