"""What each verb of the command line does: calls one function and prints what came back."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK, UserError

if TYPE_CHECKING:
    from qwen_ray.config import RunConfig

Verb = Callable[[argparse.Namespace, "Output"], int]


class Output:
    """The one writer to stdout."""

    def __init__(self, stream: TextIO, *, as_json: bool) -> None:
        self._stream, self.as_json = stream, as_json

    def result(self, value: Any, text: str) -> None:
        """Print ``value`` as JSON under ``--json``, else ``text``."""
        print(json.dumps(value, indent=2) if self.as_json else text, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Progress, to stderr."""
        print(text, file=sys.stderr, flush=True)


@contextmanager
def going_on(again: Callable[[], str] = lambda: "the same command goes on") -> Iterator[None]:
    """Work that may be interrupted: then ``again`` says what the same command would do."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again()) from None


def demo(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.demo import run_demo, summary

    comparison = run_demo(Path(args.out), note=output.note)
    output.result(comparison, summary(comparison, Path(args.out)))
    return EXIT_OK if comparison["verdict"] == "promote" else EXIT_GATE_SAID_NO


def train(args: argparse.Namespace, output: Output) -> int:
    flags = {
        "model.name": args.model,
        "method.name": args.method,
        "data.train": args.data,
        "cluster.workers": args.workers,
        "optim.max_steps": args.steps,
        "seed": args.seed,
        "out": args.out,
    }
    config = _config(args, flags)
    if args.dry_run:
        output.result(config.model_dump(mode="json"), config.to_yaml().rstrip())
        return EXIT_OK
    from qwen_ray.fsio import output_path
    from qwen_ray.training.checkpoint import complete
    from qwen_ray.training.driver import ProgressBar, run_training
    from qwen_ray.training.worker import CHECKPOINTS

    out = output_path(config.out, folder=True)

    def again() -> str:
        kept = complete(out / CHECKPOINTS)
        return "the same command goes on from the last checkpoint" if kept else "there is no checkpoint yet"

    bar = ProgressBar()
    try:
        with going_on(again):
            run = run_training(config, progress=bar)
    finally:
        bar.close()
    value = {
        "out": str(run.out),
        "artifact": str(run.artifact),
        "steps": run.steps,
        "loss": run.loss,
        "eval_loss": run.eval_loss,
        "resumed_from": run.resumed_from,
        "stopped": run.stopped,
    }
    if run.stopped:
        output.note(f"stopped early: {run.stopped}")
    held_out = "" if run.eval_loss is None else f", held-out {run.eval_loss:.4f}"
    output.result(value, f"{run.steps} steps, loss {run.loss:.4f}{held_out}\n{run.artifact}")
    return EXIT_OK


def plan(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.planner.hardware import hardware
    from qwen_ray.planner.plan import plan
    from qwen_ray.planner.text import count_tokens, plan_text

    flags = {
        "model.name": args.model,
        "method.name": args.method,
        "strategy.name": args.strategy,
        "data.max_length": args.sequence_length,
        "optim.epochs": args.epochs,
    }
    config = _config(args, flags)
    machine = hardware(
        args.gpu, gpus_per_node=args.gpus, nodes=args.nodes, price=args.price, network=args.network
    )
    if config.cluster.workers is None:  # as train --workers with a worker for each GPU would have it
        config.cluster.workers = machine.gpus
    tokens = args.tokens
    if tokens is not None and not 0 < tokens < math.inf:
        raise UserError(f"{tokens:g} tokens cannot be trained on", where="--tokens")
    files = [Path(file) for file in args.data or config.data.train]
    if tokens is None and files:
        tokens = count_tokens(files, config.model.name, max_length=config.data.max_length)
    result = plan(config, machine, tokens or 0.0)
    output.result(result.to_dict(every=args.all), plan_text(result, every=args.all))
    return EXIT_OK if result.fits else EXIT_GATE_SAID_NO


def merge(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.training.merge import merge

    weights = args.weight or [1.0] * len(args.adapter)
    if len(weights) != len(args.adapter):
        raise UserError(
            f"{len(args.adapter)} adapters and {len(weights)} weights", where="--weight", fix="one for each"
        )
    adapters = [(Path(folder), weight) for folder, weight in zip(args.adapter, weights, strict=True)]
    out = merge(args.model, adapters, Path(args.out), dtype=args.dtype)
    output.result({"out": str(out)}, str(out))
    return EXIT_OK


def compare(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.evaluation.compare import compare
    from qwen_ray.evaluation.gate import given_gate
    from qwen_ray.evaluation.harness import read_result
    from qwen_ray.evaluation.report_text import comparison_table
    from qwen_ray.fsio import output_path, write_json

    inputs = [args.baseline, args.candidate]
    out = None if args.out is None else output_path(args.out, inputs=inputs)
    gate = given_gate(args.gate, min_gain=args.min_gain, tolerance=args.tolerance)
    targets = args.targets.split(",") if args.targets else None
    comparison = compare(
        read_result(Path(args.baseline)), read_result(Path(args.candidate)), gate, targets=targets
    )
    if out is not None:
        write_json(out, comparison)
    output.result(comparison, comparison_table(comparison))
    return EXIT_OK if comparison["verdict"] == "promote" else EXIT_GATE_SAID_NO


def config_schema(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.config import json_schema

    schema = json_schema()
    output.result(schema, json.dumps(schema, indent=2))
    return EXIT_OK


def config_reference(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.config import reference

    text = reference()
    output.result({"markdown": text}, text)
    return EXIT_OK


def _config(args: argparse.Namespace, flags: dict[str, Any]) -> RunConfig:
    """The configuration of ``--config``, the options that were given (dotted keys) and ``--set``."""
    from qwen_ray.config import build_config

    given = {key: value for key, value in flags.items() if value is not None}
    return build_config(Path(args.config) if args.config else None, flags=given, sets=args.set)
