"""Evaluation of the model under training, and the forgetting monitor."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.evaluation.live import LiveBackend, LiveEngine, evaluate_live
from qwen_ray.evaluation.monitor import ForgettingMonitor, metrics, smallest_fall
from qwen_ray.evaluation.run import evaluate_local
from qwen_ray.serving.backends import Sampling
from tests.evaluation.test_compare import result, right
from tests.evaluation.test_run import _mini_guide

TINY = models.resolve("tiny")
GREEDY = Sampling(max_tokens=6, temperature=0.0, top_p=1.0, stop=(), seed=None)


def adapted(*, dropout: float = 0.0, std: float = 0.02) -> Any:
    """The embedded model with an adapter that changes its answers, in train mode."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = models.load_model(TINY, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=dropout)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model.train()


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """One step on the model's own tokens; dropout draws from the global generator."""
    ids = torch.arange(2, 66).reshape(2, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adamw(model: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


def live(model: Any, suite: str = "tiny", **settings: Any) -> dict[str, Any]:
    return evaluate_live(model, models.load_tokenizer(TINY), suite, device="cpu", **settings)


# ---------------------------------------------------------------- on the live weights


@pytest.fixture(scope="module")
def mini_guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guide")
    _mini_guide(root)
    return root


@pytest.mark.parametrize("suite", ["tiny", "guide"])
def test_equals_the_evaluation_of_the_saved_adapter(suite: str, mini_guide: Path, tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(str(tmp_path / "adapter"))
    settings: dict[str, Any] = {"limit": 30} if suite == "tiny" else {"limit": 3, "data_dir": mini_guide}
    saved = evaluate_local("tiny", tmp_path / "adapter", suite, out=tmp_path / "r.json", **settings)
    base = evaluate_local("tiny", None, suite, out=tmp_path / "b.json", **settings)
    got = live(model, suite, id="tiny", **settings)
    assert got["items"] == saved["items"]
    assert got["items"] != base["items"]  # the adapter was on
    assert {k: got[k] for k in ("suite", "settings", "categories", "controls", "model")} == {
        k: saved[k] for k in ("suite", "settings", "categories", "controls", "model")
    }


def test_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that evaluates twice is, bit for bit, the run that does not."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    calls: list[bool] = []

    def needs_training(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.training)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("of_training", needs_training)
    AttentionMaskInterface.register("of_training", sdpa_mask)
    monkeypatch.setenv("LOCAL_RANK", "1")  # as on the second worker of a node

    def run(evaluates: bool) -> tuple[Any, tuple[Any, ...]]:
        model = adapted(dropout=0.2)
        model.get_base_model().set_attn_implementation("of_training")
        model.get_submodule("base_model.model.model.layers.1").eval()  # a mode of its own
        optimizer = adamw(model, 1e-3)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        for i in range(4):
            ids = torch.arange(2, 66).reshape(2, 32)
            model(input_ids=ids, labels=ids).loss.backward()  # evaluated with gradients in place
            if evaluates and i in (0, 2):
                assert live(model, limit=2)["categories"]["arithmetic"]["n"] == 2
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    live(model, limit=1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state = random.random(), float(np.random.random()), float(torch.rand(1))
        return model, state

    plain, plain_state = run(False)
    assert calls
    expected = list(calls)
    calls.clear()
    watched, watched_state = run(True)
    assert watched_state == plain_state
    assert calls == expected  # never called by the evaluation
    for (name, a), (_, b) in zip(plain.named_parameters(), watched.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not b.is_inference()
        assert a.requires_grad == b.requires_grad
    assert [m.training for m in watched.modules()] == [m.training for m in plain.modules()]
    assert watched.get_base_model().config._attn_implementation == "of_training"
    assert os.environ["LOCAL_RANK"] == "1"


def test_compiled_layers_are_not_compiled_for_the_benchmark() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = adapted()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=backend)
    optimizer = adamw(model, 1e-3)
    step(model, optimizer)
    compiled = len(graphs)
    assert compiled > 0
    live(model, limit=2)
    step(model, optimizer)
    assert len(graphs) == compiled


def test_a_model_that_gives_no_numbers_fails() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, float("nan"))
    with pytest.raises(FloatingPointError, match="not a number"):
        live(model, limit=1)
    assert model.training
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- several ranks


class Root(nn.Module):
    """The outermost sharded module: calls what it is given, so that its parameters are whole meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Any) -> Any:
        return function()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every scoring forward of this process."""
    rows: list[int] = []
    score = LiveEngine.run_score

    def run_score(self: LiveEngine, batch: Any, results: Any) -> None:
        rows.append(len(batch.rows))
        score(self, batch, results)

    monkeypatch.setattr(LiveEngine, "run_score", run_score)
    return rows


def prompts() -> list[list[int]]:
    """More than are decoded together."""
    tokenizer = models.load_tokenizer(TINY)
    return [tokenizer(f"Question: What is {i} + {3 * i}?\nAnswer:")["input_ids"] for i in range(40)]


@torch.no_grad()
def generated(model: Any, **sharding: Any) -> list[str]:
    tokenizer, base = models.load_tokenizer(TINY), model.get_base_model().eval()
    engine = LiveEngine(base, tokenizer, device=torch.device("cpu"), id="tiny", **sharding)
    return LiveBackend(engine, tokenizer).generate(prompts(), GREEDY, lambda n: None)


def _worker(rank: int, folder: str) -> None:
    out: dict[str, Any] = {}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    os.environ["LOCAL_RANK"] = str(rank)
    monkeypatch = pytest.MonkeyPatch()
    rows = counted(monkeypatch)
    try:
        model = adapted()
        out["items"] = live(model, limit=25)["items"]
        out["rows"] = list(rows)
        out["texts"] = generated(model)
        # A rank that fails takes the others with it, instead of leaving them waiting.
        if rank == 1:
            nn.init.constant_(next(p for n, p in model.named_parameters() if "lora_B" in n), float("nan"))
        try:
            live(model, limit=25)
        except (FloatingPointError, RuntimeError) as e:
            out["error"] = f"{type(e).__name__}: {e}"
        rows.clear()
        out |= _sharded()
        out["sharded rows"] = list(rows)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(out))
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


def _sharded() -> dict[str, Any]:
    """The same under FSDP2, before the first step, and whether a step then has gradients."""
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    root = fully_shard(Root(model))
    items = live(model, limit=25, lockstep=True, inside=root)["items"]
    texts = generated(model, lockstep=True, inside=root)
    ids = torch.arange(2, 66).reshape(2, 32)
    root(lambda: model(input_ids=ids, labels=ids).loss).backward()
    gradient = all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return {"sharded items": items, "sharded texts": texts, "gradient": gradient}


def test_two_ranks_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = counted(monkeypatch)
    model = adapted()
    items, texts = live(model, limit=25)["items"], generated(model)
    alone = list(rows)
    assert len(alone) > 1  # something to share
    assert len(set(texts)) > 10
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for out in (zero, one):
        assert out["items"] == out["sharded items"] == items
        assert out["texts"] == out["sharded texts"] == texts
        assert out["gradient"]
    assert zero["rows"] == alone[0::2]
    assert one["rows"] == alone[1::2]
    assert one["sharded rows"] == zero["sharded rows"] == alone  # in lockstep
    assert one["error"].startswith("FloatingPointError")
    assert zero["error"] == one["error"]  # no reason to start again, on any rank


# ---------------------------------------------------------------- the monitor


def test_a_huge_learning_rate_is_caught() -> None:
    model = adapted(std=0.0)
    monitor = ForgettingMonitor(0.04, "rollback")
    first = monitor.update(0, live(model, limit=30))
    assert (first.action, first.fallen, first.best_step) == ("none", (), 0)
    gentle, huge = adamw(model, 1e-6), adamw(model, 0.3)
    step(model, gentle)
    held = monitor.update(1, live(model, limit=30))
    assert (held.action, held.fallen) == ("none", ())
    for _ in range(8):
        step(model, huge)
    final = live(model, limit=30)
    verdict = monitor.update(9, final)
    assert verdict.action == "rollback"
    assert verdict.best_step == monitor.best_step < 9
    fall = next(fall for fall in verdict.fallen if fall.name == "arithmetic")
    assert fall.before > 0.9 > fall.after == final["categories"]["arithmetic"]["score"]
    assert fall.interval[0] < fall.after - fall.before < fall.interval[1] < 0
    assert fall.n == 30
    assert verdict.worst is not None
    assert verdict.worst >= fall.before - fall.after
    assert "tiny/arithmetic fell from" in verdict.message
    assert f"the run ends with step {verdict.best_step}" in verdict.message
    rows = monitor.metrics(final)
    assert rows["forgetting/worst"] == verdict.worst
    assert rows["suite/tiny/arithmetic"] == fall.after
    assert set(metrics(final)) == set(rows) - {"forgetting/worst"}
    assert "suite/tiny/untaught_facts" in rows
    json.dumps(verdict.to_json())


def scored(biology: int, arithmetic: int, of: int = 100, **changes: Any) -> dict[str, Any]:
    """A result with so many right answers."""
    made = result(
        {"biology": right(biology, of), "arithmetic": right(arithmetic, of), "control": right(5, of)},
        **changes,
    )
    for name in (*made["categories"], *made["controls"]):
        scores = [item["score"] for item in made["items"] if item["category"] == name]
        {**made["categories"], **made["controls"]}[name]["score"] = sum(scores) / len(scores)
    return made


def test_the_rule_is_the_gates() -> None:
    monitor = ForgettingMonitor(0.05, "stop")
    monitor.update(0, scored(20, 90))
    assert monitor.update(10, scored(0, 86)).action == "none"  # a target may fall; 4 points are within 5
    verdict = monitor.update(20, scored(60, 84))
    assert verdict.action == "stop"
    assert [f.name for f in verdict.fallen] == ["arithmetic"]
    assert verdict.worst == pytest.approx(0.06)
    assert ForgettingMonitor(0.05).update(0, scored(20, 90)).worst == 0


def test_best_step() -> None:
    monitor = ForgettingMonitor(0.04, "rollback")
    assert monitor.update(0, scored(20, 90)).is_best
    assert monitor.update(10, scored(50, 90)).best_step == 10
    assert not monitor.update(20, scored(40, 95)).is_best  # targets are worse
    assert monitor.update(30, scored(50, 88)).is_best  # equal, newer
    assert monitor.update(40, scored(90, 80)).best_step == 30  # better, but it forgot
    assert monitor.update(50, scored(70, 90)).best_step == 50


def test_without_targets_the_newest_that_holds_is_best() -> None:
    def strengths(arithmetic: int) -> dict[str, Any]:
        made = scored(0, arithmetic)
        del made["categories"]["biology"]
        return {**made, "items": [i for i in made["items"] if i["category"] != "biology"]}

    monitor = ForgettingMonitor(0.04)
    monitor.update(0, strengths(90))
    assert monitor.update(10, strengths(89)).best_step == 10
    assert monitor.update(20, strengths(50)).best_step == 10


def test_few_items_are_said_to_be_few() -> None:
    monitor = ForgettingMonitor(0.04)
    first = monitor.update(0, scored(2, 10, of=10))
    detectable = smallest_fall(right(10, 10))
    assert detectable is not None
    assert f"n=10 items cannot show a fall of less than {100 * detectable:.1f} points" in first.message
    verdict = monitor.update(5, scored(2, 9, of=10))
    assert verdict.action == "warn"
    assert not verdict.fallen[0].certain
    assert "which may be chance: n=10" in verdict.message
    certain = monitor.update(6, scored(2, 2, of=10)).fallen[0]
    assert certain.certain
    assert "chance" not in str(certain)
    assert "cannot show" not in ForgettingMonitor(0.1).update(0, scored(20, 150, of=200)).message


def test_smallest_fall_is_where_the_interval_leaves_zero() -> None:
    from qwen_ray.evaluation.statistics import paired_difference

    for baseline in (right(20, 20), right(95, 100), right(300, 500)):
        fall = smallest_fall(baseline)
        assert fall is not None
        lost = round(fall * len(baseline))
        after = [0.0] * lost + baseline[lost:]
        assert paired_difference(baseline, after)[2] < 0
        assert paired_difference(baseline, [0.0] * (lost - 1) + baseline[lost - 1 :])[2] >= 0
    assert smallest_fall(right(0, 50)) is None  # nothing to lose
    assert smallest_fall(right(1, 2)) is None
    with pytest.raises(ValueError, match="0 and 1"):
        smallest_fall([0.5])


def test_scores_in_between() -> None:
    def partial(shift: float) -> dict[str, Any]:
        made = scored(2, 10, of=10)
        for i, item in enumerate(made["items"]):
            item["score"] = 0.5 + 0.04 * (i % 10) - (shift if item["category"] == "arithmetic" else 0)
        return made

    monitor = ForgettingMonitor(0.04)
    assert "cannot show" not in monitor.update(0, partial(0.0)).message
    restored = ForgettingMonitor(0.04)
    restored.load_state(json.loads(json.dumps(monitor.state())))
    fall = restored.update(1, partial(0.1)).fallen[0]
    assert fall.after - fall.before == pytest.approx(-0.1)
    assert fall.interval == pytest.approx((-0.1, -0.1))  # every item lost the same


def test_the_state_goes_through_a_checkpoint() -> None:
    """A resumed monitor gives the same verdicts, from the paired scores of the first one."""
    shuffled = scored(55, 70)
    random.Random(0).shuffle(shuffled["items"])
    monitor = ForgettingMonitor(0.04, "rollback")
    monitor.update(0, scored(20, 90))
    monitor.update(10, scored(60, 90))
    state = json.loads(json.dumps(monitor.state()))
    assert len(json.dumps(state)) < 300 + 300 + 800  # about a character an item, and a digest a category
    resumed = ForgettingMonitor(0.04, "rollback")
    assert not resumed.started
    resumed.load_state(state)
    assert resumed.started
    assert resumed.state() == monitor.state()
    for step_, next_result in ((20, shuffled), (30, scored(61, 90))):
        assert resumed.update(step_, next_result) == monitor.update(step_, copy.deepcopy(next_result))
    assert resumed.best_step == 30
    # Pairs, not totals: the same score on other items is a wider interval than on the same ones.
    other = scored(20, 90)
    arithmetic = [item for item in other["items"] if item["category"] == "arithmetic"]
    for item, score in zip(arithmetic, [0.0] * 10 + [1.0] * 70 + [0.0] * 10 + [1.0] * 10, strict=True):
        item["score"] = score
    wide = resumed.update(40, other).fallen[0]
    narrow = resumed.update(40, scored(20, 80)).fallen[0]
    assert wide.after == narrow.after
    assert wide.interval[1] - wide.interval[0] > narrow.interval[1] - narrow.interval[0]


def test_what_cannot_be_compared_is_refused() -> None:
    monitor = ForgettingMonitor(0.04)
    monitor.update(0, scored(20, 90))
    with pytest.raises(UserError, match="the items of tiny/biology are not those of the baseline"):
        monitor.update(10, scored(20, 90, of=99))
    with pytest.raises(UserError, match="the baseline is of the suites tiny"):
        monitor.update(10, scored(20, 90), scored(20, 90, suite="guide"))
    with pytest.raises(UserError, match="suite_version 1 and 2"):
        monitor.update(10, scored(20, 90, suite_version="2"))
    with pytest.raises(UserError, match="version 0"):
        monitor.load_state({"version": 0})
    with pytest.raises(UserError, match="unknown action 'halt'"):
        ForgettingMonitor(0.04, "halt")


def test_several_suites() -> None:
    monitor = ForgettingMonitor(0.04, "stop")
    monitor.update(0, scored(20, 90), scored(20, 90, suite="guide"))
    verdict = monitor.update(10, scored(20, 90), scored(20, 70, suite="guide"))
    assert [(fall.suite, fall.name) for fall in verdict.fallen] == [("guide", "arithmetic")]
    rows = monitor.metrics(scored(20, 90), scored(20, 70, suite="guide"))
    assert rows["suite/guide/arithmetic"] == 0.7
    assert rows["suite/tiny/arithmetic"] == 0.9
    assert rows["forgetting/worst"] == pytest.approx(0.2)
