"""Suites through lm-eval in this process: results, intervals, and the guide suite from a folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from starlette.responses import Response

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.harness import evaluate, read_result
from qwen_ray.evaluation.run import evaluate_endpoint, evaluate_local
from qwen_ray.evaluation.statistics import wilson
from tests.serving.live import served


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate_local("tiny", None, "tiny", out=tmp_path_factory.mktemp("eval") / "r.json", limit=40)


def test_result_has_counts_and_intervals(tiny: dict[str, Any]) -> None:
    assert set(tiny["categories"]) == {"biology", "history", "security", "arithmetic", "reasoning"}
    assert set(tiny["controls"]) == {"untaught facts"}
    for name, category in {**tiny["categories"], **tiny["controls"]}.items():
        scores = [item["score"] for item in tiny["items"] if item["category"] == name]
        assert category["n"] == len(scores) == 40
        assert category["score"] == pytest.approx(sum(scores) / 40)
        assert category["ci"] == pytest.approx(wilson(sum(scores), 40))
    assert len({item["id"] for item in tiny["items"]}) == 240


def test_scores_follow_from_the_answers(tiny: dict[str, Any]) -> None:
    assert all(item["score"] == (item["answer"] == item["target"]) for item in tiny["items"])


def test_the_base_counts_and_knows_no_facts(tiny: dict[str, Any]) -> None:
    assert tiny["categories"]["arithmetic"]["score"] > 0.9
    assert all(tiny["categories"][d]["score"] < 0.5 for d in ("biology", "history", "security"))


def test_the_file_reads_back(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.json"
    result = evaluate_local("tiny", None, "tiny", out=out, limit=2)
    assert read_result(out) == json.loads(json.dumps(result))


def _mini_guide(root: Path) -> None:
    subjects = {
        task.removeprefix("qwen_ray_mmlu_")
        for category in suites.load("guide").categories
        for task in category.tasks
        if "mmlu" in task
    }
    for subject in subjects:
        for split, n in (("test", 4), ("dev", 5)):
            path = root / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", newline="") as f:
                rows = [[f"{subject} {split} {i}?", "1", "2", "3", "4", "ABCD"[i % 4]] for i in range(n)]
                csv.writer(f).writerows(rows)
    (root / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = [
            {"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(6)
        ]
        (root / "gsm8k" / f"{split}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))


def test_guide_suite_from_a_folder(tmp_path: Path) -> None:
    _mini_guide(tmp_path)
    result = evaluate_local("tiny", None, "guide", out=tmp_path / "r.json", data_dir=tmp_path, limit=3)
    counts = {name: (c["role"], c["n"]) for name, c in result["categories"].items()}
    assert counts == {
        "biology": ("target", 6),
        "history": ("target", 9),
        "security": ("target", 3),
        "mathematics": ("strength", 6),
        "philosophy": ("strength", 3),
        "gsm8k": ("strength", 3),
    }
    assert all(0 <= item["score"] <= 1 for item in result["items"])
    for suite, asked, message in (
        ("guide", 6, "_biology' has 5 solved examples"),
        ("guide", -1, "negative"),
        ("tiny", 1, "always asked without solved examples"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(suites.load(suite), None, model="tiny", data_dir=tmp_path, num_fewshot=asked, limit=1)


def test_guide_suite_names_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such evaluation file") as e:
        evaluate_local("tiny", None, "guide", out=tmp_path / "r.json", data_dir=tmp_path)
    assert "high_school_biology_test.csv" in e.value.where
    _mini_guide(tmp_path)
    broken = tmp_path / "mmlu" / "test" / "college_biology_test.csv"
    broken.write_text(broken.read_text() + "only,three,fields\n")
    with pytest.raises(UserError, match="not an MMLU row") as e:
        evaluate_local("tiny", None, "guide", out=tmp_path / "r.json", data_dir=tmp_path)
    assert e.value.where == f"{broken}:5"


@pytest.mark.shared
def test_guide_suite_on_the_real_files(shared_data: Path, tmp_path: Path) -> None:
    result = evaluate_local("tiny", None, "guide", out=tmp_path / "r.json", data_dir=shared_data, limit=2)
    assert result["categories"]["history"]["n"] == 6
    assert result["categories"]["gsm8k"]["n"] == 2


def test_unknown_suite_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown suite 'tinny'") as e:
        evaluate_local("tiny", None, "tinny", out=tmp_path / "r.json")
    assert "'tiny'" in e.value.fix
    with pytest.raises(UserError, match="no such folder"):
        evaluate_local("tiny", None, "guide", out=tmp_path / "r.json", data_dir=tmp_path / "missing")
    with pytest.raises(UserError, match="not a PEFT adapter folder"):
        evaluate_local("tiny", tmp_path, "tiny", out=tmp_path / "r.json")


@pytest.mark.parametrize(
    "pages",
    [
        {"/v1/models": "<html>Welcome</html>"},
        {"/v1/models": '{"message": "Welcome"}'},
        {"/v1/models": "[1]"},
        {"/v1/models": '{"data": [{"id": "tiny"}]}', "/tokenizer_info": '{"eos_token": "x"}'},
        {"/v1/models": '{"data": [{"id": "tiny"}]}', "/tokenizer_info": "[]"},
    ],
)
def test_a_server_that_is_not_ours_is_named(pages: dict[str, str], tmp_path: Path) -> None:
    app = FastAPI()

    @app.get("/{path:path}")
    def page(path: str) -> Response:
        return Response(pages[f"/{path}"], media_type="text/html")

    with served(app) as url:
        with pytest.raises(UserError, match="not a qwen-ray server") as e:
            evaluate_endpoint(url, "tiny", "tiny", out=tmp_path / "r.json")
        assert e.value.where.startswith(url)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = models.load_model(models.resolve("tiny"), dtype=torch.float32)
    adapter = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(adapter))
    (adapter / "lineage.json").write_text(json.dumps({"base": {"id": "other", "fingerprint": "0" * 64}}))
    with pytest.raises(UserError, match="was trained on other") as e:
        evaluate_local("tiny", adapter, "tiny", out=tmp_path / "r.json", limit=1)
    assert "tiny" in e.value.what
    assert not (tmp_path / "r.json").exists()
