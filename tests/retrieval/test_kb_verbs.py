"""`qwen-ray kb ...` as a user types it, in this process."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import kb_verbs
from qwen_ray.embedder import Embedder
from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.verbs import Output

Run = Callable[..., Any]


@pytest.fixture
def kb(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a verb; its JSON. The model is loaded once for all of them."""
    monkeypatch.setattr(Embedder, "load", lambda name=None, **_: embedder)

    def run(*words: str, text: bool = False) -> Any:
        parser = argparse.ArgumentParser()
        kb_verbs.add(parser.add_subparsers(required=True))
        as_json = [] if text else ["--json"]
        args = parser.parse_args(["kb", *words, *as_json, "--root", str(tmp_path / "knowledge")])
        out = io.StringIO()
        assert args.verb(args, Output(out, as_json=args.json)) == EXIT_OK
        return out.getvalue() if text else json.loads(out.getvalue())

    return run


def test_build_update_rollback_list_and_query(
    kb: Run, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = kb("build", "nature", "--source", f"text={notes}", "--license", "CC-BY-4.0")
    assert (made["version"], made["chunks"]) == (1, 4)
    assert made["sources"] == {"notes": {"license": "CC-BY-4.0", "chunks": 4}}
    assert kb("update", "nature")["version"] == 1
    assert "nothing changed" in capsys.readouterr().err
    (notes / "rivers.md").unlink()
    assert kb("update", "nature")["removed"] == 2
    assert kb("rollback", "nature@1")["chunks"] == 4
    (row,) = kb("list")
    assert (row["name"], row["current"], [v["version"] for v in row["versions"]]) == ("nature", 1, [1, 2])
    assert "* version 1 (build" in kb("list", text=True)
    (first,) = kb("query", "nature", "How long is the Nile?", "-k", "1")
    assert first["text"] == "The Nile is 6,650 km long."
    shown = kb("query", "nature", "How long is the Nile?", "-k", "1", "--by", "text", text=True)
    assert shown == "[1] Rivers > Length (notes, CC-BY-4.0)\n    The Nile is 6,650 km long.\n"


def test_eval_of_a_file_and_of_the_embedded_questions(kb: Run, notes: Path, tmp_path: Path) -> None:
    kb("build", "nature", "--source", f"text={notes}")
    file = tmp_path / "questions.jsonl"
    rows = [{"question": "How long is the Nile?", "relevant": ["notes/rivers/rivers/length"]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = kb("eval", "nature", str(file))
    assert [way["by"] for way in found["ways"]] == ["vector", "text", "hybrid"]
    assert all(way["recall@1"]["value"] == way["mrr"]["value"] == 1 for way in found["ways"])
    assert "1 questions" in kb("eval", "nature", str(file), text=True)
    file.write_text('{"question": "a"}')
    with pytest.raises(UserError, match=r"questions\.jsonl:1"):
        kb("eval", "nature", str(file))
    with pytest.raises(UserError, match="no domain 'nature'"):
        kb("eval", "nature", "--embedded")


def test_what_is_wrong_is_said(kb: Run, tmp_path: Path) -> None:
    for words, what in (
        (("build", "nature"), "no documents"),
        (("build", "nature", "--source", "notes"), "NAME=PATH"),
        (("rollback", "nature"), "NAME@VERSION"),
        (("list",), "no such folder"),
        (("update", "nature"), "no such folder"),
        (("build", "nature", "--embedded"), "no domain"),  # makes the folder
        (("query", "nature", "a"), "no knowledge base 'nature'"),
    ):
        with pytest.raises(UserError, match=what):
            kb(*words)
    (tmp_path / "knowledge").mkdir(exist_ok=True)
    assert kb("list") == []
    assert "no knowledge base in" in kb("list", text=True)
