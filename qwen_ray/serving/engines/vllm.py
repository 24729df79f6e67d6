"""The vLLM engine: for GPUs, with the calls of the embedded engine, behind the same service and ingress.

Optional: vLLM is imported when an engine is loaded. docs/decisions/0021-vllm.md says how it is used and what
was measured. Memory for ``max_adapters`` + 1 adapters is taken at the start, and they are mixed in a batch.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import (
    MAX_TOP,
    GenerateRequest,
    GenerateResult,
    ScoreItem,
    ScoreResult,
    TokenEvent,
)
from qwen_ray.serving.engines.decode import check_request
from qwen_ray.serving.engines.packing import check_item
from qwen_ray.serving.engines.shared import check_lineage, eos_ids
from qwen_ray.serving.engines.vllm_adapters import RANKS, Shapes, blueprint, write_lora
from qwen_ray.serving.engines.vllm_check import check_adapters
from qwen_ray.serving.engines.vllm_core import Core, require_vllm
from qwen_ray.serving.engines.vllm_queue import VllmQueue
from qwen_ray.serving.lora_weights import LoraWeights, read_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Slots of vLLM that stay empty: on CPUs, 0.32 answers for the base with what the last one holds.
_SPARE_SLOTS = 1
_TOLERANCE = {torch.float32: 1e-3}  # nats a token, between an answer alone and in a batch
_ROUGH = 0.5  # the same in 16 bits
_PLACE_SECONDS = 5.0  # waited for a place, where all are taken
_CPU_CACHE_BYTES = 2**30
_STEP_TOKENS = 2048  # tokens of one step; scoring holds logits of all of them, 1.2 GB for Qwen's vocabulary


class VllmEngine:
    """A model served by vLLM. See :class:`qwen_ray.serving.engines.base.Engine` for the contract.

    Adapters are known by key here, by number in vLLM. A number is never used twice, and the name that vLLM
    gets is as unique: it compares requests, and keys its prefix cache, by name.
    """

    def __init__(
        self,
        core: Core,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        id: str,
        fingerprint: str,
        context_length: int,
        max_adapters: int,
        max_rank: int,
    ) -> None:
        """``model``: its :func:`~qwen_ray.serving.engines.vllm_adapters.blueprint`."""
        self.core, self.tokenizer, self.id, self.fingerprint = core, tokenizer, id, fingerprint
        self.context_length, self.max_adapters = context_length, max_adapters
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.eos_ids = eos_ids(model, tokenizer)
        self._dtype = model.dtype
        self._shapes = Shapes(model, max_rank=max_rank)
        self._loras: dict[str, Any] = {}  # vLLM's LoRARequest of each key
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()  # adapters; held while one is loaded
        self._folder = Path(tempfile.mkdtemp(prefix="qwen-ray-vllm-"))
        self._clean = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._queue = VllmQueue(self)

    @classmethod
    def load(
        cls,
        ref: models.ModelRef,
        *,
        gpus: float = 0.0,
        threads: int = 1,
        max_adapters: int = 8,
        max_rank: int = 64,
        context_length: int | None = None,
        memory: float = 0.85,
        cache_bytes: int | None = None,
    ) -> VllmEngine:
        """Start vLLM on a model, and check that it keeps adapters apart.

        ``gpus``: of this replica; the model is spread over all of them, in bfloat16, and of a fraction it
        takes that part. 0 is the CPU, in float32. ``threads``: of each computing process. ``max_adapters``:
        resident at once; ``max_rank``: of any of them. ``context_length``: the model's own if not given.
        ``memory``: the part of each GPU's memory that may be used. ``cache_bytes``: of keys and values; on a
        GPU what ``memory`` leaves, on the CPU 1 GiB.

        Raises :class:`UserError` if vLLM is not installed, cannot serve this model or mixes adapters up.
        """
        version = require_vllm(threads=threads)
        dtype = torch.bfloat16 if gpus else torch.float32
        length = min(context_length or models.context_length(ref), models.context_length(ref))
        rank = next((r for r in RANKS if r >= max_rank), None)
        if rank is None or max_adapters < 1:
            raise UserError(
                f"max_rank is {max_rank} and max_adapters {max_adapters}",
                where="vLLM",
                fix=f"a rank of 1 to {RANKS[-1]}, and at least one adapter",
            )
        parts = {
            "model": blueprint(ref, dtype),
            "tokenizer": models.load_tokenizer(ref),
            "id": ref.id,
            "fingerprint": models.fingerprint(ref),
        }
        arguments = {
            "model": str(models.model_folder(ref)),
            "load_format": "safetensors",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # nothing is sampled otherwise than the request says
            "dtype": str(dtype).removeprefix("torch."),
            "tensor_parallel_size": max(1, int(gpus)),
            "gpu_memory_utilization": memory * (min(1.0, gpus) or 1.0),
            "kv_cache_memory_bytes": cache_bytes or (None if gpus else _CPU_CACHE_BYTES),
            "enforce_eager": not gpus,
            # A sequence to score is one token longer than the context, and vLLM wants room for one more.
            "max_model_len": length + 2,
            "hf_overrides": {"max_position_embeddings": max(length + 2, models.context_length(ref))},
            "max_num_batched_tokens": _STEP_TOKENS,
            "enable_prefix_caching": True,
            "max_logprobs": MAX_TOP,
            "enable_lora": True,
            "max_loras": max_adapters + _SPARE_SLOTS,
            "max_cpu_loras": max_adapters + _SPARE_SLOTS,
            "max_lora_rank": rank,
            "disable_log_stats": True,
        }
        core: Core | None = None
        try:
            core = Core(arguments)
            engine = cls(core, context_length=length, max_adapters=max_adapters, max_rank=rank, **parts)
            engine.check()
        except BaseException as e:
            if core is not None:
                core.stop()
            if isinstance(e, UserError) or not isinstance(e, Exception):
                raise
            reason = str(e).strip().splitlines() or [type(e).__name__]
            raise UserError(
                f"vLLM {version} cannot serve this model: {reason[0][:300]}",
                where=ref.location,
                fix="its log above says more; the embedded engine (engine: torch) may do",
            ) from e
        return engine

    def queue(self, *, max_waiting_tokens: int | None = None) -> VllmQueue:
        """What the service puts requests into, in the place of a scheduler."""
        if max_waiting_tokens is not None:
            self._queue = VllmQueue(self, max_waiting_tokens=max_waiting_tokens)
        return self._queue

    def check(self) -> None:
        """Fill every place with an adapter made for it, and score alone and mixed; see ``vllm_check``."""
        probes = [f"probe {i}" for i in range(1, self.max_adapters + 1)]
        try:
            for i, key in enumerate(probes):
                self.add_adapter(key, self._shapes.probe(i))
            check_adapters(
                self.score, probes, vocabulary=self.vocabulary, tolerance=_TOLERANCE.get(self._dtype, _ROUGH)
            )
        finally:
            for key in probes:
                self.remove_adapter(key)

    def close(self) -> None:
        """End vLLM's processes and remove what was written for it."""
        self.core.stop()
        self._clean()

    # -- adapters

    def read_adapter(self, folder: Path, *, within: Path | None = None) -> LoraWeights:
        """The slow part of :meth:`add_adapter`; any thread may."""
        return read_lora(folder, within=within)

    def check_lineage(self, folder: Path) -> None:
        """:class:`UserError` (409) if the folder says that it was trained on another base model."""
        check_lineage(folder, self.id, self.fingerprint)

    def add_adapter(self, key: str, folder: Path | LoraWeights, *, within: Path | None = None) -> int:
        """Load an adapter under ``key``; returns its size in bytes.

        Raises :class:`UserError`: 409 if it is refused, 503 while all places are taken.
        """
        from vllm.lora.request import LoRARequest

        weights = folder if isinstance(folder, LoraWeights) else self.read_adapter(folder, within=within)
        self.remove_adapter(key)
        with self._changed:
            # What is being dropped leaves its place in a moment.
            free = self._changed.wait_for(lambda: len(self._shapes) < self.max_adapters, _PLACE_SECONDS)
            if not free:
                raise UserError(
                    f"all {self.max_adapters} places for adapters are in use",
                    fix="ask again, or start the server with a larger max_adapters",
                    status=503,
                    retry_after=1.0,
                )
            nbytes = self._shapes.accept(key, weights)
            number = next(self._numbers)
            place = self._folder / str(number)
            try:
                write_lora(weights, place, self._dtype)
                lora = LoRARequest(lora_name=f"{number}:{key}", lora_int_id=number, lora_path=str(place))
                self.core.add_lora(lora)
            except BaseException:
                self._shapes.forget(key)
                shutil.rmtree(place, ignore_errors=True)
                raise
            self._loras[key] = lora
        return nbytes

    def remove_adapter(self, key: str) -> None:
        """Unload; nothing happens if it is not loaded. No request may be using it."""
        with self._changed:
            lora = self._loras.pop(key, None)
            if lora is None:
                return
            self.core.remove_lora(lora.lora_int_id)
            self._shapes.forget(key)
            self._changed.notify_all()
            shutil.rmtree(lora.lora_path, ignore_errors=True)

    def lora(self, key: str | None) -> Any:
        """vLLM's ``LoRARequest`` of a loaded adapter; None for the base."""
        return None if key is None else self._loras[key]

    # -- scoring and generating

    def check_score(self, item: ScoreItem) -> None:
        """Raise :class:`UserError` for an item that cannot be scored."""
        check_item(item, vocabulary=self.vocabulary, context_length=self.context_length)
        self._check_adapter(item.adapter)

    def check_generate(self, request: GenerateRequest) -> None:
        """Raise :class:`UserError` for a request that cannot be generated from."""
        check_request(request, vocabulary=self.vocabulary, context_length=self.context_length)
        self._check_adapter(request.adapter)

    def _check_adapter(self, key: str | None) -> None:
        if key is not None and key not in self._loras:
            raise UserError(f"adapter '{key}' is not loaded", fix="add_adapter it first", status=404)

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """Log-probabilities of each item's continuations, in order."""
        return self._queue.score(items).result()

    def generate(
        self, requests: Sequence[GenerateRequest], on_token: Callable[[int, TokenEvent], None] | None = None
    ) -> list[GenerateResult]:
        """Continue every prompt; ``on_token(i, event)`` is called as request ``i`` gets a token."""
        return [running.future.result() for running in self._queue.generate(requests, on_token)]
