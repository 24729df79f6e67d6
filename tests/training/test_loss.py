"""The chunked loss against the plain one, and memory savers against none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError
from qwen_ray.training import lora, memory
from qwen_ray.training import loss as losses
from qwen_ray.training.loss import TokenLoss, document_losses, head_loss
from tests.training.test_attention import LENGTHS, batch_of, documents_of, tiny

S, HIDDEN, VOCABULARY = 70, 24, 500
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one short."""
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 32 * 4 * VOCABULARY)


def plain(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def close(ours: torch.Tensor, theirs: torch.Tensor | None) -> None:
    """Equal to 1e-5 of the largest value."""
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def case(*, trained: bool, bias: bool, count: int = S) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias).requires_grad_(trained)
    return (
        torch.randn(count, HIDDEN, requires_grad=True),
        head,
        torch.randint(0, VOCABULARY, (count,)),
    )


def gradients(function: Any, hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> list[Any]:
    hidden.grad = None
    head.zero_grad(set_to_none=True)
    value = function(hidden, head, targets)
    (value * 0.25).backward()
    return [value.detach(), hidden.grad, *(p.grad for p in head.parameters())]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_loss_and_gradients_are_the_plain_ones(trained: bool, bias: bool, wrapped: bool) -> None:
    """``wrapped``: a head that is not a plain linear layer, as under an adapter."""
    hidden, head, targets = case(trained=trained, bias=bias)
    expected = gradients(plain, hidden, head, targets)
    ours = gradients(head_loss, hidden, nn.Sequential(head) if wrapped else head, targets)
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [S, 0])
def test_the_head_is_entered_once_whatever_the_number_of_tokens(count: int) -> None:
    """Strategies gather a sharded head there, and every rank must take part as often as the others."""
    hidden, head, targets = case(trained=True, bias=False, count=count)
    calls: list[int] = []
    head.register_forward_pre_hook(lambda *_: calls.append(1))
    head_loss(hidden, head, targets)
    assert len(calls) == 1
    assert head(hidden).shape == (count, VOCABULARY)  # it is itself again


