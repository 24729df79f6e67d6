"""The loop alone: what its loss is, and that a resumed run is the run that was not interrupted."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_ray import models
from qwen_ray.config import OptimConfig, RunConfig, build_config
from qwen_ray.data.packing import collate, pack
from qwen_ray.data.tokenise import tokenise
from qwen_ray.errors import UserError
from qwen_ray.training import attention, loop
from qwen_ray.training import checkpoint as ckpt
from qwen_ray.training.loop import train
from qwen_ray.training.loss import TokenLoss
from qwen_ray.training.run import set_up
from qwen_ray.training.schedule import learning_rate
from qwen_ray.training.strategy.base import trained
from qwen_ray.training.strategy.ddp import Ddp
from tests.conftest import disk_full, sums
from tests.evaluation.test_monitor import scored

REF = models.resolve("tiny")


def config(data: Path, out: Path, *sets: str, **flags: Any) -> RunConfig:
    every = {"model.name": "tiny", "data.train": [str(data)], "cluster.workers": 0, "out": str(out), **flags}
    settings = [
        "data.max_length=96",
        "optim.warmup_steps=2",
        "checkpoint.every_steps=4",
        "method.dropout=0.1",
    ]
    return build_config(flags=every, sets=[*settings, "optim.max_steps=10", *sets])


class Store(ckpt.CheckpointStore):
    def __init__(self, root: Path, *, keep: int = 1, asynchronous: bool = True) -> None:
        super().__init__(root, Ddp(), keep=keep, asynchronous=asynchronous)


def run(settings: RunConfig, store: ckpt.CheckpointStore) -> tuple[list[dict[str, Any]], Any]:
    rows: list[dict[str, Any]] = []
    result = train(settings, strategy=Ddp(), store=store, on_metrics=rows.append)
    return rows, result


def weights(store: ckpt.CheckpointStore) -> bytes:
    """The newest checkpoint's weights and optimizer state."""
    return (ckpt.complete(store.root)[-1] / "state" / "rank-00000.safetensors").read_bytes()


class _Killed(Exception):
    pass


class DyingStore(Store):
    """Dies right after it has stored the checkpoint of ``at``."""

    at = 4

    def save(self, step: int, write: Callable[[Path], None], manifest: dict[str, Any]) -> str | None:
        super().save(step, write, manifest)
        if step != self.at:
            return None
        assert self.settle() is None
        raise _Killed


class FullStore(Store):
    """Of a disk that is full at step 2."""

    def save(self, step: int, write: Callable[[Path], None], manifest: dict[str, Any]) -> str | None:
        return super().save(step, disk_full if step == 2 else write, manifest)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("packing", [True, False])
def test_resumed_is_bit_for_bit_the_same(tmp_path: Path, data_file: Path, method: str, packing: bool) -> None:
    settings = config(data_file, tmp_path, f"method.name={method}", f"data.packing={str(packing).lower()}")
    undisturbed = Store(tmp_path / "a", keep=2)
    rows, _ = run(settings, undisturbed)
    with pytest.raises(_Killed):
        run(settings, DyingStore(tmp_path / "b", keep=2))
    resumed = Store(tmp_path / "b", keep=2)
    later, result = run(settings, resumed)
    assert result.resumed_from == 4
    assert [r["step"] for r in later] == [5, 6, 7, 8, 9, 10]
    assert [r["loss"] for r in later] == [r["loss"] for r in rows[4:]]
    assert weights(resumed) == weights(undisturbed)


def test_another_seed_is_another_run(tmp_path: Path, data_file: Path) -> None:
    runs = []
    for seed in (0, 1):
        store = Store(tmp_path / str(seed), keep=1)
        run(config(data_file, tmp_path, seed=seed), store)
        runs.append(weights(store))
    assert runs[0] != runs[1]


def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path: Path, data_file: Path) -> None:
    store = Store(tmp_path / "c", keep=1)
    settings = config(data_file, tmp_path, "optim.max_steps=30", "evaluate.every_steps=10")
    rows, result = run(settings, store)
    assert sum(r["loss"] for r in rows[-5:]) < 0.9 * sum(r["loss"] for r in rows[:5])
    assert [r["step"] for r in rows if "eval_loss" in r] == [10, 20, 30]
    assert result.steps == rows[-1]["step"] == rows[-1]["total_steps"]
    for folder in ckpt.complete(store.root):
        assert {p.name for p in (folder / "adapter").iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, data_file: Path) -> None:
    store = Store(tmp_path / "c", keep=1)
    run(config(data_file, tmp_path, "optim.max_steps=4"), store)
    with pytest.raises(UserError, match="another configuration"):
        run(config(data_file, tmp_path, "optim.max_steps=4", "method.r=4"), store)


