"""``loss/DOMAIN``: the mean over the domain's supervised tokens, on all ranks, under every strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ray.config import RunConfig
from qwen_ray.training import loss
from qwen_ray.training.run import set_up
from qwen_ray.training.strategy.ddp import Ddp
from tests.training.ranks import launch, run
from tests.training.test_loop import config

SETS = [
    "optim.batch_size=2",
    "optim.gradient_accumulation=4",
    "optim.max_steps=2",
    "method.dropout=0",
    "data.weights={sums: 0.8, more: 0.2}",
    "optim.eps=1e-4",
]


def of_domains(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("loss/")}


@pytest.mark.parametrize("sets", [[], ["data.packing=false"]])
def test_it_is_the_mean_over_the_domains_tokens(data_file: Path, tmp_path: Path, sets: list[str]) -> None:
    """Against the losses of each document by itself."""
    settings = config(data_file, tmp_path, *SETS, *sets)
    rows, _ = run(settings, tmp_path / "run")
    fresh = set_up(settings, Ddp())
    fresh.data.stream.plan(rows=16)
    (step, *_) = fresh.feed.steps(fresh.data.stream, rows=8, count=1)
    nats, tokens = {"sums": 0.0, "more": 0.0}, {"sums": 0, "more": 0}
    names = dict(zip(fresh.feed.domains.values(), fresh.feed.domains, strict=True))
    for batch in step.batches:
        losses = loss.document_losses(fresh.loss, batch)
        document = torch.bucketize(batch.where, batch.offsets[1:], right=True)
        for d in range(len(batch.lengths)):
            (of,) = {names[int(n)] for n in batch.domains[document == d]}
            nats[of] += float(losses[d])
            tokens[of] += int((document == d).sum())
    assert of_domains(rows[0]) == pytest.approx({f"loss/{d}": nats[d] / tokens[d] for d in nats}, rel=1e-5)
    assert tokens == step.supervised_of
    # Weighed by their tokens they are the loss.
    assert rows[0]["loss"] == pytest.approx(sum(nats.values()) / sum(tokens.values()), rel=1e-5)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [0, 1, 50])
def test_what_each_position_adds(
    linear: bool, dtype: torch.dtype, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of 16, by the fused loss and, for a head that is not linear, by the plain one."""
    monkeypatch.setitem(loss.LOGITS_BYTES, "cpu", 16 * 4 * 32)
    torch.manual_seed(0)
    inner = torch.nn.Linear(8, 32)
    head: torch.nn.Module = inner if linear else torch.nn.Sequential(inner)
    hidden = torch.randn(positions, 8, requires_grad=True)
    targets, nats = torch.randint(0, 32, (positions,)), torch.empty(positions)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        total = loss.head_loss(hidden, head, targets, nats=nats)
        plain = loss.head_loss(hidden, head, targets)
        expected = torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    torch.testing.assert_close(nats, expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, plain)
    assert not nats.requires_grad
    total.backward()


def train_each(todo: dict[str, dict[str, Any]], root: Path) -> None:
    for name, given in todo.items():
        rows, _ = run(RunConfig.model_validate(given), root / name)
        if rows:
            (root / name / "rows.json").write_text(json.dumps(rows))


@pytest.mark.slow
def test_two_ranks_report_what_one_reports(data_file: Path, tmp_path: Path) -> None:
    strategies = {
        "ddp": ["strategy.name=ddp"],
        "fsdp": ["strategy.name=fsdp"],
        "zero3": ["strategy.name=deepspeed", "strategy.zero_stage=3"],
    }
    todo = {}
    for name, sets in strategies.items():
        settings = config(data_file, tmp_path, *SETS, *sets)
        settings.optim.gradient_accumulation, settings.cluster.workers = 2, 2
        todo[name] = settings.model_dump(mode="json")
    single, _ = run(config(data_file, tmp_path, *SETS), tmp_path / "single")
    assert all(set(of_domains(row)) == {"loss/sums", "loss/more"} for row in single)
    launch(2, train_each, todo, tmp_path)
    for name in todo:
        rows = json.loads((tmp_path / name / "rows.json").read_text())
        for mine, theirs in zip(rows, single, strict=True):
            assert of_domains(mine) == pytest.approx(of_domains(theirs), rel=2e-4), name
