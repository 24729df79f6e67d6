"""Submitting a verb as a job: what is sent, under which name, and what the same command again means."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ray import __version__
from qwen_ray.errors import EXIT_GATE_SAID_NO, UserError, did_you_mean
from qwen_ray.fsio import sha256_json
from qwen_ray.jobs import api as keys
from qwen_ray.jobs import request as requests
from qwen_ray.jobs import secrets
from qwen_ray.jobs.api import Job, JobsApi
from qwen_ray.jobs.package import Package, own_package, working_tree
from qwen_ray.jobs.request import Request, Room

Note = Callable[[str], None]
_STOP_SECONDS = "60"
"""Ray kills a stopped job after 3 s; a run then has no time to leave the cluster in order."""


@dataclass(frozen=True)
class Options:
    """How a verb is submitted. Names as on the command line."""

    name: str | None = None
    env: Sequence[str] = ()
    send_env: Sequence[str] = ()
    pip: str | None = None
    install: bool = False
    cpus: float | None = None
    gpus: float | None = None
    python: str = "python"


@dataclass(frozen=True)
class Submitted:
    """A job and how it came about: ``new``, ``resumed`` (as a new attempt), ``joined`` (it was running) or
    ``over`` (it had ended well)."""

    job: Job
    how: str


def submit(api: JobsApi, request: Request, options: Options, *, root: Path, note: Note) -> Submitted:
    """Start ``request`` on the cluster with the files of ``root``; or join the job of its name if that runs.

    A job that was stopped or failed gets another attempt, which resumes what it left. Raises
    :class:`UserError` before anything is sent if it could not run there.
    """
    requests.check_out(request)
    name = _name(options.name or request.default_name)
    secrets.check_names(options.env)
    api.check()
    tree = working_tree(root)
    # A file that was changed makes the same words another command.
    command = sha256_json([request.verb, *request.argv, tree.digest(requests.sent_inputs(request))])
    jobs = api.jobs()
    last = latest(jobs, name)
    if last is not None and (how := _as_it_is(last, request, command)):
        return Submitted(last, how)
    _check_alone(jobs, name, request)
    if tree.withheld:
        note(f"note: not sent, as they look like secrets: {', '.join(tree.withheld)}")
    for said in requests.check_inputs(request, tree):
        note(f"note: {said}")
    reserved = _entry_resources(api, request, options)
    attempt = 1 if last is None else last.attempt + 1
    job_id = name if attempt == 1 else f"{name}.{attempt}"  # no name has a dot
    body = {
        "entrypoint": entry_point(request, attempt, python=options.python),
        "submission_id": job_id,
        "runtime_env": _runtime_environment(api, tree, options, note),
        "metadata": {
            keys.NAME: name,
            keys.ATTEMPT: str(attempt),
            keys.VERB: request.verb,
            keys.OUT: request.out or "",
            keys.COMMAND: command,
            "qwen_ray.version": __version__,
        },
        **reserved,
    }
    if not api.submit(body):
        other = api.job(job_id)
        if not _same(other, command):
            raise UserError("another job has this id", where=job_id, fix="choose another --name")
        return Submitted(other, "joined")  # somebody was quicker, with the same
    resumes = last is not None and _same(last, command) and not ended_well(last)
    return Submitted(api.job(job_id), "resumed" if resumes else "new")


def _as_it_is(last: Job, request: Request, command: str) -> str | None:
    """How the newest attempt answers the request, if no other one is needed."""
    same = _same(last, command)
    if last.over:
        return "over" if same and ended_well(last) and not request.again else None
    if not same:
        raise UserError(
            f"a job of this name is {last.status.lower()}, with another command or other files: "
            f"{last.entrypoint}",
            where=f"--name {last.name}",
            fix=f"choose another --name, or stop it: qwen-ray stop {last.name}",
        )
    return "joined"


def _same(job: Job, command: str) -> bool:
    return job.metadata.get(keys.COMMAND) == command


def _check_alone(jobs: Sequence[Job], name: str, request: Request) -> None:
    """Refuse what a job of another name writes to: each would remove the other's files."""
    if not request.out:
        return
    out = posixpath.normpath(request.out)
    for job in jobs:
        theirs = job.metadata.get(keys.OUT)
        if not job.over and job.name != name and theirs and posixpath.normpath(theirs) == out:
            raise UserError(
                f"{job.id} is {job.status.lower()} and writes there",
                where=f"{request.where}: {request.out}",
                fix=f"write elsewhere, or stop it: qwen-ray stop {job.name}",
            )


