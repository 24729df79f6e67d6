"""One run of a pipeline at a time."""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_ray.lifecycle.lease import Lease, this_process
from qwen_ray.lifecycle.state import State
from qwen_ray.storage import update

_OWNER = re.compile(r".*/(\d+)@([0-9a-f]+)")


@contextmanager
def turn(state: State, seconds: float, note: Callable[[str], None]) -> Iterator[Lease]:
    """The lease of a pipeline, for as long as the block runs.

    :class:`~qwen_ray.errors.UserError`, status 409, says who else runs it. Of a process that died on this
    machine it is taken at once; of one that died elsewhere when its time is up.
    """
    lease = Lease(state.storage, state.lease, f"{this_process()}@{_kernel()}", seconds)
    _end_of_the_dead(state)
    holder = lease.holder()
    if holder is not None and not _is_here(holder.owner):
        note(f"waiting to see whether {holder.owner} still runs this pipeline")
        while lease.holder() == holder:  # until it renews its lease, or the lease ends
            time.sleep(seconds / 100)
    with lease:
        yield lease


def _end_of_the_dead(state: State) -> None:
    """Free the lease of a process of this machine that is not there any more."""

    def change(document: Any) -> Any:
        owner = str(document["owner"]) if document is not None else ""
        if _is_here(owner) and not Path("/proc", _pid(owner)).exists():
            return {**document, "until": 0.0}
        return document

    if state.storage.keys(state.lease):
        update(state.storage, state.lease, change)


def _is_here(owner: str) -> bool:
    """Whether a holder is, or was, a process of this machine since it was last started."""
    found = _OWNER.fullmatch(owner)
    return found is not None and found[2] == _kernel()


def _pid(owner: str) -> str:
    found = _OWNER.fullmatch(owner)
    return found[1] if found else ""


def _kernel() -> str:
    """Names this boot of this machine and the space of its process numbers; a place of its own where that is
    not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        here = f"{boot}{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        here = uuid.uuid4().hex
    return hashlib.sha256(here.encode()).hexdigest()[:8]
