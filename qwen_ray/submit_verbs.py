"""The verbs `qwen-ray submit`, `status`, `logs` and `stop`: what they take and what they do."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from qwen_ray.jobs.request import VERBS
from qwen_ray.jobs.text import row, table, when
from qwen_ray.options import example, positive, verb
from qwen_ray.verbs import Output

if TYPE_CHECKING:
    from qwen_ray.jobs.api import Job, JobsApi


def add(verbs: Any) -> None:
    p = verb(
        verbs, "submit", partial(submit, verbs.choices), "run a verb as a job of a Ray cluster elsewhere"
    )
    example(
        p,
        "qwen-ray submit train --config run.yaml --out /mnt/shared/bio --address http://HEAD:8265",
        "qwen-ray submit sweep sweeps/demo.yaml --out /mnt/shared/sweep --env WANDB_API_KEY",
        "qwen-ray submit pipeline run pipeline.yaml --address http://HEAD:8265",
        "qwen-ray submit eval --model 3b --suite guide --out /mnt/shared/3b.json --gpus 1 --no-follow",
    )
    _options(p)
    p.add_argument("what", metavar="VERB", choices=VERBS, help=f"{', '.join(VERBS)}: the verb to run there")
    p.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="what that verb takes")
    p = verb(verbs, "status", status, "the jobs of a cluster, or one with its attempts")
    example(p, "qwen-ray status --address http://HEAD:8265", "qwen-ray status train-bio")
    p.add_argument("name", nargs="?", help="job (all)")
    _address(p)
    p = verb(verbs, "logs", logs, "what a job has printed")
    example(p, "qwen-ray logs train-bio --follow")
    p.add_argument("name", help="job, by its name (the newest attempt) or id")
    p.add_argument(
        "-f", "--follow", action="store_true", help="until it ends; exit code 0 only if it succeeded"
    )
    _patience(p)
    _address(p)
    p = verb(verbs, "stop", stop, "stop a job and wait until it has ended; the same submit resumes it")
    example(p, "qwen-ray stop train-bio")
    p.add_argument("name", help="job, by its name (the newest attempt) or id")
    p.add_argument("--timeout", type=positive, default=120, help="seconds to wait for its end (%(default)s)")
    _address(p)


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's job server, http://HEAD:8265 ($RAY_API_SERVER_ADDRESS, else this machine's)",
    )


def _patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patience",
        type=float,
        default=30,
        metavar="SECONDS",
        help="give a followed job's head up after so long without an answer (%(default)g)",
    )


def _options(parser: argparse.ArgumentParser) -> None:
    """What says how a verb is submitted: before the verb or among its arguments."""
    _address(parser)
    parser.add_argument("--name", help="the job's name (made from the verb and --out)")
    parser.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print the job's log until it ends (the default); Ctrl-C leaves the job running",
    )
    _patience(parser)
    parser.add_argument(
        "--env", action="append", metavar="NAME", help="secret that the nodes must have; may be repeated"
    )
    parser.add_argument(
        "--send-env",
        action="append",
        metavar="NAME[=VALUE]",
        help="setting to send with the job, readable by all who may list jobs; may be repeated",
    )
    parser.add_argument("--pip", metavar="FILE", help="requirements to install on the nodes for this job")
    parser.add_argument(
        "--install", action="store_true", help="send this qwen-ray too, for nodes with only its requirements"
    )
    parser.add_argument(
        "--cpus", type=float, help="CPUs of the entry point (0: on the head; 1 for eval of a model)"
    )
    parser.add_argument("--gpus", type=float, help="GPUs of the entry point (0; 1 for eval of a model)")
    parser.add_argument("--python", default="python", help="Python on the nodes (%(default)s)")


def submit(choices: dict[str, argparse.ArgumentParser], args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.jobs import submit as jobs
    from qwen_ray.jobs.api import JobsApi
    from qwen_ray.jobs.follow import outcome
    from qwen_ray.jobs.request import read

    # A verb may have options of the same name; here they are about the job.
    own = argparse.ArgumentParser(prog=f"qwen-ray submit {args.what}", add_help=False, allow_abbrev=False)
    _options(own)
    own.add_argument("--json", action="store_true")
    args, rest = own.parse_known_args(args.arguments, args)
    output.as_json = args.json
    request = read(args.what, rest, choices[args.what])
    options = jobs.Options(
        name=args.name,
        env=args.env or (),
        send_env=args.send_env or (),
        pip=args.pip,
        install=args.install,
        cpus=args.cpus,
        gpus=args.gpus,
        python=args.python,
    )
    with JobsApi(args.address) as api:
        done = jobs.submit(api, request, options, root=Path.cwd(), note=output.note)
        job = done.job
        if done.how == "over":
            code, line = outcome(job, "")
            output.result(row(job), f"{line} since {when(job.ended)}; another --name runs it again")
            return code
        if done.how == "joined":
            output.note(f"{job.id} is {job.status.lower()} since {when(job.started)}")
        elif done.how == "resumed":
            output.note(f"{job.id} goes on where attempt {job.attempt - 1} ended")
        else:
            output.note(f"{job.id} is submitted")
        if not args.follow:
            output.result(row(job), job.id)
            return EXIT_OK
        return _follow(api, job, output, args.patience, to_stdout=False)


def status(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.jobs.api import JobsApi
    from qwen_ray.jobs.submit import find

    with JobsApi(args.address) as api:
        api.check()
        jobs = api.jobs()
        if args.name is not None:
            name = find(api, args.name).name
            jobs = [job for job in jobs if job.name == name]
            message = jobs[-1].message.strip().splitlines()
            text = table(jobs) + "".join(f"\n{line}" for line in [jobs[-1].entrypoint, *message])
        else:
            text = table(jobs) if jobs else f"no job at {api.address}"
    output.result([row(job) for job in jobs], text)
    return EXIT_OK


def logs(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.jobs.api import JobsApi
    from qwen_ray.jobs.submit import find

    with JobsApi(args.address) as api:
        api.check()
        job = find(api, args.name)
        if args.follow:
            return _follow(api, job, output, args.patience, to_stdout=not output.as_json)
        text = api.logs(job.id)
    output.result({**row(job), "log": text}, text.rstrip("\n"))
    return EXIT_OK


def stop(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.jobs.api import JobsApi
    from qwen_ray.jobs.submit import find

    with JobsApi(args.address) as api:
        api.check()
        job = find(api, args.name)
        if not job.over:
            api.stop(job.id)
            deadline = time.monotonic() + args.timeout
            while not (job := api.job(job.id)).over:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{job.id} did not end within {args.timeout} s; `qwen-ray status`")
                time.sleep(0.5)
    text = f"{job.id} is {job.status.lower()}"
    if job.status == "STOPPED":
        text += "; the same submit goes on from its last checkpoint"
    output.result(row(job), text)
    return EXIT_OK


def _follow(api: JobsApi, job: Job, output: Output, patience: float, *, to_stdout: bool) -> int:
    """Print a job's log until it ends: to stdout where the log was asked for, else to stderr."""
    from qwen_ray.jobs.follow import follow, outcome

    log, line = "", ""

    def write(piece: str) -> None:
        nonlocal log, line
        log += piece
        if not to_stdout:
            print(piece, end="", file=sys.stderr, flush=True)
            return
        whole, newline, line = (line + piece).rpartition("\n")
        if newline:
            output.result(None, whole)

    try:
        job = follow(api, job, write=write, note=output.note, patience=patience)
    except KeyboardInterrupt:
        where = f" --address {api.address}"
        output.note(
            f"\n{job.id} goes on. `qwen-ray logs {job.name} -f{where}` follows it again, "
            f"`qwen-ray stop {job.name}{where}` stops it"
        )
        return EXIT_INTERRUPTED
    code, said = outcome(job, log)
    if code == EXIT_FAILED:
        raise RuntimeError(said)
    if to_stdout:
        output.note(said)
    else:
        output.result(row(job), said)
    return code
