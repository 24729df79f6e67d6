"""Which records are held out of training, for the validation loss: those with the lowest numbers."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, TypeVar

from qwen_ray.data.lots import integer
from qwen_ray.data.records import Record
from qwen_ray.errors import UserError

MAX_VALIDATION = 512

T = TypeVar("T", bound=tuple[Any, ...])


def number_of(id: str, *, seed: int) -> float:
    """In [0, 1), and decided by the two alone. A record is held out if it is below the fraction to hold."""
    return integer(f"{seed}/{id}") / 2**64


def lowest(numbered: Iterable[T]) -> list[T]:
    """The first :data:`MAX_VALIDATION` of tuples ``(number, id, ...)``: no more than these are held out."""
    return heapq.nsmallest(MAX_VALIDATION, numbered)


def refuse_shared(train: Iterable[Record], validation: Iterable[Record]) -> None:
    """Raise :class:`UserError` where a record is in both, with the same id and the same messages."""
    messages = {record.id: record.messages for record in validation}
    shared = [record.id for record in train if messages.get(record.id) == record.messages]
    if shared:
        raise UserError(
            f"{len(shared)} of the validation records are trained on, among them '{shared[0]}'",
            where="data.validation",
            fix="name a file that is not in data.train, or none: data.validation_fraction holds records out",
        )
