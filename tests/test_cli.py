"""The command line: help with examples that parse, JSON alone on stdout, exit codes, docs that stay true."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qwen_ray.cli import build_parser, of_the_machine
from qwen_ray.config import reference
from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_file, write_json
from qwen_ray.verbs import Output
from tests.conftest import ROOT, disk_full
from tests.evaluation.test_compare import result, right


def verbs(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf of the command line."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield path, parser
    for group in groups:
        for name, child in group.choices.items():
            yield from verbs(child, (*path, name))


VERBS = dict(verbs(build_parser()))


def qwen_ray(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_ray.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, check=False)


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_every_verb_has_an_example_that_parses(path: tuple[str, ...]) -> None:
    text = VERBS[path].format_help()
    assert "--json" in text
    examples = text.split("example:\n")[1].strip().splitlines()
    for example in examples:
        words = shlex.split(re.split("[<>]", example)[0])
        assert words[0] == "qwen-ray"
        assert tuple(words[1 : 1 + len(path)]) == path
        build_parser().parse_args(words[1:])


def commands_in(markdown: str) -> list[list[str]]:
    """The qwen-ray commands of a page's code blocks."""
    blocks = re.findall(r"```\n(.*?)```", markdown, flags=re.DOTALL)
    whole = [re.sub(r"\\\n\s*", "", block) for block in blocks]  # a line that goes on
    lines = [line.split("#")[0].strip() for block in whole for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("qwen-ray ")]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_commands_in_the_docs_parse(page: Path) -> None:
    for words in commands_in(page.read_text(encoding="utf-8")):
        build_parser().parse_args(words)


def test_readme_shows_commands() -> None:
    assert len(commands_in((ROOT / "README.md").read_text(encoding="utf-8"))) >= 8


def test_configuration_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    made = page.split("<!-- made by `qwen-ray config reference` -->")[1].strip()
    assert made == reference()


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_json_is_alone_on_stdout() -> None:
    done = qwen_ray("data", "sources", "--json")
    assert done.returncode == 0
    assert {"openstax_biology", "gsm8k"} <= {row["name"] for row in json.loads(done.stdout)}


def test_schema_is_json() -> None:
    assert json.loads(qwen_ray("config", "schema").stdout)["title"] == "RunConfig"


@pytest.mark.parametrize(
    "argv",
    [["tran"], ["train", "--stpes", "3"], ["train", "--steps", "0"], ["compare", "only-one.json"], []],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2_with_a_hint(argv: list[str]) -> None:
    done = qwen_ray(*argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "--help" in done.stderr


@pytest.fixture
def results(tmp_path: Path) -> Path:
    before = {"biology": right(25, 100), "arithmetic": right(99, 100)}
    after = {"biology": right(80, 100), "arithmetic": right(98, 100)}
    for name, scores in (("before", before), ("after", after)):
        value = result(scores, schema="qwen-ray/eval-result/1")
        for category in value["categories"].values():
            category |= {"n": 100, "score": 0.5, "ci": [0.4, 0.6], "metric": "acc"}
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def test_compare_promotes_with_0_and_refuses_with_3(results: Path) -> None:
    done = qwen_ray("compare", "before.json", "after.json", "--out", "comparison.json", "--json", cwd=results)
    assert done.returncode == 0, done.stderr
    comparison = json.loads(done.stdout)
    assert comparison["verdict"] == "promote"
    assert comparison == json.loads((results / "comparison.json").read_text())
    back = qwen_ray("compare", "after.json", "before.json", cwd=results)
    assert back.returncode == 3
    assert "verdict: regress" in back.stdout
    strict = qwen_ray("compare", "before.json", "after.json", "--min-gain", "60", cwd=results)
    assert strict.returncode == 3
    assert "verdict: hold" in strict.stdout


def test_compare_names_what_is_no_result(results: Path) -> None:
    (results / "other.json").write_text("{}")
    too_long = "x" * 300  # the system refuses it
    files = {"other.json": "not a result of", "missing.json": "no such file", too_long: "File name too long"}
    for file, message in files.items():
        done = qwen_ray("compare", "before.json", file, cwd=results)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert file in done.stderr


def test_dry_run_prints_the_whole_configuration_and_starts_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = qwen_ray("train", "--model", "3b", "--workers", "8", "--out", str(out), "--dry-run", "--json")
    assert done.returncode == 0
    config = json.loads(done.stdout)
    assert config["cluster"]["workers"] == 8
    assert config["optim"]["learning_rate"] == 2e-4
    assert not out.exists()


def test_compare_does_not_write_over_what_it_reads(results: Path) -> None:
    words = ["compare", "before.json", "after.json", "--out", "after.json"]
    args = build_parser().parse_args([str(results / w) if w.endswith(".json") else w for w in words])
    before = sha256_file(results / "after.json")
    with pytest.raises(UserError, match="this is what is read"):
        args.verb(args, Output(io.StringIO(), as_json=False))
    assert sha256_file(results / "after.json") == before


def test_eval_does_not_write_over_the_adapter_it_reads(tmp_path: Path) -> None:
    words = ["eval", "--model", "tiny", "--suite", "tiny", "--adapter", str(tmp_path)]
    args = build_parser().parse_args([*words, "--out", str(tmp_path / "adapter_config.json")])
    with pytest.raises(UserError, match="which is read"):
        args.verb(args, Output(io.StringIO(), as_json=False))


def damaged(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"no tensors")
    load_file(folder / "a.safetensors")


def too_many_files(path: Path) -> None:
    """No fault of the path or its disk."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))


@pytest.mark.parametrize(
    ("act", "status", "words"),
    [
        (lambda folder: (folder / "a").read_text(), 400, "/a: No such file"),
        (lambda folder: folder.read_text(), 400, "Is a directory"),
        (lambda folder: folder.mkdir(), 400, "File exists"),
        (lambda folder: (folder / ("a" * 300)).touch(), 400, "File name too long"),
        (lambda folder: shutil.copyfile(folder / "a", folder / "b"), 400, "/a: No such file"),
        (lambda folder: folder.rename(folder / "a"), 503, "/a: Invalid argument"),
        (too_many_files, 503, "limits of this machine"),
        (disk_full, 503, "No space left on device"),
        (damaged, 503, "header"),
    ],
)
def test_what_the_machine_refuses_is_one_message(
    act: Callable[[Path], object], status: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception) as e:  # noqa: PT011 - each of its own kind
        act(tmp_path)
    told = of_the_machine(e.value)
    assert told is not None
    assert told.status == status
    assert words in str(told)
    assert told.fix


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    for act in (
        lambda: socket.create_connection(("127.0.0.1", 1), timeout=1),
        lambda: int("x"),
        lambda: os.close(-1),
    ):
        with pytest.raises((OSError, ValueError)) as e:
            act()
        assert of_the_machine(e.value) is None


def test_an_interrupted_run_says_whether_it_would_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_ray.training.driver.run_training", interrupted)
    args = build_parser().parse_args(["train", "--model", "tiny", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt, match="no checkpoint yet"):
        args.verb(args, Output(io.StringIO(), as_json=False))
    write_json(tmp_path / "checkpoints" / "step-00000002" / "manifest.json", {})
    with pytest.raises(KeyboardInterrupt, match="goes on from the last checkpoint"):
        args.verb(args, Output(io.StringIO(), as_json=False))
    args = build_parser().parse_args(["train", "--model", "tiny", "--out", ""])
    with pytest.raises(UserError, match="no name given"):
        args.verb(args, Output(io.StringIO(), as_json=False))
