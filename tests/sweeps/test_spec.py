"""SweepConfig: reading, what is refused and how, trials' configurations, the points at which they report."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_ray.config import reference as reference_table
from qwen_ray.errors import UserError
from qwen_ray.sweeps.checks import check_domains
from qwen_ray.sweeps.spec import (
    REFERENCE,
    SweepConfig,
    included,
    load_sweep,
    points,
    reference,
    trial_config,
)
from tests.conftest import ROOT

DOMAINS = ["biology", "history", "security", "replay"]
DEMO: dict[str, Any] = {
    "name": "demo",
    "out": "runs/sweep-demo",
    "embedded_data": True,
    "run": {"model": {"name": "tiny"}, "optim": {"max_steps": 240}},
    "space": {
        "optim.learning_rate": {"distribution": "log_uniform", "low": 1e-3, "high": 2e-2},
        "method.r": {"distribution": "choice", "values": [8, 16, 32]},
    },
    "mixture": {"domains": DOMAINS, "floor": 0.02, "ranges": {"replay": [0.05, 0.6]}},
    "objective": {"targets": DOMAINS[:3], "strengths": ["replay"], "confirm": {"suite": "tiny"}},
    "search": {"name": "random", "trials": 8, "seed": 0},
}


def write(tmp_path: Path, **changes: Any) -> Path:
    """The demo with some of its dotted keys (``__`` for a dot) set, or left out where None."""
    tree = copy.deepcopy(DEMO)
    for key, value in changes.items():
        *parents, last = key.split("__")
        at = tree
        for name in parents:
            at = at.setdefault(name, {})
        if value is None:
            at.pop(last, None)
        else:
            at[last] = value
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def test_reads_what_the_documentation_shows(tmp_path: Path) -> None:
    spec = load_sweep(write(tmp_path))
    assert spec.space["optim.learning_rate"].ends == (1e-3, 2e-2)
    assert spec.simplex is not None
    assert spec.simplex.bounds[3] == pytest.approx((0.05, 0.6))
    assert spec.objective.confirm is not None
    assert spec.objective.confirm.top == 2
    assert (spec.trials.kind, spec.trials.slots, spec.stopping.name) == ("packed", 8, "halving")


def test_yaml_there_and_back(tmp_path: Path) -> None:
    spec = load_sweep(write(tmp_path))
    again = tmp_path / "again.yaml"
    again.write_text(spec.to_yaml())
    assert again.read_text().startswith("# qwen-ray sweep ")
    assert load_sweep(again) == spec


def test_set_reaches_every_part(tmp_path: Path) -> None:
    sets = [
        "search.trials=9",
        "run.optim.max_steps=20",
        "space.optim.learning_rate.low=2e-3",
        "mixture.include=[uniform]",
    ]
    spec = load_sweep(write(tmp_path), sets=sets, out=tmp_path / "elsewhere")
    assert spec.search.trials == 9
    assert spec.out == str(tmp_path / "elsewhere")
    assert spec.space["optim.learning_rate"].ends == (2e-3, 2e-2)  # the rest of it stays
    assert trial_config(spec, {}, out="x").optim.max_steps == 20


@pytest.mark.parametrize(
    ("changes", "where", "says", "fix"),
    [
        ({"serch": {}}, "", "unknown key 'serch'", "'search'"),
        ({"search__trails": 3}, "", "unknown key 'search.trails'", "trials"),
        ({"objective__confirm__sweet": "x"}, "", "unknown key 'objective.confirm.sweet'", "suite"),
        ({"search__trials": 0}, "", "search.trials", "docs/sweeps.md"),
        ({"space__optim.learning_rat": {"distribution": "choice", "values": [1]}},
         "space.optim.learning_rat", "unknown key", "optim.learning_rate"),
        ({"space__method.r": {"distribution": "choice", "values": [8, 0]}},
         "space.method.r", "method.r = 0 is refused", ""),
        ({"space__method.r": {"distribution": "uniform", "low": 4, "high": 8}},
         "space.method.r", "is refused: 'method.r'", ""),
        ({"space__method.r": {"distribution": "uniform", "low": 8, "high": 4}}, "", "low < high", ""),
        ({"space__method.init": {"distribution": "choice", "values": ["default", "ortogonal"]}},
         "space.method.init", "'ortogonal' is refused", ""),
        ({"run__method": {"init": "orthogonal"},
          "space__method.r": {"distribution": "choice", "values": [7]}},
         "space.method.r", "7 is odd", "method.r=8"),
        ({"space__seed": {"distribution": "choice", "values": [0, 1]}}, "space.seed", "held out", ""),
        ({"space__data.max_length": {"distribution": "choice", "values": [64]}},
         "space.data.max_length", "held out", ""),
        ({"space__cluster.workers": {"distribution": "choice", "values": [0]}},
         "space.cluster.workers", "where a trial runs", ""),
        ({"space__data.weights.biology": {"distribution": "uniform", "low": 0, "high": 1}},
         "space.data.weights.biology", "both decide the shares", ""),
        ({"run__optm": {}}, "run", "unknown key 'optm'", "optim"),
        ({"run__data": {"train": ["a.jsonl"]}}, "run.data.train", "both say", ""),
        ({"embedded_data": False}, "run.data.train", "no training data", ""),
        ({"run__data": {"temperature": 2.0}}, "run.data.temperature", "both decide the shares", ""),
        ({"run__data": {"validation_fraction": 0.0}}, "run.data", "nothing is held out", ""),
        ({"mixture__domains": [*DOMAINS[:3], "replai"]}, "mixture.domains", "replai", "replay"),
        ({"mixture__domains": DOMAINS[1:]}, "mixture.domains", "'biology' has data", ""),
        ({"mixture__ranges": {"replai": [0, 0.5]}}, "mixture.ranges", "replai", "replay"),
        ({"mixture__floor": 0.3}, "mixture", "no mixture is possible", "mixture.floor"),
        ({"objective__targets": ["biologie"]}, "objective.targets.0", "biologie", "biology"),
        ({"objective__strengths": ["biology"]}, "objective", "a target and a strength", ""),
        ({"objective__targets": [], "objective__strengths": DOMAINS}, "objective.strengths", "nothing", ""),
        ({"search__trials": 4}, "search.trials", "5 trials are always tried", "search.trials=5"),
        ({"search__name": "grid"}, "space.optim.learning_rate.points", "how many values", "points"),
        ({"mixture__lattice": 3}, "mixture.lattice", "only a grid", "grid"),
        ({"space": None, "mixture": None, "objective": None}, "space", "nothing to search", ""),
        ({"stopping__rungs": [0.5, 0.2]}, "", "ascend", ""),
        ({"mix_search": {}, "mixture": None, "objective": None}, "mix_search", "needs mixtures", ""),
        ({"stopping__rungs": [0.5, 1.0]}, "", "ascend", ""),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], where: str, says: str, fix: str
) -> None:
    file = write(tmp_path, **changes)
    with pytest.raises(UserError) as e:
        load_sweep(file)
    assert says in e.value.what
    assert fix in e.value.fix
    assert str(file) in e.value.where
    assert where in e.value.where


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run__method": {"name": "full"}}, "the method is full"),
        ({"run__method": {"name": "qlora"}}, "the method is qlora"),
        ({"run__method": {"dora": True}}, "DoRA"),
        ({"run__method": {"init": "pissa"}}, "pissa moves a part of the base"),
        ({"space__method.init": {"distribution": "choice", "values": ["default", "olora"]}}, "olora moves"),
        ({"run__optim": {"name": "adamw_8bit"}}, "adamw_8bit"),
        ({"run__cluster": {"workers": 2}}, "one process"),
        ({"run__compute": {"compile": True}}, "compiled"),
        ({"run__evaluate": {"suites": ["tiny"]}}, "benchmarks"),
        ({"space__model.name": {"distribution": "choice", "values": ["tiny", "3b"]}}, "share one model.name"),
        ({"space__precision": {"distribution": "choice", "values": ["fp32", "bf16"]}}, "one precision"),
    ],
)
def test_what_a_pack_cannot_do_is_for_plain_trials(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as e:
        load_sweep(write(tmp_path, **changes))
    assert "trials.kind: plain" in e.value.fix
    assert load_sweep(write(tmp_path, **changes, trials={"kind": "plain"})).trials.kind == "plain"


def test_seed_and_curriculum_are_searched_where_the_held_out_records_stay(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    spec = load_sweep(
        write(
            tmp_path,
            run__data={"validation": [str(held)]},
            **{
                "space__seed": {"distribution": "choice", "values": [0, 1]},
                "space__data.curriculum": {"distribution": "choice", "values": ["shuffled", "easy_to_hard"]},
            },
        )
    )
    assert trial_config(spec, {"seed": 1}, out="x").seed == 1


def test_nested_sections_of_the_space_are_dotted_keys(tmp_path: Path) -> None:
    nested = {
        "optim": {"learning_rate": DEMO["space"]["optim.learning_rate"]},
        "method": {"r": DEMO["space"]["method.r"]},
    }
    assert load_sweep(write(tmp_path, space=nested)) == load_sweep(write(tmp_path))


def test_a_trial_is_the_base_run_with_its_values(tmp_path: Path) -> None:
    spec = load_sweep(write(tmp_path))
    mix = {"biology": 0.5, "history": 0.2, "security": 0.2, "replay": 0.1}
    config = trial_config(
        spec, {"optim.learning_rate": 5e-3, "method.r": 8, "data.weights": mix}, out="t/0001"
    )
    base = trial_config(spec, {}, out="t/0001")
    assert (config.optim.learning_rate, config.method.r, config.data.weights) == (5e-3, 8, mix)
    assert config.out == "t/0001"
    assert config.data.train == [f"runs/sweep-demo/data/{d}.jsonl" for d in DOMAINS]
    assert config.optim.max_steps == 240
    assert config.method.alpha == base.method.alpha  # the preset's, as for a run
    assert spec.run == DEMO["run"]


def test_the_reference_has_the_runs_own_values_and_the_uniform_mixture(tmp_path: Path) -> None:
    spec = load_sweep(
        write(
            tmp_path,
            run__method={"r": 4},
            run__data={"weights": dict.fromkeys(DOMAINS, 2.0) | {"replay": 4.0}},
        )
    )
    first = reference(spec)
    assert first["method.r"] == 4
    assert first["data.weights"] == dict.fromkeys(DOMAINS, 0.25)
    found = included(spec)
    assert [origin for _, origin in found] == ["reference", "current", *(f"vertex:{d}" for d in DOMAINS)]
    assert found[REFERENCE][0] == first
    assert found[1][0]["data.weights"]["replay"] == pytest.approx(0.4)
    assert found[2][0]["data.weights"]["biology"] == pytest.approx(0.91)
    assert all(values["method.r"] == 4 for values, _ in found)


def test_points(tmp_path: Path) -> None:
    def of(**stopping: Any) -> list[float]:
        return points(load_sweep(write(tmp_path, stopping=stopping)))

    assert of() == pytest.approx([1 / 9, 1 / 3, 1])
    assert of(eta=2) == [0.25, 0.5, 1]
    assert of(rungs=[0.11, 0.33]) == [0.11, 0.33, 1]
    assert of(name="none") == [1]
    assert of(name="none", rungs=[0.5]) == [0.5, 1]


def test_domains_of_the_data_complete_the_sweep(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        embedded_data=False,
        run__data={"train": ["a.jsonl"]},
        mixture__domains=None,
        objective__targets=["law"],
        objective__strengths=["general"],
        mixture__ranges={"general": [0.1, 0.5]},
    )
    spec = load_sweep(file)
    with pytest.raises(ValueError, match="check_domains"):
        _ = spec.simplex
    done = check_domains(spec, ["law", "general"])
    assert done.simplex is not None
    assert done.simplex.domains == ["general", "law"]
    with pytest.raises(UserError, match="no data has the domain 'law'") as e:
        check_domains(spec, ["lore", "general"])
    assert "lore" in e.value.fix


def test_a_grid_has_as_many_trials_as_it_needs(tmp_path: Path) -> None:
    grid = {
        "search__name": "grid",
        "space__optim.learning_rate": {"distribution": "log_uniform", "low": 1e-3, "high": 2e-2, "points": 2},
        "mixture__lattice": 1,
        "mixture__include": ["uniform"],
    }
    # 2 rates x 3 ranks x (4 vertices, of which replay's is out of range), and the reference.
    assert load_sweep(write(tmp_path, **grid, search__trials=50)).search.trials == 1 + 2 * 3 * 3
    with pytest.raises(UserError, match="the grid has 18 points") as e:
        load_sweep(write(tmp_path, **grid, search__trials=18))
    assert "search.trials=19" in e.value.fix
    # Without mixtures the data need not be read for it.
    of_files = {
        "embedded_data": False,
        "mixture": None,
        "objective": None,
        "run__data": {"train": ["a.jsonl"]},
    }
    of_files |= {key: value for key, value in grid.items() if not key.startswith("mixture")}
    assert load_sweep(write(tmp_path, **of_files, search__trials=50)).search.trials == 1 + 2 * 3
    with pytest.raises(UserError, match="the grid has 6 points"):
        load_sweep(write(tmp_path, **of_files, search__trials=6))


def test_a_mix_search_has_mixtures_of_its_own(tmp_path: Path) -> None:
    """Its trials are planned as it goes: only those over the space are counted, and the vertices are not."""
    spec = load_sweep(write(tmp_path, mix_search={"verify": 2}, search__trials=2))
    assert spec.search.trials == 2


def test_every_key_has_a_help_text() -> None:
    table = reference_table(SweepConfig)
    for row in table.splitlines()[2:]:
        assert not row.endswith("|  |"), row
    for key in (
        "space.KEY.low",
        "mixture.ranges",
        "objective.confirm.suite",
        "trials.slots",
        "mix_search.verify",
    ):
        assert f"| `{key}` |" in table


def test_the_page_describes_every_key() -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    made = page.split("<!-- keys: qwen_ray.config.reference(SweepConfig) -->")[1].strip()
    assert made == reference_table(SweepConfig)
