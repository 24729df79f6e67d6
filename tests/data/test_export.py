"""What is exported can be read back as it was, and what a format cannot hold is refused by name."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_ray.data.formats import detect, load_examples
from qwen_ray.data.formats.export import EXPORTS, export
from qwen_ray.data.records import Message, Record
from qwen_ray.errors import UserError

ONE = Record(
    "r/1",
    (Message("user", 'Two\r\nlines, "quoted"?\u2028'), Message("assistant", " é\t[1] ")),
    "biology",
    "book",
    "CC0-1.0",
    0.1,
)
TALK = Record(
    "r/2",
    (
        Message("system", "Be brief."),
        Message("user", "Q1?"),
        Message("assistant", "A1"),
        Message("user", "true"),
        Message("assistant", "12"),
    ),
    "history",
    "talks",
    "MIT",
)
NAMES = {
    "record": ("a.jsonl", "record"),
    "alpaca": ("a.json", "alpaca"),
    "sharegpt": ("a.jsonl", "sharegpt"),
    "openai": ("a.jsonl", "openai"),
    "dolly": ("a.json", "dolly"),
    "csv": ("a.csv", "alpaca"),
    "parquet": ("a.parquet", "record"),
}


@pytest.mark.parametrize("format", EXPORTS)
def test_each_format_is_read_back_as_it_was(tmp_path, format):
    name, read_as = NAMES[format]
    records = [ONE] if format == "dolly" else [ONE, TALK]
    path = tmp_path / "new" / name
    assert export(iter(records), path, format) == len(records)
    assert detect(path) == read_as
    read = load_examples(path)
    if format == "openai":  # has room for nothing else
        assert [r.messages for r in read] == [r.messages for r in records]
    else:
        assert read == records
    assert [p.name for p in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("format", ["record", "alpaca", "sharegpt", "openai", "dolly"])
def test_json_formats_are_a_list_or_lines_by_the_name(tmp_path, format):
    for name in ("a.json", "a.jsonl"):
        export([ONE, replace(ONE, id="r/3")], tmp_path / name, format)
    as_list = json.loads((tmp_path / "a.json").read_text())
    assert as_list == [json.loads(line) for line in (tmp_path / "a.jsonl").read_bytes().splitlines()]
    assert len(as_list) == 2


def test_rows_are_as_other_tools_expect_them(tmp_path):
    def first(format: str) -> dict:
        export([TALK], tmp_path / "a.json", format)
        return json.loads((tmp_path / "a.json").read_text())[0]

    about = {"domain": "history", "source": "talks", "license": "MIT"}
    assert first("openai") == {"messages": [{"role": m.role, "content": m.content} for m in TALK.messages]}
    assert first("alpaca") == {
        "id": "r/2",
        "instruction": "true",
        "input": "",
        "output": "12",
        "system": "Be brief.",
        "history": [["Q1?", "A1"]],
        **about,
    }
    sharegpt = first("sharegpt")
    assert sharegpt["conversations"][:2] == [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Q1?"},
    ]
    assert sharegpt["license"] == "MIT"
    export([ONE], tmp_path / "a.csv", "csv")
    with open(tmp_path / "a.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["instruction"], row["domain"], row["difficulty"]) == (
        ONE.messages[0].content,
        "biology",
        "0.1",
    )


def refused(tmp_path: Path, record: Record, format: str) -> str:
    path = tmp_path / NAMES[format][0]
    with pytest.raises(UserError) as error:
        export([ONE, record], path, format)
    assert error.value.where == f"record '{record.id}'"
    assert not path.exists()
    return error.value.what


def test_what_a_format_cannot_hold_names_the_record_and_writes_nothing(tmp_path):
    assert "more than one question" in refused(tmp_path, TALK, "dolly")
    short = replace(TALK, messages=TALK.messages[:3])
    assert "a system prompt" in refused(tmp_path, short, "dolly")
    unanswered = replace(TALK, messages=TALK.messages[:4])
    for format in ("alpaca", "csv", "dolly"):
        assert "questions and answers in turn" in refused(tmp_path, unanswered, format)
    blank = replace(TALK, messages=(Message("system", " "), *TALK.messages[1:]))
    assert "cannot hold it as it is" in refused(tmp_path, blank, "alpaca")
    half = replace(ONE, id="half", messages=(Message("user", "\ud800"), ONE.messages[1]))
    for format in EXPORTS:
        assert "surrogate" in refused(tmp_path, half, format)


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        export([ONE], tmp_path / "a.json", "alpacca")
    with pytest.raises(UserError, match=r"a file of format 'csv' ends in \.csv"):
        export([ONE], tmp_path / "a.json", "csv")
    with pytest.raises(UserError, match=r"a file of format 'record' ends in \.jsonl or \.json"):
        export([ONE], tmp_path / "a.parquet", "record")


@pytest.mark.shared
def test_real_conversations_survive_every_format_that_can_hold_them(shared_data, tmp_path):
    records = load_examples(shared_data / "format_samples" / "fastchat_dummy_conversation.json")
    for format, (name, _) in NAMES.items():
        if format not in ("dolly", "openai"):
            assert export(records, tmp_path / name, format) == 500
            assert load_examples(tmp_path / name) == records
