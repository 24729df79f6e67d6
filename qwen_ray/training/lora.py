"""LoRA through PEFT: which layers get an adapter, how it starts, and how it leaves.

PEFT builds the layers; the numbers they start with are made here. Each layer's matrices are drawn on the
CPU, in float32 or better, from a generator seeded by (seed, the layer's name). So they are the same
whatever the device, the strategy, the number of ranks and the order in which layers come to life, and a
model that is materialised layer by layer starts as one that is wrapped whole.

PiSSA and OLoRA move a part of the base's weights W into the adapter: W' = W - s B0 A0. What
:func:`export_adapter` writes fits the original W all the same: its rank is doubled, A = [A; A0] and
B = [B, -B0], so s B A over W is the update of W' (the conversion of PEFT's ``subtract_mutated_init``).
It also holds everything needed to go on training: see :func:`load_adapter`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_ray.combinations import head_in_shards, layers_named, tied_head
from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, sha256_json, write_json
from qwen_ray.peft_folder import CHANGES_BASE, CONFIG, WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

# PEFT imports bitsandbytes where it is installed, which then complains of a kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


_ADAPTER = "default"
_ROOT = "base_model.model."  # how PEFT names the base inside its wrapper
# Parts of a name that wrappers put in: torch.compile, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)(?:\.|$)")


# ---------------------------------------------------------------- building


def add_adapter(
    model: PreTrainedModel,
    config: MethodConfig,
    *,
    seed: int,
    initialise: bool = True,
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Freeze ``model`` and put a fresh adapter on it. Draws nothing from torch's global generator.

    With ``initialise=False`` the adapter's parameters stay on the meta device, and the model itself may be
    there: call :func:`initialise_adapter` (or :func:`load_adapter`) once the base's weights are in place.
    ``dtype``: the adapter's, whatever the base's.
    """
    from peft import get_peft_model

    peft = get_peft_model(
        model, peft_settings(model, config), low_cpu_mem_usage=True, autocast_adapter_dtype=False
    )
    for _, layer in _layers(peft):
        for part in _parts(layer).values():
            part.weight = nn.Parameter(part.weight.detach().to("meta", dtype))
    if initialise:
        initialise_adapter(peft, config, seed=seed)
    return peft


