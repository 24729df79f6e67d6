"""Following a job until it ends, through pauses of the network, and saying why it failed."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from qwen_ray.errors import EXIT_FAILED, EXIT_GATE_SAID_NO, EXIT_OK, UserError
from qwen_ray.jobs.api import Job, JobsApi, Unreachable

_POLL, _LAST_WORDS = 2.0, 5.0  # seconds: between looks at the status; for the log after the end
_SOON, _REMIND = 8.0, 30.0  # seconds: until the first note on a job that waits, and between notes
PATIENCE = 30.0
"""Seconds without an answer after which the head is given up."""
Write = Callable[[str], None]
T = TypeVar("T")


def follow(api: JobsApi, job: Job, *, write: Write, note: Write, patience: float = PATIENCE) -> Job:
    """Pass on what a job prints until it is over; returns it as it then is.

    ``write`` gets pieces of its log, ``note`` lines about it. ``RuntimeError`` where the head does not
    answer for ``patience`` seconds, or has forgotten the job: a new head did not start it. What ``write``
    raises ends the following at once.
    """
    return asyncio.run(_interruptible(_follow(api, job.id, write, note, patience)))


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """``work``, cancelled by Ctrl-C: a handler that raises would do so inside of asyncio's own code."""
    if threading.current_thread() is not threading.main_thread():
        return await work
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    task = asyncio.ensure_future(work)
    for number in handlers:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in handlers.items():
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, handler)


async def _follow(api: JobsApi, job_id: str, write: Write, note: Write, patience: float) -> Job:
    shown = 0

    async def pass_on() -> None:
        """Print the log; a stream that broke starts at its beginning again."""
        nonlocal shown
        while True:
            read = 0
            async for piece in api.tail(job_id):
                read += len(piece)
                if read > shown:
                    write(piece[-(read - shown) :])
                    shown = read
            await asyncio.sleep(_POLL)

    async def to_the_end() -> tuple[Job, str]:
        """The job when it is over, and all that it has printed."""
        job = await _until_over(api, job_id, note, patience)
        try:
            text = await _answered(lambda: api.logs(job_id), patience)
        except RuntimeError as e:  # how the job ended is known without its log
            note(f"the end of {job_id}'s log could not be read: {e}")
            return job, ""
        deadline = time.monotonic() + _LAST_WORDS
        while shown < len(text) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return job, text

    printing, watching = asyncio.create_task(pass_on()), asyncio.create_task(to_the_end())
    try:
        await asyncio.wait({printing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if printing.done():  # it ends by an error alone, as where nobody reads what is written
            printing.result()
        job, text = await watching
    finally:
        for task in (printing, watching):
            task.cancel()
        await asyncio.gather(printing, watching, return_exceptions=True)
    if len(text) > shown:
        write(text[shown:])
    return job


async def _until_over(api: JobsApi, job_id: str, note: Write, patience: float) -> Job:
    remind = time.monotonic() + _SOON
    while True:
        job = await _answered(lambda: api.job(job_id), patience)
        if job.over:
            return job
        if job.status == "PENDING" and time.monotonic() > remind:
            remind = time.monotonic() + _REMIND
            note(f"{job_id} has not started: {waits_for(await _answered(api.in_use, patience))}")
        await asyncio.sleep(_POLL)


async def _answered(ask: Callable[[], T], patience: float) -> T:
    deadline = time.monotonic() + patience
    while True:
        try:
            return await asyncio.to_thread(ask)
        except Unreachable as e:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{e.what}, at {e.where}. The job may go on there, or have ended with its head; once "
                    "a head answers, the same submit joins it or goes on from its last checkpoint"
                ) from e
            await asyncio.sleep(_POLL)
        except UserError as e:
            raise RuntimeError(f"{e.where}: {e.what}: the cluster was started anew, or is another") from e


def waits_for(in_use: Mapping[str, tuple[float, float]]) -> str:
    """What a job that has not started may wait for, in words. Ray has no queue: a job waits for room."""
    shown = [
        f"{in_use[kind][0]:g} of {in_use[kind][1]:g} {kind} in use"
        for kind in ("CPU", "GPU")
        if kind in in_use
    ]
    return f"it waits for room, or for its environment to be set up ({', '.join(shown) or 'use not known'})"


def outcome(job: Job, log: str) -> tuple[int, str]:
    """The exit code that a job's end amounts to, and a line on it; its own error first if it failed."""
    if job.status == "SUCCEEDED":
        return EXIT_OK, f"{job.id} is done"
    if job.status == "STOPPED":
        return EXIT_FAILED, f"{job.id} was stopped; the same submit goes on from its last checkpoint"
    if job.exit_code == EXIT_GATE_SAID_NO:
        return EXIT_GATE_SAID_NO, f"{job.id} is done: a gate said no"
    return EXIT_FAILED, f"{_why(job, log)}\n  ({job.id}; all of it: qwen-ray logs {job.name})"


def _why(job: Job, log: str) -> str:
    """Why a job failed."""
    lines = log.splitlines()
    told = [n for n, line in enumerate(lines) if line.startswith(("error: ", "failed: "))]
    if told:
        return "\n".join(lines[told[-1] : told[-1] + 2]).split(": ", 1)[1]
    if "No module named qwen_ray" in log or "No module named 'qwen_ray" in log:
        return "qwen-ray is not installed on the cluster's nodes; use an image that has it, or --install"
    if job.exit_code == 127:
        return "the node has no such Python; name one with --python"
    if job.error_type == "JOB_SUPERVISOR_ACTOR_DIED":
        return "the node of the entry point was lost; the same submit goes on from the last checkpoint"
    said = [line for line in job.message.splitlines() if line.strip()]
    if job.exit_code is None:
        return said[0] if said else "the cluster does not say why"
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"the entry point ended with {job.exit_code}: {last}"
