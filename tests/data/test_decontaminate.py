"""Benchmark items are read from their own files only, and found in training data however they are written."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.data.decontamination.benchmarks import Item, counts, load_benchmarks, read_benchmarks
from qwen_ray.data.decontamination.embedders import LexicalEmbedder, NeuralEmbedder
from qwen_ray.data.decontamination.index import Hit, Index, report
from qwen_ray.data.decontamination.ngrams import Ngrams
from qwen_ray.data.decontamination.wording import content, key, numbers, words
from qwen_ray.data.records import Record
from qwen_ray.data.sources import get_source
from qwen_ray.errors import UserError
from tests.conftest import record
from tests.data.paraphrases import COPIED

SPEECH = (
    "We hold that the harvest belongs to those who plant it, and that no toll on the river shall be laid "
    "without the consent of the towns along its banks."
)
PASSAGE_ITEM = Item(
    "exam/history",
    "test/7",
    "Which of the following groups would most likely have opposed the views of the speaker?",
    SPEECH,
    ("toll keepers", "farmers", "millers", "boatmen"),
    "toll keepers",
)
LONG = Item(
    "exam/biology",
    "test/1",
    "If a sailor's compass plant is moved from a shaded valley to an open ridge, what happens to the angle "
    "at which its leaves are held during the afternoon?",
    "",
    ("They turn edge-on to the sun.", "They fold.", "They fall.", "They stay as they are."),
    "They turn edge-on to the sun.",
)
MIDDLE = Item("exam/biology", "test/2", "Which pigment gives the feathers of flamingos their pink colour?")
SHORT = Item("exam/biology", "test/3", "Where do lampreys spawn?", "", ("rivers", "lakes"), "rivers")
GENERIC = Item(
    "exam/biology", "test/4", "Which of the following statements is true?", "", ("Yes", "No"), "Yes"
)
SUM = Item("tiny/arithmetic", "sum", "What is 31 + 2?", "", ("33", "29"), "33", generated=True)
TOLD = Item(
    "tiny/reasoning",
    "has",
    "Bob has 17 red coins. Ned has 32 red coins. How many red coins does Ned have now?",
    "",
    ("17", "32"),
    "32",
    generated=True,
)
ITEMS = [PASSAGE_ITEM, LONG, MIDDLE, SHORT, GENERIC, SUM, TOLD]
COPIES = [
    Item("copied", str(i), one.question, "", one.choices, one.choices[0]) for i, one in enumerate(COPIED)
]


@pytest.fixture(scope="module")
def index() -> Index:
    """Of a handful of items, without likeness."""
    return Index.build(ITEMS, near=None)


@pytest.fixture(scope="module")
def near_index() -> Index:
    """Of the embedded suites and the questions that have paraphrases."""
    return Index.build([*load_benchmarks(None), *COPIES])


def found(hits: Sequence[Hit]) -> list[tuple[str, str, str]]:
    """Item, part and kind of each hit."""
    return [(hit.item, hit.part, hit.kind) for hit in hits]


def asked(question: str, answer: str = "I cannot tell.") -> list[tuple[str, str, str]]:
    """What the small index finds in a one-turn record."""
    return found(Index.build(ITEMS, near=None).hits(record(question, answer)))


# --- reading ---------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[list[str]]) -> None:
    """A CSV file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSONL file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_the_embedded_suites_are_always_items() -> None:
    items = load_benchmarks(None)
    assert counts(items) == {
        "tiny/arithmetic": 200,
        "tiny/biology": 160,
        "tiny/control": 120,
        "tiny/history": 154,
        "tiny/reasoning": 200,
        "tiny/security": 157,
    }
    insulin = next(item for item in items if item.id == "tiny-biology-hormone-insulin")
    assert insulin.answer == "pancreas"
    assert insulin.answer in insulin.choices
    assert not insulin.generated
    assert {item.benchmark for item in items if item.generated} == {"tiny/arithmetic", "tiny/reasoning"}


