"""A sweep's folder: what is checked before anything starts, and which sweep goes on in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_ray.data.records import write_records
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, write_json
from qwen_ray.sweeps.folder import check_state, open_sweep, prepared, with_data
from qwen_ray.sweeps.spec import SweepConfig
from tests.conftest import sums


def spec(folder: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> SweepConfig:
    """A sweep over 60 sums and 20 more, of which a tenth is held out, with sections replaced."""
    files = {"a": sums(60), "b": sums(20, seed=1, domain="more")}
    for name, records in files.items():
        if not (folder / f"{name}.jsonl").is_file():
            write_records(folder / f"{name}.jsonl", records)
    train = [str(folder / f"{name}.jsonl") for name in files]
    tree: dict[str, Any] = {
        "out": str(folder / "out"),
        "run": {
            "model": {"name": "tiny"},
            "data": {"train": train, "validation_fraction": 0.1, **(data or {})},
        },
        "space": {"optim.learning_rate": {"distribution": "choice", "values": [1e-3]}},
    }
    return prepared(SweepConfig.model_validate({**tree, **changes}))


def opened(settings: SweepConfig, *, resume: bool = True) -> dict[str, Any]:
    """As the driver opens the folder; what it returns is what ``sweep.json`` has once the search begins."""
    out = Path(settings.out)
    check_state(out, resume)
    out.mkdir(exist_ok=True)
    return open_sweep(out, *with_data(settings))


@pytest.mark.parametrize("streaming", [False, True])
def test_changed_data_are_not_gone_on_with(tmp_path: Path, streaming: bool) -> None:
    """Trials before and after would be compared though they were held against other records."""
    held = tmp_path / "held.jsonl"
    write_records(held, [*sums(5, seed=2, domain="held"), *sums(5, seed=3, domain="sums2")])
    settings = spec(tmp_path, data={"validation": [str(held)], "streaming": streaming})
    first = opened(settings, resume=False)
    assert set(first["sources"]) == {*settings.run["data"]["train"], str(held), "tiny"}
    assert opened(settings) == first
    for path in (tmp_path / "b.jsonl", held):
        before = path.read_bytes()
        path.write_bytes(before.replace(b"What is", b"How much is"))
        with pytest.raises(UserError, match="it has changed since the sweep began") as error:
            opened(settings)
        assert error.value.where == str(path)
        path.write_bytes(before)
    state = Path(settings.out) / "sweep.json"
    write_json(state, {**first, "sources": {**first["sources"], "tiny": "another base"}})
    with pytest.raises(UserError, match="tiny: it has changed"):
        opened(settings)
    # One of an earlier version goes on, and is held to what it finds now.
    write_json(state, {"id": "1", "state": "searching", "version": "0"})
    assert opened(settings)["sources"] == first["sources"]


@pytest.mark.parametrize("left", ["sweep.json", ".sweep.json.x1y2"])
def test_a_start_that_was_killed_is_started_again(tmp_path: Path, left: str) -> None:
    settings = spec(tmp_path)
    opened(settings, resume=False)
    out = tmp_path / "out"
    (out / "sweep.yaml").unlink()
    (out / "sweep.json").rename(out / left)
    again = opened(spec(tmp_path, search={"seed": 7}))
    assert again["state"] == "new"
    assert read_json(out / "sweep.json") == again
    assert "seed: 7" in (out / "sweep.yaml").read_text()


def test_benchmarks_may_be_corrected_until_there_is_a_result(tmp_path: Path) -> None:
    def confirmed(**confirm: Any) -> SweepConfig:
        return spec(tmp_path, objective={"confirm": {"suite": "tiny", **confirm}})

    first = opened(confirmed(), resume=False)
    write_json(tmp_path / "out" / "sweep.json", {**first, "state": "failed", "during": "confirming"})
    assert opened(confirmed(suite="guide", limit=3))["id"] == first["id"]
    with pytest.raises(UserError, match="another sweep"):
        opened(confirmed(suite="guide", limit=3, tolerance=0.5))
    write_json(tmp_path / "out" / "eval" / "base.json", {})
    for changes in ({"suite": "tiny", "limit": 3}, {"suite": "guide", "limit": 4}):
        with pytest.raises(UserError, match="another sweep"):
            opened(confirmed(**changes))


def test_a_suite_without_a_target_confirms_nothing(tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "sums.yaml").write_text("task: sums\n")
    category = "{role: strength, tasks: [sums], metric: acc}"
    (suite / "suite.yaml").write_text(
        f"name: sums\nversion: '1'\ndescription: Sums.\ncategories:\n  sums: {category}\n"
    )
    with pytest.raises(UserError, match="no category of the suite 'sums' is a target") as error:
        spec(tmp_path, objective={"confirm": {"suite": str(suite)}})
    assert error.value.where == "objective.confirm.suite"


def test_the_files_of_the_benchmarks_are_there(tmp_path: Path) -> None:
    confirm = {"suite": "guide", "data_dir": str(tmp_path)}
    with pytest.raises(UserError, match="no such evaluation file") as error:
        with_data(spec(tmp_path, objective={"confirm": confirm}))
    assert error.value.where.startswith(f"objective.confirm.data_dir: {tmp_path}/mmlu/test/")


def test_something_that_can_gain_is_held_out(tmp_path: Path) -> None:
    """Strengths alone, or nothing at all, tell no gain."""
    held = tmp_path / "held.jsonl"
    write_records(held, sums(5, seed=2, domain="more2"))
    held.write_text(held.read_text().replace('"domain": "more2"', '"domain": "more"'))
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"validation": [str(held)]}, ["more"]),
        ({"validation_fraction": 1e-6}, []),
    ]
    for data, strengths in cases:
        with pytest.raises(UserError, match="no record of a target is held out") as error:
            with_data(spec(tmp_path, data=data, objective={"strengths": strengths}))
        assert error.value.where == "run.data"
