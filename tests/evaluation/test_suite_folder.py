"""Suites from a folder: what is refused and how, and a held-out set through our harness and stock lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qwen_ray import models
from qwen_ray.data.heldout.build import build_heldout
from qwen_ray.data.records import write_records
from qwen_ray.errors import UserError
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.compare import compare
from qwen_ray.evaluation.run import evaluate_local
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.tiny import MODEL_DIR
from tests.data.quiz import quiz

TASK = "qwen_ray_heldout_law"


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout")
    write_records(folder / "quiz.jsonl", quiz(40))
    build_heldout("law", {"file": folder / "quiz.jsonl"}, folder / "set")
    return folder / "set"


@pytest.fixture(scope="module")
def result(heldout: Path) -> dict[str, Any]:
    return evaluate_local("tiny", None, str(heldout), out=heldout.parent / "result.json", limit=20)


def test_a_folder_is_evaluated_like_a_named_suite(heldout: Path, result: dict[str, Any]) -> None:
    assert result["suite"] == "heldout-law"
    assert result["suite_version"] == suites.load(str(heldout)).version
    assert {name: (c["role"], c["n"]) for name, c in result["categories"].items()} == {"law": ("target", 20)}
    rows = [json.loads(line) for line in (heldout / "items.jsonl").read_text().splitlines()]
    test = [row for row in rows if row["split"] == "test"][:20]
    assert [item["id"] for item in result["items"]] == [row["id"] for row in test]
    assert [item["target"] for item in result["items"]] == [row["answer"] for row in test]
    assert all(item["score"] == (item["answer"] == item["target"]) for item in result["items"])
    assert compare(result, result)["categories"][0]["delta"] == 0


def test_stock_lm_eval_runs_the_folder_and_agrees(heldout: Path, result: dict[str, Any]) -> None:
    done = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(MODEL_DIR), dtype="float32", device="cpu", batch_size=8),
        tasks=[TASK, f"{TASK}_text"],
        # What --include_path does; the tasks that come with lm-eval are left out, as they take long to list.
        task_manager=TaskManager(include_path=str(heldout), include_defaults=False),
        limit=20,
        bootstrap_iters=0,
    )
    assert done["results"][TASK]["acc,none"] == pytest.approx(result["categories"]["law"]["score"])
    assert 0 <= done["results"][f"{TASK}_text"]["acc,none"] <= 1
    prompts = [sample["arguments"][0][0] for sample in done["samples"][TASK]]
    assert all(prompt.count("Answer:") == 6 for prompt in prompts)  # five solved, one to solve
    assert prompts[0].startswith("The following are multiple choice questions (with answers) about law.\n\n")
    alone = [sample["arguments"][0][0] for sample in done["samples"][f"{TASK}_text"]]
    assert all(prompt.startswith("Question: ") and "A. " not in prompt for prompt in alone)


def test_names_stay_names_and_paths_are_folders(
    heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(heldout.parent)
    assert suites.load("set").folder == heldout  # no suite of the package is called that
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(heldout)
    assert suites.load("tiny").name == "tiny"
    assert suites.load("./tiny").name == "heldout-law"
    with pytest.raises(UserError, match="unknown suite 'heldout'") as e:
        suites.load("heldout")
    assert "folder that holds a suite.yaml" in e.value.fix
    for path in ("./nowhere", str(tmp_path)):
        with pytest.raises(UserError, match=r"no suite\.yaml here") as e:
            suites.load(path)
        assert e.value.where == path


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"name": "tiny"}, "calls itself 'tiny'"),
        (
            {"categories": {"law": {"role": "goal", "tasks": [TASK], "metric": "acc"}}},
            r"'categories\.0\.role'",
        ),
        (
            {"categories": {"law": {"role": "target", "tasks": [], "metric": "acc"}}},
            r"'categories\.0\.tasks'",
        ),
        ({"categories": {}}, "'categories'"),
        ({"categories": None}, "'categories'"),
        ({"version": None}, "'version'"),
        ({"descripton": "x"}, "'descripton'"),
        (
            {"categories": {"law": {"role": "target", "tasks": [f"{TASK}s"], "metric": "acc"}}},
            f"'task: {TASK}s'",
        ),
    ],
)
def test_a_faulty_definition_is_named(
    heldout: Path, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    spec = yaml.safe_load((heldout / "suite.yaml").read_text()) | change
    (tmp_path / f"{TASK}.yaml").write_text((heldout / f"{TASK}.yaml").read_text())
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(UserError, match=what) as e:
        suites.load(str(tmp_path))
    assert str(tmp_path / "suite.yaml") in e.value.where


def sums(folder: Path, **category: str) -> str:
    """A suite of one task, whose written answers are scored by two filters."""
    folder.mkdir()
    rows = [{"id": f"q{i}", "question": f"What is {i} + 3?", "answer": str(i + 3)} for i in range(4)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filters = {"strict": r"#### (\d+)", "flexible": r"(\d+)"}
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
        "filter_list": [
            {
                "name": name,
                "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}],
            }
            for name, pattern in filters.items()
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    spec = {
        "version": "1",
        "description": "Sums.",
        "categories": {
            "sums": {"role": "strength", "tasks": ["sums"], "metric": "exact_match", **category},
        },
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(spec))
    return str(folder)


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine.load(models.resolve("tiny"))


def test_an_item_counts_once_whatever_filters_its_task_has(engine: TorchEngine, tmp_path: Path) -> None:
    suite = sums(tmp_path / "named", filter="flexible")
    result = evaluate_local("tiny", None, suite, out=tmp_path / "r.json", engine=engine)
    assert result["categories"]["sums"]["n"] == len({item["id"] for item in result["items"]}) == 4


@pytest.mark.parametrize(
    ("category", "says"),
    [
        ({}, r"sums: 'sums' scores .* by 2 filters, .*: strict, flexible"),
        ({"filter": "flexibel"}, r"sums\.filter: .* no filter 'flexibel'.* 'flexible'\?"),
        ({"filter": "strict", "metric": "exact_mach"}, r"sums\.metric: .* 'exact_mach'.* 'exact_match'\?"),
    ],
)
def test_a_score_that_cannot_be_is_refused_before_the_benchmark(
    engine: TorchEngine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    category: dict[str, str],
    says: str,
) -> None:
    monkeypatch.setattr(engine, "generate", None)  # nothing is asked
    suite = sums(tmp_path / "suite", **category)
    with pytest.raises(UserError, match="(?s)" + says):
        evaluate_local("tiny", None, suite, out=tmp_path / "r.json", engine=engine)


def test_what_is_not_yaml_is_named(tmp_path: Path) -> None:
    for text in ("categories: [", "- a list"):
        (tmp_path / "suite.yaml").write_text(text)
        with pytest.raises(UserError) as e:
            suites.load(str(tmp_path))
        assert str(tmp_path / "suite.yaml") in e.value.where
