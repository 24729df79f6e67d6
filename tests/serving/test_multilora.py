from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen_ray import models
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.multilora import LoraLinear

IDS = torch.tensor(
    [[5, 9, 200, 31, 77, 401], [8, 8, 14, 300, 2, 90], [1, 2, 3, 4, 5, 6], [50, 60, 70, 80, 90, 100]]
)


def peft_logits(model_dir: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter).eval()(ids).logits


def ours(engine: TorchEngine, keys: list[str | None], ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad(), engine.lora.select(keys):
        return engine.model(ids).logits


@pytest.mark.parametrize("name", ["geo", "law", "bio"])
def test_each_adapter_gives_pefts_logits(
    loaded: TorchEngine, model_dir: Path, adapter_dirs: dict[str, Path], name: str
) -> None:
    want = peft_logits(model_dir, adapter_dirs[name], IDS)
    torch.testing.assert_close(ours(loaded, [name] * 4), want, atol=1e-4, rtol=0)
    # The adapters are strong enough for a mix-up to show.
    assert (want - ours(loaded, [None] * 4)).abs().max() > 0.1


def test_mixed_batch_gives_each_row_its_adapter(
    loaded: TorchEngine, model_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    got = ours(loaded, ["law", None, "geo", "bio"])
    for row, name in ((0, "law"), (2, "geo"), (3, "bio")):
        want = peft_logits(model_dir, adapter_dirs[name], IDS[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], want, atol=1e-4, rtol=0)


def test_base_rows_are_the_same_bits_as_without_adapters(loaded: TorchEngine, engine: TorchEngine) -> None:
    with torch.no_grad():
        plain = engine.model(IDS).logits
    assert isinstance(loaded.model.model.layers[0].self_attn.q_proj, LoraLinear)
    assert torch.equal(ours(loaded, [None] * 4), plain)
    assert torch.equal(loaded.model(IDS).logits, plain)
    assert torch.equal(ours(loaded, [None, "law", "geo", None])[[0, 3]], plain[[0, 3]])


def test_adapter_chosen_by_token(loaded: TorchEngine) -> None:
    """Causality makes tokens before the switch equal to the first adapter's."""
    index = torch.tensor([[0, 0, 0, 1, 1, 1]])
    with torch.no_grad(), loaded.lora.select(["law", "geo"], index):
        got = loaded.model(IDS[:1]).logits
    torch.testing.assert_close(got[:, :3], ours(loaded, ["law"], IDS[:1])[:, :3], atol=1e-5, rtol=0)
    assert (got[:, 3:] - ours(loaded, ["law"], IDS[:1])[:, 3:]).abs().max() > 0.1


def test_failing_forward_leaves_no_adapter_behind(loaded: TorchEngine) -> None:
    plain = ours(loaded, [None] * 4)
    with pytest.raises(IndexError), loaded.lora.select(["law"] * 4):
        loaded.model(torch.full((4, 3), 10_000))
    assert loaded.lora.selection is None
    assert torch.equal(loaded.model(IDS).logits, plain)


def test_removed_adapter_is_gone_and_the_others_stay(
    engine: TorchEngine, adapter_dirs: dict[str, Path]
) -> None:
    engine.add_adapter("geo", adapter_dirs["geo"])
    engine.add_adapter("law", adapter_dirs["law"])
    both = ours(engine, ["geo", "law", None, None])
    engine.remove_adapter("law")
    torch.testing.assert_close(ours(engine, ["geo"] * 4)[0], both[0], atol=1e-5, rtol=0)
    with pytest.raises(KeyError):
        ours(engine, ["law"] * 4)
    engine.add_adapter("law", adapter_dirs["bio"])  # the same key, other weights
    again = ours(engine, ["geo", "law", None, None])
    assert (again[1] - both[1]).abs().max() > 0.1, "the old concatenation was used"
    assert torch.equal(again[2:], both[2:])
    torch.testing.assert_close(again[0], both[0], atol=1e-5, rtol=0)


def test_lora_on_a_tied_output_head(tmp_path: Path, model_dir: Path) -> None:
    from tests.serving.conftest import make_adapter

    folder = make_adapter(model_dir, tmp_path / "head", seed=9, r=3, target_modules=["lm_head", "q_proj"])
    engine = TorchEngine.load(models.resolve(str(model_dir)))
    engine.add_adapter("head", folder)
    want = peft_logits(model_dir, folder, IDS)
    torch.testing.assert_close(ours(engine, ["head"] * 4), want, atol=1e-4, rtol=0)
    got = engine.prompt_logprobs("head", IDS[0].tolist()).continuations[0].logprobs
    expect = want[0].log_softmax(-1)[range(5), IDS[0, 1:]]
    assert got == pytest.approx(expect.tolist(), abs=1e-4)
