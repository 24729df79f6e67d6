"""The engine as a Ray actor. When it dies, Ray starts it again and makes the calls of it again."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json
from qwen_ray.sweeps.engine import EngineCore
from qwen_ray.sweeps.spec import SweepConfig
from qwen_ray.training import errors

if TYPE_CHECKING:
    from ray.actor import ActorHandle


log = logging.getLogger(__name__)


class GaveUp(RuntimeError):
    """The engine has died too often without a decision in between."""


class Engine(EngineCore):
    """What the core cannot go on from ends the process, as it may have spoilt it.

    Bad input does not, nor what has come back too often: the trials' calls raise it.
    """

    def _set_up(self) -> None:
        most = self.spec.trials.max_failures
        if self._journal.starts > most:
            noted = sorted((self.out / errors.FOLDER).glob("*.json"))
            last = read_json(noted[-1])["error"] if noted else "it was killed"
            raise GaveUp(f"the engine died {most + 1} times before it came to a decision: {last}")
        self._journal.started()
        super()._set_up()

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, UserError | GaveUp):
            log.error("the engine failed", exc_info=error)
            errors.note(self.out, self.number, error)
            os._exit(1)
        super()._fail(error)


def engine_actor(spec: SweepConfig, out: Path, *, number: int, group: str) -> ActorHandle:
    """Start engine ``number`` of the sweep in ``out``, with the CPUs and GPUs of ``spec.trials``."""
    import ray

    trials = spec.trials
    return (
        ray.remote(Engine)
        .options(
            num_cpus=trials.cpus,
            num_gpus=trials.gpus or 0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2 * trials.slots + 8,
        )
        .remote(spec, out, number=number, group=group)
    )
