"""The settings of a mix search (:mod:`qwen_ray.sweeps.mixsearch`)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qwen_ray.config import Section


class MixSearchConfig(Section):
    """Which mixes are scored by merging domain experts, which are really trained, and what if that fails."""

    page: ClassVar[str] = "docs/sweeps.md"
    candidates: Annotated[int, Field(ge=4)] = 300
    """Mixes that are scored by merging the experts' adapters. A score is a forward pass, not a training."""
    verify: Annotated[int, Field(ge=1)] = 3
    """Mixes that are then really trained, beside the uniform one."""
    learning_rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(
        default=[0.5, 1.0, 2.0]
    )
    """Each of them at these multiples of the learning rate."""
    proxy_threshold: Annotated[float, Field(ge=-1, le=1)] = 0.9
    """Rank correlation of scores and real losses over the verified mixes, below which the scores are not
    believed and the fallback searches on."""
    held_out_tokens: Annotated[int, Field(ge=1)] = 20_000
    """About so many held-out tokens of each domain are read for a score, if there are more."""
    fallback: Literal["bayes", "none"] = "bayes"
    """bayes: Bayesian search over the mixes with real runs, from those there are. none: the best of those."""
    fallback_trials: Annotated[int, Field(ge=1)] = 8
    """Real runs that the fallback may use."""
