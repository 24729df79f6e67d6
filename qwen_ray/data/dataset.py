"""The data of a run: files read, validation held out, tokenised, and laid into a stream of rows."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.config import DataConfig
from qwen_ray.data.formats import load_examples
from qwen_ray.data.mixture import Mixture
from qwen_ray.data.packing import Row, RowStream, pack
from qwen_ray.data.records import Record
from qwen_ray.data.tokenise import Example, tokenise
from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MAX_VALIDATION = 512


@dataclass
class Dataset:
    """What the loop reads. ``validation`` maps domains to rows; ``manifest`` says what it was made of."""

    stream: RowStream
    validation: dict[str, list[Row]]
    manifest: dict[str, Any]


def build_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, context: int
) -> Dataset:
    """Read and tokenise the files of ``config``. Every worker does the same and gets the same stream.

    ``context`` is the model's longest sequence; rows are never longer.
    """
    train, validation = load_splits(config, seed=seed)
    max_length = min(config.max_length, context)
    examples, report = tokenise(train, tokenizer, max_length)
    held_out, held_report = tokenise(validation, tokenizer, max_length)
    for name, ids in (
        ("cut", report.cut + held_report.cut),
        ("dropped", report.dropped + held_report.dropped),
    ):
        if ids:
            log.warning("%d records %s at %d tokens, the first: %s", len(ids), name, max_length, ids[0])
    by_domain = _by_domain(examples)
    sizes = {d: [len(e.ids) if config.unit == "tokens" else 1 for e in es] for d, es in by_domain.items()}
    mixture = make_mixture(config, sizes, seed=seed)
    stream = RowStream(
        by_domain, mixture, max_length=max_length, packing=config.packing, window=config.packing_window
    )
    manifest = {
        "files": {path: sha256_file(Path(path)) for path in [*config.train, *config.validation]},
        "train_records": {d: len(es) for d, es in sorted(by_domain.items())},
        "validation_records": len(held_out),
        "shares": mixture.shares,
        "stages": [{"until": until, "shares": shares} for until, shares in mixture.stages],
        "unit": config.unit,
        "max_length": max_length,
        "cut": len(report.cut),
        "dropped": len(report.dropped),
    }
    validation_rows = {
        domain: pack(es, max_length=max_length, packing=config.packing)
        for domain, es in sorted(_by_domain(held_out).items())
    }
    return Dataset(stream, validation_rows, manifest)


def make_mixture(config: DataConfig, sizes: Mapping[str, Sequence[int]], *, seed: int) -> Mixture:
    """The mixture of ``config`` over domains with these costs; :class:`UserError` if they do not fit."""
    stages = [(stage.until, stage.weights) for stage in config.stages]
    return Mixture(sizes, config.weights, seed=seed, stages=stages)


def load_splits(config: DataConfig, *, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and validation records. Raises :class:`UserError` for missing or malformed files."""
    if not config.train:
        raise UserError("no training data", where="data.train", fix="name a file: --data FILE")
    records = _read(config.train)
    if config.validation:
        return records, _read(config.validation)
    drawn = sorted((_fraction(f"{seed}/{r.id}"), r.id) for r in records)
    held = {i for fraction, i in drawn[:MAX_VALIDATION] if fraction < config.validation_fraction}
    return [r for r in records if r.id not in held], [r for r in records if r.id in held]


def _read(paths: list[str]) -> list[Record]:
    records: list[Record] = []
    seen: dict[str, str] = {}
    for path in paths:
        for record in load_examples(Path(path)):
            if seen.setdefault(record.id, path) != path:
                raise UserError(
                    f"record id '{record.id}' is also in {seen[record.id]}",
                    where=path,
                    fix="name each file once",
                )
            records.append(record)
    return records


def _by_domain(examples: list[Example]) -> dict[str, list[Example]]:
    grouped: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        grouped[example.domain].append(example)
    return dict(grouped)


def _fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
