"""vLLM's asynchronous engine on an event loop of its own, in a thread of this process.

The model itself runs in processes that vLLM starts, one for each GPU. Everything here may be called from any
thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from qwen_ray.errors import UserError

T = TypeVar("T")

# Defaults only: what the administrator has set stays.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # vLLM reports its use to its makers unless told not to
    "VLLM_LOGGING_LEVEL": "WARNING",
    # This process has threads, and a forked child would inherit their locks.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas share a machine's cores: Ray counts them
}


def require_vllm(*, threads: int) -> str:
    """Prepare the environment and import vLLM; returns its version. :class:`UserError` if it is missing.

    ``threads``: of the processes that compute, where they do so on CPUs.
    """
    for name, value in (_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}).items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as e:
        raise UserError(
            f"the vLLM engine needs vLLM, which does not import here ({e})",
            fix="install it in an environment of its own (docs/decisions/0021-vllm.md), "
            "or use the embedded engine (engine: torch)",
        ) from None
    return str(vllm.__version__)


class Core:
    """A running ``AsyncLLM``. ``arguments``: those of vLLM's ``AsyncEngineArgs``."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._llm: Any = None
        try:
            self.run(self._start(arguments)).result()
        except BaseException:
            self.stop()
            raise

    async def _start(self, arguments: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        # On this loop, so that its sockets and tasks belong to it.
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on vLLM's loop. Cancelling the future cancels it."""
        if not self._thread.is_alive():
            coroutine.close()
            raise RuntimeError("vLLM has stopped")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def soon(self, function: Callable[[], None]) -> None:
        """Call ``function`` on vLLM's loop, if it still runs."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(function)

    async def outputs(self, prompt: Sequence[int], params: Any, lora: Any) -> AsyncGenerator[Any, None]:
        """vLLM's ``RequestOutput`` objects for one prompt. Closing the generator aborts the request.

        ``params``: ``SamplingParams``; ``lora``: ``LoRARequest``, or None for the base.
        """
        stream = self._llm.generate(
            {"prompt_token_ids": list(prompt)}, params, f"r{next(self._ids)}", lora_request=lora
        )
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    def add_lora(self, lora: Any) -> None:
        """Load a ``LoRARequest``'s files into a slot; vLLM does so between two steps. Waits."""
        self.run(self._llm.add_lora(lora)).result()

    def remove_lora(self, number: int) -> None:
        """Free a slot, if vLLM still runs. Waits."""
        if self.alive:
            self.run(self._llm.remove_lora(number)).result()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._llm is not None and not self._llm.errored

    def stop(self) -> None:
        """End vLLM's processes and the loop; what runs on it fails. A second call does nothing."""
        if not self._thread.is_alive():
            return
        self.run(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
