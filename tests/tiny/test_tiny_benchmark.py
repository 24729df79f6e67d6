"""The shipped benchmark files: reproducible, balanced, and only untaught answers in the control."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.tiny.benchmark import CATEGORIES, SUITE_DATA_DIR, build_items, write_benchmark
from qwen_ray.tiny.facts import DOMAINS, load_relations


def shipped(category: str) -> list[dict[str, Any]]:
    text = (SUITE_DATA_DIR / f"{category}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_shipped_files_are_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    assert {p.name for p in SUITE_DATA_DIR.glob("*.jsonl")} == {f"{c}.jsonl" for c in CATEGORIES}
    for category in CATEGORIES:
        name = f"{category}.jsonl"
        assert (tmp_path / name).read_bytes() == (SUITE_DATA_DIR / name).read_bytes()


@pytest.mark.parametrize("category", CATEGORIES)
def test_items_are_well_formed(category: str) -> None:
    items = shipped(category)
    assert len({i["id"] for i in items}) == len(items)
    assert len({i["question"] for i in items}) == len(items)
    for item in items:
        assert set(item) == {"id", "kind", "question", "choices", "answer"}
        assert len(set(item["choices"])) == 4
        assert 0 <= item["answer"] < 4


def test_sizes() -> None:
    assert len(shipped("arithmetic")) == len(shipped("reasoning")) == 200
    for domain in DOMAINS:
        taught = sum(len(r.taught) for r in load_relations() if r.domain == domain)
        assert len(shipped(domain)) == taught
    assert len(shipped("control")) == sum(len(r.control) for r in load_relations())


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_answer_is_offered_four_times_and_right_once(domain: str) -> None:
    for relation in load_relations():
        if relation.domain != domain:
            continue
        items = [i for i in shipped(domain) if i["kind"] == relation.name]
        offered = Counter(c for i in items for c in i["choices"])
        right = Counter(i["choices"][i["answer"]] for i in items)
        assert offered == {a: 4 for _, a in relation.taught}
        assert right == {a: 1 for _, a in relation.taught}


def test_control_offers_only_untaught_answers() -> None:
    untaught = {(r.name, a) for r in load_relations() for _, a in r.control}
    for item in shipped("control"):
        assert all((item["kind"], choice) in untaught for choice in item["choices"])


def test_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown category"):
        build_items("chemistry")
