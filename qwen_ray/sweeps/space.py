"""The values that a setting may take in a sweep, and drawing from them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qwen_ray.config import Section
from qwen_ray.data.lots import integer

WEIGHTS = "data.weights"
"""The key that a mixture has among a trial's values; its value maps domains to shares."""


class Distribution(Section):
    page: ClassVar[str] = "docs/sweeps.md"
    distribution: Literal["choice", "uniform", "log_uniform", "int_uniform", "log_int_uniform"]
    """How values are drawn: one of a list, or evenly between two ends (log: evenly in the logarithm)."""
    values: list[Any] = Field(default=[])
    """choice: the list."""
    low: float | None = None
    """The lowest value."""
    high: float | None = None
    """The highest value."""
    step: Annotated[int, Field(ge=1)] = 1
    """int_uniform: only every so many whole numbers from low."""
    points: Annotated[int, Field(ge=2)] | None = None
    """A grid takes so many values, evenly spread from low to high; a choice takes all it has."""

    @model_validator(mode="after")
    def _fits(self) -> Distribution:
        if self.distribution == "choice":
            given = [name for name in ("low", "high", "points") if getattr(self, name) is not None]
            if not self.values or given:
                raise ValueError(
                    "a choice needs values, a list, and "
                    + (f"no {given[0]}" if given else "not an empty one")
                )
            return self
        if self.values:
            raise ValueError(f"{self.distribution} takes low and high, not values")
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"{self.distribution} needs low and high, with low < high")
        if not math.isfinite(self.high - self.low):
            raise ValueError("low and high are finite numbers")
        if self.logarithmic and self.low <= 0:
            raise ValueError(f"{self.distribution} needs low > 0")
        if self.whole and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(f"{self.distribution} needs whole numbers for low and high")
        if self.step != 1 and self.distribution != "int_uniform":
            raise ValueError(f"{self.distribution} has no step; int_uniform has")
        return self

    @property
    def logarithmic(self) -> bool:
        return self.distribution.startswith("log")

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return "int" in self.distribution

    @property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest value of one that is no choice."""
        assert self.low is not None
        assert self.high is not None
        high = self.high - (self.high - self.low) % self.step if self.step != 1 else self.high
        return (int(self.low), int(high)) if self.whole else (self.low, high)

    @property
    def extremes(self) -> list[Any]:
        """Every choice, or the two ends."""
        return list(self.values or self.ends)

    def at(self, share: float) -> Any:
        """The value below which ``share``, in [0, 1), of the draws fall."""
        if self.values:
            return self.values[int(share * len(self.values))]
        low, high = self.ends
        if not self.whole:
            value = low * (high / low) ** share if self.logarithmic else low + share * (high - low)
            return min(max(value, low), high)
        if self.logarithmic:  # each number has the stretch of half a unit on either side
            return min(max(round((low - 0.5) * ((high + 0.5) / (low - 0.5)) ** share), int(low)), int(high))
        return int(low) + self.step * int(share * ((high - low) // self.step + 1))

    def grid(self) -> list[Any]:
        """Every choice, or ``points`` values from end to end, each once. Raises :class:`ValueError` without
        points."""
        if self.values:
            return list(self.values)
        if self.points is None:
            raise ValueError(f"a grid needs points for {self.distribution}: how many values to try")
        low, high = self.ends
        shares = [i / (self.points - 1) for i in range(self.points)]
        spread = [low * (high / low) ** s if self.logarithmic else low + s * (high - low) for s in shares]
        spread[-1] = high
        if self.whole:
            spread = [int(low) + self.step * round((x - low) / self.step) for x in spread]
        return list(dict.fromkeys(spread))

    def holds(self, value: Any) -> bool:
        """Whether it is a value that could be drawn."""
        if self.values:
            return value in self.values
        low, high = self.ends
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return False
        return not self.whole or (value == int(value) and (value - low) % self.step == 0)


def generator(seed: int, index: int) -> random.Random:
    """The chance of one trial: decided by the two numbers alone."""
    return random.Random(integer(f"sweep/{seed}/{index}"))


def sample(space: Mapping[str, Distribution], rng: random.Random) -> dict[str, Any]:
    """A value for each key, drawn independently."""
    return {key: distribution.at(rng.random()) for key, distribution in space.items()}


def latin(space: Mapping[str, Distribution], *, seed: int, index: int, size: int) -> dict[str, Any]:
    """Draw number ``index`` of ``size``, of a Latin hypercube (McKay, Beckman and Conover, Technometrics
    21:239, 1979): each key's range is cut into ``size`` parts of equal chance, and each part is drawn from
    once."""
    rng, values = generator(seed, index), {}
    for key, distribution in space.items():
        parts = list(range(size))
        random.Random(integer(f"latin/{seed}/{key}")).shuffle(parts)
        values[key] = distribution.at((parts[index] + rng.random()) / size)
    return values


def grid_size(space: Mapping[str, Distribution]) -> int:
    """Number of points of :func:`grid`."""
    return math.prod(len(distribution.grid()) for distribution in space.values())


def grid(space: Mapping[str, Distribution]) -> Iterator[dict[str, Any]]:
    """Every combination; the last key changes fastest."""
    for point in itertools.product(*(distribution.grid() for distribution in space.values())):
        yield dict(zip(space, point, strict=True))


def to_tune(index: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """A trial as Ray Tune's flat config: ``data.weights/DOMAIN`` for a mixture, and ``trial``, its index."""
    flat: dict[str, Any] = {"trial": index}
    for key, value in values.items():
        if key == WEIGHTS:
            flat |= {f"{WEIGHTS}/{domain}": share for domain, share in value.items()}
        else:
            flat[key] = value
    return flat


def from_tune(config: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """``(index, values)`` of what :func:`to_tune` made."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith(f"{WEIGHTS}/"):
            values.setdefault(WEIGHTS, {})[key.removeprefix(f"{WEIGHTS}/")] = value
        elif key != "trial":
            values[key] = value
    return int(config["trial"]), values