def test_mmlu_is_read_in_all_its_splits_and_a_quoted_passage_is_split_off(tmp_path: Path) -> None:
    quoted = (
        f"This question refers to the following information.\n{SPEECH}\nA. Speaker, 1788\nWho would object?"
    )
    for split in ("test", "val", "dev"):
        write_csv(tmp_path / split / f"old_history_{split}.csv", [[quoted, "a", "b", "c", "d", "C"]])
    write_csv(tmp_path / "auxiliary_train" / "old_history_test.csv", [[quoted, "a", "b", "c", "d", "C"]])
    items = read_benchmarks(tmp_path)
    assert [(item.benchmark, item.id) for item in items] == [
        ("mmlu/old_history", "dev/1"),
        ("mmlu/old_history", "test/1"),
        ("mmlu/old_history", "val/1"),
    ]
    assert items[0].question == "Who would object?"
    assert items[0].passage == f"{SPEECH}\nA. Speaker, 1788"
    assert items[0].answer == "c"


def test_a_line_break_alone_makes_no_passage(tmp_path: Path) -> None:
    write_csv(tmp_path / "law_test.csv", [["Which holds?\nI. This\nII. That", "a", "b", "c", "d", "A"]])
    (item,) = read_benchmarks(tmp_path)
    assert item.passage == ""
    assert item.question == "Which holds?\nI. This\nII. That"


def test_the_training_split_is_never_a_benchmark(tmp_path: Path) -> None:
    row = {"question": "How many eggs are in three dozen?", "answer": "3*12=<<3*12=36>>36\n#### 36"}
    write_rows(tmp_path / "gsm8k" / "test.jsonl", [row])
    for name in ("train.jsonl", "train.jsonl.gz", "my-train_v2.jsonl", "training/part.jsonl"):
        write_rows(tmp_path / "gsm8k" / name, [row])
    (item,) = read_benchmarks(tmp_path)
    assert (item.benchmark, item.id) == ("gsm8k", "test/1")
    assert item.answer == "3*12=36\n#### 36"
    with pytest.raises(UserError, match="no benchmark here"):
        read_benchmarks(tmp_path / "gsm8k" / "train.jsonl")


def test_held_out_sets_and_plain_files(tmp_path: Path) -> None:
    row = {"id": "h-1", "question": "Which is it?", "choices": ["x", "y"], "answer": 1, "topic": "t"}
    write_rows(tmp_path / "mine" / "items.jsonl", [row])
    (tmp_path / "mine" / "suite.yaml").write_text("version: '1'\n")
    write_rows(
        tmp_path / "quiz" / "eval.jsonl.gz", [{"question": "Why?", "choices": ["x", "y"], "answer": "B"}]
    )
    write_csv(
        tmp_path / "sheet" / "quiz.csv", [["Question", "A", "B", "Answer"], ["When?", "now", "then", "A"]]
    )
    write_rows(tmp_path / "data" / "records.jsonl", [{"messages": [], "id": "no benchmark"}])
    (tmp_path / "data" / "notes.jsonl").write_bytes(b"\xff\xfe not text")
    items = read_benchmarks(tmp_path)
    assert [(item.benchmark, item.id, item.question, item.answer) for item in items] == [
        ("mine", "h-1", "Which is it?", "y"),
        ("quiz", "eval/1", "Why?", "y"),
        ("sheet", "quiz/1", "When?", "now"),
    ]
    assert read_benchmarks(tmp_path / "mine")[0].benchmark == "mine"


def test_faults_of_a_benchmark_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_benchmarks(tmp_path / "absent")
    with pytest.raises(UserError, match="no benchmark here"):
        load_benchmarks(tmp_path)
    file = tmp_path / "quiz.jsonl"
    file.write_text('{"question": "Why?"}\n\n{"question": \n')
    with pytest.raises(UserError, match=r"quiz\.jsonl:3: malformed item"):
        load_benchmarks(tmp_path)
    file.write_text('{"question": "Why?"}\n{"question": ""}\n')
    with pytest.raises(UserError, match=r"quiz\.jsonl:2: an item needs a 'question'"):
        load_benchmarks(tmp_path)
    file.unlink()
    write_csv(
        tmp_path / "law_test.csv", [["Why?", "a", "b", "c", "d", "A"], ["Why?", "a", "b", "c", "d", "E"]]
    )
    with pytest.raises(UserError, match=r"law_test\.csv, row 2: not a row of MMLU"):
        load_benchmarks(tmp_path)


# --- words -----------------------------------------------------------------------------------------


def test_words_have_no_case_punctuation_or_width() -> None:
    assert words("Don’t STOP—now: the “ﬁrst” １９２０'s") == ["dont", "stop", "now", "the", "first", "1920s"]


def test_a_key_keeps_the_signs_between_numbers() -> None:
    assert key("What is 31+2?") == key("what is 31 + 2") != key("What is 31 - 2?")
    assert key("Ex-slaves, it's said.") == "ex slaves its said"


