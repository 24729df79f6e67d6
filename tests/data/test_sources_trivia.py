"""OpenTriviaQA and GSM8K: records, what is left out and where, and what is no such source."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.data.records import Record
from qwen_ray.data.sources.base import Drops
from qwen_ray.data.sources.gsm8k import SOURCE as GSM8K
from qwen_ray.data.sources.opentriviaqa import SOURCE as TRIVIA
from qwen_ray.errors import UserError


def read(source, path: Path) -> tuple[list[Record], Drops]:
    drops = Drops()
    return list(source.read(path, drops=drops)), drops


def text(record: Record) -> tuple[str, str]:
    return record.messages[0].content, record.messages[1].content


# --- OpenTriviaQA ----------------------------------------------------------------------------------

ANIMALS = b"""
#Q Which bird cannot
fly, and has ________?
^ Emu
A Wren
B emu
C Swift
D Tern

#Q Frogs are mammals.
^ False
A True
B False

#Q Is a whale a fish?
^ No
A Yes
B No

#Q Which of these is a bird?
^ Wren
A Wren
B Bat
C Bee

#Q Where do emus live?
^ In Australia
A In Asia
B In Australia
C In Africa
"""
FAULTY = b"""#Q Who wrote Les Mis\xe9rables,
or \xc2\xabLes Mis\xc3\xa9rables\xc2\xbb?
^ Victor Hugo
A Balzac
B Victor Hugo
C Zola
D Verne\r

#Q No answer
A One
B Two

#Q Which?
^ Three
A One
B Two
C Four
D Five

#Q Twice?
^ One
A One
B one
C Two
D Three

#Q Empty?
^ One
A One
B
C Two
D Three

