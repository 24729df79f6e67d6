"""A check that no request is answered by another's adapter, made before an engine serves.

vLLM 0.32 on CPUs gives a request for the base model the adapter of the last slot when every slot is taken
and the request shares a batch with others' (vllm-project/vllm issues 48421 and 49656); 0.22 and 0.24 mixed
adapters up when one was loaded under load (47724). Nothing fails in these cases: the answers are just
another model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import ScoreItem, ScoreResult

_ROUNDS = 4  # times that each adapter is in the mixed call: a batch must hold it beside every other
_TOKENS = 12


def check_adapters(
    score: Callable[[Sequence[ScoreItem]], list[ScoreResult]],
    adapters: Sequence[str],
    *,
    vocabulary: int,
    tolerance: float,
) -> None:
    """Score the base and each adapter alone, then all in one call; :class:`UserError` if they differ.

    ``score``: an engine's, with ``adapters`` loaded, which must have unlike effects. ``tolerance``: the
    difference of log-probabilities, in nats a token, that rounding explains.
    """
    keys: list[str | None] = [None, *adapters]
    ids = [(37 * i + 11) % vocabulary for i in range(_TOKENS)]

    def logprobs(asked: Sequence[str | None]) -> list[list[float]]:
        items = [ScoreItem(key, ids[:2], [ids[2:]]) for key in asked]
        return [result.continuations[0].logprobs for result in score(items)]

    alone = [logprobs([key])[0] for key in keys]
    for i, one in enumerate(alone):
        for j in range(i):
            if _apart(one, alone[j]) <= 2 * tolerance:
                raise UserError(
                    f"adapters have no effect on this engine: {_name(keys[i])} answers as {_name(keys[j])}",
                    fix=_FIX,
                )
    mixed = logprobs(keys * _ROUNDS)
    for place, got in enumerate(mixed):
        own = place % len(keys)
        if _apart(got, alone[own]) <= tolerance:
            continue
        near = min(range(len(keys)), key=lambda other: _apart(got, alone[other]))
        seen = "unlike every one alone" if near == own else f"with the scores of {_name(keys[near])}"
        raise UserError(
            f"this engine mixes adapters up: in a mixed batch {_name(keys[own])} was answered {seen}",
            fix=_FIX,
        )


_FIX = "use the embedded engine (engine: torch), or a version of vLLM that passes this check"


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference in nats; infinite if one is not a number."""
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def _name(key: str | None) -> str:
    return "the base" if key is None else f"'{key}'"
