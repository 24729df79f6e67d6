"""A packed sweep as a user runs it, from the file to what is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import models
from qwen_ray.config import read_config
from qwen_ray.errors import EXIT_OK
from qwen_ray.fsio import read_json, write_json
from qwen_ray.registry import Registry
from qwen_ray.training.driver import run_training
from tests.test_cli import qwen_ray
from tests.test_sweep_verbs import written

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STEPS = 12


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """The sweep's file, its folder and what the command printed: 4 trials in 3 slots, confirmed by lm-eval.

    The tolerances are such that nothing counts as forgotten: what a few steps on sums do is not the point.
    """
    folder = tmp_path_factory.mktemp("sweep")
    data = folder / "data.jsonl"
    file = written(
        folder,
        run={
            "model": {"name": "tiny"},
            "data": {"train": [str(data)], "validation_fraction": 0.1, "max_length": 96},
            "optim": {"max_steps": STEPS, "warmup_steps": 1},
            "tracking": {"wandb": "off"},
        },
        mixture={"floor": 0.1, "include": ["uniform"]},
        objective={
            "targets": ["sums"],
            "strengths": ["more"],
            "tolerance": 50.0,
            "confirm": {"suite": "tiny", "top": 1, "tolerance": 0.99, "limit": 4},
        },
        stopping={"name": "halving", "eta": 2, "rungs": [0.25]},
        trials={"slots": 3, "cpus": 1},
    )
    run = qwen_ray("sweep", file, "--json")
    assert run.returncode == EXIT_OK, run.stderr[-3000:]
    return file, folder / "out", json.loads(run.stdout)


def test_every_trial_is_told_and_one_wins(done: tuple[str, Path, dict[str, Any]]) -> None:
    _, out, result = done
    assert result == read_json(out / "result.json")
    assert read_json(out / "sweep.json")["state"] == "done"
    assert set(read_json(out / "sweep.json")["sources"]) == {str(out.parent / "data.jsonl"), "tiny"}
    assert [t["origin"] for t in result["trials"]] == ["reference", "random", "random", "random"]
    states = [t["state"] for t in result["trials"]]
    assert states[0] == "done"
    assert set(states) == {"done", "stopped"}
    assert result["cost"]["trial_steps"] == sum(t["reports"][-1]["step"] for t in result["trials"])
    assert result["cost"]["full_trial_steps"] == 4 * STEPS
    assert result["cost"]["sequential_seconds"] > 0
    assert {row["index"] for row in result["confirmed"]} >= {0, result["winner"]}
    assert all((out / row["result"]).is_file() for row in result["confirmed"])
    assert "<svg" in (out / "report.html").read_text()
    assert len(list((out / "tune").glob("*/result.json"))) == 4  # as Ray Tune sees it


def test_the_best_configuration_trains_to_the_winner(done: tuple[str, Path, dict[str, Any]]) -> None:
    _, out, result = done
    config = read_config(out / result["best_config"])
    assert config.optim.learning_rate == result["trials"][result["winner"]]["values"]["optim.learning_rate"]
    assert config.out == f"{out}-best"
    config.cluster.workers = 0
    run = run_training(config)
    last = result["trials"][result["winner"]]["reports"][-1]
    assert run.steps == last["step"]
    assert run.eval_loss == pytest.approx(last["eval_loss"], abs=2e-3)


def test_the_candidate_is_the_winners_adapter_and_serves(done: tuple[str, Path, dict[str, Any]]) -> None:
    from qwen_ray.serving.engines.base import ScoreItem
    from qwen_ray.serving.engines.torch import TorchEngine

    _, out, result = done
    registry = Registry(out / "registry")
    version = registry.resolve("example", "candidate")
    assert version.ref == result["registered"] == "example@1"
    registry.verify(version)
    assert version.lineage["sweep"]["trial"] == result["winner"]
    assert version.lineage["config"]["optim"]["max_steps"] == STEPS
    name = "adapter_model.safetensors"
    left = out / result["trials"][result["winner"]]["adapter"]
    assert (version.path / name).read_bytes() == (left / name).read_bytes()
    engine = TorchEngine.load(models.resolve("tiny"))
    engine.add_adapter("candidate", version.path)
    item = ([1, 2, 3], [[4, 5]])
    base, tuned = engine.score([ScoreItem(None, *item), ScoreItem("candidate", *item)])
    assert base.continuations[0].total != tuned.continuations[0].total


def test_what_is_done_is_not_done_again(done: tuple[str, Path, dict[str, Any]]) -> None:
    file, _, result = done
    again = qwen_ray("sweep", file, "--json")
    assert again.returncode == 2
    assert "--resume goes on with it" in again.stderr
    again = qwen_ray("sweep", file, "--resume", "--json")
    assert again.returncode == EXIT_OK, again.stderr[-3000:]
    assert json.loads(again.stdout) == result
    assert "starting Ray" not in again.stderr


def test_a_driver_killed_before_the_outcome_comes_to_the_same(
    done: tuple[str, Path, dict[str, Any]],
) -> None:
    """As of a driver that was killed while benchmarking: one result is missing, nothing was concluded."""
    file, out, result = done
    write_json(out / "sweep.json", {**read_json(out / "sweep.json"), "state": "confirming"})
    (out / "result.json").unlink()
    (out / "eval" / "reference.json").unlink()
    run = qwen_ray("sweep", file, "--resume", "--json")
    assert run.returncode == EXIT_OK, run.stderr[-3000:]
    again = json.loads(run.stdout)
    for key in ("winner", "trials", "confirmed", "versus_reference", "registered"):
        assert again[key] == result[key]
    assert Registry(out / "registry").versions("example") == [1]
