"""Next-token loss from a micro-batch, without its logits ever existing whole.

Logits are made only at supervised positions, a chunk at a time. A chunk's gradient of hidden states and
head is computed at once, while its logits are there, so nothing of vocabulary size is kept for the backward
pass, which only scales (the idea of Liger's fused cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qwen_ray.errors import UserError
from qwen_ray.planner.programs import LOGITS_BYTES
from qwen_ray.training.attention import Documents, Kind, Packed

LossKind = Literal["chunked", "liger"]


class PackedBatch(Packed, Protocol):
    """What is needed of a batch; see :class:`qwen_ray.data.packing.Batch`."""

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def position_ids(self) -> torch.Tensor: ...
    @property
    def where(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...


def choose(name: str, device: torch.device) -> LossKind:
    """Turn ``compute.loss`` into a kind. Raises :class:`UserError` where Liger cannot run."""
    if name != "liger":
        return "chunked"
    fix = "use compute.loss auto or chunked"
    if device.type != "cuda":
        raise UserError(
            f"Liger's loss needs a GPU, and the device is {device.type}", where="compute.loss", fix=fix
        )
    try:
        import liger_kernel.transformers  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: F401
    except ImportError as e:
        raise UserError(
            f"Liger cannot be imported: {e}",
            where="compute.loss",
            fix=f"pip install liger-kernel, or {fix}",
        ) from None
    return "liger"


class TokenLoss(nn.Module):
    """Sum over a micro-batch's supervised tokens of the next-token loss, in nats."""

    def __init__(
        self, model: nn.Module, *, attention: Kind = "documents", loss: LossKind = "chunked"
    ) -> None:
        """``model``: a causal language model that attends by :mod:`qwen_ray.training.attention`."""
        super().__init__()
        self.model = model
        self.attention, self.loss = attention, loss
        # Under PEFT the layers are replaced inside the base model, so the base is what runs.
        # In a list, so that it is not a second child with the same weights.
        base: Any = model
        self.nats: torch.Tensor | None = None
        """The last batch's loss token by token, float32 ``[S]``, without gradient. None from Liger, whose
        kernel gives the sum only. Not returned, for a strategy may do things to what is returned."""
        self._base = [base.get_base_model() if hasattr(model, "peft_config") else base]

    @property
    def head(self) -> nn.Module:
        """The output projection, ``[hidden]`` to ``[vocabulary]``."""
        head: nn.Module = self._base[0].get_output_embeddings()
        return head

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """The last hidden state at the ``S`` positions that predict a supervised token: ``[S, hidden]``."""
        states: torch.Tensor = (
            self._base[0]
            .base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                **Documents.of(batch, self.attention).model_inputs,
            )
            .last_hidden_state
        )
        return states[0].index_select(0, batch.where)

    def forward(self, batch: PackedBatch | Callable[[], Any]) -> Any:
        """The loss, a float32 scalar; without supervised tokens zero, but joined to what is trained.

        A function instead of a batch is called: where parameters are sharded, the layers can be used from
        inside this forward only.
        """
        if callable(batch):
            return batch()
        hidden = self.hidden(batch)
        if self.loss == "liger" and _is_linear(self.head):
            return _inside(self.head, _liger, hidden, batch.targets)
        self.nats = torch.empty(len(batch.targets), dtype=torch.float32, device=hidden.device)
        return head_loss(hidden, self.head, batch.targets, nats=self.nats)


@torch.no_grad()
def document_losses(model: TokenLoss, batch: PackedBatch) -> torch.Tensor:
    """Loss of each document, float32 ``[D]``: summed over its supervised tokens, in nats."""
    hidden, head = model.hidden(batch), model.head
    if _is_linear(head):
        nats = _inside(head, _token_losses, hidden, batch.targets)
    else:
        nats = _by_chunks(head, hidden, batch.targets, size=_chunk(head, hidden))
    document = torch.bucketize(batch.where, batch.offsets[1:], right=True)
    return nats.new_zeros(len(batch.lengths)).index_add_(0, document, nats)


