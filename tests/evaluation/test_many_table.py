"""The table of improvements: differences paired with the first model, and where reading does not help."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ray.evaluation.compare import compare
from qwen_ray.evaluation.harness import summarise
from qwen_ray.evaluation.improvements import improvements, title
from qwen_ray.evaluation.report_text import improvements_markdown, improvements_table
from qwen_ray.evaluation.suites import Category
from tests.evaluation.test_compare import result, right

ROLES = {"biology": "target", "arithmetic": "strength", "untaught": "control"}


def served(
    model: str, biology: int, arithmetic: int, *, untaught: int = 25, passages: int = 0
) -> dict[str, Any]:
    """The result of a model with so many of 100 right."""
    scores = {"biology": biology, "arithmetic": arithmetic, "untaught": untaught}
    value = result({name: right(n, 100) for name, n in scores.items()})
    summaries = {c: summarise(Category(c, role, (c,), "acc"), value["items"]) for c, role in ROLES.items()}  # type: ignore[arg-type]
    return value | {
        "settings": {"limit": 100},
        "created_at": "2026-01-01T00:00:00+00:00",
        "versions": {},
        "categories": {name: summaries[name] for name in ("biology", "arithmetic")},
        "controls": {"untaught": summaries["untaught"]},
        "served": {
            "id": model,
            "answers": 300,
            "adapters": {"base": 300},
            "with_passages": passages,
            "truncated": 7,
            "knowledge_bases": {},
        },
    }


RESULTS = {
    "tiny": served("tiny", 30, 95),
    "tiny:bio": served("tiny:bio", 80, 94),
    "tiny+rag": served("tiny+rag", 31, 60, passages=40),
    "tiny:bio+rag": served("tiny:bio+rag", 95, 94, passages=300),
}


def test_every_cell_is_the_paired_comparison_with_the_first() -> None:
    table = improvements(RESULTS)
    assert [(row["name"], row["role"], row["n"]) for row in table["rows"]] == [
        (name, role, 100) for name, role in ROLES.items()
    ]
    for model in list(RESULTS)[1:]:
        comparison = compare(RESULTS["tiny"], RESULTS[model])
        assert table["verdicts"][model]["verdict"] == comparison["verdict"]
        assert table["verdicts"][model]["reasons"] == comparison["reasons"]
        for row, paired in zip(table["rows"], comparison["categories"] + comparison["controls"], strict=True):
            cell = row["cells"][model]
            assert (cell["delta"], cell["delta_ci"]) == (paired["delta"], paired["delta_ci"])
            assert cell["score"] == pytest.approx(paired["candidate"])
            assert cell["ci"][0] < cell["score"] < cell["ci"][1]
    assert "delta" not in table["rows"][0]["cells"]["tiny"]
    assert [v["verdict"] for v in table["verdicts"].values()] == ["promote", "regress", "promote"]


def test_targets_can_be_named() -> None:
    table = improvements(RESULTS, targets=["arithmetic"])
    assert {row["name"]: row["role"] for row in table["rows"]}["biology"] == "strength"
    assert table["verdicts"]["tiny:bio"]["verdict"] == "hold"
    alone = improvements({"tiny": RESULTS["tiny"]})
    assert (alone["verdicts"], alone["rag"]) == ({}, [])
    assert "biology" in improvements_table(alone)


def test_it_says_where_reading_does_not_help() -> None:
    table = improvements(RESULTS)
    effects = {
        reading["model"]: {row["name"]: row["effect"] for row in reading["categories"]}
        for reading in table["rag"]
    }
    assert effects == {
        "tiny+rag": {"biology": "not shown", "arithmetic": "harms", "untaught": "not shown"},
        "tiny:bio+rag": {"biology": "helps", "arithmetic": "not shown", "untaught": "not shown"},
    }
    assert [reading["without"] for reading in table["rag"]] == ["tiny", "tiny:bio"]
    for text in (improvements_table(table), improvements_markdown(table)):
        lines = text.splitlines()
        start = next(i for i, line in enumerate(lines) if "+RAG on tiny (" in line)
        assert "before 40 of 300 prompts" in lines[start]
        assert lines[start + 1] == "  - helps: nowhere"
        assert lines[start + 2].startswith("  - harms: arithmetic -35.0 [")
        assert lines[start + 3].startswith("  - no difference shown: biology +1.0 [")


def test_the_markdown_is_one_table_with_every_number() -> None:
    text = improvements_markdown(improvements(RESULTS))
    rows = [line for line in text.splitlines() if line.startswith("| biology")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[:3] == ["biology", "target", "100"]
    assert cells[3] == "30.0 [21.9, 39.6]"  # Wilson's interval of 30 of 100
    assert cells[4].startswith("80.0 [71.1, 86.7] **+50.0** [+")
    assert "At most 100 items of each task" in text
    assert "## `tiny:bio`: promote" in text
    assert "| `tiny+rag` | base 300 | 40 | 7 |" in text


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiny", "base"),
        ("tiny:bio", "+bio"),
        ("tiny:bio@2", "+bio@2"),
        ("tiny+rag", "+RAG"),
        ("tiny:bio+rag", "both: bio +RAG"),
        ("tiny:auto", "auto"),
        ("tiny:auto+rag", "auto +RAG"),
    ],
)
def test_titles(model: str, name: str) -> None:
    assert title(model) == name
