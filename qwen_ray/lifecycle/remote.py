"""A stage as a Ray job of its own, on a cluster that mounts the work folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK
from qwen_ray.fsio import write_text
from qwen_ray.jobs import api as keys
from qwen_ray.jobs.api import Job, JobsApi
from qwen_ray.jobs.follow import follow, outcome
from qwen_ray.jobs.request import Request
from qwen_ray.jobs.submit import entry_point, latest
from qwen_ray.lifecycle.stages import Context, Json


def run_job(
    context: Context, stage: str, settings: Json, verb: Sequence[str], key: str, *, leaves: Path
) -> None:
    """Run ``qwen-ray VERB FILE`` with ``settings`` in the file, on the cluster of ``run_on``, until it ends.

    The job is named by the stage and ``key``, the hash of its inputs: one that runs is joined, and one that
    failed is followed by another attempt, which resumes. ``leaves``: what it leaves in the work folder.
    Raises ``RuntimeError`` where it fails.
    """
    spec = context.spec
    assert spec.run_on is not None
    file = spec.folder("jobs", key, f"{stage}.yaml")
    write_text(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    name = f"{spec.name}-{stage}-{key[:16]}".replace(".", "-")
    with JobsApi(spec.run_on.address) as api:
        api.check()
        request = Request(verb[0], (*verb[1:], str(file)), out=None)
        job = _job(api, name, request, python=spec.run_on.python, computes=stage.startswith("prepare"))
        context.note(f"  Ray job {job.id} at {api.address}")
        context.reached(f"{stage}: submitted")
        log: list[str] = []

        def write(text: str) -> None:
            log.append(text)
            print(text, end="", file=sys.stderr)

        ended = follow(api, job, write=write, note=context.note)
        code, said = outcome(ended, "".join(log))
    if code not in (EXIT_OK, EXIT_GATE_SAID_NO):
        raise RuntimeError(said)
    if not leaves.exists():
        raise RuntimeError(f"{job.id} is done, and {leaves} is not here: mount the work folder on the nodes")


def _job(api: JobsApi, name: str, request: Request, *, python: str, computes: bool) -> Job:
    """The job of this name that is not over, or a new attempt. ``computes``: the entry point itself works;
    others start workers."""
    last = latest(api.jobs(), name)
    if last is not None and not last.over:
        return last
    attempt = 1 if last is None else last.attempt + 1
    job_id = name if attempt == 1 else f"{name}.{attempt}"
    metadata = {keys.NAME: name, keys.ATTEMPT: str(attempt), keys.VERB: request.verb, keys.OUT: ""}
    body: dict[str, Any] = {
        "entrypoint": entry_point(request, attempt, python=python),
        "submission_id": job_id,
        "metadata": metadata,
    }
    if computes:
        body["entrypoint_num_cpus"] = 1
    api.submit(body)  # False: somebody was quicker, with the same
    return api.job(job_id)
