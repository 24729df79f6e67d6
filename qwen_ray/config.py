"""RunConfig: the one typed tree that says what a run is. Unknown keys are refused.

Layers, later ones win: the defaults below, the method's, the model's preset, a YAML file, command-line
flags, ``--set key=value``. What comes out is complete: it is written beside the run and reproduces it.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from qwen_ray import models
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.manifests.names import label_key, label_value


class Section(BaseModel):
    """A part of the tree. The docstring under a field is its help text and goes into the JSON schema."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    page: ClassVar[str] = "docs/configuration.md"
    """Where its keys are described."""


S = TypeVar("S", bound=Section)


class ModelConfig(Section):
    name: str = "tiny"
    """Alias (tiny, 0.5b ... 32b, 3b-instruct ...), hub id (OWNER/NAME) or folder."""


class MethodConfig(Section):
    name: Literal["lora", "qlora", "full"] = "lora"
    """What is trained: a low-rank adapter, one over a base in 4 bits (arXiv 2305.14314), or every weight."""
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA scale: the update is multiplied by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the adapter's input while training."""
    targets: Literal["all-linear", "qv"] | list[str] = "all-linear"
    """Which linear layers get an adapter: all but the output head, q_proj and v_proj only, or by name."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(r) (arXiv 2312.03732)."""
    dora: bool = False
    """Train a magnitude for each output beside the low-rank direction (arXiv 2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """How the adapter starts: Kaiming A and zero B, Gaussian A, orthogonal, or from the base's principal
    singular values (arXiv 2404.02948) or QR factors (arXiv 2406.01775)."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354, advises 16). 1: the same."""
    quantization: Literal["nf4", "fp4"] = "nf4"
    """qlora: the 4-bit format of the frozen base."""
    double_quantization: bool = True
    """qlora: quantise the quantisation constants too, which saves 0.4 bit a weight."""

    @field_validator("targets")
    @classmethod
    def _something_is_trained(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("an adapter needs a layer: all-linear, qv or names")
        return value


class StageConfig(Section):
    until: Annotated[float, Field(gt=0, le=1)]
    """Where the stage ends, as a share of the run. The last one ends at 1."""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """Share of each domain during the stage."""


class DataConfig(Section):
    train: list[str] = []
    """Data files: Record JSONL, Alpaca, ShareGPT, messages and others (docs/data.md)."""
    validation: list[str] = []
    """Data files never trained on, for the validation loss. Empty: hold out validation_fraction."""
    validation_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.02
    """Share of the training records held out (by a hash of their id) when no validation file is given."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Share of each domain in what is trained on, whatever the sizes of the files. Empty: by size."""
    unit: Literal["examples", "tokens"] = "examples"
    """What the weights count."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Weigh domains by size to the power of 1/temperature: 1 is by size, higher is nearer to even. Instead
    of weights and stages."""
    stages: list[StageConfig] = []
    """Weights that change over the run. Instead of weights."""
    max_epochs: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Passes over a domain's examples after which it leaves the mixture; its share goes to the others in
    proportion. Domains that are not named may repeat for ever."""
    curriculum: Literal["shuffled", "easy_to_hard", "hard_to_easy"] = "shuffled"
    """Order of a domain's examples within a pass, by the difficulty in the records."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Length of a row in tokens. Longer records are cut at the end, and counted."""
    packing: bool = True
    """Put several records into a row, isolated from one another, by best fit. Off: one record a row."""
    packing_window: Annotated[int, Field(ge=1)] = 64
    """Rows packed together: a larger window fills rows better and looks further ahead in the mixture."""
    streaming: bool = False
    """Read and tokenise the training records when they are drawn, for files (Record JSONL) that are larger
    than memory. An index is kept beside each file."""

    @model_validator(mode="after")
    def _one_rule_for_shares(self) -> DataConfig:
        given = [name for name in ("weights", "stages") if getattr(self, name)]
        if self.temperature is not None and given:
            raise ValueError(f"temperature and {given[0]} both decide the shares; give the one or the other")
        return self


class OptimConfig(Section):
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with its state in float32, or in 8 bits (arXiv 2110.02861, bitsandbytes; a quarter of it)."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate. Default 2e-4 for LoRA, 2e-5 for full fine-tuning."""
    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the mixture; a pass ends when the first domain without a limit (data.max_epochs) is used
    up. Ignored with max_steps."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Rows of one worker in one forward pass."""
    gradient_accumulation: Annotated[int, Field(ge=1)] = 8
    """Forward passes a step. Rows a step: batch_size x gradient_accumulation x workers."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear warm-up (at most half of the run)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the schedule ends, as a share of the peak."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled decay, on matrices only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's momentum coefficients."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""


class StrategyConfig(Section):
    name: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"
    """How the model is spread over workers. ddp: one whole copy each. fsdp: parameters, gradients and
    optimizer state in shards (FSDP2). deepspeed: ZeRO. auto: the planner's choice for this hardware."""
    zero_stage: Literal[1, 2, 3] = 2
    """deepspeed: shard the optimizer state (1), gradients too (2), parameters too (3)."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """deepspeed: where the optimizer state is kept and stepped; nvme at stage 3 only."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """deepspeed stage 3: where parameters wait when not in use."""
    nvme_path: str | None = None
    """deepspeed: a folder on a local NVMe disk, for the nvme offloads."""
    reshard_after_forward: bool = True
    """fsdp: free a layer's gathered parameters after its forward pass. Off: faster, and more memory."""


class ComputeConfig(Section):
    attention: Literal["auto", "varlen", "documents", "block_mask"] = "auto"
    """Kernel for isolated documents. varlen: torch's variable-length flash kernel (GPU, bf16 or fp16).
    documents: each document by itself, in batches of similar length. block_mask: one masked matrix a row.
    auto: varlen where it runs, else documents."""
    loss: Literal["auto", "chunked", "liger"] = "auto"
    """Cross-entropy: in chunks, so that the logits never exist whole, or Liger's fused kernel (GPU).
    auto: chunked."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass rather than keep its activations."""
    activation_offload: bool = False
    """Keep what the backward pass needs in host memory instead of on the GPU."""
    compile: bool = False
    """torch.compile each layer."""


class ClusterConfig(Section):
    workers: Annotated[int, Field(ge=0)] | None = None
    """Training workers. 0: run in this process, without Ray. Default: 1 where there is a cluster to join or
    the strategy or resources asked for need one, else 0."""
    min_workers: Annotated[int, Field(ge=1)] | None = None
    """Elastic: go on with as few as this when nodes are lost, and grow back to workers when they return.
    Default: always workers."""
    resize_seconds: Annotated[float, Field(gt=0)] = 60
    """Elastic: how often to look for returned nodes. A resize goes back to the newest checkpoint."""
    address: str | None = None
    """Ray cluster to join. Default: $RAY_ADDRESS, else a cluster of its own on this machine."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs reserved for a worker; also its number of threads."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs reserved for a worker, 0 or 1. Default: 1 if the cluster has that many GPUs, else 0."""
    start_seconds: Annotated[float, Field(gt=0)] = 600
    """How long to wait for the cluster to have room for the workers; nodes may have to be started."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a lost worker group is started again from the newest checkpoint."""
    labels: dict[str, str] = {}
    """Ray labels of the nodes that train: `ray start --labels`, or `labels` of a group in KubeRay. Ray's own,
    such as ray.io/accelerator-type, too. Default: any node."""

    @model_validator(mode="after")
    def _labels_choose_workers_nodes(self) -> ClusterConfig:
        for key, value in self.labels.items():
            if wrong := label_key(key) or label_value(value):
                raise ValueError(wrong)
        if self.labels and self.workers == 0:
            raise ValueError("labels choose the nodes of workers, and workers is 0")
        if self.labels and self.min_workers is not None:
            # Ray 2.60 decides how many workers there is room for without a look at labels.
            raise ValueError("an elastic run takes any node: give either labels or min_workers")
        return self

    @model_validator(mode="after")
    def _workers_can_be_had(self) -> ClusterConfig:
        if self.min_workers is not None and self.min_workers > (self.workers or 0):
            most = "not given" if self.workers is None else self.workers
            raise ValueError(f"workers, the most there are, is {most}, and min_workers is {self.min_workers}")
        if self.gpus_per_worker not in {None, 0, 1}:
            raise ValueError(
                f"a worker drives one GPU, and gpus_per_worker is {self.gpus_per_worker:g}: "
                "ask for as many workers as GPUs"
            )
        return self


class EvaluateConfig(Section):
    every_steps: Annotated[int, Field(ge=1)] = 50
    """Validation loss every so many steps, and at the end."""
    at: list[Annotated[float, Field(gt=0, le=1)]] = []
    """Validation loss at these shares of the run too."""
    suites: list[str] = []
    """Benchmarks (see `qwen-ray eval`) to run on the live weights while training."""
    suites_every_steps: Annotated[int, Field(ge=1)] = 200
    """The suites before the first step, every so many steps, and at the end."""
    suites_limit: Annotated[int, Field(ge=1)] | None = None
    """Items of each task (all)."""
    suites_data_dir: str | None = None
    """The suites' original files, where there is no hub."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.04
    """Forgetting: how far a strength may fall below its score before the first step."""
    on_forgetting: Literal["warn", "stop", "rollback"] = "warn"
    """What to do then: say so, end the run there, or end it with the best checkpoint that forgot nothing."""


class CheckpointConfig(Section):
    every_steps: Annotated[int, Field(ge=1)] = 100
    """A checkpoint every so many steps, and at the end."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest are kept."""
    asynchronous: bool = True
    """Write while the next steps are computed, from a copy in host memory. deepspeed writes in step."""


class TrackingConfig(Section):
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when an API key is set, else offline files inside the run's folder."""
    project: str = "qwen-ray"
    """The wandb project."""
    examples: bool = False
    """Write the ids of the records each worker trained on, step by step, to examples-RANK.jsonl."""

    @field_validator("wandb", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML 1.1 reads a bare off as false


class RunConfig(Section):
    """Everything that decides a training run."""

    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    strategy: StrategyConfig = StrategyConfig()
    compute: ComputeConfig = ComputeConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    precision: Literal["auto", "bf16", "pure_bf16", "fp16", "fp32"] = "auto"
    """Format of matrix products. auto: bf16 where the GPU has it, fp16 with loss scaling where not, fp32 on
    a CPU. pure_bf16 also keeps trained weights and optimizer state in bf16: half the memory, less exact."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the order of the data, the adapter's initial weights and dropout."""
    out: str = "runs/train"
    """The run's folder: configuration, checkpoints, metrics, adapter."""

    @model_validator(mode="after")
    def _storage_is_a_path(self) -> RunConfig:
        if "://" in self.out:
            raise ValueError(f"out: '{self.out}' is a URI; this version writes to a local or mounted folder")
        return self

    @property
    def rows_a_step(self) -> int:
        """Rows of the global batch. Counted with the configured workers, so fewer make the same steps."""
        return self.optim.batch_size * self.optim.gradient_accumulation * max(1, self.cluster.workers or 0)

    def to_yaml(self) -> str:
        """The complete configuration as YAML, headed by the command that runs it."""
        body = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return f"# qwen-ray train --config THIS_FILE\n{body}"


# Defaults that depend on the method (dotted keys), below the model's preset.
_METHOD_DEFAULTS: dict[str, dict[str, Any]] = {"full": {"optim.learning_rate": 2e-5}}

# Options that are not called as the last word of their key.
_OPTIONS = {
    "model.name": "--model",
    "method.name": "--method",
    "strategy.name": "--strategy",
    "data.train": "--data",
    "data.max_length": "--sequence-length",
    "optim.max_steps": "--steps",
    "sources": "--source",
}


def build_config(
    file: Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    sets: list[str] | None = None,
) -> RunConfig:
    """Build the complete configuration from a YAML file, flags (dotted keys) and ``key=value`` strings.

    Raises :class:`UserError` naming the key, where it stands and the nearest valid name.
    """
    user, origin = read_settings(file, flags=flags, sets=sets)
    return complete(user, where=str(file) if file else "configuration", origin=origin)


def complete(tree: Mapping[str, Any], *, where: str, origin: Mapping[str, str] | None = None) -> RunConfig:
    """What a user has given as a tree, on top of the defaults of method and model. Raises
    :class:`UserError` as :func:`build_config` does; ``where`` the tree stands, and ``origin`` some keys."""
    method = get(tree, "method.name", "lora")
    preset = models.resolve(str(get(tree, "model.name", "tiny"))).preset
    merged: dict[str, Any] = {}
    for layer in (_METHOD_DEFAULTS.get(str(method), {}), preset.get("all", {}), preset.get(str(method), {})):
        for key, value in layer.items():
            put(merged, key, value, where="preset")
    _merge(merged, tree)
    return validate(RunConfig, merged, where=where, origin=origin or {})


def read_settings(
    file: Path | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    sets: list[str] | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What a user has given, as a tree, and where each flag or ``--set`` came from."""
    user: dict[str, Any] = {} if file is None else _read_yaml(file)
    origin: dict[str, str] = {}
    for key, value in (flags or {}).items():
        option = _OPTIONS.get(key, f"--{key.split('.')[-1].replace('_', '-')}")
        put(user, key, value, where=option)
        origin[key] = option
    for item in sets or []:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(
                f"'{item}' is not key=value", where="--set", fix="for example --set optim.epochs=2"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        put(user, key.strip(), _number(value), where=f"--set {item}")
        origin[key.strip()] = f"--set {item}"
    return user, origin


def validate(kind: type[S], tree: Mapping[str, Any], *, where: str, origin: Mapping[str, str]) -> S:
    """A tree as a typed section; :class:`UserError` naming the key, where it stands and the nearest name."""
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        raise _user_error(e, where, origin, kind) from None


def read_config(file: Path) -> RunConfig:
    """Read a complete configuration, as :meth:`RunConfig.to_yaml` writes it."""
    return build_config(file)


def json_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def reference(kind: type[Section] = RunConfig) -> str:
    """Every key, its type, default and meaning, as a Markdown table (docs/configuration.md)."""
    rows = [_row(key, field) for key, field in fields(kind)]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def fields(kind: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a tree and its field; ``KEY`` stands for the keys of a mapping of sections."""
    for name, field in kind.model_fields.items():
        section, of_mapping = _section(field.annotation)
        if section is None:
            yield name, field
        else:
            inside = f"{name}.KEY" if of_mapping else name
            yield from ((f"{inside}.{key}", inner) for key, inner in fields(section))


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, perhaps or once for each key, and whether it is the latter."""
    choices = [a for a in typing.get_args(annotation) if a is not type(None)]
    of_mapping = typing.get_origin(annotation) is dict
    if of_mapping or len(choices) == 1 < len(typing.get_args(annotation)):
        annotation = choices[-1]
    found = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return (annotation if found else None), of_mapping


def _row(key: str, field: FieldInfo) -> str:
    default = "" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
    one_of = f" One of {', '.join(f'`{c}`' for c in choices)}." if choices else ""
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{key}` | {f'`{default}`' if default else 'required'} | {meaning}{one_of} |"


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError("no such configuration file", where=str(file), fix="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"not valid YAML ({getattr(e, 'problem', e)})", where=f"{file}{line}") from None
    if not isinstance(value, dict):
        raise UserError(
            "a configuration is a mapping of sections", where=str(file), fix="see docs/configuration.md"
        )
    return typing.cast(dict[str, Any], _number(value))


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; everybody means the number."""
    if isinstance(value, dict):
        return {k: _number(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_number(v) for v in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def put(tree: dict[str, Any], dotted: str, value: Any, *, where: str) -> None:
    """Set the value of a dotted key in a tree; :class:`UserError` if a part of the key is no section."""
    *parents, last = dotted.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"'{name}' is a value, not a section", where=where)
    tree[last] = value


def get(tree: Mapping[str, Any], dotted: str, default: Any) -> Any:
    """The value of a dotted key in a tree."""
    for name in dotted.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return default
        tree = tree[name]
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _user_error(
    error: ValidationError, where: str, origin: Mapping[str, str], kind: type[Section]
) -> UserError:
    """The first problem, in words; unknown keys before wrong values, as they often explain them."""
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    loc = [
        str(part) for part in first["loc"] if not str(part).startswith(("literal[", "list[", "constrained-"))
    ]
    key = ".".join(loc)
    where = origin.get(key, where)
    if first["type"] == "extra_forbidden":
        everywhere = [".".join((s, f)) for s in kind.model_fields for f in _fields_at(kind, [s])]
        namesake = next((k for k in everywhere if k.endswith(f".{loc[-1]}")), None)
        valid = [".".join([*loc[:-1], name]) for name in _fields_at(kind, loc[:-1])]
        fix = f"did you mean '{namesake}'?" if namesake else did_you_mean(key, valid)
        return UserError(f"unknown key '{key}'", where=where, fix=fix)
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return UserError(f"'{key}': {message}{got}" if key else message, where=where, fix=f"see {kind.page}")


def _fields_at(kind: type[BaseModel], loc: list[str]) -> list[str]:
    names = iter(loc)
    for name in names:
        field = kind.model_fields.get(name)
        section, of_mapping = _section(field.annotation) if field else (None, False)
        if section is None:
            return []
        if of_mapping:
            next(names, None)
        kind = section
    return list(kind.model_fields)