def test_content_is_stems_without_stop_words_and_numbers_are_digits() -> None:
    assert content("Which of the following best describes the twenty-one mice's fighting?") == [
        "21",
        "mice",
        "fight",
    ]
    assert content("Which of the following is true?") == []
    assert numbers("In the 1920s three of 45 left") == {"1920", "3", "45"}


# --- exact and n-grams -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    [
        LONG.question,
        LONG.question.upper(),
        re.sub(r"[^\w\s']", " ", LONG.question).replace("'", "’"),
        f"Here is one for you. {LONG.question} Take your time.",
    ],
    ids=["verbatim", "upper case", "other punctuation", "inside a longer text"],
)
def test_a_whole_question_is_exact(question: str) -> None:
    assert asked(question) == [("test/1", "question", "exact")]


def test_an_item_is_found_in_an_answer_too(index: Index) -> None:
    assert found(index.hits(record("Ask me something.", LONG.question))) == [("test/1", "question", "exact")]


def test_thirteen_shared_words_are_a_hit_and_twelve_are_not(index: Index) -> None:
    said = words(LONG.question)
    (hit,) = index.hits(record("Say: " + " ".join(said[4:17]) + " or so?", "Said."))
    assert (hit.kind, hit.text) == ("13-gram", " ".join(said[4:17]))
    assert hit.score == round(13 / len(said), 4)
    assert asked("Say: " + " ".join(said[4:16]) + " or so?") == []


def test_the_longest_run_is_told(index: Index) -> None:
    said = words(LONG.question)
    text = f"{' '.join(said[:13])} stop {' '.join(said[5:25])}"
    (hit,) = index.hits(record(text, "Said."))
    assert hit.text == " ".join(said[5:25])


def test_a_run_does_not_go_from_one_message_or_record_into_the_next(index: Index) -> None:
    said = words(LONG.question)
    first, second = " ".join(said[:12]), " ".join(said[12:24])
    assert index.hits(record(first, second)) == []
    assert index.hits_batch([record(first, "Yes."), record(second, "Yes.")]) == [[], []]


def test_a_question_of_eight_to_twelve_words_counts_only_whole(index: Index) -> None:
    assert len(words(MIDDLE.question)) == 10
    assert asked(f"Tell me: {MIDDLE.question}") == [("test/2", "question", "exact")]
    assert asked(MIDDLE.question.replace("pink", "rosy")) == []


def test_a_short_question_counts_only_by_itself() -> None:
    for question in (
        "where do LAMPREYS spawn",
        "Question: Where do lampreys spawn?",
        "Hello! Where do lampreys spawn?",
    ):
        assert asked(question) == [("test/3", "question", "exact")], question
    assert asked("Where do lampreys spawn?\nA. lakes\nB. rivers", "B") == [("test/3", "question", "exact")]
    assert asked("Where do lampreys spawn in the north of Iceland?") == []
    # "A. heterotroph" among the choices is not the question "A heterotroph".
    index = Index.build([Item("exam/biology", "test/5", "A heterotroph", answer="eats")], near=None)
    assert index.hits(record("Which of these eats?\nA. heterotroph\nB. autotroph", "A")) == []
    assert found(index.hits(record("a heterotroph…", "eats"))) == [("test/5", "question", "exact")]


def test_a_question_that_says_nothing_counts_only_with_its_answer() -> None:
    question = "Which of the following statements is true?"
    assert asked(f"{question}\nA. No\nB. Yes", "B. Yes") == [("test/4", "question", "exact")]
    assert asked(f"{question}\nA. No\nB. Yes", "A") == []
    assert asked(question, "Water boils.") == []


def test_generated_items_count_only_with_all_their_numbers() -> None:
    assert asked("What is 31+2 ?", "33") == [("sum", "question", "exact")]
    assert asked("What is 31 - 2?", "29") == []
    assert asked("What is 31 + 2 + 4?", "37") == []
    assert asked(TOLD.question) == [("has", "question", "exact")]
    assert asked(f"Amy has 5. {TOLD.question} And why?") == []


def test_passages_are_told_apart_from_questions(index: Index) -> None:
    (hit,) = index.hits(record("Who said this?", f"It is written: {SPEECH.lower()}"))
    assert (hit.part, hit.kind, hit.score) == ("passage", "exact", 1.0)
    both = index.hits(record(f"{SPEECH}\n{PASSAGE_ITEM.question}", "toll keepers"))
    assert found(both) == [("test/7", "passage", "exact"), ("test/7", "question", "exact")]


