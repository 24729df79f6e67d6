"""Readers on anything at all: a UserError or Records, never a traceback. Export and reading: nothing lost."""

import gzip
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_ray.data.formats import load_examples, read_found, spans
from qwen_ray.data.formats.export import EXPORTS, export
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources import Drops
from qwen_ray.errors import UserError

few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
NAMES = ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.gz", "a.parquet")

# Any character that JSON can spell, halves of surrogate pairs among them.
words = st.text(st.characters(), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(words, v, max_size=4), max_leaves=12
)
# The names that mean something, so that rows get past the detection of their format.
KEYS = [
    *("id", "messages", "conversations", "domain", "source", "license", "difficulty", "instruction", "input"),
    *("output", "system", "history", "context", "response", "prompt", "completion", "question", "answer"),
    *("choices", "A", "B", "instances", "chosen", "rejected", "chosen_messages", "label", "kto_tag", "tools"),
    *(
        "images",
        "message_tree_id",
        "tree_state",
        "message_id",
        "parent_id",
        "parent_message_id",
        "text",
        "role",
    ),
    *("user_message_id", "lang", "deleted", "review_result", "rank"),
]
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | values,
        "content": words | values,
        "from": st.sampled_from(["human", "gpt", "observation"]) | values,
        "value": words | values,
        "type": st.just("text") | values,
        "text": words,
        "loss_weight": values,
        "replies": values,
        "output": words | values,
    },
)
rows = st.dictionaries(
    st.sampled_from(KEYS), words | st.lists(turns | words, max_size=4) | turns | values, max_size=6
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def read_all(path: Path) -> None:
    """Both readers, in one go and in parts; anything but a UserError fails the test."""
    drops = Drops()
    with suppress(UserError):
        assert load_examples(path)
    with suppress(UserError):
        cuts = spans(path, 40)
        for span in cuts:
            for found in read_found(path, domain=None, source=None, license=None, drops=drops, span=span):
                assert found.where.startswith(str(path))
                json.dumps(found.record.to_dict(), ensure_ascii=False, allow_nan=False).encode()
    for drop in drops.log:
        assert drop.reason
        assert drop.where.startswith(str(path))
        drop.shown.encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@few
@given(data=st.binary(max_size=300), name=st.sampled_from(NAMES), packed=st.booleans())
def test_any_bytes(folder, data, name, packed):
    path = folder / name
    if packed:
        write(path, data)
    else:
        path.write_bytes(data)
    read_all(path)


@few
@given(data=st.data())
def test_a_good_file_with_bytes_changed(folder, data):
    format = data.draw(st.sampled_from(list(EXPORTS)))
    records = [
        Record(f"r{i}", (Message("user", f"Q{i}?"), Message("assistant", "A\nb")), "d", "s", "l")
        for i in range(3)
    ]
    path = folder / {"csv": "b.csv", "parquet": "b.parquet"}.get(format, "b.jsonl")
    export(records, path, format)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(content)
    read_all(path)


@few
@given(lines=st.lists(rows | values, max_size=5), name=st.sampled_from(("a.jsonl", "a.json")))
def test_any_json_values(folder, lines, name):
    text = json.dumps(lines) if name == "a.json" else "\n".join(json.dumps(line) for line in lines)
    read_all(write(folder / name, text.encode()))


SAID = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
GOOD: list[dict[str, Any]] = [
    {"id": "r", "messages": SAID, "domain": "d", "source": "s", "license": "l"},
    {"messages": SAID},
    {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
    {"instruction": "Q?", "input": "", "output": "A.", "history": [["a", "b"]]},
    {"instruction": "Q?", "context": "", "response": "A."},
    {"instruction": "Q?", "instances": [{"input": "", "output": "A."}]},
    {"question": "Q?", "choices": ["a", "b"], "answer": 1},
    {"prompt": "Q?", "chosen": "A.", "rejected": "B."},
    {"message_id": "m", "parent_id": None, "role": "prompter", "text": "Q?"},
]


@settings(few, max_examples=120)
@given(
    good=st.sampled_from(GOOD), key=st.sampled_from(KEYS), value=values | words | st.lists(turns), row=rows
)
def test_any_value_in_a_row_of_each_format(folder, good, key, value, row):
    lines = [json.dumps(one) for one in (good, {**good, key: value}, row)]
    read_all(write(folder / "c.jsonl", "\n".join(lines).encode()))


@few
@given(cells=st.lists(st.lists(st.text(max_size=8), min_size=1, max_size=4), max_size=5))
def test_any_table(folder, cells):
    text = "\n".join(",".join(row) for row in [["question", "answer", "history", "id"], *cells])
    read_all(write(folder / "d.csv", text.encode("utf-8", "surrogatepass")))


# --- nothing is lost -------------------------------------------------------------------------------

# Text that is not blank, of any characters that UTF-8 can write.
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, most: int = 3, system: bool = True) -> tuple[Message, ...]:
    messages = [Message("system", draw(texts))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, most))):
        messages += [Message("user", draw(texts)), Message("assistant", draw(texts))]
    return tuple(messages)


def records(**given: Any) -> st.SearchStrategy[list[Record]]:
    numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    one = st.builds(Record, texts, conversations(**given), texts, texts, texts, numbers)
    return st.lists(one, min_size=1, max_size=4, unique_by=lambda record: record.id)


@pytest.mark.parametrize("format", EXPORTS)
@few
@given(data=st.data())
def test_export_and_reading_lose_nothing(folder, format, data):
    written = data.draw(records(most=1, system=False) if format == "dolly" else records())
    path = folder / {"csv": "e.csv", "parquet": "e.parquet"}.get(
        format, data.draw(st.sampled_from(["e.json", "e.jsonl"]))
    )
    export(written, path, format)
    for read in (
        load_examples(path),
        [f.record for f in read_found(path, domain=None, source=None, license=None, drops=Drops())],
    ):
        if format == "openai":
            assert [r.messages for r in read] == [r.messages for r in written]
        else:
            assert read == written
