"""Every format is read from a tiny sample, and everything refused says where and why."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.data.formats import detect, load_examples
from qwen_ray.data.records import Message, read_records, write_records
from qwen_ray.errors import UserError

ALPACA = {"instruction": "Name a planet.", "input": "", "output": "Mars."}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A model."}]
}
OPENAI = {"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello."}]}
RECORD = {
    "id": "r1",
    **OPENAI,
    "domain": "biology",
    "source": "book",
    "license": "CC0-1.0",
    "difficulty": 0.5,
}


def as_list(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(path: Path, **given: Any) -> list[tuple[str, str]]:
    (record,) = load_examples(path, **given)
    return [(m.role, m.content) for m in record.messages]


@pytest.mark.parametrize("write", [as_list, as_lines])
@pytest.mark.parametrize(
    ("row", "name"), [(ALPACA, "alpaca"), (SHAREGPT, "sharegpt"), (OPENAI, "openai"), (RECORD, "record")]
)
def test_each_format_is_detected_and_read_as_list_and_as_lines(tmp_path, write, row, name):
    path = write(tmp_path / "mine.json", row)
    assert detect(path) == name
    (record,) = load_examples(path)
    assert [m.role for m in record.messages] == ["user", "assistant"]
    if name != "record":
        assert (record.domain, record.source, record.license) == ("general", "mine", "unknown")


def test_record_keeps_what_it_says_and_is_filled_where_it_is_silent(tmp_path):
    short = {"id": "r2", **OPENAI, "domain": "history"}
    first, second = load_examples(
        as_lines(tmp_path / "a.jsonl", RECORD, short), source="given", license="MIT"
    )
    assert (first.domain, first.source, first.license, first.difficulty) == (
        "biology",
        "book",
        "CC0-1.0",
        0.5,
    )
    assert (second.domain, second.source, second.license) == ("history", "given", "MIT")


def test_what_is_read_can_be_written_and_read_as_records(tmp_path):
    records = load_examples(as_list(tmp_path / "a.json", ALPACA, SHAREGPT["conversations"] and ALPACA))
    write_records(tmp_path / "out.jsonl", records)
    assert read_records(tmp_path / "out.jsonl") == records


def test_alpaca_joins_input_and_puts_system_and_history_first(tmp_path):
    row = {
        "instruction": "Add.",
        "input": "2 and 3",
        "output": "5",
        "system": "Be brief.",
        "history": [["a?", "b"], ["c?", "d"]],
    }
    assert turns(as_list(tmp_path / "a.json", row)) == [
        ("system", "Be brief."),
        ("user", "a?"),
        ("assistant", "b"),
        ("user", "c?"),
        ("assistant", "d"),
        ("user", "Add.\n\n2 and 3"),
        ("assistant", "5"),
    ]


@pytest.mark.parametrize(("asks", "answers"), [("human", "gpt"), ("user", "assistant")])
def test_both_sharegpt_dialects(tmp_path, asks, answers):
    said = [{"from": "system", "value": "S"}, {"from": asks, "value": "Q?"}, {"from": answers, "value": "A"}]
    assert turns(as_list(tmp_path / "a.json", {"conversations": said})) == [
        ("system", "S"),
        ("user", "Q?"),
        ("assistant", "A"),
    ]


@pytest.mark.parametrize("key", ["text", "value"])
def test_typed_text_parts_are_joined(tmp_path, key):
    parts = [{"type": "text", key: "How "}, {"type": "text", key: "so?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Like this."}]}
    assert turns(as_lines(tmp_path / "a.jsonl", row))[0] == ("user", "How so?")


def test_made_ids_depend_on_the_content_and_stay_unique(tmp_path):
    other = {**ALPACA, "output": "Venus."}
    one = load_examples(as_list(tmp_path / "a.json", ALPACA, other, ALPACA))
    two = load_examples(as_lines(tmp_path / "b.jsonl", other, ALPACA))
    assert one[0].id == two[1].id
    assert one[1].id == two[0].id
    assert one[2].id == f"{one[0].id}-2"


def test_gzip_and_byte_order_mark_and_separator_inside_a_string(tmp_path):
    row = {**ALPACA, "output": "one\u2028two"}
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n\n").encode()))
    (record,) = load_examples(path)
    assert record.source == "a"
    assert record.messages[1] == Message("assistant", "one\u2028two")


REFUSED = [
    (
        {**SHAREGPT, "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}},
        "preference pair",
    ),
    ({"chosen_messages": [], "rejected_messages": [1]}, "preference pair"),
    ({**OPENAI, "label": False}, "KTO"),
    ({**SHAREGPT, "tools": '[{"name": "f"}]'}, "with tools"),
    ({**OPENAI, "images": ["a.png"]}, "images"),
    ({"conversations": [*SHAREGPT["conversations"], {"from": "function_call", "value": "{}"}]}, "tool call"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "tool call"),
    ({"messages": [*OPENAI["messages"], {"role": "tool", "content": "4"}]}, "tool call"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "'image_url' is not read",
    ),
    ({"messages": [{"role": "assistant", "content": "a", "loss_weight": 0.0}]}, "loss_weight 0.0"),
    ({"messages": "hello"}, "must be a list"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "conversations[0]"),
    ({"conversations": [{"from": ["x"], "value": "x"}]}, "conversations[0]"),
    ({"instruction": "Q", "output": 5}, "'output' must be text"),
    ({**ALPACA, "history": {"a": 1}}, "'history'"),
    ({**ALPACA, **OPENAI}, "unsure of the format"),
    ({"message_tree_id": "1", "prompt": {}}, "OpenAssistant message tree"),
    ({"instruction": "Q", "context": "", "response": "A"}, "rename context to input"),
    ({"prompt": "Q", "completion": "A"}, "unknown format: keys are prompt, completion"),
    ({**RECORD, "domian": "x"}, "unknown key 'domian'"),
    ("text", "this is str"),
]


@pytest.mark.parametrize(("row", "says"), REFUSED)
def test_refusals_say_why_and_where(tmp_path, row, says):
    for path, where in (
        (as_lines(tmp_path / "a.jsonl", row), f"{tmp_path}/a.jsonl:1"),
        (as_list(tmp_path / "a.json", row), f"{tmp_path}/a.json record 1"),
    ):
        with pytest.raises(UserError) as error:
            load_examples(path)
        assert says in str(error.value)
        assert error.value.where == where


def test_refusal_beyond_the_detected_records_names_its_line(tmp_path):
    path = as_lines(tmp_path / "a.jsonl", *[ALPACA] * 30, {**ALPACA, "chosen": "x"})
    assert detect(path) == "alpaca"
    with pytest.raises(UserError, match=r"a\.jsonl:31: a preference pair"):
        load_examples(path)


def test_malformed_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ALPACA) + "\n\n" + '{"instruction": "cut o\n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: malformed line: not JSON"):
        load_examples(path)


def test_malformed_list_names_its_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"instruction": "a"},\n {"instruction" "b"}\n]')
    with pytest.raises(UserError, match=r"a\.json:3: not valid JSON"):
        load_examples(path)


def test_two_formats_in_one_file(tmp_path):
    with pytest.raises(UserError, match=r"unsure of the format: alpaca at .*:1, openai at .*:2"):
        detect(as_lines(tmp_path / "a.jsonl", ALPACA, OPENAI))
    late = as_lines(tmp_path / "b.jsonl", *[ALPACA] * 25, OPENAI)
    with pytest.raises(UserError, match=r"b\.jsonl:26: this record is openai, the file began as alpaca"):
        load_examples(late)


@pytest.mark.parametrize("row", [{**ALPACA, "output": " "}, {**ALPACA, "instruction": ""}])
def test_an_empty_example_is_an_error_or_is_told(tmp_path, row):
    path = as_lines(tmp_path / "a.jsonl", ALPACA, row)
    with pytest.raises(UserError, match=r"a\.jsonl:2: empty (question|answer)"):
        load_examples(path)
    told: list[str] = []
    assert len(load_examples(path, on_empty=told.append)) == 1
    assert told[0].startswith(f"{path}:2: empty")


def test_repeated_given_id(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl:2: id 'r1' is already at .*a\.jsonl:1"):
        load_examples(as_lines(tmp_path / "a.jsonl", RECORD, RECORD))


def test_unreadable_files(tmp_path):
    for name, data, says in (
        ("empty.jsonl", b"\n", "holds no record"),
        ("list.json", b"[]", "holds no record"),
        ("latin.jsonl", "é".encode("latin-1"), "not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 99)[:20], "damaged gzip"),
        ("plain.jsonl.gz", b"{}", "damaged gzip"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=says):
            load_examples(tmp_path / name)
    with pytest.raises(UserError, match="no such data file"):
        load_examples(tmp_path / "absent.jsonl")


# --- public data, where it lies --------------------------------------------------------------------

READABLE = {
    "llamafactory_alpaca_en_demo.json": ("alpaca", 999),
    "llamafactory_identity.json": ("alpaca", 91),
    "llamafactory_v1_sft_demo.jsonl": ("openai", 500),
    "fastchat_dummy_conversation.json": ("sharegpt", 500),
}
NOT_READABLE = {
    "llamafactory_glaive_toolcall_en_demo.json": "tool",
    "llamafactory_dpo_en_demo.json": "preference pair",
    "llamafactory_v1_dpo_demo.jsonl": "preference pair",
    "llamafactory_kto_en_demo.json": "KTO",
    "stanford_alpaca_seed_tasks.jsonl": "self-instruct",
    "oasst_en_100_tree.jsonl": "message tree",
    "oasst_realistic_seed_data.json": "message list",
    "dolly_sample.jsonl": "Dolly",
}


@pytest.mark.shared
def test_public_samples_are_read_or_refused_for_a_reason(shared_data):
    folder = shared_data / "format_samples"
    assert {p.name for p in folder.iterdir()} == READABLE.keys() | NOT_READABLE.keys()
    for name, (expected, count) in READABLE.items():
        assert detect(folder / name) == expected
        assert len(load_examples(folder / name)) == count
    for name, says in NOT_READABLE.items():
        with pytest.raises(UserError, match=says):
            load_examples(folder / name)
