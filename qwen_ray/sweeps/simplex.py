"""The mixtures that a sweep may try: shares that add up to 1, each between its bounds."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qwen_ray.errors import UserError, did_you_mean

Mix = dict[str, float]
"""Share of each domain."""

ROUNDING = 1e-9
_TRIES = 20_000


@dataclass(frozen=True)
class Simplex:
    """Mixtures of ``domains`` in which each has at least ``floor`` and those in ``ranges`` keep to theirs.

    Raises :class:`UserError` for a region without a point.
    """

    domains: Sequence[str]
    floor: float = 0.0
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for domain, (low, high) in self.ranges.items():
            if domain not in self.domains:
                raise UserError(
                    f"unknown domain '{domain}'",
                    where="mixture.ranges",
                    fix=did_you_mean(domain, self.domains),
                )
            if not max(low, self.floor) <= high <= 1:
                raise UserError(
                    f"{domain} is to be between {max(low, self.floor):g} and {high:g}",
                    where=f"mixture.ranges.{domain}",
                    fix="[low, high] with mixture.floor <= low <= high <= 1",
                )
        least, most = math.fsum(self._lows), math.fsum(self._highs)
        if least > 1 + ROUNDING or most < 1 - ROUNDING:
            says = f"at least {least:g}" if least > 1 else f"at most {most:g}"
            raise UserError(
                f"the shares add up to {says}, so no mixture is possible",
                where="mixture",
                fix="change mixture.floor or mixture.ranges",
            )

    @property
    def _lows(self) -> list[float]:
        return [max(self.floor, self.ranges.get(d, (0.0, 1.0))[0]) for d in self.domains]

    @property
    def _highs(self) -> list[float]:
        return [self.ranges.get(d, (0.0, 1.0))[1] for d in self.domains]

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Least and greatest share of each domain that occurs in a mixture, in their order."""
        lows, highs = self._lows, self._highs
        least, most = math.fsum(lows), math.fsum(highs)
        return [
            (max(low, 1 - (most - high)), min(high, 1 - (least - low)))
            for low, high in zip(lows, highs, strict=True)
        ]

    def holds(self, mix: Mapping[str, float]) -> bool:
        """Whether it is a mixture of the region, to rounding."""
        return (
            set(mix) == set(self.domains)
            and abs(math.fsum(mix.values()) - 1) <= ROUNDING
            and all(
                low - ROUNDING <= mix[d] <= high + ROUNDING
                for d, low, high in zip(self.domains, self._lows, self._highs, strict=True)
            )
        )

    def uniform(self) -> Mix:
        """As much of each, whatever the bounds say: what a search has to beat."""
        return dict.fromkeys(self.domains, 1 / len(self.domains))

    def vertices(self) -> dict[str, Mix]:
        """For each domain, the mixture with as much of it as possible."""
        return {d: self.nearest({x: float(x == d) for x in self.domains}) for d in self.domains}

    def sample(self, rng: random.Random) -> Mix:
        """A mixture drawn evenly from the region.

        Shares above the floor are exponential draws made to add up (a flat Dirichlet), and again until all
        are within their ranges; the same from the upper ends down, where that leaves less to reject. A range
        of one value is not drawn.
        """
        lows, highs = self._lows, self._highs
        above, below = 1 - math.fsum(lows), math.fsum(highs) - 1
        least = dict(zip(self.domains, lows, strict=True))
        free = [(d, low, high) for d, low, high in zip(self.domains, lows, highs, strict=True) if low < high]
        for _ in range(_TRIES):
            draws = [-math.log(1 - rng.random()) for _ in free]
            unit = [draw / math.fsum(draws) for draw in draws]
            mix = least | {
                d: low + above * u if above <= below else high - below * u
                for (d, low, high), u in zip(free, unit, strict=True)
            }
            if self.holds(mix):
                return mix
        raise UserError(
            "the ranges leave too little to draw from", where="mixture.ranges", fix="make them wider"
        )

    def nearest(self, point: Mapping[str, float]) -> Mix:
        """The mixture of the region with the least Euclidean distance to ``point``.

        It is the point moved by one number for all domains and cut to the bounds; the number is bisected.
        """
        at = [point[d] for d in self.domains]
        bounds = list(zip(self._lows, self._highs, strict=True))

        def moved(by: float) -> list[float]:
            return [min(max(x + by, low), high) for x, (low, high) in zip(at, bounds, strict=True)]

        down, up = -1 - max(at), 1 - min(at)
        for _ in range(100):
            middle = (down + up) / 2
            down, up = (middle, up) if math.fsum(moved(middle)) < 1 else (down, middle)
        return dict(zip(self.domains, moved(up), strict=True))

    def lattice(self, parts: int) -> Iterator[Mix]:
        """The {D, parts} simplex lattice (Scheffé 1958) between the lower bounds, where it is in range:
        what is left above them, dealt out in equal parts. Without bounds, C(parts + D - 1, D - 1) mixtures.
        """
        lows = self._lows
        left = 1 - math.fsum(lows)
        if left <= ROUNDING:
            yield dict(zip(self.domains, lows, strict=True))
            return
        # What is out of range is not even counted through: with narrow ranges that is nearly all.
        room = [(high - low + ROUNDING) / left for low, high in zip(lows, self._highs, strict=True)]
        for counts in _compositions(parts, [min(parts, math.floor(parts * share)) for share in room]):
            shares = (low + left * n / parts for low, n in zip(lows, counts, strict=True))
            mix = dict(zip(self.domains, shares, strict=True))
            if self.holds(mix):
                yield mix

    def from_cube(self, point: Sequence[float]) -> Mix:
        """The mixture at a point of the unit cube with D - 1 axes: what is left above the lower bounds is
        broken off piece by piece, so that even draws of points are even draws of mixtures. The upper ends of
        ranges may be exceeded; see :meth:`nearest`."""
        lows, pieces, rest = self._lows, [], 1.0
        for i, u in enumerate(point):
            pieces.append(rest * (1 - (1 - u) ** (1 / (len(point) - i))))
            rest -= pieces[-1]
        left = 1 - math.fsum(lows)
        shares = (low + left * piece for low, piece in zip(lows, [*pieces, rest], strict=True))
        return dict(zip(self.domains, shares, strict=True))

    def to_cube(self, mix: Mapping[str, float]) -> list[float]:
        """The point of the unit cube that :meth:`from_cube` makes ``mix`` of."""
        lows, point, rest = self._lows, [], 1.0
        left = max(1 - math.fsum(lows), ROUNDING)
        for i, (domain, low) in enumerate(zip(self.domains[:-1], lows, strict=False)):
            piece = (mix[domain] - low) / left
            share = min(max(piece / max(rest, ROUNDING), 0.0), 1.0)
            point.append(1 - (1 - share) ** (len(self.domains) - 1 - i))
            rest -= piece
        return point

    def to_ilr(self, mix: Mapping[str, float]) -> list[float]:
        """D - 1 isometric log-ratio coordinates (Egozcue et al., Mathematical Geology 35:279, 2003): number
        i weighs the geometric mean of the first i shares against the next. All shares must be above 0."""
        logs = [math.log(mix[d]) for d in self.domains]
        return [_balance(math.fsum(logs[:i]) / i - logs[i], i) for i in range(1, len(logs))]

    def from_ilr(self, coordinates: Sequence[float]) -> Mix:
        """The mixture with these coordinates, which need not be in the region."""
        logs = [0.0]
        for i, z in enumerate(coordinates, start=1):
            logs.append(math.fsum(logs) / i - z / _balance(1.0, i))
        top = max(logs)
        shares = [math.exp(x - top) for x in logs]
        return dict(zip(self.domains, (s / math.fsum(shares) for s in shares), strict=True))

    def ilr_bounds(self) -> list[tuple[float, float]]:
        """An interval of each coordinate that holds the region. The floor must be above 0."""
        lows, highs = ([math.log(x) for x in side] for side in zip(*self.bounds, strict=True))
        return [
            (
                _balance(math.fsum(lows[:i]) / i - highs[i], i),
                _balance(math.fsum(highs[:i]) / i - lows[i], i),
            )
            for i in range(1, len(lows))
        ]


def _balance(log_ratio: float, i: int) -> float:
    return math.sqrt(i / (i + 1)) * log_ratio


def _compositions(total: int, most: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Ways to make ``total`` of as many numbers, none above its ``most``."""
    if not most:
        if total == 0:
            yield ()
        return
    for first in range(min(total, most[0]), max(0, total - sum(most[1:])) - 1, -1):
        for rest in _compositions(total - first, most[1:]):
            yield (first, *rest)
