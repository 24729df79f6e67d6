"""Scores of mixes without training them: the experts of the domains, merged in the mix's shares.

The update of a mix is taken to be the shares' sum of the experts' updates, which is exactly one adapter:
their A's stacked, their B's side by side, each scaled by its expert's share (rank: the sum of the ranks).
So a score is a forward pass. It is a proxy: what domains do to one another in training is not in it (Merge
to Mix, arXiv 2505.16066; MergeMix, arXiv 2601.17858; OP-Mix, arXiv 2605.15220). Experts share the initial
A, the steps and the learning rate of the runs that they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.data.packing import Row
from qwen_ray.sweeps.objective import PREFIX
from qwen_ray.sweeps.simplex import Mix

if TYPE_CHECKING:
    from qwen_ray.config import RunConfig
    from qwen_ray.training.packed import Adapter, Pack

AT_ONCE = 8
"""Merged adapters that are scored in one pass."""
_KEY = "scores"


def merge(experts: Mapping[str, Adapter], mix: Mapping[str, float]) -> Adapter:
    """One adapter whose update is that of the ``experts``, by domain, in the shares of ``mix``.

    Layers: A [sum of ranks, in] and B [out, sum of ranks]. Domains without a share, or a layer that an
    expert does not adapt, add nothing.
    """
    import torch

    parts = [(mix[domain], expert) for domain, expert in sorted(experts.items()) if mix.get(domain)]
    merged: Adapter = {}
    for layer in sorted({layer for _, expert in parts for layer in expert}):
        pairs = [(share, *expert[layer]) for share, expert in parts if layer in expert]
        merged[layer] = (
            torch.cat([a for _, a, _ in pairs]),
            torch.cat([share * b for share, _, b in pairs], dim=1),
        )
    return merged


def score(
    pack: Pack,
    experts: Mapping[str, Adapter],
    mixes: Sequence[Mix],
    rows: Mapping[str, Sequence[Row]],
    *,
    at_once: int = AT_ONCE,
) -> list[dict[str, float]]:
    """Of each mix, merged: how far the loss of each domain's ``rows`` is above the base's, nats a token."""
    (base,) = pack.score([{}], rows)
    scores: list[dict[str, float]] = []
    for start in range(0, len(mixes), at_once):  # merged adapters are large: no more of them at a time
        merged = [merge(experts, mix) for mix in mixes[start : start + at_once]]
        scores += pack.score(merged, rows, at_once=at_once)
    return [{domain: loss - base[domain] for domain, loss in losses.items()} for losses in scores]


def score_folders(
    pack: Pack, config: RunConfig, experts: Mapping[str, str], mixes: Sequence[Mix], *, held_out_tokens: int
) -> dict[str, Any]:
    """:func:`score` of experts in PEFT folders, on the held-out rows of ``config``, about
    ``held_out_tokens`` tokens of a domain.

    Returns ``{"base": {domain: loss of all its rows}, "rises": [...]}``; JSON, for another process.
    """
    from qwen_ray.serving.lora_weights import read_lora

    slot = pack.add(_KEY, config)
    try:
        rows = bounded(slot.data.validation, held_out_tokens)
        base = {
            name.removeprefix(PREFIX): loss
            for name, loss in pack.base_losses(_KEY).items()
            if name.startswith(PREFIX)
        }
    finally:
        pack.remove(_KEY)
    adapters = {domain: read_lora(Path(folder)).layers for domain, folder in experts.items()}
    return {"base": base, "rises": score(pack, adapters, mixes, rows)}


def bounded(rows: Mapping[str, Sequence[Row]], tokens: int) -> dict[str, list[Row]]:
    """Rows of each domain, of about ``tokens`` tokens and at least one: all, or evenly spread ones, as
    packed rows are in order of their longest record."""
    kept: dict[str, list[Row]] = {}
    for domain, of_domain in rows.items():
        have, n = sum(row.tokens for row in of_domain), len(of_domain)
        count = n if have <= tokens else max(1, n * tokens // have)
        kept[domain] = [of_domain[i * n // count] for i in range(count)]
    return kept


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's coefficient; ties have their mean rank. None where either has no order to speak of."""
    from scipy.stats import spearmanr

    if len(a) < 2 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return float(spearmanr(a, b).statistic)
