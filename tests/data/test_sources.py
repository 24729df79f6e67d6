"""The OpenStax reader on a small book of every shape it meets, GSM8K, and the catalogue."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from qwen_ray.data.records import Record
from qwen_ray.data.sources import SOURCES, Drops, get_source
from qwen_ray.data.sources.kramdown import plain_text
from qwen_ray.errors import UserError

SUMMARY = """---
title: "Book"
---

1.  {: .preface} [Preface](contents/m1.md)
2.  {: .part} Unit 1
    1.  {: .chapter} [Cells](contents/m2.md)
        1.  [Membranes](contents/m3.md)
    2.  {: .chapter} [Genes](contents/m4.md)
"""


def exercise(problem: str, solution: str | None) -> str:
    solved = (
        f'<div data-type="solution" markdown="1">\n{solution}\n\n</div>\n' if solution is not None else ""
    )
    asked = f'<div data-type="problem" markdown="1">\n{problem}\n\n</div>\n'
    return f'<div data-type="exercise">\n{asked}{solved}</div>\n\n'


MEMBRANES = (
    'Text about **membranes**{: data-type="term"}.\n\n'
    + exercise(
        'What crosses \\_\\_\\_\\_?\n\n1.  water\n2.  CO<sub>2</sub>\n3.  all of the above\n{: type="a"}',
        "C",
    )
    + exercise("Why do *E. coli* matter?", "Answers will vary. They help digestion.")
    + exercise("[[link]](#fig-1) What is shown?", "[[link]](#fig-1) A cell.")
    + exercise("Name the steps.", "Answers will vary.")
    + exercise("In Section 4.2, what was said?", "Much.")
    + exercise('Two lists.\n\n1.  a\n2.  b\n^\n\n1.  c\n2.  d\n{: type="a"}', "B")
    + exercise("No answer is given.", None)
    + """<div data-type="glossary" markdown="1">
### Glossary
{: data-type="glossary-title"}

plasma membrane
: (also, *cell membrane*) thin layer around a plasma membrane
^

cation
: positive ion, such as Ca<sup>2+</sup>
{: data-label=""}

frog
: Anura

</div>
"""
)
GENES = """<div data-type="glossary" markdown="1">
### Glossary
{: data-type="glossary-title"}
Cation
: again the positive ion
^

FtsZ
: \\- protein (*Z* ring) in 10<sup>6</sup> cells
</div>
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    book = tmp_path / "book"
    (book / "contents").mkdir(parents=True)
    (book / "SUMMARY.md").write_text(SUMMARY)
    for name, text in (
        ("m1", "Welcome."),
        ("m2", "Cells."),
        ("m3", MEMBRANES),
        ("m4", GENES),
        ("m9", "Loose."),
    ):
        (book / "contents" / f"{name}.md").write_text(text)
    return book


def read(name: str, path: Path) -> tuple[list[Record], Drops]:
    drops = Drops()
    return list(get_source(name).read(path, drops=drops)), drops


def text(record: Record) -> tuple[str, str]:
    return record.messages[0].content, record.messages[1].content


def test_openstax_exercises_and_terms(checkout):
    records, drops = read("openstax_biology", checkout)
    by_item = {r.id: text(r) for r in records}
    where = "openstax_biology/ch01/m3"
    assert by_item[f"{where}/choice-1"] == (
        "What crosses ____?\nA. water\nB. CO2\nC. all of the above",
        "C. all of the above",
    )
    assert by_item[f"{where}/question-2"] == ("Why do E. coli matter?", "They help digestion.")
    # The definition names the term, so only the definition can be asked for; the other name comes last.
    assert by_item[f"{where}/term-plasma-membrane"] == (
        "What does the term “plasma membrane” mean?",
        "Thin layer around a plasma membrane (also, cell membrane).",
    )
    assert set(by_item[f"{where}/term-cation"]) in (
        {"Which term means: positive ion, such as Ca2+?", "cation"},
        {"What does the term “cation” mean?", "Positive ion, such as Ca2+."},
    )
    assert "rotein (Z ring) in 10^6 cells" in " ".join(by_item["openstax_biology/ch02/m4/term-ftsz"])
    assert len(records) == 5
    assert {(r.domain, r.source, r.license) for r in records} == {
        ("biology", "openstax_biology", "CC-BY-3.0")
    }
    assert drops.counts == {
        "refers to a figure": 1,
        "the solution only says that answers vary": 1,
        "refers to another place in the book": 1,
        "exercise of a layout that is not understood": 1,
        "exercise without a solution": 1,
        "glossary entry without a definition": 1,
        "term defined before in the book": 1,
    }
    assert drops.examples["refers to a figure"] == [f"{where}: What is shown?"]


def test_openstax_is_the_same_from_checkout_archive_and_folder_with_archive(checkout, tmp_path):
    archive = tmp_path / "held" / "book.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(checkout, arcname="book-cf3dc8c")
    expected = read("openstax_us_history", checkout)
    assert read("openstax_us_history", archive) == expected
    assert read("openstax_us_history", archive.parent) == expected
    assert expected[0][0].domain == "history"