def test_large_logits_keep_their_precision() -> None:
    hidden, head, targets = case(trained=False, bias=False)
    with torch.no_grad():
        head.weight *= 300
    exact = plain(hidden.double(), head.double(), targets)
    assert exact > 1000 * S / 20
    head.float()
    assert head_loss(hidden, head, targets).item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_bf16_autocast_is_as_exact_as_the_plain_loss(trained: bool) -> None:
    hidden, head, targets = case(trained=trained, bias=True)
    exact = gradients(plain, hidden, head, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = gradients(plain, hidden, head, targets)
        ours = gradients(head_loss, hidden, head, targets)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        if e is not None:
            assert a.dtype == e.dtype
            assert (a - e).norm() <= 1.2 * (b - e).norm() + 1e-3 * e.norm()


def logits_alive(function: Any, hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> int:
    """Values in tensors with a vocabulary-long last axis that the backward pass would need."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() if tensor.shape[-1:] == (VOCABULARY,) and tensor.dim() == 2 else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = function(hidden, head, targets)
    node = value.grad_fn
    kept += sum(g.numel() for g in getattr(node, "grads", ()) if g is not None and g.shape[-1] == VOCABULARY)
    return kept


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    hidden, head, targets = case(trained=False, bias=False)
    assert logits_alive(plain, hidden, head, targets) >= S * VOCABULARY
    assert logits_alive(head_loss, hidden, head, targets) == 0


def shapes_made(function: Any) -> set[tuple[int, ...]]:
    """Shapes of all tensors that any operation made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: set[tuple[int, ...]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.shapes.add(tuple(out.shape))
            return out

    with Watch() as watch:
        function()
    return watch.shapes


def test_logits_never_exist_whole() -> None:
    hidden, head, targets = case(trained=True, bias=False)
    assert (S, VOCABULARY) in shapes_made(lambda: plain(hidden, head, targets).backward())
    made = shapes_made(lambda: head_loss(hidden, head, targets).backward())
    assert max(shape[0] for shape in made if shape[1:] == (VOCABULARY,)) == 32


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation the head's gradient would be as large as the head."""
    hidden, head, targets = case(trained=True, bias=False)
    expected = plain(hidden, head, targets).item()
    made: list[torch.Size] = []
    for name in ("zeros_like", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda x, make=make: made.append(x.shape) or make(x))
    head_loss(hidden, head, targets)
    assert made.count(head.weight.shape) == 1
    with torch.no_grad():
        assert head_loss(hidden, head, targets).item() == pytest.approx(expected, rel=1e-6)
    assert made.count(head.weight.shape) == 1


def test_a_second_backward_is_refused() -> None:
    hidden, head, targets = case(trained=True, bias=False)
    value = head_loss(hidden, head, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already used"):
        value.backward()


@pytest.mark.parametrize("wrapped", [True, False])
def test_without_supervised_tokens_it_is_zero_and_joined(wrapped: bool) -> None:
    """Every trained weight gets a gradient of zero: otherwise another rank would wait for it."""
    model = tiny("Qwen2")
    if wrapped:
        model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))  # type: ignore[operator]
    batch = batch_of([[5], [7]])
    assert batch.supervised == 0
    value = TokenLoss(model)(batch)
    assert value.item() == 0
    value.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def lora_model(targets: list[str], *, dropout: float = 0.0, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout, init_lora_weights=False
    )
    return get_peft_model(tiny("Qwen2", **settings), config)


def model_gradients(loss: TokenLoss, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss.zero_grad(set_to_none=True)
    torch.manual_seed(3)  # dropout
    value = loss(batch)
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_adapters_on_layers_and_on_the_head(targets: list[str]) -> None:
    model = lora_model(targets)
    batch = batch_of(documents_of(LENGTHS))
    loss = TokenLoss(model)
    value, grads = model_gradients(loss, batch)
    assert grads.keys() == {n for n, p in loss.named_parameters() if p.requires_grad}
    loss.zero_grad(set_to_none=True)
    expected = plain(loss.hidden(batch), loss.head, batch.targets)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6)
    for name, p in loss.named_parameters():
        if p.grad is not None:
            close(grads[name], p.grad)
    assert document_losses(loss, batch).sum().item() == pytest.approx(value, rel=1e-5)


def test_a_tied_head_adds_to_the_embeddings_gradient() -> None:
    batch = batch_of(documents_of(LENGTHS))
    loss = TokenLoss(tiny("Qwen2", tied=True))
    assert loss.head.weight is loss.model.get_input_embeddings().weight  # type: ignore[operator]
    _, grads = model_gradients(loss, batch)
    loss.zero_grad(set_to_none=True)
    plain(loss.hidden(batch), loss.head, batch.targets).backward()
    for name, p in loss.named_parameters():
        close(grads[name], p.grad)


def test_liger_needs_a_gpu() -> None:
    assert losses.choose("auto", CPU) == losses.choose("auto", torch.device("cuda")) == "chunked"
    with pytest.raises(UserError, match="needs a GPU"):
        losses.choose("liger", CPU)


@pytest.fixture
def _group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("around_head", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_fsdp_with_the_head_in_the_root_or_by_itself(around_head: bool, recompute: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    batch = batch_of(documents_of(LENGTHS))
    value, expected = model_gradients(TokenLoss(tiny("Qwen2")), batch)
    loss = TokenLoss(tiny("Qwen2"))
    if recompute:
        memory.checkpoint_layers(loss)
    mesh = init_device_mesh("cpu", (1,))
    for layer in memory.decoder_layers(loss):
        fully_shard(layer, mesh=mesh)
    if around_head:
        fully_shard(loss.head, mesh=mesh)
    fully_shard(loss, mesh=mesh)
    sharded, grads = model_gradients(loss, batch)
    assert sharded == pytest.approx(value, rel=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        close(grad.full_tensor(), expected[name])  # type: ignore[operator]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recomputed_layers_give_the_same_bits(method: str) -> None:
    def make() -> TokenLoss:
        if method == "full":
            return TokenLoss(tiny("Qwen2", attention_dropout=0.1))
        return TokenLoss(lora_model(["q_proj", "down_proj"], dropout=0.1))

    batch = batch_of(documents_of(LENGTHS))
    value, expected = model_gradients(make(), batch)
    loss = make()
    memory.checkpoint_layers(loss.model)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    # A pre-hook: the second run stops as soon as all that the backward pass needs is there.
    memory.decoder_layers(loss)[0].get_submodule("mlp").register_forward_pre_hook(count)
    again, grads = model_gradients(loss, batch)
    assert runs == 2  # once more in the backward pass
    assert again == value
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    assert grads.keys() == expected.keys()


@pytest.mark.parametrize("recompute", [True, False])
def test_activations_kept_elsewhere_come_back_and_weights_stay(recompute: bool) -> None:
    batch = batch_of(documents_of(LENGTHS))
    loss = TokenLoss(lora_model(["q_proj"]))
    if recompute:
        memory.checkpoint_layers(loss.model)
    value, expected = model_gradients(loss, batch)
    weights = {p.data_ptr() for p in loss.parameters()}
    moved: list[int] = []

    def store(tensor: torch.Tensor) -> Any:
        assert tensor.data_ptr() not in weights
        moved.append(tensor.nbytes)
        copy = tensor.clone()
        return lambda: copy

    with memory.saved_elsewhere(store, minimum_bytes=4000):
        again, grads = model_gradients(loss, batch)
    assert sum(moved) > 2 * 4 * 32 * sum(LENGTHS)
    assert min(moved) >= 4000
    assert again == value
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recompute", [True, False])
def test_compiled_layers_agree(recompute: bool) -> None:
    """Traced and differentiated by the compiler, run eagerly: no C++ compiler is needed. Two lengths."""
    batches = [batch_of(documents_of(LENGTHS)), batch_of(documents_of(LENGTHS[2:]))]
    expected = [model_gradients(TokenLoss(tiny("Qwen2")), batch) for batch in batches]
    loss = TokenLoss(tiny("Qwen2"))
    if recompute:
        memory.checkpoint_layers(loss)
    memory.compile_layers(loss, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for batch, (value, grads) in zip(batches, expected, strict=True):
        compiled, ours = model_gradients(loss, batch)
        assert compiled == pytest.approx(value, rel=1e-5)
        for name in grads:
            close(ours[name], grads[name])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_method_config_reaches_the_adapter() -> None:
    """The project's own adapter, not only PEFT's."""
    model = lora.add_adapter(tiny("Qwen2"), MethodConfig(r=2), seed=0)  # type: ignore[arg-type]
    _, grads = model_gradients(TokenLoss(model), batch_of(documents_of(LENGTHS)))
    assert all("lora_" in name for name in grads)
    assert grads
