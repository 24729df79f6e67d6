"""Any local file in a format that :mod:`qwen_ray.data.formats` reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwen_ray.data.formats import load_examples
from qwen_ray.data.records import Record
from qwen_ray.data.sources.base import Drops, Source


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Record]:
    yield from load_examples(
        path, domain=domain, on_empty=lambda where: drops.add("empty question or answer", where)
    )


SOURCE = Source(
    name="file",
    title="A local file: Record JSONL, Alpaca, ShareGPT or OpenAI messages",
    licence="as each record says, else unknown",
    domain_hint="general",
    where_to_get="your own data",
    reader=_read,
)
