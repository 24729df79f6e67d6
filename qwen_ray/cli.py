"""The command line: which verbs there are and what they take. What they do is in verbs.py; a file such as
data_verbs.py has both for `qwen-ray data`.

Results go to stdout, everything else to stderr; with ``--json`` stdout holds one JSON document.
Exit codes: 0 done, 1 failed while running (also: storage or a server is away, and the same command may do
later), 2 bad input, 3 a gate said no, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from qwen_ray import (
    __version__,
    data_verbs,
    doctor_verbs,
    eval_verbs,
    kb_verbs,
    key_verbs,
    manifests_verbs,
    pipeline_verbs,
    protocol_verbs,
    registry_verbs,
    report_verbs,
    router_verbs,
    serve_verbs,
    submit_verbs,
    sweep_verbs,
    watch_verbs,
)
from qwen_ray import verbs as run
from qwen_ray.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    UserError,
)
from qwen_ray.options import example, group, positive, set_option, targets_option, verb

# What a user can mend by another path, and disks that fail whatever is written.
_PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST}
_PATHS |= {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the ``qwen-ray`` command."""
    args = build_parser().parse_args(argv)
    # Ray, lm-eval and wandb print to stdout as they like. Give them stderr and keep the real one.
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
        signal.signal(number, _interrupt)
    if not sys.stderr.isatty():  # bars are for people; tqdm reads this when first imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    code = EXIT_FAILED
    try:
        code = args.verb(args, run.Output(stdout, as_json=args.json))
    except UserError as e:
        code = _refused(e)
    except KeyboardInterrupt as e:  # a verb says what the same command would do, where it knows
        print("; ".join(["interrupted", *map(str, e.args)]), file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        code = EXIT_FAILED
    except (RuntimeError, FloatingPointError) as e:
        print(f"failed: {e}", file=sys.stderr)
        if os.environ.get("QWEN_RAY_DEBUG"):
            traceback.print_exc()
    except Exception as e:
        told = of_the_machine(e)
        if told is None or os.environ.get("QWEN_RAY_DEBUG"):
            traceback.print_exc()
        if told is not None:
            code = _refused(told)
    finally:
        sys.stderr.flush()
        from qwen_ray import cluster

        if "ray" in sys.modules:
            cluster.disconnect()
    sys.exit(code)


def of_the_machine(error: Exception) -> UserError | None:
    """What a path or a disk refused, for the user to read; None: it may be a bug."""
    if type(error).__name__ == "SafetensorError":  # it has no number of its own
        return UserError(str(error), fix="see that the disk has room and the files are whole", status=503)
    if not isinstance(error, OSError):
        return None
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    if not paths and error.errno not in _DISKS:
        return None
    theirs = error.errno in _PATHS
    if theirs:
        fix = "check the path and its permissions"
    elif error.errno in _DISKS:
        fix = "see that the disk works and has room"
    else:
        fix = "check the path, and the limits of this machine (ulimit -a)"
    return UserError(
        error.strerror or str(error), where=" -> ".join(paths), fix=fix, status=400 if theirs else 503
    )


def _refused(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return EXIT_FAILED if error.status == 503 else EXIT_BAD_INPUT


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\n  fix: see `{self.prog} --help`", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="qwen-ray",
        description="Fine-tune a Qwen model where it is weak; prove that nothing else got worse.",
    )
    parser.add_argument("--version", action="version", version=f"qwen-ray {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    p = verb(verbs, "demo", run.demo, "the whole path on the embedded model, in minutes on two CPU cores")
    example(p, "qwen-ray demo --out runs/demo")
    p.add_argument("--out", default="runs/demo", help="folder for everything the demo makes (%(default)s)")
    data_verbs.add(verbs)
    _add_plan(verbs)
    _add_train(verbs)
    sweep_verbs.add(verbs)
    _add_merge(verbs)
    eval_verbs.add(verbs)
    _add_compare(verbs)
    protocol_verbs.add(verbs)
    serve_verbs.add(verbs)
    key_verbs.add(verbs)
    kb_verbs.add(verbs)
    pipeline_verbs.add(verbs)
    router_verbs.add(verbs)
    watch_verbs.add(verbs)
    submit_verbs.add(verbs)
    manifests_verbs.add(verbs)
    doctor_verbs.add(verbs)
    registry_verbs.add(verbs)
    report_verbs.add(verbs)
    config = group(verbs, "config", "about configuration files")
    p = verb(config, "schema", run.config_schema, "JSON schema of a configuration, for editors")
    example(p, "qwen-ray config schema > run-config.schema.json")
    p = verb(config, "reference", run.config_reference, "every key with its default and meaning, as Markdown")
    example(p, "qwen-ray config reference")
    return parser


def _add_train(verbs: Any) -> None:
    p = verb(verbs, "train", run.train, "fine-tune, here or by Ray Train; the same command again resumes")
    example(
        p,
        "qwen-ray train --model 3b --method lora --data data/biology.jsonl --workers 2 --out runs/bio",
        "qwen-ray train --config run.yaml --set optim.learning_rate=1e-4 --dry-run",
    )
    p.add_argument("--config", metavar="FILE", help="configuration (YAML); the options below override it")
    p.add_argument("--model", help="alias (tiny, 3b ...), hub id or folder")
    p.add_argument("--method", help="lora, qlora or full")
    p.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="training data: Records, Alpaca, ShareGPT, messages, CSV ...; may be repeated",
    )
    p.add_argument(
        "--workers",
        type=int,
        help="Ray Train workers (default: 1 if there is a cluster, else 0: this process)",
    )
    p.add_argument("--steps", type=positive, help="optimizer steps (default: by epochs)")
    p.add_argument("--seed", type=int, help="order of the data, initial adapter weights, dropout")
    p.add_argument("--out", help="the run's folder")
    set_option(p)
    p.add_argument("--dry-run", action="store_true", help="print the complete configuration and stop")


def _add_plan(verbs: Any) -> None:
    p = verb(
        verbs, "plan", run.plan, "say what a run needs and costs on given GPUs, and what fits; exit 3: no"
    )
    example(
        p,
        "qwen-ray plan --model 7b --method full --gpu h100-80gb --gpus 8 --tokens 20e6",
        "qwen-ray plan --config configs/14b-lora-4x80gb.yaml --gpu a100-80gb --gpus 4 --data a.jsonl --all",
    )
    p.add_argument("--config", metavar="FILE", help="YAML configuration")
    p.add_argument("--model", help="alias, hub id or folder")
    p.add_argument("--method", choices=["lora", "qlora", "full"], help="what is trained")
    p.add_argument("--strategy", choices=["auto", "ddp", "fsdp", "deepspeed"], help="default: the cheapest")
    p.add_argument("--sequence-length", type=positive, metavar="TOKENS", help="length of a row")
    p.add_argument("--gpu", default="h100-80gb", help="GPU, by its name in the catalogue (%(default)s)")
    p.add_argument("--gpus", type=positive, default=1, help="GPUs of a node (%(default)s)")
    p.add_argument("--nodes", type=positive, default=1, help="nodes (%(default)s)")
    p.add_argument(
        "--network", type=float, metavar="GBIT", help="Gb/s of a node's ports together (the catalogue's)"
    )
    p.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU-hour (the catalogue's)")
    amount = p.add_mutually_exclusive_group()
    amount.add_argument(
        "--data", action="append", metavar="FILE", help="data whose tokens are counted; may be repeated"
    )
    amount.add_argument("--tokens", type=float, help="tokens of one epoch")
    p.add_argument("--epochs", type=float, help="passes over the data")
    set_option(p)
    p.add_argument("--all", action="store_true", help="show every layout that was tried")


def _add_merge(verbs: Any) -> None:
    p = verb(verbs, "merge", run.merge, "write a model with its adapter merged in, as full weights")
    example(
        p,
        "qwen-ray merge --model 3b --adapter runs/bio/adapter --out models/bio-3b --dtype bf16",
        "qwen-ray merge --model 3b --adapter A --weight 0.7 --adapter B --weight 0.3 --out models/both",
    )
    p.add_argument("--model", required=True, help="the adapter's base: alias, hub id or folder")
    p.add_argument(
        "--adapter", required=True, action="append", metavar="FOLDER", help="PEFT adapter; several add up"
    )
    p.add_argument(
        "--weight", type=float, action="append", help="share of each adapter, in the same order (1)"
    )
    p.add_argument("--out", required=True, help="model folder to write; must not exist")
    p.add_argument("--dtype", help="fp32, bf16 or fp16 (default: as the base is stored)")


def _add_compare(verbs: Any) -> None:
    p = verb(verbs, "compare", run.compare, "two results, paired by item: verdict, exit 0 promote, 3 not")
    example(
        p,
        "qwen-ray compare runs/base.json runs/bio.json --targets biology",
        "qwen-ray compare runs/base.json runs/bio.json --gate gate.yaml",
    )
    _two_results(p)
    protocol_verbs.gate_options(p)
    p.add_argument("--out", help="comparison file to write (JSON)")


def _two_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", help="EvalResult before")
    parser.add_argument("candidate", help="EvalResult after")
    targets_option(parser)


if __name__ == "__main__":
    main()