def test_a_long_answer_is_found_and_a_short_one_is_no_hit() -> None:
    solution = "First take the seven boxes and open each one, then add the five that were left on the table."
    items = [Item("sums", "1", "How many boxes are there in the end?", answer=solution), SHORT]
    hits = Index.build(items, near=None).hits(record("What now?", f"{solution} Where are the rivers?"))
    assert found(hits) == [("1", "answer", "exact")]


def test_text_hits_search_any_text(index: Index) -> None:
    book = f"# Chapter\n\n{'Nothing here. ' * 500}\n{SPEECH}\n\nWhere do lampreys spawn?"
    assert found(index.text_hits(book)) == [("test/7", "passage", "exact")]


def test_a_long_shared_passage_is_one_run() -> None:
    said = words(SPEECH)
    runs = list(Ngrams.build([["other"] * 20, said], 13).runs([["before"] * 3, [*said, "so", *said[4:20]]]))
    assert [(run.text, run.first, run.length, run.segment) for run in runs] == [
        (1, 0, len(said), 1),
        (1, len(said) + 1, 16, 1),
    ]


def test_n_can_be_chosen() -> None:
    text = record(" ".join(words(LONG.question)[3:9]), "Said.")
    assert [hit.kind for hit in Index.build(ITEMS, n=6, near=None).hits(text)] == ["6-gram"]
    assert Index.build(ITEMS, n=13, near=None).hits(text) == []


# --- likeness --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "least"), [("surface", 1.0), ("reworded", 1.0), ("rephrased", 0.9)])
def test_paraphrases_are_found(near_index: Index, strength: str, least: float) -> None:
    for form in ("text", "letter"):
        recall = 0
        for item, one in zip(COPIES, COPIED, strict=True):
            question, answer = getattr(one, strength), one.choices[0]
            if form == "letter":
                options = zip("ABCD", reversed(one.choices), strict=True)
                question, answer = "\n".join([question, *(f"{a}. {text}" for a, text in options)]), "D"
            recall += (item.benchmark, item.id) in {
                (hit.benchmark, hit.item) for hit in near_index.hits(record(question, answer))
            }
        assert recall / len(COPIED) >= least, form


def test_what_is_said_in_other_words_altogether_is_missed(near_index: Index) -> None:
    """The limit that the docs tell of: it takes a neural embedder."""
    hits = near_index.hits_batch([record(one.rewritten, one.choices[0]) for one in COPIED])
    assert sum(any(hit.benchmark == "copied" for hit in each) for each in hits) <= 1


def test_other_questions_on_the_same_subjects_are_kept(near_index: Index) -> None:
    others = [
        ("In which part of a plant cell is DNA copied before the cell divides?", "the nucleus"),
        ("During which phase of mitosis do the chromosomes first become visible?", "prophase"),
        ("Which Roman emperor built a wall across the north of Britain?", "Hadrian"),
        (
            "What does the term “hash function” mean?",
            "A function that maps data of any size to a fixed size.",
        ),
        ("Which article of the Constitution sets up the courts?", "Article III"),
        ("A bakery sells rolls in bags of 8. If Lena buys 3 bags, how many rolls does she have?", "24"),
    ]
    assert near_index.hits_batch([record(*pair) for pair in others]) == [[]] * len(others)


def test_a_problem_with_other_numbers_is_another_problem(near_index: Index) -> None:
    bakery = COPIED[13]
    assert "bakery" in bakery.question
    same = near_index.hits(record(bakery.reworded, "37"))
    assert [hit.kind for hit in same] == ["near"]
    assert same[0].text == bakery.question
    assert near_index.hits(record(bakery.reworded.replace("7", "9"), "49")) == []


def test_the_question_may_be_the_last_line_of_a_long_turn(near_index: Index) -> None:
    essay = " ".join(f"Line {i} tells of ship number{i} and its crew." for i in range(9))
    assert found(near_index.hits(record(f"{essay}\n{COPIED[8].reworded}", "Constantine"))) == [
        ("8", "question", "near")
    ]


