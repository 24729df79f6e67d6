"""DeepSpeed ZeRO (arXiv 1910.02054): optimizer state (1), gradients (2), parameters (3) in shards, with
offload to host memory or NVMe (arXiv 2104.07857).

Stage 3 reads the model straight into shards. Another number of workers goes on through DeepSpeed's
universal checkpoint (arXiv 2406.18820).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from qwen_ray import combinations, models
from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError
from qwen_ray.training.base import load_base
from qwen_ray.training.precision import Precision, choose
from qwen_ray.training.strategy.base import MakeOptimizer, Strategy, Write, trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwen_ray.models import ModelRef

_TAG = "state"
_MARGIN = 2**16
"""Elements: shares are padded, to multiples of the number of ranks and of what the disk takes."""


class DeepSpeed(Strategy):
    """A DeepSpeed engine. It owns optimizer, clipping, loss scaling and the accumulation of gradients."""

    name = "deepspeed"
    asynchronous = False

    def load(
        self, ref: ModelRef, config: RunConfig, numbers: Precision, adapter: Path | None = None
    ) -> PreTrainedModel:
        deepspeed = _deepspeed()
        if not self.distributed:
            raise RuntimeError("deepspeed needs a process group")
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self._config = zero_config(config, self.device, self.world_size)
        if config.strategy.offload_parameters == "nvme":
            # Each of DeepSpeed's buffers must hold a rank's share of any parameter.
            buffer = -(-largest_parameter(ref) // self.world_size) + _MARGIN
            self._config["zero_optimization"]["offload_param"]["buffer_size"] = buffer
        self.format = f"deepspeed-zero-{config.strategy.zero_stage}"
        self.lockstep = config.strategy.zero_stage == 3
        self._lora = config.method.name != "full"
        if self.lockstep:
            from transformers.integrations import HfDeepSpeedConfig

            # While this object lives, from_pretrained reads into shards.
            self._sharded_loading: Any = HfDeepSpeedConfig(self._config)
        model = load_base(ref, config, numbers, self.device, adapter)
        self._sharded_loading = None
        return model

    def join(self, module: nn.Module, make_optimizer: MakeOptimizer, config: RunConfig) -> None:
        optimizer: Any = make_optimizer(module)
        self._eight_bit = config.optim.name == "adamw_8bit"
        largest = max(sum(p.numel() for p in group["params"]) for group in optimizer.param_groups)
        why = combinations.oversize(config, largest, self.world_size)
        if why:
            raise UserError(why, where="strategy.zero_stage", fix="strategy.zero_stage=3, or more workers")
        deepspeed = _deepspeed()
        if config.strategy.offload_optimizer != "none" and self.device.type == "cuda":
            # Steps on the host: a kernel for its vector units, built when first used.
            optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(optimizer.param_groups, adamw_mode=True)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=list(trained(module).values()),
            config=self._config,
            dist_init_required=False,
        )
        self.module = self.engine
        # A script for reading the shards, which it would put into each checkpoint from rank 0, unguarded.
        self.engine._copy_recovery_script = lambda *_: None

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        # Said, not counted: a pass over the data may end in a step of fewer micro-batches than the others.
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # The loss is a share of the global sum already; DeepSpeed need not divide by the micro-batches.
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch; the update comes with the last one

    def step(self, rate: float, max_norm: float) -> torch.Tensor:
        self._set_rate(rate)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm)

    def weights(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        every = dict(self.engine.module.named_parameters())
        whole: dict[str, torch.Tensor] = {}
        for name in trained(self.engine.module) if names is None else names:
            parameter = every[name]
            if parameter.requires_grad:
                value = safe_get_full_fp32_param(parameter)  # gathers: every rank calls it
            else:
                with _deepspeed().zero.GatheredParameters([parameter], enabled=self.lockstep):
                    value = parameter.detach().clone()
            if self.rank == 0 and value is not None:
                whole[name] = value.detach().to("cpu", copy=True)
        return whole

    def snapshot(self) -> Write:
        def write(folder: Path) -> None:
            failures: list[BaseException] = []
            writer: Any = self.engine.checkpoint_engine
            save = writer.save

            def guarded(*args: Any, **kwargs: Any) -> Any:
                try:
                    return save(*args, **kwargs)
                except (OSError, RuntimeError) as e:  # torch.save: RuntimeError where a disk is full
                    failures.append(e)

            writer.save = guarded  # DeepSpeed has barriers after it, where the other ranks wait
            try:
                self.engine.save_checkpoint(
                    str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=self._lora
                )
            finally:
                del writer.save
            if failures:
                raise failures[0]

        return write

    def restore(self, folder: Path) -> None:
        files = list((folder / _TAG).glob("*_optim_states.pt"))
        written_by = len(files)
        if not written_by:
            raise RuntimeError(f"no ZeRO shard in {folder / _TAG}")
        tag = _TAG
        if written_by != self.world_size:
            if self._eight_bit:
                raise UserError(
                    f"the checkpoint is of {written_by} workers, and DeepSpeed cannot divide its 8-bit state "
                    f"among {self.world_size}",
                    where="cluster.workers",
                    fix=f"go on at cluster.workers={written_by}, or train anew with optim.name=adamw",
                )
            tag = f"{_TAG}-universal"
            self._make_universal(folder, tag)
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
        self.engine._config.load_universal_checkpoint = written_by != self.world_size
        path, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self._lora)
        self.engine._config.load_universal_checkpoint = False
        # Stage 3 loads a universal checkpoint with the first group's settings for all groups, and with one
        # step count that all share and each increments.
        for group, settings in zip(inner.param_groups, groups, strict=True):
            group.update(settings)
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load {folder / tag}")

    def _make_universal(self, folder: Path, tag: str) -> None:
        """Rank 0 rewrites the shards as one slice a parameter, which load at any number of ranks."""
        failure: list[str] = [""]
        if self.rank == 0:
            shutil.rmtree(folder / tag, ignore_errors=True)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            # From inside the folder: it takes paths for regular expressions.
            command += ["--input_folder", _TAG, "--output_folder", tag]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                failure[0] = done.stderr[-2000:]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise RuntimeError(f"cannot convert {folder / _TAG} to another number of ranks: {failure[0]}")


def largest_parameter(ref: ModelRef) -> int:
    """Elements of the model's largest parameter, found without its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(str(models.model_folder(ref)))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(settings)
    return max(p.numel() for p in model.parameters())


