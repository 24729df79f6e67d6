"""Any local file in a format that :mod:`qwen_ray.data.formats` reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwen_ray.data.formats import Span, read_found
from qwen_ray.data.sources.base import Drops, Found, Source


def _read(path: Path, *, domain: str, drops: Drops, span: Span | None = None) -> Iterator[Found]:
    return read_found(path, domain=domain, source=None, license=None, drops=drops, span=span)


SOURCE = Source(
    name="file",
    title="A local file: Alpaca, ShareGPT, OpenAI, Dolly, OASST and more, as JSON(L), CSV or Parquet",
    licence="as each record says, else unknown",
    domain_hint="general",
    where_to_get="your own data",
    reader=_read,
)