def test_the_loss_is_the_models_own() -> None:
    """On one unpacked document it is Hugging Face's loss; over many it is the token mean of theirs."""
    model, tokenizer = models.load_model(REF, dtype=torch.float32), models.load_tokenizer(REF)
    examples, _ = tokenise(sums(6), tokenizer, 96)
    attention.register()
    ours_model = models.load_model(REF, dtype=torch.float32, attention=attention.ATTENTION)
    loss = TokenLoss(ours_model)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            theirs = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.labels])).loss
            count = sum(label >= 0 for label in example.labels)
            total, tokens = total + float(theirs) * count, tokens + count
        rows = pack(examples, max_length=64, packing=True)
        assert len(rows) < len(examples)
        ours = loss(collate(rows, tokenizer.pad_token_id))
    assert float(ours) == pytest.approx(total, rel=1e-5)


def test_micro_batches_do_not_change_the_step(tmp_path: Path, data_file: Path) -> None:
    """8 rows a step as 8x1, 2x4 and 1x8 are one and the same loss and gradient."""
    norms = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        settings = config(
            data_file,
            tmp_path,
            f"optim.batch_size={size}",
            f"optim.gradient_accumulation={accumulation}",
            "optim.max_steps=2",
            "method.dropout=0",
        )
        rows, _ = run(settings, Store(tmp_path / str(size), keep=1))
        norms.append([(r["loss"], r["grad_norm"]) for r in rows])
    for other in norms[1:]:
        for mine, theirs in zip(norms[0], other, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-4)


def test_schedules() -> None:
    def rates(**kwargs: Any) -> list[float]:
        optim = OptimConfig(learning_rate=1.0, warmup_steps=4, **kwargs)
        return [learning_rate(step, 20, optim) for step in range(20)]

    for schedule in ("cosine", "linear", "constant"):
        values = rates(schedule=schedule)
        assert values[:4] == [0.25, 0.5, 0.75, 1.0]
        assert max(values) == 1.0
        assert all(a >= b for a, b in itertools.pairwise(values[4:]))
    assert rates(schedule="constant")[-1] == 1.0
    assert rates(schedule="linear")[-1] == pytest.approx(1 / 16)
    assert rates(schedule="cosine", min_learning_rate_ratio=0.1)[-1] == pytest.approx(0.1086, abs=1e-3)
    assert (
        learning_rate(1, 4, OptimConfig(learning_rate=1.0, warmup_steps=100)) == 1.0
    )  # short runs reach the peak


def test_unknown_target_is_refused(tmp_path: Path, data_file: Path) -> None:
    with pytest.raises(UserError, match="no linear layer 'q_porj'") as e:
        set_up(config(data_file, tmp_path, "method.targets=[q_porj]"), Ddp())
    assert "q_proj" in e.value.fix


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, data_file: Path) -> None:
    settings = config(
        data_file, tmp_path, "optim.learning_rate=1e30", "optim.max_grad_norm=1e30", "optim.warmup_steps=0"
    )
    with pytest.raises(FloatingPointError, match=r"lower optim\.learning_rate"):
        run(settings, Store(tmp_path / "c", keep=1))


def test_weights_that_the_last_step_ruined_are_not_handed_over(tmp_path: Path, data_file: Path) -> None:
    """The loss of the only step is that of the base; what it leaves shows in the held-out loss alone."""
    settings = config(
        data_file, tmp_path, "optim.learning_rate=1e25", "optim.warmup_steps=0", "optim.max_steps=1"
    )
    store, rows = Store(tmp_path / "c"), list[dict[str, Any]]()
    with pytest.raises(FloatingPointError, match=r"held-out loss is nan at step 1; lower optim"):
        train(settings, strategy=Ddp(), store=store, on_metrics=rows.append, artifact=tmp_path / "left")
    assert rows == []
    assert store.newest() is None
    assert not (tmp_path / "left").exists()


