"""The data of a run: files read, validation held out, tokenised, and laid into a stream of rows."""

from __future__ import annotations

import logging
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ray.config import DataConfig
from qwen_ray.data.formats import load_examples
from qwen_ray.data.mixture import Mixture
from qwen_ray.data.packing import Row, RowStream, lengths_of, pack
from qwen_ray.data.records import Record
from qwen_ray.data.shares import temperature_weights
from qwen_ray.data.split import lowest, number_of, refuse_shared
from qwen_ray.data.stream import RecordFiles, StreamedExamples, token_lengths
from qwen_ray.data.tokenise import Example, tokenise
from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_file, sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass
class Dataset:
    """What the loop reads. ``validation`` maps domains to rows; ``manifest`` says what it was made of."""

    stream: RowStream
    validation: dict[str, list[Row]]
    manifest: dict[str, Any]


class _Count(NamedTuple):
    """Of records that something happened to: how many, and the id of the first."""

    records: int
    first: str


@dataclass
class _Pool:
    """What is trained on, by domain. Nothing is lost without being counted."""

    examples: Mapping[str, Sequence[Example]]
    lengths: Mapping[str, Sequence[int]]
    difficulty: Mapping[str, Sequence[float]]
    """Empty without a curriculum."""
    cut: _Count
    dropped: _Count


@dataclass(frozen=True)
class _Tokenised:
    """Files read, split and tokenised; what is drawn from them is another matter."""

    pool: _Pool
    held_out: list[Example]
    files: dict[str, str]
    """SHA-256 of each."""
    max_length: int


_DECIDES_TOKENS = {"train", "validation", "validation_fraction", "max_length", "curriculum", "streaming"}
"""What of a configuration decides a :class:`_Tokenised`, beside the seed."""