def _token_losses(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    def project(states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, head.weight, head.bias)

    return _by_chunks(project, hidden, targets, size=_chunk(head, hidden))


def _by_chunks(
    project: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    size: int,
) -> torch.Tensor:
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([F.cross_entropy(project(h).float(), t, reduction="none") for h, t in parts])


def head_loss(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, *, nats: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of ``head(hidden)``, ``[S, h]``, against ``targets``, int64 ``[S]``, summed, in nats.
    ``nats``, float32 ``[S]``, is filled with what each position adds.

    A linear head takes the fused way, within one call of the module: a strategy that gathers a sharded
    weight around a module's forward (FSDP2, ZeRO-3) does so here, once on every rank however many tokens
    it has. Another head (one with an adapter) is called chunk by chunk, and its logits are recomputed in the
    backward pass: the same result for one product more. With a different number of chunks on each rank, such
    a head must not be sharded.
    """
    if _is_linear(head):
        return _inside(head, partial(_fused, nats=nats), hidden, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    size = _chunk(head, hidden)
    for start in range(0, max(1, len(targets)), size):  # an empty chunk joins the result to the head
        span = slice(start, start + size)
        losses = checkpoint(_chunk_losses, head, hidden[span], targets[span], use_reentrant=False)
        total = total + losses.sum()
        if nats is not None:
            nats[span] = losses.detach()
    return total


def _is_linear(head: nn.Module) -> bool:
    """Not one that holds 4-bit or 8-bit codes."""
    weight = getattr(head, "weight", None)
    return isinstance(head, nn.Linear) and isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point


def _inside(
    head: nn.Module,
    function: Callable[[nn.Linear, torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Call ``head`` with ``function`` as its forward: within its hooks, its weight is whole."""
    own = head.__dict__.get("forward")
    head.forward = MethodType(function, head)
    try:
        result: torch.Tensor = head(hidden, targets)
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    return result


def _fused(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, nats: torch.Tensor | None = None
) -> torch.Tensor:
    inputs: list[torch.Tensor | None] = [hidden, head.weight, head.bias]
    if not torch.is_grad_enabled():  # which the function cannot see from within
        inputs = [None if x is None else x.detach() for x in inputs]
    loss: torch.Tensor = _HeadLoss.apply(*inputs, targets, _chunk(head, hidden), _compute_dtype(hidden), nats)
    return loss


def _chunk_losses(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _chunk(head: nn.Module, hidden: torch.Tensor) -> int:
    """Positions whose logits exist at once: a multiple of 16, as matrix units like it."""
    vocabulary = int(getattr(head, "out_features", 0)) or 2**17
    budget = LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"])
    return max(16, budget // (4 * vocabulary) // 16 * 16)


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _logits(
    states: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, buffer: torch.Tensor | None
) -> torch.Tensor:
    if buffer is None:
        return F.linear(states, matrix, bias)
    logits = buffer[: len(states)]
    torch.mm(states, matrix.t(), out=logits)
    return logits if bias is None else logits.add_(bias)


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, float32 ``[n, 1]``, and d sum / d logits = softmax - onehot, float32. Overwrites float32
    logits."""
    if logits.dtype == torch.float32:
        logits -= logits.amax(1, keepdim=True)
        own = logits.gather(1, target)
        total = logits.exp_().sum(1, keepdim=True)
        losses = total.log() - own
        logits.div_(total)
    else:
        # One kernel reads 16 bits and writes 32: the loss is as exact as float32 makes it.
        scores = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        losses = -scores.gather(1, target)
        logits = scores.exp_()
    logits.scatter_add_(1, target, logits.new_full((1, 1), -1.0).expand_as(target))
    return losses, logits


class _HeadLoss(torch.autograd.Function):
    """Loss and gradients together; the backward pass multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        size: int,
        dtype: torch.dtype,
        nats: torch.Tensor | None,
    ) -> torch.Tensor:
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            states, matrix = hidden.to(dtype), weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(states) if want_hidden else None
            # In the weight's own format, like any gradient: float32 for float32 master weights.
            fresh = weight.dtype == dtype and len(targets) > 0  # the first product fills it
            make = torch.empty_like if fresh else torch.zeros_like
            grad_weight = make(weight) if want_weight else None
            grad_bias = torch.zeros_like(bias) if want_bias and bias is not None else None
            # One buffer for all chunks: on a CPU, fresh pages cost more than what is computed in them.
            buffer = (
                states.new_empty(min(size, len(targets)), len(matrix)) if dtype == torch.float32 else None
            )
            for start in range(0, len(targets), size):
                span = slice(start, start + size)
                part, target = states[span], targets[span, None]
                logits = _logits(part, matrix, offset, buffer)
                losses, grad = _cross_entropy(logits, target)
                grad = grad.to(dtype)
                loss += losses.sum()
                if nats is not None:
                    nats[span] = losses[:, 0]
                if grad_hidden is not None:
                    torch.mm(grad, matrix, out=grad_hidden[span])
                if grad_weight is not None:
                    if grad_weight.dtype == dtype:
                        grad_weight.addmm_(grad.t(), part, beta=1 if start else 0)
                    else:
                        grad_weight += grad.t() @ part
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        ctx.hidden_dtype = hidden.dtype
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("this loss was already used: its gradients are scaled in place, once")
        grad_hidden, grad_weight, grad_bias = ctx.grads
        ctx.grads = None  # frees them as soon as their users are done
        grads = [None if g is None else g.mul_(grad_loss) for g in (grad_hidden, grad_weight, grad_bias)]
        if grads[0] is not None:
            grads[0] = grads[0].to(ctx.hidden_dtype)
        return (*grads, None, None, None, None)


def _liger(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Liger's kernel as a head's forward; it keeps the head's gradient in the product's format."""
    if len(targets) == 0:  # its grid would be empty
        return _fused(head, hidden, targets)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    dtype = _compute_dtype(hidden)
    bias = None if head.bias is None else head.bias.to(dtype)
    loss: torch.Tensor = fused(head.weight.to(dtype), hidden.to(dtype), targets, bias)
    return loss.float()
