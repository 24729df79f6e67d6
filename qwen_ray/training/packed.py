"""Packed training: many LoRA trials on one frozen base, by one forward and one backward pass.

The trials' rows lie end to end in one sequence, as a run's documents do, so the base's products are made
once for all. Everything else is each trial's own: data and their order, the number of tokens that its loss
is divided by, adapter, clipping, learning rate, decay, Adam's moments and step count, dropout. So a trial
is the run that :func:`qwen_ray.training.loop.train` would make of its configuration, but for rounding, and
its checkpoints are that run's: the loop goes on from them, and a pack from the loop's. On a GPU the masks of
dropout are others than the loop's.

No trial's numbers meet another's: one that diverges, even to NaN, leaves the others' bits as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_ray.config import RunConfig
from qwen_ray.data.dataset import Datasets
from qwen_ray.data.packing import Row
from qwen_ray.errors import UserError
from qwen_ray.evaluation.monitor import ForgettingMonitor
from qwen_ray.training import loop, lora, state
from qwen_ray.training.checkpoint import CheckpointStore
from qwen_ray.training.feed import Feed, Step
from qwen_ray.training.packed_bank import Bank, Lane
from qwen_ray.training.packed_base import FrozenBase
from qwen_ray.training.packed_checks import check, check_numbers
from qwen_ray.training.packed_layers import Adapter
from qwen_ray.training.packed_slot import Slot
from qwen_ray.training.run import identity, plan
from qwen_ray.training.schedule import learning_rate
from qwen_ray.training.throughput import Meter

__all__ = ["Adapter", "Pack", "Slot"]

_STATE, _STRATEGY = "shards", "ddp"  # as which a checkpoint counts: one process that holds the whole


class Pack:
    """K LoRA trials on one frozen base, trained by one forward and backward pass a step."""

    def __init__(self, config: RunConfig, *, device: torch.device | None = None) -> None:
        """Load the base of ``config``, with its precision and ``compute`` settings, which are the pack's
        whatever a trial's configuration says of them. ``device``: a GPU if there is one.

        Raises :class:`UserError` for a configuration that cannot be packed.
        """
        check(config)
        self.config = config
        self.base = FrozenBase(config, device)
        check_numbers(self.base.numbers)
        self.datasets = Datasets(self.base.tokenizer, context=self.base.context)
        self.bank: Bank
        self.slots: dict[str, Slot] = {}
        """The trials, in order of adding."""

    # ---------------------------------------------------------------- trials come and go

    def add(self, key: str, config: RunConfig, *, store: CheckpointStore | None = None) -> Slot:
        """Take in a trial: fresh, or from the newest checkpoint in ``store`` if it holds one.

        Raises :class:`UserError` where the trial does not fit this pack, or the checkpoint is of another
        run; ``ValueError`` for a key that is there already. The pack is as before then.
        """
        if key in self.slots:
            raise ValueError(f"'{key}' is in the pack")
        check(config, self.config)
        settings = lora.peft_settings(self.base.model, config.method)
        layers = self._adapted(settings.target_modules or ())
        data = self.datasets.build(config.data, seed=config.seed)
        slot = Slot(
            key=key,
            config=config,
            data=data,
            total=plan(config, data),
            identity=identity(config, self.base.fingerprint, data),
            feed=Feed(
                0,
                1,
                config.optim.batch_size,
                self.base.pad_id,
                domains={domain: i for i, domain in enumerate(data.manifest["shares"])},
            ),
            settings=settings,
            layers=layers,
        )
        found = store.newest() if store else None
        if found:
            state.check_fits(*found, slot.identity, _STATE, _STRATEGY)
        self.slots[key] = slot
        self._lay_out()
        try:
            if found:
                folder, manifest = found
                slot.restore(folder / "state", int(manifest["step"]), manifest["data_state"])
            else:
                slot.initialise(self.base.adapters.shapes)
        except BaseException:
            self.remove(key)
            raise
        return slot

    def remove(self, key: str) -> None:
        """Let a trial go, and all that is kept of it."""
        self.slots.pop(key).close()
        self._lay_out()

    def _adapted(self, targets: Iterable[str]) -> frozenset[str]:
        """The layers that PEFT would adapt for these names."""
        names = [name for name, m in self.base.model.named_modules() if isinstance(m, nn.Linear)]
        chosen = {n for n in names for target in targets if n == target or n.endswith(f".{target}")}
        if head := chosen - set(self.base.adapters.shapes):
            raise UserError(
                f"'{min(head)}' is the output head, which a pack's trials share",
                where="method.targets",
                fix="leave it out, or train it as a plain trial (trials.kind: plain)",
            )
        return frozenset(chosen)

    def _lay_out(self) -> None:
        """Give each trial its lane in a new bank: copies are small, and no lane is ever empty or stale."""
        slots = list(self.slots.values())
        sources = [slot.leave() for slot in slots]
        old: Bank | None = self.__dict__.pop("bank", None)
        if not slots:
            return
        self.bank = self.base.bank(
            [Lane(slot.config.method.r, slot.scale, slot.layers) for slot in slots],
            trains=True,
            old=None if old is None else (old, sources),
        )
        for lane, slot in enumerate(slots):
            slot.place(self.bank, lane)
        self.bank.refresh()

    # ---------------------------------------------------------------- training

    def step(self, keys: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """One optimizer step of each trial (of ``keys``) that is neither done nor failed.

        Returns the metrics of each, as the loop gives them; ``tokens_per_second`` and the like are a
        trial's own, so those of the pack are their sum. A trial whose loss or gradient is not finite has no
        metrics: it is marked ``failed`` and is not stepped again.
        """
        began = time.perf_counter()
        slots = [slot for slot in self._chosen(keys) if not slot.done and not slot.failed]
        if not slots:
            return {}
        taken = [(slot, slot.take()) for slot in slots]
        self.bank.grads.whole.zero_()
        losses = self._backward(taken)
        norms = self._clip()
        rates = [learning_rate(slot.step, slot.total, slot.config.optim) for slot in slots]
        for slot, rate in zip(slots, rates, strict=True):
            slot.update(rate)
        self.bank.refresh()
        # The step's one wait for the device.
        sums, norm = torch.cat([losses.flatten(), norms.double()]).split([losses.numel(), len(norms)])
        of_lanes, norm_of = sums.view(losses.shape).tolist(), norm.tolist()
        seconds = time.perf_counter() - began
        metrics = {}
        for (slot, data), rate in zip(taken, rates, strict=True):
            total = sum(of_lanes[slot.lane])
            try:
                loop.check_finite(total, "loss", slot.step + 1)
                loop.check_finite(norm_of[slot.lane], "gradient's norm", slot.step + 1)
            except FloatingPointError as e:
                slot.failed = str(e)
                continue
            slot.step, slot.data_state = slot.step + 1, data.state
            of_domains = {domain: of_lanes[slot.lane][i] for domain, i in slot.feed.domains.items()}
            metrics[slot.key] = {
                "step": slot.step,
                "total_steps": slot.total,
                **loop.losses_of(data, total, of_domains),
                "learning_rate": rate,
                "grad_norm": norm_of[slot.lane],
                "workers": 1,
                **loop.rates_of(data, Meter(), seconds),
            }
        return metrics

    def _clip(self) -> torch.Tensor:
        """Clip each lane's gradient to its trial's limit; returns the norms before, ``[K]``."""
        norms = torch.stack([torch.linalg.vector_norm(row) for row in self.bank.grads])
        limits = norms.new_tensor([slot.config.optim.max_grad_norm for slot in self.slots.values()])
        for row, factor in zip(self.bank.grads, (limits / (norms + 1e-6)).clamp(max=1.0), strict=True):
            row.mul_(factor)
        return norms

    def _backward(self, taken: list[tuple[Slot, Step]]) -> torch.Tensor:
        """Make the gradients of a step, in as many passes as its longest accumulation and the tokens need.
        Returns the summed loss of each lane's domains, float64."""
        width = max(len(slot.feed.domains) for slot, _ in taken)
        losses = torch.zeros(len(self.slots), width, dtype=torch.float64, device=self.base.device)
        dropout = {}
        for slot, _ in taken:
            if rate := slot.config.method.dropout:
                generator = torch.Generator(self.base.device)
                generator.manual_seed(loop.dropout_seed(slot.config.seed, slot.step + 1))
                dropout[slot.lane] = (rate, generator)
        for i in range(max(len(data.batches) for _, data in taken)):
            parts = {
                slot.lane: (data.batches[i], data.supervised) for slot, data in taken if i < len(data.batches)
            }
            for together in self.base.passes(parts):
                for lane, nats, domains in self.base.backward(self.bank, together, dropout):
                    losses[lane].index_add_(0, domains, nats.double())
        return losses

    def _chosen(self, keys: Sequence[str] | None) -> list[Slot]:
        """The trials of ``keys`` (all), in order of their lanes."""
        wanted = set(self.slots if keys is None else keys)
        if unknown := wanted - set(self.slots):
            raise KeyError(min(unknown))
        return [slot for key, slot in self.slots.items() if key in wanted]

    # ---------------------------------------------------------------- held-out loss

    def validation(self, keys: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
        """Token-mean loss on the held-out rows as the loop gives it: ``eval_loss`` over all,
        ``eval_loss/DOMAIN`` of each domain; of each trial (of ``keys``), in nats. NaN of a failed one."""
        slots = self._chosen(keys)
        if not slots:
            return {}
        found = self.base.losses(self.bank, {slot.lane: slot.data.validation for slot in slots})
        return {slot.key: _eval_loss(found[slot.lane]) for slot in slots}

    def base_losses(self, key: str) -> dict[str, float]:
        """:meth:`validation` of a trial's rows without any adapter."""
        return _eval_loss(self.base.losses(None, {0: self.slots[key].data.validation})[0])

    def score(
        self, adapters: Sequence[Adapter], rows: Mapping[str, Sequence[Row]], *, at_once: int = 8
    ) -> list[dict[str, float]]:
        """Token-mean loss of each adapter on the rows of each domain, in nats; ``at_once`` a pass.

        Adapters may have any ranks and layers, and an empty one is the base.
        """
        scores: list[dict[str, float]] = []
        for start in range(0, len(adapters), at_once):
            group = adapters[start : start + at_once]
            bank = self.base.bank(
                [
                    Lane(max((len(a) for a, _ in each.values()), default=1), 1.0, frozenset(each))
                    for each in group
                ]
            )
            for lane, adapter in enumerate(group):
                pairs = bank.layouts[lane].views(bank.values[lane])
                for name, (a, b) in adapter.items():
                    pairs[name][0][: len(a)].copy_(a)
                    pairs[name][1][:, : len(a)].copy_(b)
            bank.refresh()
            found = self.base.losses(bank, dict.fromkeys(range(len(group)), rows))
            scores += [{d: _mean(*sums) for d, sums in found[lane].items()} for lane in range(len(group))]
        return scores

    # ---------------------------------------------------------------- out

    def weights(self, key: str) -> Adapter:
        """A trial's adapter, copied to the CPU."""
        slot = self.slots[key]
        pairs = slot.views(self.bank.values)
        return {name: (a.to("cpu", copy=True), (b * slot.scale).cpu()) for name, (a, b) in pairs.items()}

    def save(self, key: str, store: CheckpointStore) -> None:
        """Write a trial's checkpoint: an ordinary run's, from which loop and pack go on bit for bit.

        Raises ``RuntimeError`` if it could not be written; an asynchronous store says so when it is settled.
        """
        slot = self.slots[key]
        settings = slot.config.evaluate
        monitor = ForgettingMonitor(settings.tolerance, settings.on_forgetting)
        manifest = state.manifest(
            slot.config, slot.identity, _STATE, slot.data, slot.data_state, monitor.state()
        )
        if failure := store.save(slot.step, slot.snapshot(), manifest):
            raise RuntimeError(f"the checkpoint of '{key}' was not written: {failure}")

    def export(self, key: str, folder: Path) -> None:
        """Write a trial's adapter as a PEFT folder, as a run of its own leaves it."""
        self.slots[key].export()(folder)


def _eval_loss(found: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    if not found:
        return {}
    nats, tokens = (sum(part) for part in zip(*found.values(), strict=True))
    return {"eval_loss": _mean(nats, tokens), **{f"eval_loss/{d}": _mean(*sums) for d, sums in found.items()}}


def _mean(nats: float, tokens: float) -> float:
    return nats / tokens if tokens else math.nan
