"""Sets of the hub, from files in the hub's layouts and from a hub that cannot be reached."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.hub import AGAIN, MALFORMED
from qwen_ray.data.sources.hub_sets import SOURCES
from qwen_ray.errors import UserError

SETS: dict[str, Source] = {source.name: source for source in SOURCES}
MMLU = {
    "question": "Which is a fruit?",
    "subject": "",
    "choices": ["stone", "apple", "nail", "sand"],
    "answer": 1,
}
SCIQ = {
    "question": "What do plants take in?",
    "distractor3": "gold",
    "distractor1": "iron",
    "distractor2": "sand",
    "correct_answer": "carbon dioxide",
    "support": "",
}


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(found: list[Found]) -> list[list[str]]:
    return [[message.content for message in f.record.messages] for f in found]


def test_the_catalogue_has_five_sets_with_licences() -> None:
    assert sorted(SETS) == ["dolly", "flan", "mmlu_auxiliary", "oasst1", "sciq"]
    assert all(source.licence and source.requires and source.size for source in SOURCES)
    assert SETS["sciq"].licence == "CC-BY-NC-3.0"


def test_sciq_gives_the_training_split_only(tmp_path: Path) -> None:
    train = parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [SCIQ, {**SCIQ, "distractor1": ""}])
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{**SCIQ, "question": "A test question?"}])
    parquet(
        tmp_path / "data" / "validation-00000-of-00001.parquet", [{**SCIQ, "question": "A test question?"}]
    )
    drops = Drops()
    for path in (tmp_path, tmp_path / "data", train):
        found = list(SETS["sciq"].find(path, drops=drops))
        [[question, answer]] = texts(found)
        assert question.startswith("What do plants take in?\nA. ")
        assert answer[1:] == ". carbon dioxide"
        assert answer in question.split("\n")
        assert found[0].where.startswith(str(train))
        assert found[0].record.license == "CC-BY-NC-3.0"
    assert drops.counts == {MALFORMED: 3}  # the row with two wrong answers, each time


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sciq", "data/test-00000-of-00001.parquet"),
        ("mmlu_auxiliary", "all/validation-00000-of-00001.parquet"),
        ("mmlu_auxiliary", "all/dev-00000-of-00001.parquet"),
        ("mmlu_auxiliary", "high_school_biology_test.parquet"),
    ],
)
def test_a_split_that_is_not_for_training_is_refused(tmp_path: Path, name: str, file: str) -> None:
    path = parquet(tmp_path / file, [{**SCIQ, **MMLU}])
    with pytest.raises(UserError, match="not for training"):
        list(SETS[name].find(path))
    with pytest.raises(UserError, match="in this folder"):
        list(SETS[name].find(tmp_path))
    folder = tmp_path / "validation"
    parquet(folder / "train-0.parquet", [{**SCIQ, **MMLU}])
    with pytest.raises(UserError, match="not for training"):
        list(SETS[name].find(folder))


def test_mmlu_auxiliary_in_both_layouts(tmp_path: Path) -> None:
    parquet(
        tmp_path / "flat" / "all" / "auxiliary_train-00000-of-00001.parquet",
        [MMLU, MMLU, {**MMLU, "answer": 4}],
    )
    parquet(tmp_path / "flat" / "all" / "test-00000-of-00001.parquet", [{**MMLU, "question": "In the test?"}])
    parquet(tmp_path / "nested" / "auxiliary_train" / "train-00000-of-00001.parquet", [{"train": MMLU}])
    drops = Drops()
    flat = list(SETS["mmlu_auxiliary"].find(tmp_path / "flat", drops=drops))
    nested = list(SETS["mmlu_auxiliary"].find(tmp_path / "nested"))
    assert (
        texts(flat)
        == texts(nested)
        == [["Which is a fruit?\nA. stone\nB. apple\nC. nail\nD. sand", "B. apple"]]
    )
    assert drops.counts == {AGAIN: 1, MALFORMED: 1}


def test_dolly_puts_the_context_below_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Who is it?", "context": "It is Anna.", "response": "Anna", "category": "closed_qa"}
    path = lines(
        tmp_path / "databricks-dolly-15k.jsonl", [row, {**row, "response": ""}, {**row, "context": ""}, 7]
    )
    drops = Drops()
    found = list(SETS["dolly"].find(tmp_path, domain="history", drops=drops))
    assert texts(found) == [["Who is it?\n\nIt is Anna.", "Anna"], ["Who is it?", "Anna"]]
    assert found[0].record.id.startswith("dolly/closed_qa/")
    assert found[0].record.domain == "history"
    assert [f.where for f in found] == [f"{path}:1", f"{path}:3"]
    assert [drop.where for drop in drops.log] == [f"{path}:2", f"{path}:4"]


def test_oasst_follows_the_best_ranked_answer(tmp_path: Path) -> None:
    def message(
        name: str, parent: str | None, role: str, text: str, rank: int | None = None, **more: Any
    ) -> dict[str, Any]:
        return {
            "message_id": name,
            "parent_id": parent,
            "text": text,
            "role": role,
            "lang": "en",
            "rank": rank,
            "deleted": False,
            "review_result": True,
            "message_tree_id": "t",
            "tree_state": "ready_for_export",
            **more,
        }

    rows = [
        message("a", None, "prompter", "Hello?"),
        message("b", "a", "assistant", "No.", 1),
        message("c", "a", "assistant", "Yes.", 0),
        message("d", "c", "prompter", "Why?", 0),
        message("e", "d", "assistant", "Because.", 0),
        message("f", None, "prompter", "¿Hola?", lang="es"),
    ]
    parquet(tmp_path / "data" / "train-00000-of-00001-x.parquet", rows)
    drops = Drops()
    assert texts(list(SETS["oasst1"].find(tmp_path, drops=drops))) == [["Hello?", "Yes.", "Why?", "Because."]]
    assert len(drops.log) == 1


def test_flan_reads_its_named_tasks_only(tmp_path: Path) -> None:
    for split, task in (
        ("train", "arc_easy"),
        ("train", "trivia_qa"),
        ("train", "sst2"),
        ("validation", "arc_easy"),
    ):
        row = {"inputs": f"{split} {task}?", "targets": "yes", "task": f"{task}_10templates"}
        lines(tmp_path / split / f"{task}_10templates_{split}.jsonl", [row])
    found = list(SETS["flan"].find(tmp_path))
    assert texts(found) == [["train arc_easy?", "yes"], ["train trivia_qa?", "yes"]]
    assert found[0].record.id.startswith("flan/arc_easy/")
    assert texts(list(SETS["flan"].find(tmp_path / "train"))) == texts(found)


@pytest.mark.parametrize("path", ["hub", "somebody/copy-of-it"])
def test_a_hub_that_cannot_be_reached_says_what_to_do(path: str, tmp_path: Path) -> None:
    """In a process of its own: the libraries look at the variable only as they are imported."""
    code = (
        "from pathlib import Path\n"
        "from qwen_ray.data.sources.hub_sets import SOURCES\n"
        "from qwen_ray.errors import UserError\n"
        "for source in SOURCES:\n"
        "    try:\n"
        f"        list(source.find(Path({path!r})))\n"
        "    except UserError as e:\n"
        "        print(source.name, '|', e.what, '|', e.where, '|', e.fix)\n"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path),
        "HOME": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    said = [line.split(" | ") for line in run.stdout.strip().split("\n")]
    assert [line[0] for line in said] == [source.name for source in SOURCES]
    for name, what, where, fix in said:
        assert "cannot be had from the hub" in what
        assert where == (path if "/" in path else where)
        assert "hf download --repo-type dataset" in fix
        assert f"--source {name}=FOLDER" in fix


def test_what_is_no_file_and_no_hub_id_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        list(SETS["sciq"].find(tmp_path / "nowhere"))
    assert e.value.where == str(tmp_path / "nowhere")
    assert "--source sciq=hub" in e.value.fix
