"""The training loop: one for LoRA and full fine-tuning, one process or many workers.

A step is: draw the rows of the global batch, take this worker's share, sum the loss over the supervised
tokens, divide by the number of supervised tokens in the *global* batch, clip, step. So the loss is the
token mean however rows fall on workers and micro-steps. Every worker draws the whole stream and knows that
count without asking.

Exactness: the stream's state is in the checkpoint, the learning rate is a function of the step, and
dropout's generator is seeded from (seed, step, rank). A run that was killed and resumed is the run that
was not, bit for bit, at the same number of workers on the same kind of device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from qwen_ray import __version__, models
from qwen_ray.config import OptimConfig, RunConfig
from qwen_ray.data.dataset import Dataset, build_dataset
from qwen_ray.data.packing import Row, block_mask, collate
from qwen_ray.data.tokenise import IGNORE, Example
from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_json
from qwen_ray.training import checkpoint as ckpt
from qwen_ray.training import lora, precision
from qwen_ray.training.schedule import learning_rate
from qwen_ray.training.strategy.ddp import Ddp

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS_CHUNK = 4096
"""Positions whose logits exist at once: 152k-word logits of a whole batch would not fit."""

OnMetrics = Callable[[dict[str, Any]], None]


@dataclass
class Result:
    """How far a run went, and the step it went on from. Its losses are in its metrics."""

    steps: int
    resumed_from: int


class TokenLoss(nn.Module):
    """Sum of the next-token loss over supervised tokens; logits are made at those positions only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Under PEFT the layers are replaced inside the base model, so the base is what runs.
        # In a list, so that it is not a second child with the same weights.
        base: Any = model
        self._base = [base.get_base_model() if hasattr(model, "peft_config") else base]

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """``batch`` as :func:`qwen_ray.data.packing.collate` makes it; returns a scalar, in nats."""
        base = self._base[0]
        hidden = base.base_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=block_mask(batch["segments"]),
            use_cache=False,
        ).last_hidden_state
        labels = batch["labels"][:, 1:]
        supervised = labels != IGNORE
        inputs, targets = hidden[:, :-1][supervised], labels[supervised]
        head = base.get_output_embeddings()
        if len(targets) == 0:
            # Zero, but joined to the trained weights: a rank without a supervised token must still take part.
            return hidden.float().sum() * 0.0
        losses = []
        for start in range(0, len(targets), LOGITS_CHUNK):
            logits = head(inputs[start : start + LOGITS_CHUNK]).float()
            losses.append(F.cross_entropy(logits, targets[start : start + LOGITS_CHUNK], reduction="sum"))
        return torch.stack(losses).sum()


