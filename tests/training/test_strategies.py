"""Every strategy ends with the loss curve and the weights of a single process, and goes on where another
number of ranks left off."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError
from qwen_ray.training import checkpoint
from qwen_ray.training.strategy.deepspeed import DeepSpeed
from tests.training.ranks import launch, run
from tests.training.test_loop import config

STRATEGIES = {
    "ddp": ["strategy.name=ddp"],
    "fsdp": ["strategy.name=fsdp"],
    **{f"zero{s}": ["strategy.name=deepspeed", f"strategy.zero_stage={s}"] for s in (1, 2, 3)},
}
METHODS = ("lora", "full")
PACKING = ("true", "false")


def settings(data: Path, out: Path, method: str, packing: str, *sets: str) -> RunConfig:
    """8 rows a step as 2 workers would make it: batches of 2, accumulated twice."""
    every = [
        f"method.name={method}",
        f"data.packing={packing}",
        "optim.batch_size=2",
        "optim.gradient_accumulation=2",
        "optim.max_steps=5",
        "checkpoint.every_steps=3",
        "method.dropout=0",
        "evaluate.every_steps=3",  # with the checkpoint: a forward pass without a backward one comes first
        # Adam divides by the gradient's size: without this, entries whose gradient is rounding noise move
        # as far as any, and in another direction in each order of summation.
        "optim.eps=1e-4",
    ]
    made = config(data, out, *every, *sets)
    made.cluster.workers = 2
    return made


def cases(data: Path, root: Path, strategies: list[str]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (
            f"{strategy}-{method}-{packing}",
            settings(data, root, method, packing, *STRATEGIES[strategy]).model_dump(mode="json"),
        )
        for strategy in strategies
        for method in METHODS
        for packing in PACKING
    ]


def train_all(todo: list[tuple[str, dict[str, Any]]], root: Path) -> None:
    """On each rank: train each case; rank 0 leaves losses and weights in ``root/CASE``."""
    for name, given in todo:
        rows, _ = run(RunConfig.model_validate(given), root / name)
        if rows:
            (root / name / "rows.json").write_text(json.dumps(rows))


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    (file,) = (folder / "trained").glob("*.safetensors")
    return json.loads((folder / "rows.json").read_text()), load_file(file)


def assert_same(one: Path, other: Path, *, tolerance: float = 2e-5) -> None:
    (rows, weights), (their_rows, their_weights) = outcome(one), outcome(other)
    for mine, theirs in zip(rows, their_rows, strict=True):
        for key in ("loss", "grad_norm", *(k for k in mine if k.startswith("eval_loss"))):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4), (one.name, key, mine["step"])
    assert weights.keys() == their_weights.keys()
    differ = {name: float((value - their_weights[name]).abs().max()) for name, value in weights.items()}
    worst = max(differ, key=lambda name: differ[name])
    assert differ[worst] < tolerance, (one.name, worst, differ[worst])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qwen_ray.data.records import write_records
    from tests.conftest import sums

    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    write_records(path, [*sums(120), *sums(60, seed=1, domain="more")])
    return path


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each method and packing in one process."""
    root = tmp_path_factory.mktemp("single")
    train_all(cases(data, root, ["ddp"]), root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_end_as_one(strategy: str, data: Path, single: Path, tmp_path: Path) -> None:
    launch(2, train_all, cases(data, tmp_path, [strategy]), tmp_path)
    for method in METHODS:
        for packing in PACKING:
            assert_same(tmp_path / f"{strategy}-{method}-{packing}", single / f"ddp-{method}-{packing}")


def test_a_buffer_is_as_large_as_the_largest_parameter() -> None:
    from qwen_ray import models
    from qwen_ray.training.strategy.deepspeed import largest_parameter

    ref = models.resolve("tiny")
    model = models.load_model(ref, dtype=torch.float32)
    assert largest_parameter(ref) == max(p.numel() for p in model.parameters())


def test_eight_bit_state_is_neither_too_large_nor_divided_anew(tmp_path: Path) -> None:
    strategy = DeepSpeed(torch.device("cpu"))
    asked = RunConfig.model_validate({"optim": {"name": "adamw_8bit"}, "strategy": {"name": "deepspeed"}})
    large = torch.nn.Linear(2**16, 2**15, bias=False, device="meta")
    with pytest.raises(UserError, match="steps at most"):
        strategy.join(large, lambda module: torch.optim.SGD(module.parameters()), asked)
    (tmp_path / "state").mkdir()
    for rank in range(2):
        (tmp_path / "state" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UserError, match=r"go on at cluster\.workers=2"):
        strategy.restore(tmp_path)


@pytest.mark.slow
def test_a_smaller_last_step_is_a_step(tmp_path: Path) -> None:
    """One pass over 12 records, 8 a step: the last step has half of the micro-batches."""
    from qwen_ray.data.records import write_records
    from tests.conftest import sums

    write_records(tmp_path / "data.jsonl", sums(12))
    sets = ["optim.max_steps=null", "optim.epochs=1", "data.validation_fraction=0", "data.max_epochs.sums=1"]
    todo = [
        (name, settings(tmp_path / "data.jsonl", tmp_path, "lora", "false", *sets, *STRATEGIES[name]))
        for name in ("ddp", "zero2", "zero3")
    ]
    launch(1, train_all, [(name, given.model_dump(mode="json")) for name, given in todo], tmp_path)
    first, last = outcome(tmp_path / "ddp")[0]
    assert last["tokens"] < first["tokens"]
    for name in ("zero2", "zero3"):
        assert_same(tmp_path / name, tmp_path / "ddp")


def go_on(todo: list[tuple[str, dict[str, Any]]], root: Path) -> None:
    """On each rank: end the runs in ``root/CASE``, which lost their last checkpoint."""
    for name, given in todo:
        rows, result = run(RunConfig.model_validate(given), root / name, handed="resumed")
        assert result.resumed_from == 3
        if rows:
            (root / name / "resumed" / "rows.json").write_text(json.dumps(rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "before", "after"),
    [
        ((2, 1), ["ddp", "fsdp"], {"ddp": "ddp", "fsdp": "fsdp"}),
        ((2, 2), ["ddp", "fsdp"], {"ddp": "fsdp", "fsdp": "ddp"}),
        ((1, 2), ["ddp", "fsdp"], {"ddp": "ddp", "fsdp": "fsdp"}),
        ((2, 1), ["zero1", "zero2", "zero3"], {}),
        ((1, 2), ["zero2"], {}),
    ],
)
def test_another_number_of_ranks_goes_on(  # noqa: PLR0917
    ranks: tuple[int, int],
    before: list[str],
    after: dict[str, str],
    data: Path,
    single: Path,
    tmp_path: Path,
) -> None:
    """N to M ranks, and ddp to fsdp and back, whose checkpoints are of one format."""
    first = [case for case in cases(data, tmp_path, before) if case[0].endswith("true")]
    launch(ranks[0], train_all, first, tmp_path)
    then = []
    for name, given in first:
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000005")
        given["strategy"]["name"] = after.get(name.split("-")[0], given["strategy"]["name"])
        then.append((name, given))
    launch(ranks[1], go_on, then, tmp_path)
    for name, _ in first:
        (file,) = (tmp_path / name / "resumed").glob("*.safetensors")
        weights = load_file(file)
        _, expected = outcome(single / ("ddp-" + name.split("-", 1)[1]))
        worst = max(float((weights[key] - expected[key]).abs().max()) for key in expected)
        assert worst < 2e-5, (name, worst)


def lacks_its_files(given: dict[str, Any], root: Path) -> None:
    config = RunConfig.model_validate(given)
    rank, named = os.environ["RANK"], {"missing.jsonl": "missing.jsonl", "other.jsonl": "data.jsonl"}
    for name, what in (("missing.jsonl", "no such data file"), ("other.jsonl", "rank 1 has another content")):
        if rank == "1":
            config.data.train = [str(root / name)]
        with pytest.raises(UserError, match=what) as e:
            run(config, root)
        assert named[name] in e.value.where
    checkpoint._SHOWS_SECONDS = 0.0
    with pytest.raises(UserError, match=r"not on storage that all workers mount: .* rank 1 does not see"):
        run(config, root / rank)


def test_files_that_one_node_lacks_are_told_by_all(data: Path, tmp_path: Path) -> None:
    """Else the others would wait for that rank until a timeout, or train with it on other data."""
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[1:]))
    launch(2, lacks_its_files, settings(data, tmp_path, "lora", "true").model_dump(mode="json"), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_a_run_that_was_stopped_stays_stopped(data: Path, tmp_path: Path) -> None:
    """Started again before its result was stored, it hands over what it had; it does not train on."""
    stops = [
        "optim.learning_rate=0.2",
        "optim.warmup_steps=0",
        "evaluate.suites=[tiny]",
        "evaluate.suites_every_steps=3",
        "evaluate.suites_limit=10",
        "evaluate.on_forgetting=rollback",
    ]
    config = settings(data, tmp_path, "lora", "true", *stops)
    _, first = run(config, tmp_path)
    rows, again = run(config, tmp_path, handed="again")
    assert first.stopped
    assert (again.steps, again.step, again.stopped) == (first.steps, first.step, first.stopped)
    assert rows == []
    (one,), (other,) = ((tmp_path / name).glob("*.safetensors") for name in ("trained", "again"))
    assert one.read_bytes() == other.read_bytes()
