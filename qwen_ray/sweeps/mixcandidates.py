"""The mixes that are scored: a lattice over the simplex, then finer steps around the best of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qwen_ray.sweeps.mixsurrogate import Key, Rises, key
from qwen_ray.sweeps.simplex import Mix, Simplex

LATTICE = 2 / 3
"""Share of the candidates that is the lattice's."""
FINER = ((1 / 2, 1 / 4), (1 / 8, 1 / 16))
"""Steps of each round around the best so far, as parts of the lattice's. A round may start a process."""


def score_candidates(
    simplex: Simplex,
    mixes: Sequence[Mix],
    rises: Callable[[Sequence[Mix]], Sequence[Rises]],
    best: Callable[[Mapping[Key, Rises], Sequence[Mix]], Sequence[Mix]],
    *,
    most: int,
) -> list[tuple[Mix, Rises]]:
    """``mixes``, then at most ``most`` mixes of the region, and what ``rises`` says of each.

    ``best`` names those of some mixes, given all scores so far, around which finer steps are worth while.
    """
    grid, step = lattice(simplex, max(1, int(LATTICE * most)))
    known = {key(mix): mix for mix in [*mixes, *grid]}
    scores = dict(zip(known, rises(list(known.values())), strict=True))
    left = most - len(grid)
    for finer in FINER:
        found: dict[Key, Mix] = {}
        around = best(scores, list(known.values()))
        for part in finer:
            found |= neighbours(simplex, around, step * part)
        near = dict([(k, mix) for k, mix in found.items() if k not in known][:left])
        if near:
            known |= near
            scores |= dict(zip(near, rises(list(near.values())), strict=True))
            left -= len(near)
    return [(mix, scores[k]) for k, mix in known.items()]


def lattice(simplex: Simplex, most: int) -> tuple[list[Mix], float]:
    """The finest simplex lattice of at most ``most`` mixes, or the coarsest one; and the step between two."""
    parts, found = 1, list(simplex.lattice(1))
    while parts < most and len(finer := list(simplex.lattice(parts + 1))) <= most:
        parts, found = parts + 1, finer
    return found, (1 - len(simplex.domains) * simplex.floor) / parts


def neighbours(simplex: Simplex, around: Sequence[Mix], step: float) -> dict[Key, Mix]:
    """Mixes of the region with ``step`` taken from one domain and given to another, a turn of each of
    ``around`` after the other."""
    found: dict[Key, Mix] = {}
    for source in simplex.domains:
        for target in simplex.domains:
            for mix in around:
                moved = {**mix, source: mix[source] - step}
                moved[target] += step
                if source != target and simplex.holds(moved):
                    found[key(moved)] = moved
    return found