def zero_config(config: RunConfig, device: torch.device, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run (deepspeed.ai/docs/config-json)."""
    strategy, optim = config.strategy, config.optim
    micro_batches = -(-config.rows_a_step // (world_size * optim.batch_size))
    numbers = choose(config.precision, device)
    zero: dict[str, Any] = {
        "stage": strategy.zero_stage,
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    for key, where in (
        ("offload_optimizer", strategy.offload_optimizer),
        ("offload_param", strategy.offload_parameters),
    ):
        if where != "none":
            zero[key] = {"device": where, "pin_memory": device.type == "cuda"}
            if where == "nvme":
                zero[key]["nvme_path"] = strategy.nvme_path
    return {
        "train_micro_batch_size_per_gpu": optim.batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": optim.batch_size * micro_batches * world_size,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": zero,
        # Ours is torch's AdamW, which shards as well as theirs.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": device.type == "cuda",
        "bf16": {"enabled": numbers.compute == torch.bfloat16},
        "fp16": {"enabled": numbers.compute == torch.float16},
        "steps_per_print": 10**9,
    }


def _deepspeed() -> Any:
    # Read when DeepSpeed is imported.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
    except ImportError as e:
        raise UserError(
            f"DeepSpeed cannot be imported ({e})",
            where="strategy.name",
            fix="pip install 'qwen-ray[deepspeed]', or choose ddp or fsdp",
        ) from e
    # It calls collectives by names that torch has replaced, many times a step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    if not torch.cuda.is_available():
        # Shared memory between CPU ranks, compiled at the first start; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
