"""`qwen-ray data ...` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_ray.cli import build_parser
from qwen_ray.data.records import Message, Record, write_records
from qwen_ray.errors import UserError
from qwen_ray.verbs import Output


def data(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen_ray.cli", "data", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "frogs.jsonl"
    write_records(
        path,
        (
            Record(
                f"frogs/{i}",
                (
                    Message("user", f"What does frog number {i} eat?"),
                    Message("assistant", f"It eats fly {i}."),
                ),
                "biology",
                "frogs",
                "CC0-1.0",
            )
            for i in range(8)
        ),
    )
    return path


def test_prepare_from_options_and_from_a_file(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--domain", "biology", "--source", f"file={file}", "--size", "5", "--out", str(out), "--json"]
    done = data("prepare", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == 5
    first = out.read_bytes()
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"domain: biology\nsources: {{file: {file}}}\nsize: 5\nout: {tmp_path / 'b.jsonl'}\n")
    done = data("prepare", "--config", str(settings))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.jsonl").read_bytes() == first
    done = data("prepare", "--config", str(settings))
    assert "unchanged" in done.stdout


def test_prepare_refuses_bad_input(file: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.jsonl")
    for argv, words in (
        (["--source", f"file={file}", "--out", out], "no domain given"),
        (["--domain", "biology", "--out", out], "no sources given"),
        (["--domain", "b", "--source", "openstax=x", "--out", out], "unknown source 'openstax'"),
        (["--domain", "b", "--source", "file", "--out", out], "is not NAME=PATH"),
        (
            ["--domain", "b", "--source", f"file={file}", "--out", out, "--set", "limits.languge=de"],
            "language",
        ),
        (["--domain", "b", "--source", f"file={file}", "--out", out, "--benchmarks", "/nowhere"], "/nowhere"),
    ):
        done = data("prepare", *argv)
        assert done.returncode == 2, (argv, done.stderr)
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert not Path(out).exists()


def test_export_and_back(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "frogs.json"
    done = data("export", str(file), "--format", "sharegpt", "--out", str(out), "--json")
    assert json.loads(done.stdout)["written"] == 8
    assert json.loads(out.read_text())[0]["conversations"][0]["value"] == "What does frog number 0 eat?"
    back = tmp_path / "back.jsonl"
    assert data("export", str(out), "--format", "record", "--out", str(back)).returncode == 0
    assert back.read_bytes() == file.read_bytes()
    done = data("export", str(file), "--format", "openai", "--out", str(file))
    assert done.returncode == 2
    assert "this is what is read" in done.stderr
    assert back.read_bytes() == file.read_bytes()


def test_generate_refuses_documents_without_a_passage(tmp_path: Path) -> None:
    notes, out = tmp_path / "notes.md", tmp_path / "out.jsonl"
    notes.write_text("Too short.")
    endpoint = ["--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--domain", "biology"]
    words = ["data", "generate", "--passages", str(notes), *endpoint, "--out"]
    for given, message in ((out, "no passage to ask about .1 left out"), (notes, "this is what is read")):
        args = build_parser().parse_args([*words, str(given)])
        with pytest.raises(UserError, match=message):
            args.verb(args, Output(sys.stdout, as_json=False))
    assert notes.read_text() == "Too short."
    assert not out.exists()


def test_sources_say_their_licence_and_where_they_are() -> None:
    rows = json.loads(data("sources", "--json").stdout)
    assert len(rows) >= 18
    for row in rows:
        assert row["license"]
        assert row["where_to_get"]
