"""`qwen-ray sweep`: what it refuses and says before anything runs, and the shipped sweeps."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_ray.cli import build_parser
from qwen_ray.data.records import write_records
from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.sweeps.folder import check_state
from qwen_ray.sweeps.spec import load_sweep
from qwen_ray.verbs import Output
from tests.conftest import ROOT, sums

SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))


def sweep(*argv: str, as_json: bool = False) -> tuple[int, str]:
    """Exit code and stdout of ``qwen-ray sweep ARGV``."""
    stdout = io.StringIO()
    args = build_parser().parse_args(["sweep", *argv])
    code = args.verb(args, Output(stdout, as_json=as_json))
    return code, stdout.getvalue()


def written(folder: Path, **changes: Any) -> str:
    """A sweep file over two domains, ``sums`` and ``more``, with sections replaced by ``changes``."""
    data = folder / "data.jsonl"
    if not data.is_file():
        write_records(data, [*sums(60), *sums(60, seed=1, domain="more")])
    tree = {
        "name": "example",
        "out": str(folder / "out"),
        "run": {"data": {"train": [str(data)], "validation_fraction": 0.1}, "optim": {"max_steps": 10}},
        "space": {"optim.learning_rate": {"distribution": "log_uniform", "low": 1e-4, "high": 1e-2}},
        "objective": {"targets": ["sums"], "strengths": ["more"]},
        "search": {"trials": 4},
        **changes,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a misspelt key": ({"search": {"trails": 4}}, "search.trails", "search.trials"),
    "a misspelt key of the run": (
        {"space": {"optim.learning_rat": {"distribution": "choice", "values": [1e-3]}}},
        "unknown key 'optim.learning_rat'",
        "optim.learning_rate",
    ),
    "an empty range": (
        {"space": {"optim.learning_rate": {"distribution": "uniform", "low": 1e-2, "high": 1e-3}}},
        "low",
        "high",
    ),
    "a value the run refuses": (
        {"space": {"method.r": {"distribution": "choice", "values": [8, 0]}}},
        "method.r",
        "greater than or equal to 1",
    ),
    "a domain without data": (
        {"objective": {"targets": ["sum"]}},
        "the domain 'sum'",
        "did you mean 'sums'?",
    ),
    "a name the registry refuses": ({"name": "Example"}, "not an adapter name", "lower-case"),
    "halving of plain trials": (
        {"trials": {"kind": "plain"}, "stopping": {"name": "halving"}},
        "does not stop plain trials",
        "stopping.name=asha",
    ),
    "full fine-tuning in a pack": (
        {"run": {"method": {"name": "full"}, "data": {"train": ["a.jsonl"]}}},
        "the method is full",
        "trials.kind: plain",
    ),
    "labels for trials without workers": (
        {"run": {"data": {"train": ["a.jsonl"]}, "cluster": {"labels": {"gpu": "h100"}}}},
        "these trials have none",
        "run.cluster.workers=1",
    ),
    "a benchmark that is not there": (
        {"objective": {"targets": ["sums"], "confirm": {"suite": "tinny"}}},
        "objective.confirm.suite: unknown suite 'tinny'",
        "did you mean 'tiny'?",
    ),
    "a benchmark without its files": (
        {"objective": {"targets": ["sums"], "confirm": {"suite": "guide", "data_dir": "/nowhere"}}},
        "objective.confirm.data_dir: /nowhere: no such folder",
        "docs/evaluation.md",
    ),
    "data that are not there": (
        {"run": {"data": {"train": ["/nowhere/a.jsonl"]}}},
        "no such",
        "/nowhere/a.jsonl",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_bad_sweep_is_refused_before_anything_starts(tmp_path: Path, case: str) -> None:
    changes, *said = REFUSED[case]
    with pytest.raises(UserError) as error:
        sweep(written(tmp_path, **changes))
    for words in said:
        assert words in str(error.value)
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_a_dry_run_knows_the_benchmarks(tmp_path: Path) -> None:
    def file(**confirm: str) -> str:
        return written(tmp_path, objective={"targets": ["sums"], "confirm": confirm})

    with pytest.raises(UserError, match="unknown suite 'tinny'"):
        sweep(file(suite="tinny"), "--dry-run")
    missing = f"The sweep needs {tmp_path / 'none'} (objective.confirm.data_dir), and it is not there."
    assert missing in sweep(file(data_dir=str(tmp_path / "none")), "--dry-run")[1]
    assert "The sweep needs" not in sweep(file(data_dir=str(tmp_path)), "--dry-run")[1]


def test_a_folder_is_free_or_holds_a_sweep_to_resume(tmp_path: Path) -> None:
    file = written(tmp_path)
    out = tmp_path / "out"
    for resume in (False, True):
        check_state(out, resume)
    out.mkdir()
    (out / "thesis.txt").write_text("ten years of work")
    for how in ([], ["--resume"]):
        with pytest.raises(UserError, match="something else than a sweep"):
            sweep(file, *how)
    (out / "sweep.json").write_text('{"id": "1", "state": "searching"}')
    with pytest.raises(UserError, match="--resume goes on with it"):
        sweep(file)


def test_a_folder_goes_on_with_its_own_sweep_only(tmp_path: Path) -> None:
    file, out = written(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "sweep.json").write_text('{"id": "1", "state": "done", "version": "0"}')
    (out / "result.json").write_text('{"winner": null}')
    spec = load_sweep(Path(file))
    (out / "sweep.yaml").write_text(spec.to_yaml())
    with pytest.raises(UserError, match="another sweep"):
        sweep(file, "--resume", "--set", "search.seed=1")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_sweeps_begin_with_their_command_and_load(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# qwen-ray sweep sweeps/{path.name}")
    build_parser().parse_args(first.removeprefix("# qwen-ray ").split())
    assert load_sweep(path).name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_dry_run_of_shipped_sweeps(path: Path) -> None:
    """Without a GPU, without the model's files, without the data."""
    code, text = sweep(str(path), "--dry-run")
    assert code == EXIT_OK
    assert "Estimates" in text
    code, document = sweep(str(path), "--dry-run", as_json=True)
    assert json.loads(document)["trials"]


def test_the_page_lists_the_shipped_sweeps() -> None:
    page = (ROOT / "sweeps" / "README.md").read_text(encoding="utf-8")
    for path in SHIPPED:
        assert f"`{path.name}`" in page
