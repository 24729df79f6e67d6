"""`qwen-ray router`: trains, evaluates and routes from files."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import router_verbs
from qwen_ray.data.records import write_records
from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.verbs import Output
from tests.conftest import record
from tests.routing.conftest import ADAPTERS, OTHERS, Remembering, heldout_records, tiny_records


def run(*argv: str, as_json: bool = False) -> str:
    parser = argparse.ArgumentParser()
    router_verbs.add(parser.add_subparsers(required=True))
    args = parser.parse_args(["router", *argv])
    stdout = io.StringIO()
    assert args.verb(args, Output(stdout, as_json=as_json)) == EXIT_OK
    return stdout.getvalue()


@pytest.fixture
def remembered(embedder: Remembering, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that other tests made are not made again."""
    monkeypatch.setattr(router_verbs, "_embedder", lambda _name: embedder)


def adapter_options() -> list[str]:
    return [text for domain, name in ADAPTERS.items() for text in ("--adapter", f"{domain}={name}")]


@pytest.fixture
def folder(tmp_path: Path, remembered: None) -> str:
    write_records(tmp_path / "train.jsonl", tiny_records())
    out = str(tmp_path / "router")
    said = run("train", str(tmp_path / "train.jsonl"), *adapter_options(), "--out", out)
    assert "guard" in said
    assert "the base" in said
    assert "threshold" in said
    return out


def test_train_then_eval_then_route(folder: str, tmp_path: Path) -> None:
    write_records(tmp_path / "test.jsonl", heldout_records())
    write_records(tmp_path / "other.jsonl", [record(question, "?") for question in OTHERS])
    files = [str(tmp_path / "test.jsonl"), "--others", str(tmp_path / "other.jsonl")]
    found = json.loads(run("eval", folder, *files, as_json=True))
    assert found["n"] == 240 + len(OTHERS)
    assert found["accuracy"] >= 0.9
    assert sum(found["confusion"]["other"].values()) == len(OTHERS)
    assert "abstention AUROC" in run("eval", folder, *files)
    rows = json.loads(run("route", folder, "Which port does SSH use?", OTHERS[0], as_json=True))
    assert [(row["adapter"], row["domain"]) for row in rows] == [("guard", "security"), (None, None)]
    assert "the base" in run("route", folder, OTHERS[0])


def test_an_unknown_domain_is_no_other(folder: str, tmp_path: Path) -> None:
    write_records(tmp_path / "test.jsonl", [record("Who wrote Hamlet?", "Shakespeare", domain="bilogy")])
    with pytest.raises(UserError, match=r"does not know the domain 'bilogy'(.|\n)*'biology'"):
        run("eval", folder, str(tmp_path / "test.jsonl"))


def test_a_router_of_another_embedder_is_refused(folder: str) -> None:
    file = Path(folder) / "router.json"
    file.write_text(file.read_text().replace('"embedder": "', '"embedder": "another-'))
    with pytest.raises(UserError, match="trained with the embedder 'another-"):
        run("route", folder, "Which port does SSH use?")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapter", "biology"], "not DOMAIN=NAME"),
        (["--adapter", "biology=a", "--adapter", "biology=b"], "'biology' is named twice"),
        (["--method", "svm"], "unknown method"),
        (["--false-accepts", "20"], "no share"),
        (["--without", "physik"], "did you mean 'physics'"),
        ([], "no such data file|no such file"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(_name: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(router_verbs, "_embedder", loaded)
    with pytest.raises(UserError, match=said):
        run("train", str(tmp_path / "none.jsonl"), *options, "--out", str(tmp_path / "router"))