@dataclass
class Run:
    """What one worker trains with, put together once."""

    config: RunConfig
    strategy: Ddp
    tokenizer: PreTrainedTokenizerBase
    data: Dataset
    numbers: precision.Precision
    model: PreTrainedModel
    module: nn.Module
    """The model under its loss, joined to the other workers."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    base: str
    """Fingerprint of the weights that training starts from."""

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def rows_a_step(self) -> int:
        """Rows of the global batch. Counted with the configured workers, so fewer make the same steps."""
        optim = self.config.optim
        return optim.batch_size * optim.gradient_accumulation * max(1, self.config.cluster.workers)

    @property
    def identity(self) -> str:
        """A hash of everything that decides the result: a checkpoint goes on only under the same one.

        Where a run is stored, how it is watched and how many machines may fail are left out.
        """
        decides = self.config.model_dump(
            mode="json", include={"model", "method", "optim", "precision", "seed"}
        )
        decides |= {"base": self.base, "rows_a_step": self.rows_a_step}
        decides["data"] = {**self.data.manifest, "files": sorted(self.data.manifest["files"].values())}
        return sha256_json(decides)


def train(config: RunConfig, *, strategy: Ddp, store: ckpt.CheckpointStore, on_metrics: OnMetrics) -> Result:
    """Run ``config`` on this worker, resuming from ``store`` if it holds a checkpoint.

    ``on_metrics`` is called on rank 0 with one flat dict a step (``loss``, ``learning_rate``, ``grad_norm``,
    ``tokens_per_second`` ...), which has ``eval_loss`` and ``eval_loss/DOMAIN`` after an evaluation.
    """
    run = set_up(config, strategy)
    optim, stream = config.optim, run.data.stream
    total_steps = optim.max_steps or max(1, -(-stream.rows_in(optim.epochs) // run.rows_a_step))
    first = restore(run, store)

    for step in range(first, total_steps):
        started = time.perf_counter()
        rows = [stream.next_row() for _ in range(run.rows_a_step)]
        supervised = max(1, sum(row.supervised for row in rows))
        rate = learning_rate(step, total_steps, optim)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(int(sha256_json([config.seed, step, strategy.rank])[:15], 16))

        run.module.train()
        loss_sum = torch.zeros((), device=strategy.device)
        batches = micro_batches(run, rows)
        for batch in batches[:-1]:
            with strategy.accumulate(run.module):
                loss_sum += backward(run, batch, supervised)
        loss_sum += backward(run, batches[-1], supervised)
        run.scaler.unscale_(run.optimizer)
        norm = strategy.clip(run.trained, optim.max_grad_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)

        loss = float(strategy.sum(loss_sum)) / supervised  # the step's one wait for the device
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step + 1}; lower optim.learning_rate")
        seconds = time.perf_counter() - started
        metrics: dict[str, Any] = {
            "step": step + 1,
            "total_steps": total_steps,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": float(norm),
            "tokens_per_second": sum(row.tokens for row in rows) / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "passes": stream.mixture.served / stream.mixture.pass_length,
        }
        done = step + 1 == total_steps
        if done or (step + 1) % config.evaluate.every_steps == 0:
            metrics |= validation_loss(run)
        if strategy.rank == 0:
            on_metrics(metrics)
        if done or (step + 1) % config.checkpoint.every_steps == 0:
            writer = (lambda folder: save(run, step + 1, folder)) if strategy.rank == 0 else None  # noqa: B023
            store.save(step + 1, writer, metrics)
    return Result(steps=total_steps, resumed_from=first)


def set_up(config: RunConfig, strategy: Ddp) -> Run:
    """Data, model, optimizer: the same on every worker."""
    ref = models.resolve(config.model.name)
    tokenizer = models.load_tokenizer(ref)
    data = build_dataset(config.data, tokenizer, seed=config.seed, context=models.context_length(ref))
    numbers = precision.choose(config.precision, strategy.device)
    torch.manual_seed(config.seed)  # the adapter's initial weights, equal on every rank
    if config.method.name == "full":
        model = models.load_model(ref, dtype=torch.float32)
    else:
        model = lora.add_adapter(models.load_model(ref, dtype=numbers.compute), config.method)
    module = strategy.prepare(TokenLoss(model))
    scaler = torch.amp.GradScaler(strategy.device.type, enabled=numbers.scales_loss)
    return Run(
        config=config,
        strategy=strategy,
        tokenizer=tokenizer,
        data=data,
        numbers=numbers,
        model=model,
        module=module,
        optimizer=make_optimizer(model, config.optim),
        scaler=scaler,
        base=models.fingerprint(ref),
    )


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over what is trained; decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def micro_batches(run: Run, rows: list[Row]) -> list[dict[str, torch.Tensor]]:
    """This rank's share of ``rows`` in batches on its device; every rank gets equally many batches."""
    rank, world_size, size = run.strategy.rank, run.strategy.world_size, run.config.optim.batch_size
    pad_id = int(run.tokenizer.pad_token_id)
    own = rows[rank::world_size]
    blank = Row((Example("", "", [pad_id], [IGNORE]),))
    own += [blank] * (-(-len(rows) // world_size) - len(own))
    batches = [collate(own[i : i + size], pad_id) for i in range(0, len(own), size)]
    return [{k: v.to(run.strategy.device, non_blocking=True) for k, v in batch.items()} for batch in batches]


def backward(run: Run, batch: dict[str, torch.Tensor], supervised: int) -> torch.Tensor:
    """Forward and backward of one micro-batch; returns the summed loss of its tokens, detached."""
    with run.numbers.autocast(run.strategy.device):
        loss: torch.Tensor = run.module(batch)
    # The strategy averages gradients over workers; times their number, that is the sum we divide by tokens.
    run.scaler.scale(loss * (run.strategy.world_size / supervised)).backward()
    return loss.detach()


@torch.no_grad()
def validation_loss(run: Run) -> dict[str, float]:
    """Token-mean loss on the held-out rows: ``eval_loss`` over all, ``eval_loss/DOMAIN`` for each."""
    validation = run.data.validation
    if not validation:
        return {}
    run.module.eval()
    # Not through the wrapper, which would prepare for a backward that never comes.
    inner: nn.Module = getattr(run.module, "module", run.module)
    totals = torch.zeros(len(validation), 2, dtype=torch.float64, device=run.strategy.device)
    for d, rows in enumerate(validation.values()):
        for batch in micro_batches(run, rows):
            with run.numbers.autocast(run.strategy.device):
                totals[d, 0] += inner(batch)
            totals[d, 1] += (batch["labels"] != IGNORE).sum()
    totals = run.strategy.sum(totals)
    losses = {f"eval_loss/{d}": float(t[0] / t[1]) for d, t in zip(validation, totals, strict=True)}
    return {"eval_loss": float(totals[:, 0].sum() / totals[:, 1].sum()), **losses}


def save(run: Run, step: int, folder: Path) -> None:
    """Write a whole checkpoint of the state after ``step`` steps into an empty folder."""
    if run.config.method.name == "lora":
        run.model.save_pretrained(str(folder / "adapter"))
    else:
        run.model.save_pretrained(str(folder / "model"))
        run.tokenizer.save_pretrained(str(folder / "model"))
    torch.save(
        {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}, folder / "optimizer.pt"
    )
    ckpt.seal(
        folder,
        {
            "step": step,
            "identity": run.identity,
            "data_state": run.data.stream.state(),
            "data": run.data.manifest,
            "config": run.config.model_dump(mode="json"),
            "rng": "torch.manual_seed(sha256(seed, step, rank)) before each step",
            "world_size": run.strategy.world_size,
            "versions": {"qwen-ray": __version__, "torch": torch.__version__},
        },
    )


def restore(run: Run, store: ckpt.CheckpointStore) -> int:
    """Load the newest checkpoint, if any; returns the number of steps already done."""
    with store.latest() as folder:
        if folder is None:
            return 0
        manifest = ckpt.verify(folder)
        if manifest["identity"] != run.identity:
            raise UserError(
                "the run in this folder was started with another configuration, other data or another base",
                where=str(folder),
                fix="repeat the command it was started with, or train into a new --out folder",
            )
        if run.config.method.name == "lora":
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(run.model, load_peft_weights(str(folder / "adapter"), device="cpu"))
        else:
            from safetensors.torch import load_file

            weights = {
                k: v
                for part in sorted((folder / "model").glob("*.safetensors"))
                for k, v in load_file(part).items()
            }
            missing, unexpected = run.model.load_state_dict(weights, strict=False)
            # A tied head is stored once, under the embedding's name.
            tied = set(run.model.all_tied_weights_keys)
            if unexpected or set(missing) - tied:
                raise RuntimeError(f"the checkpoint does not fit the model: {unexpected or missing}")
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.data.stream.load_state(manifest["data_state"])
        return int(manifest["step"])