class Datasets:
    """Builds the datasets of many runs on one tokenizer; what several share is read and tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, context: int) -> None:
        self._tokenizer, self._context = tokenizer, context
        self._read: dict[str, _Tokenised] = {}
        self._held_out: dict[tuple[str, bool], dict[str, list[Row]]] = {}

    def build(self, config: DataConfig, *, seed: int) -> Dataset:
        """As :func:`build_dataset`. Equal validation rows are one object."""
        splits = not config.validation and config.validation_fraction > 0  # by the seed
        key = sha256_json([config.model_dump(mode="json", include=_DECIDES_TOKENS), splits and seed])
        if key not in self._read:
            self._read[key] = _tokenised(config, self._tokenizer, seed=seed, context=self._context)
        dataset = _dataset(config, self._read[key], seed=seed)
        dataset.validation = self._held_out.setdefault((key, config.packing), dataset.validation)
        return dataset


def build_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, context: int
) -> Dataset:
    """Read and tokenise the files of ``config``. Every worker does the same and gets the same stream.

    ``context`` is the model's longest sequence; rows are never longer.
    """
    return _dataset(config, _tokenised(config, tokenizer, seed=seed, context=context), seed=seed)


def _tokenised(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, context: int
) -> _Tokenised:
    train, validation = load_splits(config, seed=seed)
    max_length = min(config.max_length, context)
    known: dict[str, str] = {}
    if isinstance(train, RecordFiles):
        pool = _streamed(config, train, tokenizer, max_length)
        known = dict(zip(config.train, train.digests, strict=True))
    else:
        pool = _in_memory(config, train, tokenizer, max_length)
    if pool.dropped.records and not pool.lengths:
        raise UserError(
            f"no answer of the {pool.dropped.records} training records begins within {max_length} tokens",
            where="data.max_length",
            fix="raise it, or give shorter records",
        )
    held_out, _ = tokenise(validation, tokenizer, max_length)
    for name, count in (("cut", pool.cut), ("dropped", pool.dropped)):
        if count.records:
            log.warning(
                "%d records %s at %d tokens, the first: %s", count.records, name, max_length, count.first
            )
    files = {path: known.get(path) or sha256_file(Path(path)) for path in [*config.train, *config.validation]}
    return _Tokenised(pool, held_out, files, max_length)


def _dataset(config: DataConfig, read: _Tokenised, *, seed: int) -> Dataset:
    pool, max_length = read.pool, read.max_length
    ones = {d: array("B", [1]) * len(lengths) for d, lengths in pool.lengths.items()}
    mixture = make_mixture(
        config, pool.lengths if config.unit == "tokens" else ones, seed=seed, difficulty=pool.difficulty
    )
    stream = RowStream(
        pool.examples,
        mixture,
        max_length=max_length,
        packing=config.packing,
        window=config.packing_window,
        lengths=pool.lengths,
    )
    manifest = {
        "files": read.files,
        "train_records": {d: len(lengths) for d, lengths in sorted(pool.lengths.items())},
        "validation_records": len(read.held_out),
        "shares": mixture.shares,
        "stages": [{"until": until, "shares": shares} for until, shares in mixture.stages],
        "unit": config.unit,
        "max_length": max_length,
        "cut": pool.cut.records,
        "dropped": pool.dropped.records,
    }
    validation_rows = {
        domain: pack(es, max_length=max_length, packing=config.packing)
        for domain, es in sorted(_by_domain(read.held_out).items())
    }
    return Dataset(stream, validation_rows, manifest)


def make_mixture(
    config: DataConfig,
    sizes: Mapping[str, Sequence[int]],
    *,
    seed: int,
    difficulty: Mapping[str, Sequence[float]] | None = None,
) -> Mixture:
    """The mixture of ``config`` over domains with these costs; :class:`UserError` if they do not fit."""
    weights: Mapping[str, float] = config.weights
    if config.temperature is not None:
        weights = temperature_weights({d: sum(s) for d, s in sizes.items()}, config.temperature)
    return Mixture(
        sizes,
        weights,
        seed=seed,
        stages=[(stage.until, stage.weights) for stage in config.stages],
        max_epochs=config.max_epochs,
        curriculum=config.curriculum,
        difficulty=difficulty,
    )


def load_splits(config: DataConfig, *, seed: int) -> tuple[list[Record] | RecordFiles, list[Record]]:
    """Training and validation records. Raises :class:`UserError` for missing or malformed files, for
    records without the difficulty that a curriculum needs, and for validation records that are trained on.

    With ``config.streaming`` the training records are read as one goes through them.
    """
    if not config.train:
        raise UserError("no training data", where="data.train", fix="name a file: --data FILE")
    validation = _read(config.validation)
    fraction = 0.0 if validation else config.validation_fraction
    if config.streaming:
        files = RecordFiles(config.train, seed=seed, held_fraction=fraction, apart=validation)
        if config.curriculum != "shuffled":
            _need_difficulty(int((files.trains & (files.difficulty != files.difficulty)).sum()))
        return files, validation or files.held
    records = _read(config.train)
    refuse_shared(records, validation)
    numbered = ((number_of(r.id, seed=seed), r.id) for r in records)
    held = {i for _, i in lowest(n for n in numbered if n[0] < fraction)}
    train = [r for r in records if r.id not in held]
    if config.curriculum != "shuffled":
        _need_difficulty(sum(r.difficulty is None for r in train))
    return train, validation or [r for r in records if r.id in held]


def _in_memory(
    config: DataConfig, train: list[Record], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> _Pool:
    examples, report = tokenise(train, tokenizer, max_length)
    by_domain = _by_domain(examples)
    difficulty: dict[str, array[float]] = {}
    if config.curriculum != "shuffled":
        of = {r.id: r.difficulty or 0.0 for r in train}
        difficulty = {d: array("d", (of[e.id] for e in es)) for d, es in by_domain.items()}
    cut, dropped = (_Count(len(ids), "".join(ids[:1])) for ids in (report.cut, report.dropped))
    return _Pool(by_domain, lengths_of(by_domain), difficulty, cut, dropped)


def _streamed(
    config: DataConfig, files: RecordFiles, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> _Pool:
    length, is_cut = token_lengths(files, tokenizer, max_length)
    kept = files.trains & (length > 0)
    examples, lengths, difficulty = {}, {}, {}
    for number, domain in enumerate(files.domains):
        chosen = kept & (files.domain == number)
        if chosen.any():
            examples[domain] = StreamedExamples(files, files.places(chosen), tokenizer, max_length)
            lengths[domain] = array("i", length[chosen].tobytes())
            if config.curriculum != "shuffled":
                difficulty[domain] = array("d", files.difficulty[chosen].tobytes())
    cut, dropped = (
        _Count(int(which.sum()), files.read(int(which.argmax())).id)
        for which in (files.trains & is_cut, files.trains & (length == 0))
    )
    return _Pool(examples, lengths, difficulty, cut, dropped)


def _need_difficulty(missing: int) -> None:
    if missing:
        raise UserError(
            f"{missing} training records have no difficulty to order them by",
            where="data.curriculum",
            fix="make it: qwen-ray data prepare --difficulty MODEL, or data.curriculum=shuffled",
        )


def _read(paths: list[str]) -> list[Record]:
    records: list[Record] = []
    named: set[Path] = set()
    seen: dict[str, str] = {}
    for path in paths:
        if (file := Path(path).resolve()) in named:
            raise UserError("this file is named twice", where=path, fix="name each file once")
        named.add(file)
        records += load_examples(Path(path), seen=seen)
    return records


def _by_domain(examples: list[Example]) -> dict[str, list[Example]]:
    grouped: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        grouped[example.domain].append(example)
    return dict(grouped)