#Q Torn?
^ One
A One
B Two
what is this
"""


@pytest.fixture
def trivia(tmp_path: Path) -> Path:
    folder = tmp_path / "trivia" / "categories"
    folder.mkdir(parents=True)
    (folder / "animals").write_bytes(ANIMALS)
    (folder / "books").write_bytes(FAULTY)
    (folder.parent / "LICENSE").write_text("#Q this is no category")
    return folder


def test_trivia_by_its_number_of_choices(trivia):
    records, drops = read(TRIVIA, trivia / "animals")
    assert list(map(text, records)) == [
        ("Which bird cannot fly, and has ____?\nA. Wren\nB. emu\nC. Swift\nD. Tern", "B. emu"),
        ("True or false: Frogs are mammals.", "False"),
        ("Is a whale a fish?", "No"),
        ("Where do emus live?", "In Australia"),
    ]
    assert all(r.id.startswith("opentriviaqa/animals/") and r.license == "CC-BY-SA-4.0" for r in records)
    (drop,) = drops.log
    assert drop.reason == "a question of its choices, which are not four"
    assert drop.where == f"{trivia / 'animals'}:20"


def test_faulty_trivia_is_left_out_with_its_line_and_lines_of_two_encodings_are_read(trivia):
    records, drops = read(TRIVIA, trivia / "books")
    assert [text(r)[0].split("\n")[0] for r in records] == ["Who wrote Les Misérables, or «Les Misérables»?"]
    assert [(drop.where.rsplit(":", 1)[1], drop.reason) for drop in drops.log] == [
        ("9", "block without a question, an answer or two choices"),
        ("13", "the answer is not among the choices"),
        ("20", "two choices are alike"),
        ("27", "block without a question, an answer or two choices"),
        ("34", "block without a question, an answer or two choices"),
    ]


def test_trivia_of_a_checkout_a_folder_and_a_file(trivia):
    whole = read(TRIVIA, trivia)[0]
    assert whole == read(TRIVIA, trivia.parent)[0]
    assert whole == [*read(TRIVIA, trivia / "animals")[0], *read(TRIVIA, trivia / "books")[0]]
    assert {r.domain for r in whole} == {"general"}
    assert {r.domain for r in TRIVIA.read(trivia, domain="history")} == {"history"}


def test_the_same_trivia_twice_is_one_record(trivia):
    (trivia / "animals").write_bytes(ANIMALS + ANIMALS)
    records, drops = read(TRIVIA, trivia / "animals")
    assert len({r.id for r in records}) == len(records) == 4
    assert drops.counts["repeated in the file"] == 4


def test_what_is_no_trivia(tmp_path):
    with pytest.raises(UserError, match="no such"):
        read(TRIVIA, tmp_path / "absent")
    (tmp_path / "notes").write_text("Just text")
    with pytest.raises(UserError, match="no OpenTriviaQA question"):
        read(TRIVIA, tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([b"#Q ", b"\n", b"^ ", b"A ", b"B ", b"C", b"D x", b"\xe9", b"one", b"\r"])))
def test_any_bytes_are_read_or_refused(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("any") / "category"
    path.write_bytes(b"".join(parts))
    try:
        for record in read(TRIVIA, path)[0]:
            assert all(message.content.strip() for message in record.messages)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017


# --- GSM8K -----------------------------------------------------------------------------------------


def gsm8k_lines() -> str:
    rows = [
        {"question": "What is 48/2?", "answer": "It is <<48/2=24>>24.\n#### 24"},
        {"question": "No end?", "answer": "It goes on."},
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_gsm8k_train_plain_gzipped_or_in_a_folder(tmp_path):
    (tmp_path / "train.jsonl").write_text(gsm8k_lines())
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "train.jsonl.gz").write_bytes(gzip.compress(gsm8k_lines().encode()))
    for path in (tmp_path, tmp_path / "train.jsonl", tmp_path / "zip", tmp_path / "zip" / "train.jsonl.gz"):
        (record,), drops = read(GSM8K, path)
        assert text(record) == ("What is 48/2?", "It is 24.\n#### 24")
        assert (record.domain, record.license) == ("mathematics", "MIT")
        assert drops.counts == {"no final answer after ####": 1}


def test_gsm8k_leaves_out_faulty_lines_with_their_place(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n" + gsm8k_lines() + '{cut\n[]\n{"question": " ", "answer": "#### 1"}\n')
    records, drops = read(GSM8K, path)
    assert len(records) == 1
    assert [(d.where, d.reason) for d in drops.log] == [
        (f"{path}:1", "no question or no answer"),
        (f"{path}:3", "no final answer after ####"),
        (f"{path}:4", "not JSON"),
        (f"{path}:5", "no question or no answer"),
        (f"{path}:6", "no question or no answer"),
    ]


def test_gsm8k_refuses_the_test_split_and_what_is_not_gsm8k(tmp_path):
    (tmp_path / "test.jsonl").write_text(gsm8k_lines())
    with pytest.raises(UserError, match="evaluation only"):
        read(GSM8K, tmp_path / "test.jsonl")
    with pytest.raises(UserError, match=r"no train\.jsonl or train\.jsonl\.gz"):
        read(GSM8K, tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no GSM8K question"):
        read(GSM8K, tmp_path)


# --- public data, where it lies --------------------------------------------------------------------


@pytest.mark.shared
def test_real_trivia(shared_data):
    records, drops = read(TRIVIA, shared_data / "opentriviaqa")
    assert len(records) + drops.counts.total() == 10522
    assert len({r.id for r in records}) == len(records) > 10450
    history = read(TRIVIA, shared_data / "opentriviaqa" / "categories" / "history")[0]
    assert sum(text(r)[1][:3] in ("A. ", "B. ", "C. ", "D. ") for r in history) == 1445
    assert not any("\ufffd" in message.content for r in records for message in r.messages)
    asked = dict(map(text, history))
    rainier = next(q for q in asked if "Mount Rainier" in q)
    assert asked[rainier] == "C. Washington"


@pytest.mark.shared
def test_real_gsm8k(shared_data):
    records, drops = read(GSM8K, shared_data / "gsm8k")
    assert len(records) == 7473
    assert not drops.counts
    assert not any("<<" in m.content for r in records for m in r.messages)
    with pytest.raises(UserError, match="evaluation only"):
        read(GSM8K, shared_data / "gsm8k" / "test.jsonl")