def test_openstax_failures(tmp_path):
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(gzip.compress(b"x" * 2000)[:15])
    for path, says in (
        (damaged, "not a readable"),
        (tmp_path / "absent", "no such"),
        (tmp_path, "no contents|readable"),
    ):
        with pytest.raises(UserError, match=says):
            read("openstax_biology", path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"no contents/\*\.md here"):
        read("openstax_biology", tmp_path / "bare")


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ('**membrane**{: data-type="term"} of *E. coli*', "membrane of E. coli"),
        ("<em>E. coli </em>bacteria &amp; H<sub>2</sub>O", "E. coli bacteria & H2O"),
        ('see [a page][1] or [b](http://x.org){: target="_window"}', "see a page or b"),
        (
            "<sup>15</sup>N, Ca<sup>2+</sup>, 10<sup>-6</sup>, *p*<sup>2</sup> + q<sup>2</sup>",
            "15N, Ca2+, 10^-6, p^2 + q^2",
        ),
        ("1s<sup>2</sup>2s<sup>2</sup>", "1s^2 2s^2"),
        ("(8*2 + 4)/48 = .42; q = (12*2 + 4)", "(8*2 + 4)/48 = .42; q = (12*2 + 4)"),
        ("5\\'-3\\' and \\*this\\*", "5'-3' and *this*"),
        ("has\\_\\_\\_\\_\\_\\_ the number, are \\_\\_\\_.", "has ____ the number, are ____."),
        (
            '<math><mtext> CO</mtext><mn>2</mn><mo stretchy="false">→</mo><mtext>G3P</mtext></math>',
            "CO2 → G3P",
        ),
        ('one<span data-type="newline"><br /></span>two([\\[link\\]](#fig))', "one two()"),
    ],
)
def test_plain_text(markup, plain):
    assert plain_text(markup) == plain


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
        (record,), drops = read("gsm8k", path)
        assert text(record) == ("What is 48/2?", "It is 24.\n#### 24")
        assert (record.domain, record.license) == ("mathematics", "MIT")
        assert drops.counts == {"no final answer after ####": 1}


def test_gsm8k_refuses_the_test_split_and_damaged_files(tmp_path):
    (tmp_path / "test.jsonl").write_text(gsm8k_lines())
    with pytest.raises(UserError, match="evaluation only"):
        read("gsm8k", tmp_path / "test.jsonl")
    with pytest.raises(UserError, match=r"no train\.jsonl or train\.jsonl\.gz"):
        read("gsm8k", tmp_path)
    for content, says in (
        ("{}\n", ":1: not a GSM8K record"),
        (gsm8k_lines() + "{cut\n", ":3: malformed line"),
    ):
        (tmp_path / "train.jsonl").write_text(content)
        with pytest.raises(UserError, match=says):
            read("gsm8k", tmp_path / "train.jsonl")


def test_file_source_reads_any_format_and_counts_what_is_empty(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps([{"instruction": "Name a planet.", "output": "Mars."}, {"instruction": "x", "output": ""}])
    )
    (record,), drops = read("file", path)
    assert (record.domain, record.source) == ("general", "mine")
    assert drops.counts == {"empty question or answer": 1}


def test_catalogue_names_every_source_and_where_to_get_it():
    assert set(SOURCES) == {"openstax_biology", "openstax_us_history", "gsm8k", "file"}
    assert all(name == s.name and s.title and s.licence and s.where_to_get for name, s in SOURCES.items())


def test_unknown_source_gets_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'openstax_biology'"):
        get_source("openstax_biolgy")


# --- public data, where it lies --------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "kinds", "left_out"),
    [
        ("openstax_biology", {"choice": 677, "question": 435, "term": 2294}, 201),
        ("openstax_us_history", {"choice": 280, "question": 138, "term": 406}, 168),
    ],
)
def test_real_books(shared_data, name, kinds, left_out):
    records, drops = read(name, shared_data / name)
    counted = dict.fromkeys(kinds, 0)
    for record in records:
        counted[record.id.split("/")[-1].split("-")[0]] += 1
        said = " ".join(text(record))
        assert not any(
            mark in said for mark in ("[[", "{:", "\\", "<sub", "<sup", "<em", "&amp;", "data-type", "  ")
        )
    assert counted == kinds
    assert drops.counts.total() == left_out
    assert len({r.id for r in records}) == len(records)


@pytest.mark.shared
def test_real_gsm8k(shared_data):
    records, drops = read("gsm8k", shared_data / "gsm8k")
    assert len(records) == 7473
    assert not drops.counts
    assert not any("<<" in m.content for r in records for m in r.messages)
    with pytest.raises(UserError, match="evaluation only"):
        read("gsm8k", shared_data / "gsm8k" / "test.jsonl")
