"""From weights, stages or a temperature to the share of each domain, checked against the data there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_ray.errors import UserError

Stages = Sequence[tuple[float, Mapping[str, float]]]
"""``(until, weights)``: where each stage ends, as a share of the run, and its weights."""

_ROUNDING = 1e-9


def temperature_weights(costs: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Weights proportional to ``cost ** (1 / temperature)``: 1 is by size, higher is nearer to even.

    The sampling of multilingual models (arXiv 1907.05019, section 4.2).
    """
    largest = max(costs.values(), default=1)
    return {d: (cost / largest) ** (1 / temperature) for d, cost in costs.items()}


def stages_of(costs: Mapping[str, float], stages: Stages) -> list[tuple[float, dict[str, float]]]:
    """``(until, shares)`` of each stage. Raises :class:`UserError` for stages that are not in order."""
    untils = [until for until, _ in stages]
    if any(a >= b for a, b in zip([0.0, *untils], untils, strict=False)):
        raise UserError(
            f"stages end at {', '.join(f'{u:g}' for u in untils)}, which does not ascend",
            where="data.stages",
            fix="put them in the order of the run, each 'until' above the one before",
        )
    if abs(untils[-1] - 1) > _ROUNDING:
        raise UserError(f"the last stage ends at {untils[-1]:g}", where="data.stages", fix="let it end at 1")
    return [
        (until, shares_of(costs, weights, where=f"data.stages.{i}.weights"))
        for i, (until, weights) in enumerate(stages)
    ]


def shares_of(
    costs: Mapping[str, float], weights: Mapping[str, float], *, where: str = "data.weights"
) -> dict[str, float]:
    """Share of every domain that has data, adding up to 1. ``costs``: of all its examples, in the unit of
    the weights. Without weights, by size. Raises :class:`UserError` for weights that do not fit the data."""
    for domain, weight in weights.items():
        if weight > 0 and domain not in costs:
            have = ", ".join(costs) or "none"
            raise UserError(
                f"domain '{domain}' has weight {weight:g} but no data",
                where=where,
                fix=f"add data for it, or name one of: {have}",
            )
    if not weights:
        if not costs:
            raise UserError("no training data", where="data.train", fix="name a file: --data FILE")
        total: float = sum(costs.values())
        return {d: cost / total for d, cost in costs.items()}
    for domain in costs:
        if domain not in weights:
            how = f": --set {where}.{domain}=0.1" if where == "data.weights" else ""
            raise UserError(
                f"domain '{domain}' has data but no weight",
                where=where,
                fix=f"give it one (0 leaves it out){how}",
            )
    total = sum(weights.values())
    if total <= 0:
        raise UserError("all weights are zero", where=where, fix="give one domain a weight")
    return {d: weights[d] / total for d in costs}
