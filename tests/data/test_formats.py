"""Every format is read from a tiny sample; what is refused or left out says where and why."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.data.formats import Span, detect, load_examples, read_found, spans
from qwen_ray.data.formats.lines import MAX_LINE
from qwen_ray.data.records import Message, Record, read_records, write_records
from qwen_ray.data.sources import Drops
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


def tolerant(path: Path, **given: Any) -> tuple[list[Record], list[tuple[str, str]]]:
    """The records of a file, and (reason, place within the file) of every drop."""
    drops = Drops()
    options = {"domain": None, "source": None, "license": None, **given}
    records = [found.record for found in read_found(path, drops=drops, **options)]
    return records, [(drop.reason, drop.where.removeprefix(str(path))) for drop in drops.log]


FORMATS = [
    (ALPACA, "alpaca"),
    (SHAREGPT, "sharegpt"),
    (OPENAI, "openai"),
    (RECORD, "record"),
    ({"instruction": "Sum up.", "context": "All.", "response": "A.", "category": "x"}, "dolly"),
    ({"prompt": "Q?", "completion": "A."}, "prompt-completion"),
    ({"question": "How much is 2 + 2?", "answer": "It is 4.\n#### 4"}, "question-answer"),
    ({"question": "Which?", "choices": ["this", "that"], "answer": 1}, "multiple-choice"),
    ({"instruction": "Q?", "instances": [{"input": "", "output": "A."}]}, "self-instruct"),
]


@pytest.mark.parametrize("write", [as_list, as_lines])
@pytest.mark.parametrize(("row", "name"), FORMATS)
def test_each_format_is_detected_and_read_as_list_and_as_lines(tmp_path, write, row, name):
    path = write(tmp_path / "mine.json", row)
    assert detect(path) == name
    (record,) = load_examples(path)
    assert [m.role for m in record.messages] == ["user", "assistant"]
    assert tolerant(path) == ([record], [])
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
    ({"message_tree_id": "1", "prompt": {}}, "the first message cannot be used"),
    ({"message_tree_id": "1", "prompt": "Q?"}, "'prompt' must be a message"),
    ({"prompt": "Q", "answer": "A"}, "unknown format: keys are prompt, answer"),
    ({"question": "Q?", "choices": ["1", "2", "3"], "answer": "1"}, "unsure of the answer"),
    ({"question": "Q?", "choices": ["a", "b"], "answer": 2}, "'answer' must be the place"),
    ({"question": "Q?", "choices": ["a"], "answer": 0}, "'choices' must be a list of 2 to 8"),
    ({"instruction": "Q", "instances": "x"}, "'instances' must be a list"),
    ({"instruction": "Q", "instances": []}, "without instances"),
    ({**RECORD, "difficulty": 10**400}, "'difficulty' must be a finite number"),
    ({**ALPACA, "output": "\ud800"}, "half of a surrogate pair"),
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
def test_an_empty_example_is_an_error_or_a_drop(tmp_path, row):
    path = as_lines(tmp_path / "a.jsonl", ALPACA, row)
    with pytest.raises(UserError, match=r"a\.jsonl:2: empty (question|answer)"):
        load_examples(path)
    records, drops = tolerant(path)
    assert (len(records), drops) == (1, [("empty question or answer", ":2")])


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


# --- fields of their own ---------------------------------------------------------------------------


def test_context_choices_and_instances_are_laid_out(tmp_path):
    dolly = {"instruction": "Sum up.", "context": "A long text.", "response": "Short."}
    assert turns(as_lines(tmp_path / "a.jsonl", dolly))[0] == ("user", "Sum up.\n\nA long text.")
    for answer in (1, "1", "B", "b", "red"):
        row = {"question": "Which?", "choices": ["blue", "red", "green"], "answer": answer}
        assert turns(as_lines(tmp_path / "a.jsonl", row)) == [
            ("user", "Which?\nA. blue\nB. red\nC. green"),
            ("assistant", "B. red"),
        ]
    lettered = {"question": "Which?", "A": "blue", "B": "red", "answer": "A"}
    assert turns(as_lines(tmp_path / "a.jsonl", lettered))[1] == ("assistant", "A. blue")
    seed = {"id": "s", "instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}] * 2}
    records = load_examples(as_lines(tmp_path / "a.jsonl", seed))
    assert [r.id for r in records] == ["s", "s-2"]
    assert records[0].messages[0].content == "Add.\n\n1, 2"


def test_a_chosen_answer_is_kept_by_prepare_and_a_disliked_one_is_a_drop(tmp_path):
    asked = {"conversations": [{"from": "human", "value": "Q?"}]}
    said = OPENAI["messages"]
    pair = {"chosen": "good", "rejected": "bad"}
    for row in (
        {**asked, "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        {"instruction": "Q?", "input": "", **pair},
        {"prompt": "Q?", **pair},
        {"chosen_messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "good"}]},
        {"prompt": [{"role": "user", "content": "Q?"}], "chosen": [{"role": "assistant", "content": "good"}]},
    ):
        ((record,), drops) = tolerant(as_lines(tmp_path / "a.jsonl", row))
        assert [m.content for m in record.messages] == ["Q?", "good"]
        assert not drops
    for key in ("label", "kto_tag"):
        path = as_lines(tmp_path / "a.jsonl", {"messages": said, key: True}, {"messages": said, key: False})
        ((record,), drops) = tolerant(path)
        assert record.messages[1].content == "Hello."
        assert drops == [("disliked answer", ":2")]
    path = as_lines(tmp_path / "a.jsonl", ALPACA, {**asked, "rejected": "bad"})
    assert tolerant(path)[1] == [("malformed record", ":2")]


# --- OpenAssistant ---------------------------------------------------------------------------------


def node(name: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    role = "assistant" if text.startswith("A") else "prompter"
    return {"message_id": name, "text": text, "role": role, "replies": list(replies), **more}


def flat(tree: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    rest = {key: value for key, value in tree.items() if key != "replies"}
    below = [row for reply in tree["replies"] for row in flat(reply, tree["message_id"])]
    return [{**rest, "parent_id": parent}, *below]


TREE = node(
    "q1",
    "Q1",
    node("a1", "A worse", node("q2", "Q of the worse", node("a2", "A2")), rank=1),
    node(
        "a3",
        "A best",
        node("q3", "Q without an answer"),
        node("q4", "Q2", node("a4", "A deleted", rank=0, deleted=True), node("a5", "A last", rank=1)),
        rank=0,
    ),
    node("a6", "A unreviewed", rank=-1, review_result=None),
    node("a7", "Antwort", rank=-1, lang="de"),
    lang="en",
    review_result=True,
    deleted=False,
)


def test_the_best_ranked_thread_of_a_tree(tmp_path):
    said = ["Q1", "A best", "Q2", "A last"]
    lines = as_lines(tmp_path / "tree.jsonl", {"message_tree_id": "t1", "prompt": TREE})
    rows = flat(TREE)
    messages = as_list(tmp_path / "flat.json", *rows)
    upside_down = as_lines(tmp_path / "flat.jsonl", *reversed(rows))
    assert (detect(lines), detect(messages)) == ("oasst-tree", "oasst-flat")
    for path, name in ((lines, "t1"), (messages, "q1"), (upside_down, "q1")):
        for (record,) in (load_examples(path), tolerant(path)[0]):
            assert [m.content for m in record.messages] == said
            assert [m.role for m in record.messages] == ["user", "assistant"] * 2
            assert record.id == name
    assert spans(upside_down, 10) == [None]  # a thread may lie in several parts


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (node("q", "Q", node("a", "A", deleted=True)), "message without an approved answer"),
        (node("q", "Q", node("a", "A"), review_result=False), "deleted or not approved"),
        (node("q", "Q", node("a", "A"), lang="de"), "in another language than 'en'"),
        (node("q", " ", node("a", "A")), "empty question or answer"),
    ],
)
def test_trees_left_out(tmp_path, tree, reason):
    whole = {"message_tree_id": "t", "prompt": node("q0", "Q0", node("a0", "A0"))}
    bad = {"message_tree_id": "u", "prompt": tree}
    assert tolerant(as_lines(tmp_path / "a.jsonl", whole, bad))[1] == [(reason, ":2")]
    path = as_lines(tmp_path / "b.jsonl", *flat(whole["prompt"]), *flat(tree))
    records, drops = tolerant(path)
    assert (len(records), drops) == (1, [(reason, ":3")])
    with pytest.raises(UserError, match=r"b\.jsonl:3: the first message"):
        load_examples(path)


def test_messages_that_belong_to_no_thread_are_told(tmp_path):
    rows = flat(node("q", "Q", node("a", "A")))
    ring = [{**rows[1], "message_id": one, "parent_id": other} for one, other in ("xy", "yx")]
    path = as_lines(tmp_path / "a.jsonl", *rows, {**rows[1], "message_id": "z", "parent_id": "gone"}, *ring)
    records, drops = tolerant(path)
    assert len(records) == 1
    assert drops == [("message that no thread leads to", f":{n}") for n in (3, 4, 5)]


def test_a_very_long_thread_is_read(tmp_path):
    rows = [
        {"message_id": str(i), "parent_id": str(i - 1) if i else None, "text": f"{i}", "role": role}
        for i in range(3000)
        for role in [("prompter", "assistant")[i % 2]]
    ]
    ((record,), drops) = tolerant(as_lines(tmp_path / "a.jsonl", *rows))
    assert (len(record.messages), drops) == (3000, [])


# --- tables ----------------------------------------------------------------------------------------


def test_csv_and_tsv_with_the_columns_of_any_format(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(
        b'\xef\xbb\xbfquestion,answer,domain,difficulty\r\n"What, ""exactly""?",'
        b'"two\r\nlines",biology,0.5\r\n\r\nQ?,A.,,\r\n'
    )
    first, second = load_examples(path)
    assert [m.content for m in first.messages] == ['What, "exactly"?', "two\r\nlines"]
    assert (first.domain, first.difficulty, second.domain, second.difficulty) == (
        "biology",
        0.5,
        "general",
        None,
    )
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"instruction\tinput\toutput\nAdd.\t1, 2\t3\n"))
    assert turns(tmp_path / "a.tsv.gz")[0] == ("user", "Add.\n\n1, 2")
    (tmp_path / "m.csv").write_text('question,choices,answer\nWhich?,"[""x"", ""y""]",1\n')
    assert turns(tmp_path / "m.csv")[1] == ("assistant", "B. y")
    (tmp_path / "k.csv").write_text("prompt,completion,label\nQ?,good,True\nQ?,bad,False\n")
    assert tolerant(tmp_path / "k.csv")[1] == [("disliked answer", ":3")]


def test_faulty_rows_of_csv_are_left_out_with_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'question,answer\nQ1?,"an answer\non two lines"\nQ2?,A,too much\nQ3?,\xff\nQ4?,\n"Q5"x,A\nQ6?,"A\n'
    )
    records, drops = tolerant(path)
    assert len(records) == 1
    assert drops == [
        ("another number of columns than the header", ":4"),
        ("not UTF-8", ":5"),
        ("empty question or answer", ":6"),
        ("malformed record", ":7"),
        ("malformed record", ":8"),
    ]
    with pytest.raises(UserError, match=r"a\.csv:4: 3 columns, the header has 2"):
        load_examples(path)


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_parquet_with_the_columns_of_any_format(tmp_path):
    choice = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "subject": "s"}
    assert turns(write_parquet(tmp_path / "a.parquet", [choice]))[1] == ("assistant", "B. y")
    silent = {**RECORD, "difficulty": None, "license": None, "id": "r2"}
    first, second = load_examples(write_parquet(tmp_path / "b.parquet", [RECORD, silent]))
    assert first.to_dict() == RECORD
    assert (second.license, second.difficulty) == ("unknown", None)
    rows = [{**ALPACA, "output": text} for text in ("Mars.", " ", "Venus.")]
    path = write_parquet(tmp_path / "c.parquet", rows)
    records, drops = tolerant(path)
    assert (len(records), drops) == (2, [("empty question or answer", " row 2")])


# --- the tolerant reader ---------------------------------------------------------------------------

FAULTY = [
    ('{"instruction": "cut o', "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ("[" * 100_000, "not JSON"),
    ('{"instruction": "Q", "output": "A", "x": ' + "1" * 5000 + "}", "not JSON"),
    (b'{"instruction": "Q", "output": "caf\xe9"}', "not UTF-8"),
    (b'{"instruction": "Q", "output": "A\0"}', "NUL bytes"),
    ('{"instruction": "Q", "output": "\\udc00"}', "not UTF-8"),
    ({**ALPACA, "output": ""}, "empty question or answer"),
    ({**ALPACA, "output": 3}, "malformed record"),
    ({"title": "x"}, "unknown format"),
    ({**ALPACA, **OPENAI}, "unknown format"),
    (OPENAI, "another format than the file's"),
    ({**ALPACA, "tools": [{"name": "f"}]}, "tool call"),
    ({**ALPACA, "images": ["a.png"]}, "images, video or audio"),
    ({**ALPACA, "label": False}, "disliked answer"),
]


def faulty_lines(good: Any, faulty: list[tuple[Any, str]]) -> bytes:
    """Each faulty line after a good one."""
    lines = []
    for i, (line, _) in enumerate(faulty):
        lines.append(json.dumps({**good, "id": f"r{i}"}).encode())
        lines.append(
            line
            if isinstance(line, bytes)
            else (line if isinstance(line, str) else json.dumps(line)).encode()
        )
    return b"\n".join(lines) + b"\n"


def test_every_faulty_line_is_left_out_with_its_place_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(faulty_lines(ALPACA, FAULTY))
    records, drops = tolerant(path, domain="d", source="s", license="MIT")
    assert drops == [(reason, f":{2 * i + 2}") for i, (_, reason) in enumerate(FAULTY)]
    assert [r.id for r in records] == [f"r{i}" for i in range(len(FAULTY))]
    assert {(r.domain, r.source, r.license) for r in records} == {("d", "s", "MIT")}
    account = Drops()
    list(read_found(path, domain=None, source=None, license=None, drops=account))
    assert account.log[0].shown == (
        'malformed line: not JSON (Unterminated string starting at): {"instruction": "cut o'
    )
    json.dumps([list(drop) for drop in account.log], ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("roles", "fits"),
    [
        ("system user assistant", True),
        ("user assistant user assistant", True),
        ("user assistant user", True),
        ("user user assistant", False),
        ("user assistant assistant", False),
        ("assistant user assistant", False),
        ("user system assistant", False),
        ("system system user assistant", False),
    ],
)
def test_order_of_the_turns(tmp_path, roles, fits):
    said = [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(roles.split())]
    for row, good in (
        ({"messages": said}, OPENAI),
        ({**RECORD, "messages": said}, RECORD),
        ({"conversations": said}, SHAREGPT),
    ):
        path = as_lines(tmp_path / "a.jsonl", good, row)
        assert tolerant(path)[1] == ([] if fits else [("turns in the wrong order", ":2")])


def test_the_format_is_that_of_most_of_the_first_rows(tmp_path):
    path = as_lines(tmp_path / "a.jsonl", OPENAI, "text", ALPACA, {**ALPACA, "output": "Venus."})
    records, drops = tolerant(path)
    assert len(records) == 2
    assert drops == [("another format than the file's", ":1"), ("not a JSON object", ":2")]


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ALPACA).encode() + b"\n"
    path.write_bytes(good + b'{"instruction": "' + b"x" * (MAX_LINE + 10_000) + b"\n" + good)
    records, drops = tolerant(path)
    assert (len(records), drops) == (2, [("line of more than 16 MiB", ":2")])
    assert records[0].id == records[1].id  # no counter: a part of a file knows nothing of the others


def test_a_file_is_read_a_line_at_a_time(tmp_path):
    path = as_lines(tmp_path / "a.jsonl", *[ALPACA] * 30_000)
    found = read_found(path, domain=None, source=None, license=None, drops=Drops())
    next(found)
    path.write_bytes(b"")  # nothing of it was kept but a buffer
    assert len(list(found)) < 30_000


def test_spans_are_whole_lines_and_read_as_the_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + faulty_lines(ALPACA, FAULTY) + b'{"no newline": 1}')
    whole = tolerant(path)
    size = path.stat().st_size
    for step in (1, 50, 97, 1000, 100_500):
        cuts = [span for span in spans(path, step) if span]
        assert cuts[0].start == 0
        assert cuts[-1].end == size
        assert all(one.end == two.start for one, two in pairwise(cuts))
        parts = [tolerant(path, span=span) for span in cuts]
        assert [r for records, _ in parts for r in records] == whole[0]
        assert [d for _, drops in parts for d in drops] == whole[1]
    assert len(spans(path, 1)) > len(FAULTY) * 2
    assert spans(path, size) == [None]


def test_what_cannot_be_cut_is_one_span(tmp_path):
    lines = as_lines(tmp_path / "a.jsonl", *[ALPACA] * 50).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    as_list(tmp_path / "a.json", *[ALPACA] * 50)
    for name in ("a.jsonl.gz", "a.json"):
        assert spans(tmp_path / name, 10) == [None]


def test_parquet_is_cut_at_row_groups(tmp_path):
    rows = [{**ALPACA, "output": f"{i}" if i % 7 else ""} for i in range(50)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=10)
    whole = tolerant(path)
    cuts = spans(path, 1)
    assert cuts[1] == Span(1, 2, 11)
    assert len(cuts) == 5
    parts = [tolerant(path, span=span) for span in cuts]
    assert [r for records, _ in parts for r in records] == whole[0]
    assert [d for _, drops in parts for d in drops] == whole[1]
    assert spans(path, 1 << 30) == [None]


def test_files_that_hold_nothing_to_read_are_errors(tmp_path):
    good = json.dumps(ALPACA).encode() + b"\n"
    for name, data, says in (
        ("empty.jsonl", b"\n", "holds no record"),
        ("latin.jsonl", "é".encode("latin-1"), "no record that can be read; the first: not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(good * 9999)[:-20], "damaged gzip"),
        (
            "all_empty.jsonl",
            json.dumps({**ALPACA, "output": ""}).encode(),
            "no record can be used; the first: ",
        ),
        ("list.json", b"[{]", "not valid JSON"),
        ("header.csv", b"question,answer\n", "holds no record"),
        ("other.csv", b"a,b\n1,2\n", "unknown format: keys are a, b"),
        ("bad.parquet", b"PAR1", "not a readable Parquet file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=says):
            tolerant(tmp_path / name)
    with pytest.raises(UserError, match="no such data file"):
        tolerant(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="no such data file"):
        spans(tmp_path / "absent.jsonl", 10)


# --- public data, where it lies --------------------------------------------------------------------

# File -> its format, how many records `data prepare` reads, and what it leaves out.
SAMPLES: dict[str, tuple[str, int, dict[str, int]]] = {
    "dolly_sample.jsonl": ("dolly", 7, {}),
    "fastchat_dummy_conversation.json": ("sharegpt", 500, {}),
    "llamafactory_alpaca_en_demo.json": ("alpaca", 999, {}),
    "llamafactory_identity.json": ("alpaca", 91, {}),
    "llamafactory_v1_sft_demo.jsonl": ("openai", 500, {}),
    "oasst_en_100_tree.jsonl": ("oasst-tree", 100, {}),
    "oasst_realistic_seed_data.json": ("oasst-flat", 74, {}),
    "stanford_alpaca_seed_tasks.jsonl": ("self-instruct", 175, {}),
    "llamafactory_glaive_toolcall_en_demo.json": ("", 109, {"tool call": 191}),
    "llamafactory_dpo_en_demo.json": ("", 300, {}),
    "llamafactory_v1_dpo_demo.jsonl": ("", 10, {}),
    "llamafactory_kto_en_demo.json": ("", 150, {"disliked answer": 150}),
}
NOT_TRAINED_ON = {  # as it is, without `data prepare`
    "llamafactory_glaive_toolcall_en_demo.json": "a conversation with tools",
    "llamafactory_dpo_en_demo.json": "a preference pair",
    "llamafactory_v1_dpo_demo.jsonl": "a preference pair",
    "llamafactory_kto_en_demo.json": "a KTO",
}


@pytest.mark.shared
def test_public_samples_are_read_or_refused_for_a_reason(shared_data):
    folder = shared_data / "format_samples"
    assert {p.name for p in folder.iterdir()} == SAMPLES.keys()
    for name, (format_name, count, left_out) in SAMPLES.items():
        drops = Drops()
        found = list(read_found(folder / name, domain=None, source=None, license=None, drops=drops))
        assert (len(found), drops.counts) == (count, left_out), name
        if format_name:
            assert detect(folder / name) == format_name
            assert len(load_examples(folder / name)) == count
        else:
            with pytest.raises(UserError, match=NOT_TRAINED_ON[name]):
                load_examples(folder / name)


@pytest.mark.shared
def test_known_items_of_the_public_samples(shared_data):
    folder = shared_data / "format_samples"
    (seed, *_) = load_examples(folder / "stanford_alpaca_seed_tasks.jsonl")
    assert seed.id == "seed_task_0"
    assert "doesn't include eggs" in seed.messages[0].content
    horseshoes = load_examples(folder / "oasst_realistic_seed_data.json")[0]
    assert horseshoes.id == "b9d4wm7n"
    assert horseshoes.messages[1].content.startswith("I can, but maybe I should begin")
    trees = load_examples(folder / "oasst_en_100_tree.jsonl")
    assert trees[0].messages[0].content == "How can I find the best 401k plan for my needs?"
    assert all(record.messages[-1].role == "assistant" for record in trees)
    (first, *_), _ = tolerant(folder / "llamafactory_dpo_en_demo.json")
    assert first.messages[1].content.startswith("That sounds like a fun and engaging idea!")


@pytest.mark.shared
def test_gsm8k_and_its_line_numbers_in_spans(shared_data, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(gzip.decompress((shared_data / "gsm8k" / "train.jsonl.gz").read_bytes()))
    cuts = spans(path, 1 << 20)
    drops = Drops()
    found = [
        f
        for span in cuts
        for f in read_found(path, domain=None, source=None, license=None, drops=drops, span=span)
    ]
    assert len(cuts) > 3
    assert [f.where for f in found] == [f"{path}:{n}" for n in range(1, 7474)]