def _runtime_environment(api: JobsApi, tree: Package, options: Options, note: Note) -> dict[str, Any]:
    """Files, packages and variables of the job; the files are sent. No value of a secret is in it."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_SECONDS, **secrets.sent(options.send_env)}
    found: dict[str, Any] = {"env_vars": variables}
    if options.env:
        variables[secrets.NAMES] = ",".join(options.env)
        found["worker_process_setup_hook"] = secrets.HOOK
    if options.pip:
        found["pip"] = _requirements(options.pip)
    if tree.files:
        found["working_dir"] = _send(api, tree, note)
    if options.install:
        found["py_modules"] = [_send(api, own_package(), note)]
    return found


def entry_point(request: Request, attempt: int, *, python: str) -> str:
    """The shell command of a job that runs a verb."""
    out = ["--out", request.out] if request.out and "://" not in request.out else []
    words = [python, "-m", "qwen_ray.jobs.entry", "--qwen-ray", __version__, "--attempt", str(attempt), *out]
    return shell_command([*words, "--", request.verb, *request.argv])


def shell_command(words: Sequence[str]) -> str:
    """A job's command. ``exec``: no shell stays between Ray, which stops it, and the program."""
    return f"exec {shlex.join(words)}"


def ended_well(job: Job) -> bool:
    """Whether a job did what it was asked, a gate's no included."""
    return job.status == "SUCCEEDED" or (job.status == "FAILED" and job.exit_code == EXIT_GATE_SAID_NO)


def latest(jobs: Sequence[Job], name: str) -> Job | None:
    """The newest attempt of a name; None if there is none."""
    return max((job for job in jobs if job.name == name), key=lambda job: job.attempt, default=None)


def find(api: JobsApi, name: str) -> Job:
    """The newest attempt of a name, or the job of that id; :class:`UserError` with the nearest name."""
    jobs = api.jobs()
    found = latest(jobs, name) or next((job for job in jobs if job.id == name), None)
    if found is None:
        names = {job.name for job in jobs}
        fix = did_you_mean(name, names) if names else "the cluster remembers no job; it may be a new one"
        raise UserError(f"no job '{name}'", where=api.address, fix=fix)
    return found


def _name(name: str) -> str:
    if not requests.JOB_NAME.fullmatch(name):
        raise UserError(
            f"'{name}' is no name of a job", where="--name", fix="at most 80 letters, digits, '_' and '-'"
        )
    return name


def _requirements(file: str) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UserError(f"cannot be read ({e.strerror})", where=f"--pip {file}") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _send(api: JobsApi, package: Package, note: Note) -> str:
    if api.upload(package.uri, package.data):
        note(f"sent {len(package.files)} files, {len(package.data) / 2**20:.1f} MiB")
    return package.uri


def _entry_resources(api: JobsApi, request: Request, options: Options) -> dict[str, Any]:
    """What the entry point reserves, after a look at whether the cluster can ever hold the job.

    With nothing reserved Ray starts it on the head, which every cluster has and no autoscaler takes away,
    also where the head has 0 CPUs. What computes by itself reserves a GPU, or a CPU where there is none, so
    it lands on a node that has one.
    """
    nodes = api.resources()
    gpus, cpus = options.gpus, options.cpus
    if request.computes and cpus is None and gpus is None:
        gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes))
        cpus = 1.0
    cpus, gpus = cpus or 0.0, gpus or 0.0
    if not api.autoscales():
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise _no_room(Room(1, cpus, gpus, "--cpus, --gpus"), nodes)
        for room in request.room:
            each = {"CPU": room.cpus, "GPU": room.gpus}
            have = {kind: sum(node.get(kind, 0) for node in nodes) for kind in each}
            if any(have[kind] < amount * room.count for kind, amount in each.items()):
                raise _no_room(room, nodes)
    return {key: amount for key, amount in _reserved(cpus, gpus).items() if amount}


def _reserved(cpus: float, gpus: float) -> dict[str, float]:
    return {"entrypoint_num_cpus": cpus, "entrypoint_num_gpus": gpus}


def _no_room(room: Room, nodes: Sequence[dict[str, float]]) -> UserError:
    have = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    return UserError(
        f"the cluster can never hold {room.count} x {room.cpus:g} CPU and {room.gpus:g} GPU: its "
        f"{len(nodes)} nodes have {have['CPU']:g} CPU and {have['GPU']:g} GPU in all, and nothing adds nodes",
        where=room.what,
        fix="ask for less, or add nodes",
    )