def peft_settings(model: PreTrainedModel, config: MethodConfig) -> LoraConfig:
    """What PEFT has to know of an adapter on ``model``, which has none yet."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.r,
        lora_alpha=int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        lora_dropout=config.dropout,
        target_modules=target_modules(model, config),
        use_rslora=config.rslora,
        use_dora=config.dora,
        # True whatever config.init is: PEFT is told how to read the adapter, we fill it.
        init_lora_weights=True,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )


def initialise_adapter(module: nn.Module, config: MethodConfig, *, seed: int, prefix: str = "") -> None:
    """Fill the adapters inside ``module`` with their initial weights, the same bits wherever it is done.

    ``prefix``: the module's name in the base model (``model.layers.3``); empty for a whole model. The base
    weights of these layers must be in place (not on the meta device). Parameters on the meta device are
    made on the base weight's device; others, DTensor shards among them, are written in place. PiSSA and
    OLoRA also change the base weight.
    """
    for name, layer in _layers(module, prefix):
        a, b = _parts(layer)["lora_A"], _parts(layer)["lora_B"]
        base = layer.get_base_layer()
        if base.weight.is_meta:
            raise RuntimeError(f"{name}: load the base's weights before its adapter is initialised")
        r, scale = layer.r[_ADAPTER], layer.scaling[_ADAPTER]
        if config.init in CHANGES_BASE:
            if r > min(layer.in_features, layer.out_features):
                raise UserError(
                    f"{config.init} takes {r} components, and {name} is a matrix of "
                    f"{layer.out_features} x {layer.in_features}",
                    where="method.r",
                    fix=f"at most {min(layer.in_features, layer.out_features)}",
                )
            if _initial(layer) is not None:
                raise RuntimeError(
                    f"{name}: its adapter was initialised before, and the base changed with it"
                )
            _check_whole(base.weight, name)
            factors = (_principal if config.init == "pissa" else _orthogonal_factor)(base.weight, r, scale)
            _take_out(layer, *(f.to(a.weight.dtype) for f in factors))
            values_a, values_b = _initial(layer) or factors
        else:
            values_a, values_b = draw(config, name, layer.in_features, layer.out_features, seed=seed)
        _fill(a, values_a, base.weight)
        _fill(b, values_b, base.weight)
        if config.dora:
            _fill(_parts(layer)["lora_magnitude_vector"], _magnitude(layer, values_a, values_b), base.weight)


def draw(
    config: MethodConfig, name: str, inputs: int, outputs: int, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer ``name`` starts with where the base stays as it is: A [r, inputs] and B [outputs, r]
    with B A = 0, float32 on the CPU."""
    init, r = config.init, config.r
    generator = torch.Generator().manual_seed(int(sha256_json([seed, name])[:15], 16))

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    a, b = torch.empty(r, inputs), torch.zeros(outputs, r)
    if init == "default":  # uniform in ±1/sqrt(inputs)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    elif init == "gaussian":
        nn.init.normal_(a, std=1 / r, generator=generator)
    elif init == "orthogonal":
        # A's columns lie in one half of the space of the rank, B's rows in the other: neither is zero.
        basis, _ = torch.linalg.qr(normal(r, r))
        a = (basis[0::2].T @ normal(r // 2, inputs) / 10).float()
        b = (normal(outputs, r // 2) @ basis[1::2] / 10).float()
    else:
        raise ValueError(init)
    return a, b


def _principal(weight: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PiSSA: the ``r`` largest singular components of ``weight`` as A and B, with scale B A their sum."""
    u, s, vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = (s[:r] / scale).sqrt()
    # The sign of a pair of singular vectors is the library's whim; make it one's own.
    largest = vt[:r].gather(1, vt[:r].abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return vt[:r] * sign * root[:, None], u[:, :r] * sign.T * root


def _orthogonal_factor(weight: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """OLoRA: the first ``r`` rows of R and columns of Q of ``weight`` = Q R, R's diagonal not negative."""
    q, upper = torch.linalg.qr(weight.detach().float())
    sign = torch.where(upper.diagonal()[:r] < 0, -1.0, 1.0)
    return upper[:r] * sign[:, None], q[:, :r] * sign


def _magnitude(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """DoRA's initial magnitudes: the norm of each row of W + s B A. [outputs], float32."""
    from peft.utils.integrations import dequantize_module_weight
    from torch.distributed.tensor import DTensor

    base = layer.get_base_layer()
    with _gathered(base.weight):
        weight = base.weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else dequantize_module_weight(base)
        whole = whole.detach().float()
    delta = b.to(whole.device, torch.float32) @ a.to(whole.device, torch.float32)
    return torch.linalg.vector_norm(whole + layer.scaling[_ADAPTER] * delta, dim=1)


# ---------------------------------------------------------------- a base that gave a part away


def initial_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the adapter took out of the base: A0 and B0 of each layer, under PEFT's names for A and B.

    Empty unless PiSSA or OLoRA was used. On the CPU, in the adapter's dtype.
    """
    state = {}
    for name, layer in _layers(model):
        initial = _initial(layer)
        if initial is not None:
            state[tensor_name(name, "A")], state[tensor_name(name, "B")] = initial
    return state


def restore_initial(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Take ``state`` (see :func:`initial_state`) out of an original base, as its run did.

    A factorisation may come out otherwise on another machine, so a resumed run does not repeat it. Call it
    on a model whose adapter was not initialised; on one that was, it only checks that both agree, for
    the original weights are gone.
    """
    for name, layer in _layers(model):
        try:
            a, b = (state[tensor_name(name, half)] for half in "AB")
        except KeyError:
            raise RuntimeError(f"the saved initial adapter has no {name}") from None
        done = _initial(layer)
        if done is None:
            _check_whole(layer.get_base_layer().weight, name)
            _take_out(layer, a, b)
        elif not (torch.equal(done[0], a.cpu()) and torch.equal(done[1], b.cpu())):
            raise RuntimeError(
                f"{name}: its initial adapter came out otherwise than when the run began; restore the saved "
                "one on a fresh base instead (add_adapter with initialise=False)"
            )


@torch.no_grad()
def _take_out(layer: LoraLayer, a: torch.Tensor, b: torch.Tensor) -> None:
    """W -= s B A, in float32, and note A and B in the layer. The one place where a base is changed."""
    weight = layer.get_base_layer().weight
    whole = weight.detach().float()
    delta = b.to(whole.device, torch.float32) @ a.to(whole.device, torch.float32)
    weight.data.copy_(whole - layer.scaling[_ADAPTER] * delta)
    # Not a buffer: it is neither moved, broadcast nor saved with the model.
    object.__setattr__(layer, "taken_out", (a.detach().cpu().clone(), b.detach().cpu().clone()))


def _initial(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    return getattr(layer, "taken_out", None)


# ---------------------------------------------------------------- files


def tensor_name(layer: str, half: str) -> str:
    """The name that the matrix ``half`` ("A" or "B") of a layer has in a PEFT folder."""
    return f"{_ROOT}{layer}.lora_{half}.weight"


def export_adapter(
    model: PeftModel, folder: Path, *, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a PEFT folder that is valid on the original base, whatever the initialisation was.

    ``weights``: the adapter's whole tensors under their parameters' names, where the model itself holds
    shards; default the model's own. Exact: :func:`load_adapter` gets the same bits back.
    """
    from peft import get_peft_model_state_dict

    given = None if weights is None else dict(weights)
    state = get_peft_model_state_dict(model, state_dict=given, save_embedding_layers=False)
    settings = copy.copy(model.peft_config[_ADAPTER])
    initial = initial_state(model)
    if initial:
        for key, start in initial.items():
            value = state[key].detach().cpu()
            state[key] = (
                torch.cat([value, start], dim=0) if "lora_A" in key else torch.cat([value, -start], dim=1)
            )
        settings.lora_alpha *= math.sqrt(2) if settings.use_rslora else 2
        settings.r *= 2
    write_adapter(state, settings, folder)


def write_adapter(state: Mapping[str, torch.Tensor], settings: LoraConfig, folder: Path) -> None:
    """Write a PEFT folder of tensors under the names they have in it."""
    from safetensors.torch import save_file

    settings = copy.copy(settings)
    settings.inference_mode = True
    # A set, in another order each time.
    settings.target_modules = sorted(settings.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in sorted(state.items())}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings.save_pretrained(str(folder))
    # PEFT's own writer, then its one loose end: the keys in a fixed order.
    write_json(folder / CONFIG, dict(sorted(read_json(folder / CONFIG).items())))


def load_adapter(model: PeftModel, config: MethodConfig, folder: Path) -> None:
    """Put the adapter of :func:`export_adapter` back on the base it was trained on, to go on training.

    For PiSSA and OLoRA the base is changed as it was then: ``model`` comes from
    ``add_adapter(initialise=False)``. Raises ``RuntimeError`` where file and model do not fit.
    """
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    if config.init in CHANGES_BASE:
        initial = {}
        for key, value in tensors.items():
            if "lora_A" in key:
                tensors[key], initial[key] = value.chunk(2, dim=0)
            elif "lora_B" in key:
                tensors[key], start = value.chunk(2, dim=1)
                initial[key] = -start
        restore_initial(model, initial)
    for name, layer in _layers(model):
        for part, linear in _parts(layer).items():
            key = f"{_ROOT}{name}.{part}" + ("" if part == "lora_magnitude_vector" else ".weight")
            want, have = linear.weight.shape, tensors[key].shape if key in tensors else None
            if have != want:
                raise RuntimeError(
                    f"the adapter does not fit the model: {key} has shape {have and tuple(have)}, "
                    f"not {tuple(want)}"
                )
            _fill(linear, tensors.pop(key), layer.get_base_layer().weight)
    if tensors:
        raise RuntimeError(f"the adapter does not fit the model: it also has {min(tensors)}")


# ---------------------------------------------------------------- targets


def target_modules(model: PreTrainedModel, config: MethodConfig) -> list[str]:
    """The linear layers that get an adapter, named as PEFT takes them and as briefly as is exact.

    ``q_proj`` where every layer of that name is meant, full names otherwise. A name in ``method.targets``
    is the end of a name, a full name or a regular expression over full names.
    """
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if config.targets == "all-linear":
        chosen = {name for name, module in linear.items() if module is not head}
    else:
        wanted = ["q_proj", "v_proj"] if config.targets == "qv" else list(config.targets)
        chosen = {name for target in wanted for name in layers_named(target, list(linear))}
    for name in chosen:
        if linear[name] is head and model.config.get_text_config().tie_word_embeddings:
            raise tied_head(name)
        if linear[name] is head and hasattr(linear[name].weight, "ds_id"):
            raise head_in_shards(name)
    brief: set[str] = set()
    for name in chosen:
        last = name.split(".")[-1]
        brief.add(last if chosen >= {n for n in linear if n.split(".")[-1] == last} else name)
    return sorted(brief)


# ---------------------------------------------------------------- parts


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, LoraLayer]]:
    """Every adapted layer below ``module`` with its name in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, layer in module.named_modules(prefix=prefix):
        if isinstance(layer, LoraLayer):
            yield _WRAPPERS.sub("", name).rpartition(_ROOT)[2].rstrip("."), layer


def _parts(layer: LoraLayer) -> dict[str, Any]:
    """The modules whose ``weight`` is trained, by the name they have in a file."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    return {name: getattr(layer, name)[_ADAPTER] for name in names if _ADAPTER in getattr(layer, name)}


@torch.no_grad()
def _fill(part: Any, value: torch.Tensor, base: torch.Tensor) -> None:
    """Give ``part.weight`` a whole tensor's value: new beside ``base``, in place, or this rank's shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    weight = part.weight
    if isinstance(weight, DTensor):
        value = value.to(weight.device, weight.dtype)
        # Every rank has the whole value, so each takes its own shard of it and nothing is sent.
        weight.copy_(distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None))
    elif weight.is_meta:
        made = value.detach().to(base.device, weight.dtype, copy=True).contiguous()
        part.weight = nn.Parameter(made, requires_grad=weight.requires_grad)
    else:
        weight.copy_(value)


def _gathered(weight: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The whole of a weight that DeepSpeed has partitioned; all ranks must enter."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


def _check_whole(weight: torch.Tensor, name: str) -> None:
    from torch.distributed.tensor import DTensor

    if isinstance(weight, DTensor) or hasattr(weight, "ds_tensor"):
        raise RuntimeError(f"{name}: a shard cannot be factorised")
