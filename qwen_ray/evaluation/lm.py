"""lm-eval's view of our engine: every choice of a question is scored with its shared context computed once.

lm-eval hands a model (context, continuation) pairs. :class:`QwenRayLM` tokenises them as lm-eval's own
``hf`` model does, groups them by context and lets a backend score each group together: over HTTP
(:class:`EndpointBackend`, ``POST /v1/score``) or in this process (:class:`EngineBackend`).

``python -m qwen_ray.evaluation.lm run --model qwen-ray --model_args base_url=...,model=... --tasks ...``
is lm-eval's own command line with this model class registered. An API key comes from ``api_key=`` or, out of
the sight of other users of the machine, from $QWEN_RAY_API_KEY.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from qwen_ray.errors import UserError
from qwen_ray.serving.backends import Backend, EndpointBackend, EngineBackend, Ids, Sampling, Scored

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["Backend", "EndpointBackend", "EngineBackend", "QwenRayLM"]

log = logging.getLogger(__name__)

Pair = tuple[Ids, Ids]

_DEFAULT_NEW_TOKENS = 256
_KNOWN_SETTINGS = {"do_sample", "temperature", "top_p", "until", "max_gen_toks", "seed"}


@register_model("qwen-ray")
class QwenRayLM(LM):
    """An lm-eval model over a :class:`Backend`, or over ``base_url`` and ``model`` from a command line."""

    def __init__(
        self,
        backend: Backend | None = None,
        *,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 4,
        max_gen_toks: int = _DEFAULT_NEW_TOKENS,
        **_ignored: Any,  # batch_size, device and the like, which lm-eval passes to every model
    ) -> None:
        super().__init__()
        if backend is None:
            if not base_url or not model:
                raise UserError(
                    "base_url and model are needed", fix="--model_args base_url=http://...,model=ID"
                )
            backend = EndpointBackend(base_url, model, api_key, int(concurrency))
        self.backend, self.max_gen_toks = backend, int(max_gen_toks)
        info = backend.info
        self._prefix_text = info.bos_token or info.eos_token
        self.prefix_token_id = backend.encode([self._prefix_text], special=False)[0][0]

    # -- what lm-eval asks about the model

    @property
    def max_length(self) -> int:
        """Context length in tokens."""
        return self.backend.info.max_length

    @property
    def tokenizer_name(self) -> str:
        return self.backend.info.tokenizer_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.backend.info.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.backend.info.chat_template:
            raise UserError("the model has no chat template", where=self.backend.info.model)
        return self.backend.render(chat_history, add_generation_prompt=add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """Recorded in lm-eval's results."""
        return {"model_id": self.backend.info.model, "max_length": self.max_length}

    # -- requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """(log-probability, is greedy) of each request's continuation, as lm-eval defines them."""
        texts = [request.args for request in requests]
        results = self._score(self._encode_pairs(texts), disable_tqdm)
        for args, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's context where it is longer."""
        texts = [request.args[0] for request in requests]
        pairs: list[Pair] = []
        owner: list[int] = []
        for i, ids in enumerate(self._encode(texts)):
            for window in utils.get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                context, continuation = utils.make_disjoint_window(window)
                pairs.append((list(context), list(continuation)))
                owner.append(i)
        totals = [0.0] * len(texts)
        for i, (logprob, _) in zip(owner, self._score(pairs, disable_tqdm), strict=True):
            totals[i] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to its ``until`` strings."""
        from lm_eval.models.utils import postprocess_generated_text

        encoded = self._encode_prompts([request.args[0] for request in requests])
        groups: dict[Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(i)
        results = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm or None) as bar:
            for sampling, members in groups.items():
                room = self.max_length - sampling.max_tokens
                if room < 1:
                    raise UserError(
                        f"{sampling.max_tokens} new tokens do not fit the context of {self.max_length}",
                        fix="set max_gen_toks in the task's generation_kwargs",
                    )
                members.sort(key=lambda i: -len(encoded[i]))
                cut = [len(encoded[i]) > room for i in members]
                if any(cut):
                    log.warning(
                        "%d prompts left no room for %d new tokens in the %d of %s and lost their start",
                        sum(cut),
                        sampling.max_tokens,
                        self.max_length,
                        self.backend.info.model,
                    )
                texts = self._generate([encoded[i][-room:] for i in members], cut, sampling, bar.update)
                for i, text in zip(members, texts, strict=True):
                    results[i] = postprocess_generated_text(text, list(sampling.stop), None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
        return results

    def _generate(
        self,
        prompts: Sequence[Ids],
        cut: Sequence[bool],  # which lost their start: for a backend that keeps account
        sampling: Sampling,
        progress: Callable[[int], object],
    ) -> list[str]:
        return self.backend.generate(prompts, sampling, progress)

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        from lm_eval.models.utils import normalize_gen_kwargs

        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        if unknown := set(known) - _KNOWN_SETTINGS:
            raise UserError(
                f"generation_kwargs: {', '.join(sorted(unknown))} not supported", fix=f"of {_KNOWN_SETTINGS}"
            )
        return Sampling(
            max_tokens=int(known["max_gen_toks"]),
            temperature=float(known.get("temperature", 0.0)) if known.get("do_sample") else 0.0,
            top_p=float(known.get("top_p", 1.0)),
            stop=tuple(known["until"]),
            seed=known.get("seed"),
        )

    # -- tokens

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        """As HFLM.tok_encode: the tokenizer's special tokens, unless the text starts with the prefix."""
        unique = list(dict.fromkeys(texts))
        plain = [t for t in unique if t.startswith(self._prefix_text)]
        usual = [t for t in unique if not t.startswith(self._prefix_text)]
        ids: dict[str, Ids] = {}
        for group, special in ((plain, False), (usual, None)):
            if group:
                ids.update(zip(group, self.backend.encode(group, special=special), strict=True))
        return [ids[text] for text in texts]

    def _encode_prompts(self, texts: Sequence[str]) -> list[Ids]:
        return self._encode(texts)

    def _encode_pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """As TemplateLM._encode_pair: spaces at the context's end go to the continuation."""
        moved = []
        for context, continuation in texts:
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation) if context else ("", continuation))
        full = [(context, context + continuation) for context, continuation in moved]
        with_context = [pair for pair, (given, _) in zip(full, texts, strict=True) if given]
        encoded = iter(self._encode([text for pair in with_context for text in pair]))
        bare = [continuation for given, continuation in texts if not given]
        bare_ids = iter(self.backend.encode(bare, special=False) if bare else [])
        pairs: list[Pair] = []
        for given, _ in texts:
            if given:
                context_ids, whole = next(encoded), next(encoded)
                pairs.append((context_ids, whole[len(context_ids) :]))
            else:
                ids = next(bare_ids)
                starts = ids[:1] == [self.prefix_token_id]
                pairs.append((ids[:1], ids[1:]) if starts else ([self.prefix_token_id], ids))
        return pairs

    def _score(self, pairs: Sequence[Pair], quiet: bool) -> list[Scored]:
        """Score pairs, each distinct context once with all its distinct continuations."""
        grouped: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for context, continuation in pairs:
            grouped.setdefault(tuple(context), {}).setdefault(tuple(continuation))
        order = sorted(grouped, key=lambda context: (-len(context), context))
        items = [(list(context), [list(c) for c in grouped[context]]) for context in order]
        with tqdm(total=sum(map(len, grouped.values())), desc="Scoring", disable=quiet or None) as bar:
            scored = self.backend.score(items, bar.update)
        found = {
            (context, continuation): score
            for context, scores in zip(order, scored, strict=True)
            for continuation, score in zip(grouped[context], scores, strict=True)
        }
        return [found[tuple(context), tuple(continuation)] for context, continuation in pairs]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
