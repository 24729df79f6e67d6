"""The journal of answers: what it keeps, and what it leaves aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.evaluation.journal import NOISE, Answer, Journal, Versions, question_key

KEY = question_key([1, 2], [[3], [4]])
GEO_1: Versions = {"the base tiny": "f1", "tiny:geo": "geo@1", "score of tiny:geo": -3.5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two answers of two models."""
    file = tmp_path / "run" / "journal.jsonl"
    with Journal(file, {}) as journal:
        journal.add(("tiny", {"the base tiny": "f1"}, {KEY: Answer([[-1.25, True], [-2.5, False]])}))
        journal.add(("tiny:geo", GEO_1, {KEY: Answer("é\n", "geo@1", 2, truncated=True)}))
    return file


def test_answers_come_back_as_they_were(path: Path) -> None:
    with Journal(path, {"the base tiny": "f1"}) as journal:
        assert journal.left_aside == 0
        assert journal.get("tiny", KEY) == Answer([[-1.25, True], [-2.5, False]])
        assert journal.get("tiny:geo", KEY) == Answer("é\n", "geo@1", 2, truncated=True)
        assert journal.get("tiny", question_key([1, 2], [[4], [3]])) is None


@pytest.mark.parametrize(
    ("now", "kept"),
    [
        ({"the base tiny": "f2"}, []),
        ({"tiny:geo": "geo@2"}, ["tiny"]),
        ({"score of tiny:geo": -3.5 + 2 * NOISE}, ["tiny"]),
        ({"score of tiny:geo": -3.5 + NOISE / 2}, ["tiny", "tiny:geo"]),
        ({"knowledge base law": "4"}, ["tiny", "tiny:geo"]),
    ],
)
def test_what_other_versions_answered_is_left_aside(path: Path, now: Versions, kept: list[str]) -> None:
    with Journal(path, now) as journal:
        assert [model for model in ("tiny", "tiny:geo") if journal.get(model, KEY)] == kept
        assert journal.left_aside == 2 - len(kept)


def test_a_version_that_changes_is_refused_and_is_the_one_next_time(path: Path) -> None:
    with Journal(path, {}, renewed="again") as journal:
        with pytest.raises(UserError, match=r"tiny:geo changed .*: geo@1, now geo@2") as e:
            journal.add(("tiny:geo", GEO_1 | {"tiny:geo": "geo@2"}, {KEY: Answer("new")}))
        assert (e.value.fix, e.value.status) == ("again", 409)
        assert journal.get("tiny:geo", KEY) == Answer("é\n", "geo@1", 2, truncated=True)
    with Journal(path, {}) as journal:
        assert journal.get("tiny:geo", KEY) == Answer("new")
        assert journal.left_aside == 1


def test_half_a_line_is_dropped_and_the_next_starts_afresh(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with Journal(path, {}) as journal:
        assert journal.get("tiny", KEY) is not None
        assert journal.get("tiny:geo", KEY) is None
        journal.add(("tiny:geo", GEO_1, {KEY: Answer("é\n", "geo@1", 2, truncated=True)}))
    assert path.read_bytes() == whole


def test_another_file_is_named(path: Path) -> None:
    path.write_text(path.read_text() + "no JSON\n")
    with pytest.raises(UserError, match="not a journal") as e:
        Journal(path, {})
    assert e.value.where == f"{path}:3"
    with pytest.raises(UserError, match="not a journal"):  # and it is not left locked
        Journal(path, {})
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="not a journal"):
        Journal(path, {})


def test_one_benchmark_at_a_time(path: Path) -> None:
    with Journal(path, {}), pytest.raises(UserError, match="another benchmark"):
        Journal(path, {})
    with Journal(path, {}) as journal:
        assert journal.get("tiny", KEY) is not None