def test_weights_of_a_gradient_that_is_not_finite_are_not_kept(
    tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the last step is as ever."""
    backward = Ddp.backward

    def ruined(strategy: Ddp, loss: torch.Tensor) -> None:
        backward(strategy, loss)
        if len(rows) == 3:
            gradient = next(iter(trained(strategy.module).values())).grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.nan

    monkeypatch.setattr(Ddp, "backward", ruined)
    sets = ("optim.max_steps=4", "checkpoint.every_steps=2", "data.validation_fraction=0")
    store, rows = Store(tmp_path / "c"), list[dict[str, Any]]()
    settings, left = config(data_file, tmp_path, *sets), tmp_path / "left"
    with pytest.raises(FloatingPointError, match=r"gradient's norm is nan at step 4; lower optim"):
        train(settings, strategy=Ddp(), store=store, on_metrics=rows.append, artifact=left)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [ckpt.step_of(folder) for folder in ckpt.complete(store.root)] == [2]
    assert not left.exists()


def test_a_step_that_loss_scaling_skips_ends_nothing(tmp_path: Path, data_file: Path) -> None:
    """Its gradients overflowed in float16, and JSON has no word for that."""
    sets = ("precision=fp16", "optim.max_steps=3", "data.max_length=32", "data.validation_fraction=0")
    rows, _ = run(config(data_file, tmp_path, *sets), Store(tmp_path / "c"))
    assert any(row["grad_norm"] == math.inf for row in rows)
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_best_step_without_a_checkpoint_is_not_gone_back_to(
    tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of step 2 are better, but the disk was full; at step 3 arithmetic is forgotten."""
    store = FullStore(tmp_path / "c")
    found = iter([scored(1, 4, 5), scored(2, 4, 5), scored(4, 4, 5), scored(3, 0, 5)])
    monkeypatch.setattr(loop, "evaluate_suites", lambda _: [next(found)])
    sets = ("evaluate.suites=[tiny]", "evaluate.suites_every_steps=1", "evaluate.on_forgetting=rollback")
    _, ended = run(config(data_file, tmp_path, *sets, "checkpoint.every_steps=100"), store)
    assert (ended.steps, ended.step) == (3, 1)
    assert [ckpt.step_of(folder) for folder in ckpt.complete(store.root)] == [1, 3]


def test_a_model_is_left_in_the_format_it_came_in(tmp_path: Path, data_file: Path) -> None:
    """bfloat16 files, trained in float32; and what config.json says is what the files hold."""
    base = tmp_path / "base"
    models.load_model(REF, dtype=torch.bfloat16).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(REF.location) / name, base)
    sets = ("method.name=full", "optim.max_steps=1", "data.validation_fraction=0")
    settings = config(data_file, tmp_path, *sets, **{"model.name": str(base)})
    left = tmp_path / "left"
    train(settings, strategy=Ddp(), store=Store(tmp_path / "c"), on_metrics=lambda _: None, artifact=left)
    weights = load_file(left / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(left, dtype="auto").dtype == torch.bfloat16
    assert models.stored_dtype(models.resolve(str(left))) == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_a_strength_that_is_forgotten(action: str, tmp_path: Path, data_file: Path) -> None:
    """Training on sums at a far too high rate ruins the base's arithmetic: warned of, stopped, or undone."""
    settings = config(
        data_file,
        tmp_path,
        "optim.learning_rate=0.2",
        "optim.warmup_steps=0",
        "evaluate.suites=[tiny]",
        "evaluate.suites_every_steps=4",
        "evaluate.suites_limit=10",
        f"evaluate.on_forgetting={action}",
        "checkpoint.every_steps=100",
    )
    store = Store(tmp_path / "c")
    rows, result = run(settings, store)
    judged = {row["step"]: row["forgetting/worst"] for row in rows if "forgetting/worst" in row}
    assert judged[4] > 0.04
    if action == "warn":
        assert result.stopped is None
        assert set(judged) == {4, 8, 10}
        assert result.step == result.steps == 10
        return
    assert "fell from" in result.stopped
    assert result.steps == 4
    assert result.step == (0 if action == "rollback" else 4)


def test_judging_leaves_no_trace_in_the_training(tmp_path: Path, data_file: Path) -> None:
    plain, judged = Store(tmp_path / "plain"), Store(tmp_path / "judged")
    rows, _ = run(config(data_file, tmp_path, "optim.max_steps=4"), plain)
    suites = ["evaluate.suites=[tiny]", "evaluate.suites_every_steps=2", "evaluate.suites_limit=2"]
    same, _ = run(config(data_file, tmp_path, "optim.max_steps=4", *suites), judged)
    assert [r["loss"] for r in same] == [r["loss"] for r in rows]
    assert weights(judged) == weights(plain)


def test_activation_checkpointing_changes_no_bit(tmp_path: Path, data_file: Path) -> None:
    results = []
    for name in ("false", "true"):
        store = Store(tmp_path / name)
        run(
            config(data_file, tmp_path, f"compute.activation_checkpointing={name}", "optim.max_steps=4"),
            store,
        )
        results.append(weights(store))
    assert results[0] == results[1]


def test_what_decides_the_result_and_what_does_not(tmp_path: Path, data_file: Path) -> None:
    """The same rows a step in other micro-batches go on; another number of rows does not."""
    store = Store(tmp_path / "c")
    eight = ["optim.batch_size=4", "optim.gradient_accumulation=2"]
    run(config(data_file, tmp_path, "optim.max_steps=4", *eight), store)
    for sets in (["optim.batch_size=8", "optim.gradient_accumulation=1"], ["strategy.name=ddp"]):
        _, result = run(config(data_file, tmp_path, "optim.max_steps=4", *eight, *sets), store)
        assert result.resumed_from == 4
    for sets in (["optim.batch_size=2"], ["data.packing_window=3"], ["optim.max_steps=5"]):
        with pytest.raises(UserError, match="another configuration"):
            run(config(data_file, tmp_path, "optim.max_steps=4", *eight, *sets), store)
