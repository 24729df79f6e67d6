"""Isolated documents: each kind against float64, and whole models against one document at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from qwen_ray.data.packing import Batch, Row, collate
from qwen_ray.data.tokenise import Example
from qwen_ray.errors import UserError
from qwen_ray.training import attention
from qwen_ray.training.attention import Documents
from qwen_ray.training.loss import TokenLoss, document_losses

LENGTHS = (5, 90, 17, 1, 33, 16, 70, 2, 100, 5)
CPU = torch.device("cpu")


def batch_of(documents: list[list[int]]) -> Batch:
    """Every token but a document's first is supervised."""
    return collate([Row(tuple(Example("", "", ids, ids) for ids in documents))], pad_id=0)


def documents_of(lengths: tuple[int, ...], *, seed: int = 0, vocabulary: int = 97) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, vocabulary) for _ in range(n)] for n in lengths]


def tiny(architecture: str, *, tied: bool = False, **settings: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
        tie_word_embeddings=tied, **settings,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{architecture}ForCausalLM")(config)
    attention.use(model)  # type: ignore[arg-type]
    return model.train()


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], window: int | None
) -> torch.Tensor:
    """float64, document by document, from the definition; [1, T, H, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = []
    for a, b, c in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True):
        scores = a @ b.transpose(-1, -2) * 0.3
        i = torch.arange(a.shape[2])
        unseen = (i[None, :] > i[:, None]) | (i[:, None] - i[None, :] >= (window or len(i)))
        out.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ c)
    return torch.cat(out, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("lengths", [LENGTHS, (40, 130), (7,)])
@pytest.mark.parametrize("kind", ["documents", "block_mask"])
def test_each_kind_is_attention_by_definition(
    kind: attention.Kind, lengths: tuple[int, ...], window: int | None
) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    exact = [torch.randn(1, h, total, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    single = [x.detach().float().requires_grad_() for x in exact]
    weight = torch.randn(1, total, 4, 8, dtype=torch.float64)
    documents = Documents.of(batch_of(documents_of(lengths)), kind)
    out, _ = attention.attention_forward(
        nn.Module(), *single, documents.mask, documents=documents, scaling=0.3, sliding_window=window
    )
    expected = reference(*exact, lengths, window)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip(single, exact, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=2e-5)


def test_short_documents_share_calls_and_long_ones_are_not_padded() -> None:
    documents = Documents.of(batch_of(documents_of(LENGTHS)), "documents")
    assert 1 < len(documents.groups) < len(LENGTHS)
    assert sum(count for count, _ in documents.groups) == len(LENGTHS)
    assert Documents.of(batch_of(documents_of((40, 130))), "documents").gather is None


MODELS = [
    ("Qwen2", {}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    ("Qwen3", {}),
    ("Llama", {}),
    ("Mistral", {"sliding_window": 24}),
]


@pytest.mark.parametrize("kind", ["documents", "block_mask"])
@pytest.mark.parametrize(("architecture", "settings"), MODELS)
def test_packed_equals_one_document_at_a_time(
    architecture: str, settings: dict[str, Any], kind: attention.Kind
) -> None:
    """Losses of every document, and the gradients of all weights, against transformers' own sdpa."""
    documents = documents_of(LENGTHS)
    loss = TokenLoss(tiny(architecture, **settings), attention=kind)
    packed = document_losses(loss, batch_of(documents))
    loss(batch_of(documents)).backward()
    gradients = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}

    alone = tiny(architecture, **settings)
    alone.set_attn_implementation("sdpa")  # type: ignore[operator]
    total = torch.zeros(())
    for i, document in enumerate(documents):
        ids = torch.tensor([document])
        logits = alone(input_ids=ids).logits[0, :-1]
        value = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert packed[i].item() == pytest.approx(value.item(), abs=1e-5 * max(1, len(document)))
        total = total + value
    total.backward()
    assert len(gradients) == len(list(alone.parameters()))
    for name, p in alone.named_parameters():
        scale = float(p.grad.abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(gradients[f"model.{name}"], p.grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["documents", "block_mask"])
def test_neighbours_change_nothing(kind: attention.Kind) -> None:
    loss = TokenLoss(tiny("Qwen2"), attention=kind)
    documents = documents_of(LENGTHS)
    before = document_losses(loss, batch_of(documents))
    changed = documents_of(LENGTHS, seed=1)
    changed[4] = documents[4]
    after = document_losses(loss, batch_of(changed))
    assert after[4].item() == pytest.approx(before[4].item(), abs=1e-6)
    assert not torch.allclose(after[5:], before[5:])


def test_without_documents_it_is_sdpa_with_masks() -> None:
    """Evaluation and generation on the live model: left padding must still be masked."""
    model = tiny("Qwen2").eval()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    short = model(input_ids=ids[:, 2:]).logits[0, -1]
    padded = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0)).logits
    torch.testing.assert_close(padded[0, -1], short, rtol=1e-5, atol=1e-5)


def test_varlen_is_called_with_what_the_kernel_takes() -> None:
    """On meta tensors: signature, shapes and the backward formula, as no CPU runs the kernel."""
    documents = Documents(
        "varlen", torch.empty(4, dtype=torch.int32, device="meta"), (3, 4, 5), 512, CPU_MASK
    )
    q, k, v = (
        torch.empty(1, h, 12, 8, device="meta", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)
    )
    out = attention._varlen(q, k, v, documents=documents, scaling=0.3, window=None)
    assert out.shape == (1, 12, 4, 8)
    out.sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert k.grad.shape == (1, 2, 12, 8)


CPU_MASK = torch.empty(1, 1, 0, 0, dtype=torch.bool)


def test_auto_and_what_cannot_run() -> None:
    assert attention.choose("auto", CPU, torch.bfloat16) == "documents"
    assert attention.choose("block_mask", CPU, torch.float32) == "block_mask"
    with pytest.raises(UserError, match="GPU"):
        attention.choose("varlen", CPU, torch.bfloat16)
    with pytest.raises(UserError, match="fp16"):
        attention.choose("varlen", torch.device("cuda"), torch.float32)
    with pytest.raises(UserError, match="did you mean 'varlen'"):
        attention.choose("varlem", CPU, torch.float32)


def test_keys_are_repeated_where_no_kernel_shares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of it a machine without a GPU can know: the choice."""
    monkeypatch.setattr("torch.version.hip", None)
    bf16, half, single = torch.bfloat16, torch.float16, torch.float32
    for capability, flash in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, found=capability: found)
        for dtype in (bf16, half):
            assert attention._repeats_keys(torch.device("cuda"), dtype, masked=False) is not flash
        assert attention._repeats_keys(torch.device("cuda"), bf16, masked=True)
        assert attention._repeats_keys(torch.device("cuda"), single, masked=False)
        assert not attention._repeats_keys(torch.device("cpu"), bf16, masked=True)


def test_scores_that_the_kernels_do_not_make_are_refused() -> None:
    documents = Documents.of(batch_of(documents_of((4,))), "documents")
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(UserError, match="softcap"):
        attention.attention_forward(nn.Module(), x, x, x, None, documents=documents, softcap=30.0)
