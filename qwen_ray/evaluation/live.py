"""Benchmarking the model that is being trained: in memory, as it is, and without a trace left in it.

The scoring and the generating are the serving engine's (:class:`TorchEngine`); here are only what training
asks for on top. Weights are neither copied nor made into inference tensors, random number generators and
train mode are put back, compiled layers run eagerly (so that shapes of the benchmark do not end up among
those compiled for training), and the ranks share the work.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from qwen_ray.errors import UserError
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.harness import evaluate
from qwen_ray.serving.backends import EngineBackend, Ids, Sampling, Scored, warn_truncated
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem, ScoreResult
from qwen_ray.serving.engines.decode import DecodeBatch, DecodeRow
from qwen_ray.serving.engines.packing import ScoreBatch
from qwen_ray.serving.engines.torch import TorchEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Inside = Callable[[Callable[[], Any]], Any]
"""Calls a function where the weights can be used, and returns what it returns."""


def evaluate_live(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite_name: str,
    *,
    device: torch.device | str,
    limit: int | None = None,
    data_dir: Path | None = None,
    num_fewshot: int | None = None,
    id: str = "model",
    lockstep: bool = False,
    inside: Inside | None = None,
) -> dict[str, Any]:
    """Run a suite on ``model`` (a transformers model or a ``PeftModel``) between two training steps.

    Where ``torch.distributed`` is initialised every rank must call it, with the same arguments, and every
    rank gets the same result. Ranks that hold a whole model share the requests. ``lockstep``: parameters
    are sharded, so all ranks run the same forward passes together. ``inside``: how to call a function
    inside the forward of the outermost sharded module, when the model's own layers cannot be called from
    outside of it (FSDP2: ``lambda f: root(f)`` with a root that calls what it gets).

    Runs in the autocast that surrounds the call. Returns an EvalResult, as :func:`evaluate`; ``id`` is the
    model's name in it. A model whose output is not a number raises ``FloatingPointError``.
    """
    from qwen_ray.evaluation.lm import QwenRayLM

    suite = suites.load(suite_name)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    device = torch.device(device)
    with ExitStack() as stack:
        stack.enter_context(_generators_kept())
        stack.enter_context(_evaluating(model))
        stack.enter_context(_attention(base, "sdpa"))
        stack.enter_context(_only_process_of_its_node())
        # A bar for every task of every evaluation would fill the workers' logs.
        stack.enter_context(patch("lm_eval.api.task.tqdm", partial(tqdm, disable=True)))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        engine = LiveEngine(base, tokenizer, device=device, id=id, lockstep=lockstep, inside=inside)
        backend = LiveBackend(engine, tokenizer)
        result = evaluate(
            suite,
            QwenRayLM(backend),
            model=id,
            data_dir=data_dir,
            limit=limit,
            num_fewshot=num_fewshot,
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of the benchmark's shapes would fragment the training's memory
    result["settings"]["endpoint"] = False
    return result


class LiveEngine(TorchEngine):
    """The engine over a model that somebody else owns. Forward passes run outside of inference mode.

    What is allocated in inference mode can never take part in a backward pass again, and a sharded model
    allocates its gathered parameters during the forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        id: str,
        lockstep: bool = False,
        inside: Inside | None = None,
    ) -> None:
        super().__init__(model, tokenizer, id=id)
        # Neither can be read off parameters that are sharded or offloaded.
        self.device = device
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.lockstep = lockstep
        self._inside: Inside = inside or (lambda function: function())

    def _probe(self) -> None:
        """Nothing to find out: the training loss takes the same path, hidden states and then the head."""

    def run_score(self, batch: ScoreBatch, results: list[ScoreResult]) -> None:
        score = super().run_score
        self._inside(lambda: score(batch, results))

    def _hidden(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.inference_mode(False), torch.no_grad():
            return super()._hidden(*args)

    def _head(self, *args: Any) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return super()._head(*args)

    def last_logits(self, *args: Any) -> tuple[torch.Tensor, Any]:
        forward = super().last_logits
        with torch.inference_mode(False), torch.no_grad():
            logits, cache = self._inside(lambda: forward(*args))
            if self.lockstep and _world_size() > 1:
                # A rounding that differed between ranks would end a row on one of them only; the others
                # would then wait for it in the next forward for ever.
                shared = logits.to(self.device)
                dist.broadcast(shared, 0)
                logits = shared.cpu()
        return logits, cache


class LiveBackend(EngineBackend):
    """Scores and generates with every rank's engine.

    The work is cut into batches as one process would cut it, and whole batches are dealt to the ranks: the
    numbers do not depend on how many there are.
    """

    def __init__(self, engine: LiveEngine, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(engine, tokenizer)
        self._live = engine

    def score(
        self, items: Sequence[tuple[Ids, list[Ids]]], progress: Callable[[int], object]
    ) -> list[list[Scored]]:
        requests = [ScoreItem(None, *item) for item in items]
        for request in requests:
            self._live.check_score(request)
        results = self._live.blank_results(requests)
        warn_truncated(sum(result.truncated for result in results), self.info)

        def work(batch: ScoreBatch) -> list[tuple[int, int, float, bool]]:
            self._live.run_score(batch, results)
            # All tokens of a continuation are in one row.
            keys = sorted({(want.item, want.continuation) for row in batch.rows for want in row.wants})
            progress(len(keys))
            scores = [results[i].continuations[c] for i, c in keys]
            return [(i, c, s.total, s.greedy) for (i, c), s in zip(keys, scores, strict=True)]

        out: list[list[Scored]] = [[(0.0, True)] * len(continuations) for _, continuations in items]
        for found in self._deal(self._live.plan_score(requests), work):
            for i, c, total, greedy in found:
                out[i][c] = (total, greedy)
        return out

    def generate(
        self, prompts: Sequence[Ids], sampling: Sampling, progress: Callable[[int], object]
    ) -> list[str]:
        rows = []
        for prompt in prompts:
            request = GenerateRequest(
                None,
                prompt,
                sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed or 0,  # never a seed that differs between ranks
                stop=sampling.stop,
            )
            self._live.check_generate(request)
            rows.append(DecodeRow(self._live, request))
        places = {row: i for i, row in enumerate(rows)}

        def work(group: list[DecodeRow]) -> list[tuple[int, str]]:
            batch = DecodeBatch(self._live, group)
            while batch.rows:
                batch.step()
            for row in group:
                if row.error is not None:
                    raise row.error
            progress(len(group))
            return [(places[row], row.result.text) for row in group]

        texts = [""] * len(prompts)
        for found in self._deal(self._live.group_rows(rows), work):
            for i, text in found:
                texts[i] = text
        return texts

    def _deal(self, parts: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
        """What ``work`` gives for every part, in any order, the same list on every rank."""
        world = _world_size()
        if world == 1:
            return [work(part) for part in parts]
        rank = dist.get_rank()
        done: list[Any] = []
        failure: Exception | None = None
        try:
            done = [work(part) for part in (parts if self._live.lockstep else parts[rank::world])]
        except Exception as e:  # the others wait for an answer, and must learn of it
            failure = e
        told: Any = None if failure is None else f"{type(failure).__name__}: {failure}"
        if isinstance(failure, UserError | FloatingPointError):
            told = failure  # starting again would not help, and every rank must know that
        answers: list[Any] = [None] * world
        dist.all_gather_object(answers, (done, told))
        if failure is not None:
            raise failure
        for other, (_, told) in enumerate(answers):
            if isinstance(told, Exception):
                raise told
            if told is not None:
                raise RuntimeError(f"the evaluation failed on rank {other}: {told}")
        # In lockstep all did everything; rank 0's figures are everybody's, to the last bit.
        return list(answers[0][0]) if self._live.lockstep else [x for done, _ in answers for x in done]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the random number generators of Python, NumPy and torch back: lm-eval seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    # Only the current GPU: asking for another one's state would open a context on it.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, and then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _attention(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Run with another attention implementation: the one of training asks for documents' bounds."""
    from transformers import PreTrainedModel

    # In the order of modules(): setting a configuration also sets those inside it.
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def _only_process_of_its_node() -> Iterator[None]:
    """lm-eval returns nothing where ``LOCAL_RANK`` is not 0, and here every rank needs the result."""
    before = os.environ.get("LOCAL_RANK")
    if before is not None:
        os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before