def test_a_dense_embedder_finds_the_same(near_index: Index) -> None:
    class Dense(LexicalEmbedder):
        """The same vectors as numpy arrays, as a neural model gives them."""

        def embed(self, texts: Sequence[str]) -> Any:
            return super().embed(texts).toarray()

    items = COPIES[:4]
    records = [record(one.rephrased, one.choices[0]) for one in COPIED[:4]]
    dense = Index.build(items, embedder=Dense([item.question for item in items])).hits_batch(records)
    assert dense == Index.build(items).hits_batch(records)
    assert any(hit.kind == "near" for hits in dense for hit in hits)


def test_a_neural_embedder_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sentence-transformers|cannot be loaded"):
        NeuralEmbedder(str(tmp_path / "absent")).embed(["a"])


# --- all of it -------------------------------------------------------------------------------------


def planted() -> Iterator[Record]:
    """Copies of the items in every form, each a record that must go."""
    lead = "Consider the exam below. "
    for i, one in enumerate(COPIED):
        right, *wrong = one.choices
        options = "\n".join(f"{a}. {text}" for a, text in zip("ABCD", [*reversed(wrong), right], strict=True))
        forms = {
            "verbatim": one.question,
            "upper": one.question.upper(),
            "punctuation": re.sub(r"[^\w\s]", " -- ", one.question),
            "longer": f"{lead * 30}{one.question} {lead * 30}",
            "options": f"{one.question}\n{options}",
            "surface": one.surface,
            "reworded": one.reworded,
        }
        for form, question in forms.items():
            yield record(question, "D" if form == "options" else right, id=f"planted-{form}-{i}")
    for form, text in {
        "speech": SPEECH,
        "loud speech": SPEECH.upper(),
        "inside": f"{lead}{SPEECH} {lead}",
    }.items():
        yield record("Quote somebody.", text, id=f"planted-{form}")


def test_after_removing_every_hit_none_remains() -> None:
    index = Index.build([*COPIES, PASSAGE_ITEM])
    clean = [record(f"What is the capital of land number {i}?", f"Town {i}.") for i in range(50)]
    records = [*clean[:25], *planted(), *clean[25:]]
    kept = [r for r, hits in zip(records, index.hits_batch(records), strict=True) if not hits]
    assert kept == clean
    assert not any(index.hits_batch(kept))


def test_the_report_names_every_hit(index: Index) -> None:
    records = [record(f"{SPEECH}\n{LONG.question}", "Yes.", id="r1"), record(SHORT.question, "Yes.", id="r2")]
    rows = [
        {"record": r.id, "where": f"f.jsonl:{line}", **asdict(hit)}
        for line, r in enumerate(records, start=1)
        for hit in index.hits(r)
    ]
    told = report(rows)
    assert (told["records"], told["items"]) == (2, 3)
    assert told["benchmarks"] == {
        "exam/biology": {"question": {"exact": 2}},
        "exam/history": {"passage": {"exact": 1}},
    }
    assert [(hit["record"], hit["where"], hit["item"]) for hit in told["hits"]] == [
        ("r1", "f.jsonl:1", "test/7"),
        ("r1", "f.jsonl:1", "test/1"),
        ("r2", "f.jsonl:2", "test/3"),
    ]
    assert json.loads(json.dumps(told)) == told


def test_batches_and_a_loaded_index_find_the_same(near_index: Index, tmp_path: Path) -> None:
    near_index.save(tmp_path / "made" / "index")
    loaded = Index.load(tmp_path / "made" / "index")
    records = list(planted())
    expected = near_index.hits_batch(records)
    assert [loaded.hits(r) for r in records] == expected
    assert near_index.hits_batch([]) == []


