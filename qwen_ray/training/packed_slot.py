"""One trial of a pack: its data, its optimizer, and its state as the files of an ordinary run."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_ray.config import RunConfig
from qwen_ray.data.dataset import Dataset
from qwen_ray.training import lora, shards
from qwen_ray.training.checkpoint import Write
from qwen_ray.training.feed import Feed, Step
from qwen_ray.training.optimizer import make_optimizer
from qwen_ray.training.packed_bank import Bank, Rows

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(eq=False)
class Slot:
    """A trial's place in a pack. What is done to its weights is what the loop does to a run's."""

    key: str
    config: RunConfig
    data: Dataset
    total: int
    """Steps of the whole trial."""
    identity: str
    """See :func:`qwen_ray.training.run.identity`."""
    feed: Feed
    settings: LoraConfig
    layers: frozenset[str]
    """Those it adapts."""
    step: int = 0
    """Steps done."""
    failed: str | None = None
    """Why it is not stepped any more."""

    def __post_init__(self) -> None:
        self.data_state: dict[str, Any] = self.data.stream.state()
        """Of the stream, after the rows of the last step."""
        self._steps: Generator[Step, None, None] | None = None
        self.bank: Bank | None = None
        self.lane = -1
        self.parameters: list[nn.Parameter] = []
        self._updates: list[torch.Tensor] = []
        self.optimizer: torch.optim.Optimizer

    @property
    def done(self) -> bool:
        """Whether it has trained all its steps."""
        return self.step >= self.total

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        method = self.config.method
        return method.alpha / (method.r**0.5 if method.rslora else method.r)

    # ---------------------------------------------------------------- data

    def take(self) -> Step:
        """The data of the next step."""
        if self._steps is None:
            rows, left = self.config.rows_a_step, self.total - self.step
            self._steps = self.feed.steps(self.data.stream, rows=rows, count=left)
        return next(self._steps)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._steps is not None:
            self._steps.close()

    # ---------------------------------------------------------------- weights and optimizer

    def leave(self) -> int | None:
        """Let go of its lane's tensors, which are about to move; returns the lane, if it had one."""
        if self.bank is None:
            return None
        self._updates = [self.optimizer.state[p]["step"] for p in self.parameters]
        self.bank, self.parameters = None, []
        del self.optimizer
        return self.lane

    def place(self, bank: Bank, lane: int) -> None:
        """Take a lane of ``bank``, in which its state is, or zeros at first."""
        counts = self._updates or [torch.zeros((), device=bank.values.whole.device) for _ in "AB"]
        self.bank, self.lane = bank, lane
        # By the names that tell the optimizer which half is which; [1, columns], for matrices decay.
        owner = nn.ModuleDict(
            {
                f"lora_{half}": nn.ParameterDict({"weight": nn.Parameter(values)})
                for half, values in zip("AB", bank.halves(bank.values, lane), strict=True)
            }
        )
        self.optimizer = make_optimizer(owner, self.config.optim, self.config.method)
        self.parameters = list(owner.parameters())
        for i, parameter in enumerate(self.parameters):
            parameter.grad = bank.halves(bank.grads, lane)[i]
            moments = {name: bank.halves(rows, lane)[i] for name, rows in bank.moments.items()}
            self.optimizer.state[parameter] = {"step": counts[i], **moments}

    def initialise(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Start as a run of its own starts. ``shapes``: layer -> (inputs, outputs)."""
        assert self.bank is not None
        for name, pair in self.views(self.bank.values).items():
            start = lora.draw(self.config.method, name, *shapes[name], seed=self.config.seed)
            for half, value in zip(pair, start, strict=True):
                half.copy_(value)
        self.bank.refresh()

    def update(self, rate: float) -> None:
        """One step of the optimizer, at learning rate ``rate``."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.step()

    def views(self, rows: Rows) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Its own A ``[r, in]`` and B ``[out, r]`` of each layer it adapts, in ``rows`` of the bank."""
        assert self.bank is not None
        rank, layout = self.config.method.r, self.bank.layouts[self.lane]
        pairs = layout.views(rows[self.lane])
        return {name: (pairs[name][0][:rank], pairs[name][1][:, :rank]) for name in sorted(self.layers)}

    # ---------------------------------------------------------------- files

    def snapshot(self) -> Write:
        """Copy the state to host memory; the returned function writes it as an ordinary run's checkpoint."""
        names, optimizer = self._as_run()
        write_state = shards.snapshot(names, optimizer, rank=0)
        write_adapter = self.export()

        def write(folder: Path) -> None:
            write_state(folder / "state")
            write_adapter(folder / "adapter")

        return write

    def export(self) -> Write:
        """Copy the weights; the returned function writes them as a PEFT folder."""
        assert self.bank is not None
        state = {
            lora.tensor_name(layer, half): value.to("cpu", copy=True)
            for layer, pair in self.views(self.bank.values).items()
            for half, value in zip("AB", pair, strict=True)
        }
        return lambda folder: lora.write_adapter(state, self.settings, folder)

    def restore(self, folder: Path, step: int, data_state: Mapping[str, Any]) -> None:
        """Go on from the state files in ``folder``, written after ``step`` steps."""
        assert self.bank is not None
        names, optimizer = self._as_run()
        shards.restore(names, optimizer, folder)
        kinds = ("", *self.bank.moments)
        for kind, rows in zip(kinds, _rows(self.bank), strict=True):
            pairs = self.views(rows)
            for (layer, half), value in zip(_matrices(pairs), names.values(), strict=True):
                saved = value if kind == "" else optimizer.state[value][kind]
                pairs[layer]["AB".index(half)].copy_(saved)
        for parameter in self.parameters:
            self.optimizer.state[parameter]["step"].fill_(step)
        self.bank.refresh()
        self.data.stream.load_state(data_state)
        self.step, self.data_state = step, dict(data_state)

    def _as_run(self) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
        """Parameters under the names of an ordinary run, and its optimizer with their state. Copies."""
        assert self.bank is not None
        parts = [self.views(rows) for rows in _rows(self.bank)]
        names: dict[str, torch.Tensor] = {}
        states: list[dict[str, torch.Tensor]] = []
        for layer, half in _matrices(parts[0]):
            value, *moments = (part[layer]["AB".index(half)].contiguous() for part in parts)
            name = lora.tensor_name(layer, half).replace(".weight", ".default.weight")
            names[f"model.{name}"] = value.clone()
            states.append(dict(zip(self.bank.moments, moments, strict=True)))
        optimizer = torch.optim.AdamW(names.values())
        count = self.optimizer.state[self.parameters[0]]["step"]
        for value, state in zip(names.values(), states, strict=True):
            optimizer.state[value] = {"step": count, **state}
        return names, optimizer


def _rows(bank: Bank) -> list[Rows]:
    """Everything of a bank that is kept of a trial."""
    return [bank.values, *bank.moments.values()]


def _matrices(layers: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(layer, half) for layer in layers for half in "AB"]
