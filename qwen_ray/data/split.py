"""Which records are held out of training, for the validation loss: those with the lowest numbers."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, TypeVar

from qwen_ray.data.lots import integer

MAX_VALIDATION = 512

T = TypeVar("T", bound=tuple[Any, ...])


def number_of(id: str, *, seed: int) -> float:
    """In [0, 1), and decided by the two alone. A record is held out if it is below the fraction to hold."""
    return integer(f"{seed}/{id}") / 2**64


def lowest(numbered: Iterable[T]) -> list[T]:
    """The first :data:`MAX_VALIDATION` of tuples ``(number, id, ...)``: no more than these are held out."""
    return heapq.nsmallest(MAX_VALIDATION, numbered)