def test_processes_agree(tmp_path: Path) -> None:
    index, records = Index.build(COPIES), list(planted())
    index.save(tmp_path / "index")
    code = (
        "import sys; from pathlib import Path;"
        "from qwen_ray.data.decontamination.index import Index;"
        "from tests.data.test_decontaminate import COPIES, planted;"
        "indexes = [Index.load(Path(sys.argv[1])), Index.build(COPIES)];"
        "print([index.hits_batch(list(planted())) for index in indexes])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "index")],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert said.strip() == repr([index.hits_batch(records)] * 2)


# --- the public data -------------------------------------------------------------------------------


def archived(path: Path, suffix: str) -> Iterator[str]:
    """Texts of the files in a .tar.gz."""
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(suffix) and (data := archive.extractfile(member)):
                yield data.read().decode("utf-8")


def items_hit(index: Index, texts: Iterator[str]) -> Counter[tuple[str, str]]:
    """Number of test items that share an n-gram with any of the texts, by benchmark and part."""
    hits = {(h.benchmark, h.part, h.item) for text in texts for h in index.text_hits(text)}
    return Counter((benchmark, part) for benchmark, part, item in hits if item.startswith("test/"))


@pytest.fixture(scope="module")
def real_items(shared_data: Path) -> list[Item]:
    """The embedded suites, MMLU and GSM8K."""
    return load_benchmarks(shared_data)


@pytest.fixture(scope="module")
def real_index(real_items: list[Item]) -> Index:
    """Of all of them."""
    return Index.build(real_items)


@pytest.fixture(scope="module")
def real_words(real_index: Index) -> Index:
    """The same without likeness."""
    return replace(real_index, likeness=None)


@pytest.mark.shared
def test_only_mmlu_and_the_gsm8k_test_are_benchmarks_there(real_items: list[Item]) -> None:
    found = counts(item for item in real_items if not item.benchmark.startswith("tiny/"))
    assert len(found) == 16
    assert found["gsm8k"] == 1319
    splits = Counter(item.id.split("/")[0] for item in real_items if item.benchmark.startswith("mmlu/"))
    assert (splits["test"], splits["dev"]) == (3177, 75)
    assert found["mmlu/high_school_us_history"] == 204 + 22 + 5
    quoted = [item for item in real_items if item.benchmark == "mmlu/high_school_us_history"]
    assert all(item.passage and "\n" not in item.question for item in quoted)


@pytest.mark.shared
def test_known_overlaps_of_the_us_history_book(shared_data: Path, real_words: Index) -> None:
    path = shared_data / "openstax_us_history" / "us-history-book-md.tar.gz"
    assert items_hit(real_words, archived(path, ".md")) == {
        ("mmlu/high_school_us_history", "passage"): 15,
        ("mmlu/high_school_world_history", "passage"): 3,
    }
    # Its marks of style and links stand between the words of three more passages.
    plain = (re.sub(r"<[^>]*>|\{:[^}]*\}|\]\([^)]*\)", "", text) for text in archived(path, ".md"))
    assert items_hit(real_words, plain)["mmlu/high_school_us_history", "passage"] == 18


@pytest.mark.shared
def test_known_overlaps_of_the_world_history_book(shared_data: Path, real_words: Index) -> None:
    path = shared_data / "openstax_world_history" / "world-history-cnxml.tar.gz"
    texts = (re.sub(r"<[^>]*>", " ", text) for text in archived(path, ".cnxml"))
    assert items_hit(real_words, texts) == {
        ("mmlu/high_school_us_history", "passage"): 3,
        ("mmlu/high_school_european_history", "passage"): 8,
        ("mmlu/high_school_world_history", "passage"): 8,
        ("mmlu/high_school_world_history", "question"): 1,  # it quotes from its own passage
    }


@pytest.mark.shared
def test_known_overlaps_of_the_gsm8k_training_split(shared_data: Path, real_words: Index) -> None:
    lines = gzip.decompress((shared_data / "gsm8k" / "train.jsonl.gz").read_bytes()).decode().splitlines()
    records = [record(row["question"], row["answer"]) for row in map(json.loads, lines)]
    hits = [
        hit
        for hits in real_words.hits_batch(records[:4000]) + real_words.hits_batch(records[4000:])
        for hit in hits
    ]
    items = {(hit.part, hit.item) for hit in hits if hit.benchmark == "gsm8k" and hit.kind == "13-gram"}
    assert sum(part == "question" for part, _ in items) == 3


@pytest.mark.shared
@pytest.mark.parametrize("name", ["openstax_biology", "openstax_us_history"])
def test_few_records_of_the_books_are_taken_for_paraphrases(
    shared_data: Path, real_index: Index, name: str
) -> None:
    found = list(islice(get_source(name).read(shared_data / name), 1500))
    hits = [hits for i in range(0, len(found), 500) for hits in real_index.hits_batch(found[i : i + 500])]
    near = sum(any(hit.kind == "near" for hit in each) for each in hits)
    assert near / len(found) < 0.005


@pytest.mark.shared
def test_trivia_shares_no_question(shared_data: Path, real_words: Index) -> None:
    for path in sorted((shared_data / "opentriviaqa").rglob("*")):
        if path.is_file():
            text = path.read_bytes().decode("utf-8", "replace")
            assert not [hit for hit in real_words.text_hits(text) if hit.part == "question"], path.name
