"""Training records that stay in their files: an index in memory, a record read when it is drawn.

For files larger than memory. Of each record 8 bytes are kept for its place and 4 for its length in tokens
(8 more for its difficulty where a curriculum needs it), and 4 or 5 for the order of the pass. Both are kept
beside the file, too: ``FILE.idx`` (places, domains, what is held out) and ``FILE.tokens.idx`` (lengths, for
one tokenizer and row length), see :mod:`qwen_ray.data.stream_index`.

The stream of examples is the one that reading the same files into memory gives.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qwen_ray.data.lots import integer
from qwen_ray.data.records import Record
from qwen_ray.data.split import lowest, refuse_shared
from qwen_ray.data.stream_index import cached, index_of, parse_line
from qwen_ray.data.tokenise import CHUNK, RULES, Example, tokenise
from qwen_ray.errors import UserError
from qwen_ray.fsio import beside, sha256_file, sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_ray.data.stream_index import Array, Arrays


class RecordFiles:
    """The records of several Record JSONL files, in order; those that are held out are apart.

    A record's place counts bytes as if the files were one. Raises :class:`UserError` for files that are
    missing, malformed or of another format, for an id that two records have, and for one of ``apart``,
    records that are not to be trained on.
    """

    def __init__(
        self, paths: Sequence[str], *, seed: int, held_fraction: float, apart: Sequence[Record] = ()
    ) -> None:
        import numpy as np

        self.paths = [Path(path) for path in paths]
        for path in self.paths:
            if not path.is_file():
                raise UserError("no such data file", where=str(path), fix="check the path")
        self.digests = [sha256_file(path) for path in self.paths]
        """SHA-256 of each file."""
        parts = [
            index_of(path, digest, seed=seed, held_fraction=held_fraction)
            for path, digest in zip(self.paths, self.digests, strict=True)
        ]
        self._open: dict[int, IO[bytes]] = {}
        self._reading = threading.Lock()  # runs that share the files draw ahead, each in a thread of its own
        sizes = [path.stat().st_size for path in self.paths]
        self._starts: list[int] = np.cumsum([0, *sizes[:-1]]).tolist()
        self.counts = [len(part["place"]) for part in parts]
        """Records of each file, those that are held out among them."""
        firsts: list[int] = np.cumsum([0, *self.counts[:-1]]).tolist()
        self._places = np.concatenate(
            [part["place"] + start for part, start in zip(parts, self._starts, strict=True)]
        )
        digests = np.concatenate([part["digest"] for part in parts])
        self._refuse_repeats(digests)
        of_apart = np.array([integer(record.id) for record in apart], np.uint64)
        refuse_shared((self.read(int(n)) for n in np.flatnonzero(np.isin(digests, of_apart))), apart)
        self.domains = sorted({str(name) for part in parts for name in part["names"]})
        """Names of the domains."""
        to = {name: n for n, name in enumerate(self.domains)}
        self.domain: Array = np.concatenate(
            [np.array([to[str(n)] for n in part["names"]], np.uint16)[part["domain"]] for part in parts]
        )
        """Of each record, the position of its domain in ``domains``."""
        self.difficulty: Array = np.concatenate([part["difficulty"] for part in parts])
        """Of each record; NaN where it has none."""
        held = lowest(
            (float(number), str(i), first + int(n))
            for part, first in zip(parts, firsts, strict=True)
            for number, i, n in zip(part["held_number"], part["held_id"], part["held"], strict=True)
        )
        self.trains: Array = np.ones(len(self._places), dtype=bool)
        """Of each record, whether it is trained on."""
        self.trains[[n for _, _, n in held]] = False
        self.held: list[Record] = [self.read(n) for n in sorted(n for _, _, n in held)]
        """The records that are held out."""

    def __len__(self) -> int:
        """Records that are trained on."""
        return int(self.trains.sum())

    def __iter__(self) -> Iterator[Record]:
        """The records that are trained on."""
        return (self.read(int(n)) for n in self.trains.nonzero()[0])

    def read(self, number: int) -> Record:
        """Record ``number``, held out or not, counted from 0 over all files."""
        return self.read_at(int(self._places[number]))

    def read_at(self, place: int) -> Record:
        """The record at a place."""
        number = bisect_right(self._starts, place) - 1
        at = place - self._starts[number]
        with self._reading:
            if number not in self._open:
                self._open[number] = open(self.paths[number], "rb")  # noqa: SIM115 - as long as the run
            self._open[number].seek(at)
            line = self._open[number].readline()
        return parse_line(line, f"{self.paths[number]}, byte {at}")

    def places(self, chosen: Array) -> array[int]:
        """Places of the records that ``chosen``, bool ``[records]``, picks."""
        return array("Q", self._places[chosen].astype("uint64").tobytes())

    def _refuse_repeats(self, digests: Array) -> None:
        import numpy as np

        order = np.argsort(digests, kind="stable")
        for at in np.flatnonzero(digests[order[1:]] == digests[order[:-1]]):
            first, second = (self.read(int(order[at + k])) for k in (0, 1))
            if first.id == second.id:  # not two ids with one digest
                number = bisect_right(self._starts, int(self._places[order[at + 1]])) - 1
                raise UserError(
                    f"two records have the id '{first.id}'",
                    where=str(self.paths[number]),
                    fix="make ids unique, and name each file once",
                )


class StreamedExamples(Sequence[Example]):
    """The examples of a domain, each read and tokenised when it is asked for."""

    def __init__(
        self, files: RecordFiles, places: array[int], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self._files, self._places = files, places
        self._tokenizer, self._max_length = tokenizer, max_length

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        record = self._files.read_at(self._places[index])
        (example,), _ = tokenise([record], self._tokenizer, self._max_length)
        return example


def token_lengths(
    files: RecordFiles, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Array, Array]:
    """Of each record: its tokens, int32 (0 if none that carries loss is left), and whether it is cut."""
    import numpy as np

    backend: Any = tokenizer
    rules = sha256_json([backend.backend_tokenizer.to_str(), str(tokenizer.chat_template), max_length, RULES])
    parts, first = [], 0
    for path, digest, count in zip(files.paths, files.digests, files.counts, strict=True):
        numbers = range(first, first + count)
        first += count

        def make(numbers: range = numbers) -> Arrays:
            return _tokenise(files, numbers, tokenizer, max_length)

        parts.append(cached(beside(path, "tokens.idx"), sha256_json([digest, rules]), make))
    return np.concatenate([p["length"] for p in parts]), np.concatenate([p["cut"] for p in parts])


def _tokenise(
    files: RecordFiles, numbers: range, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Arrays:
    import numpy as np

    length, cut = np.zeros(len(numbers), dtype=np.int32), np.zeros(len(numbers), dtype=bool)
    for start in range(0, len(numbers), CHUNK):
        records = [files.read(n) for n in numbers[start : start + CHUNK]]
        examples, report = tokenise(records, tokenizer, max_length)
        at = {record.id: start + n for n, record in enumerate(records)}
        for example in examples:
            length[at[example.id]] = len(example.ids)
        cut[[at[i] for i in report.cut]] = True
    return {"length": length, "cut": cut}
