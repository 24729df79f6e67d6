"""What a server is started with: the arguments of :func:`qwen_ray.serving.launch.build`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from qwen_ray.config import Section, validate
from qwen_ray.serving.assistant import NOTES
from qwen_ray.serving.limits import Limits
from qwen_ray.storage import is_uri

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]


class Autoscaling(Section):
    page: ClassVar[str] = "docs/serving.md"
    min_replicas: Annotated[int, Field(ge=0)] = 1
    """Replicas kept without load. 0: the first request after a pause waits for the model to be loaded."""
    max_replicas: Count
    """Most replicas, as far as the cluster has room."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 32
    """Requests at one time that a replica should have. One batches about so many."""
    upscale_delay_s: Seconds = 10
    """For how long there must be too many before a replica is added."""
    downscale_delay_s: Seconds = 300
    """For how long there must be too few before one is taken away."""

    @model_validator(mode="after")
    def _in_order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})"
            )
        return self


class ServeSettings(Section):
    page: ClassVar[str] = "docs/serving.md"
    model: str
    """Alias (tiny, 0.5b ... 32b, 3b-instruct ...), hub id (OWNER/NAME) or folder."""
    engine: Literal["auto", "torch", "vllm"] = "auto"
    """What computes. auto: vLLM where replicas have GPUs and it is installed, else the embedded engine."""
    registry: str | Path | None = None
    """Adapters by name and version: a folder on a file system that all machines of replicas have, or the URI
    of an object store."""
    adapters: dict[str, Path] = Field(default_factory=dict)
    """PEFT folders by name, without versions."""
    pinned: list[str] = Field(default_factory=list)
    """Adapters (NAME or NAME@VERSION) loaded before a replica takes requests, and never dropped."""
    adapter_bytes: Count = 2 * 2**30
    """Memory for a replica's adapters, in bytes; the least recently used is dropped, a larger one refused."""
    max_adapters: Count = 8
    """vllm: adapters in memory at one time. It reserves memory for so many when it starts."""
    max_rank: Count = 64
    """vllm: the highest rank of an adapter. It reserves memory for that too."""
    prefix_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    """Embedded engine: a replica's memory for beginnings of prompts that were read before; 0 for none."""
    max_waiting_tokens: Count | None = None
    """Tokens that may wait in a replica before requests are refused (429). Default: a minute's work."""
    replicas: Count = 1
    """Copies of the model."""
    autoscaling: Autoscaling | None = None
    """Let the load decide how many copies there are, instead of replicas."""
    cpus_per_replica: Annotated[float, Field(ge=0)] = 0.5
    """Logical CPUs reserved for a replica."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    """GPUs reserved for a replica, which then computes on them."""
    threads: Count = 1
    """Threads that a replica computes with on CPUs."""
    router: Path | None = None
    """Folder of a trained router: answers MODEL:auto."""
    knowledge: str | None = None
    """Root of knowledge bases, a folder or URI: answers MODEL+rag and MODEL:NAME+rag."""
    embedder: str | None = None
    """Embedding model of router and knowledge bases, and of /v1/embeddings: sentence-transformers name or
    folder. Default: all-MiniLM-L6-v2 where a router or knowledge bases are given."""
    passages: Count = 4
    """Passages read for a question."""
    notes_template: str = NOTES
    """What is put before the question, with the passages in the place of {passages}."""
    keys: Path | None = None
    """File of API keys (`qwen-ray keys`). Without one everybody who reaches the server may use it."""
    limits: Limits = Limits()
    """What one request, and one key, may ask for."""
    cors: list[str] = Field(default_factory=list)
    """Origins whose pages may use the server from a browser."""
    hosts: list[str] = Field(default_factory=list)
    """Names by which the server may be asked (`Host` header; `*.NAME`: all below; `*`: any). Default: any;
    `qwen-ray serve` without keys on this machine only: localhost, 127.0.0.1 and [::1]."""

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> ServeSettings:
        """Checked, with full paths, as replicas start elsewhere. :class:`UserError` names what is wrong."""
        settings = validate(cls, args, where="serve", origin={})
        paths = {name: value for name in ("router", "keys") if (value := getattr(settings, name))}
        update: dict[str, Any] = {name: path.expanduser().resolve() for name, path in paths.items()}
        for name in ("registry", "knowledge"):
            place = getattr(settings, name)
            if place and not is_uri(place):
                update[name] = str(Path(place).expanduser().resolve())
        return settings.model_copy(update=update)

    @property
    def assisted(self) -> bool:
        """Whether there is a router, a knowledge base or an embedding model."""
        return any((self.router, self.knowledge, self.embedder))

    @field_validator("notes_template")
    @classmethod
    def _has_place(cls, value: str) -> str:
        if "{passages}" not in value:
            raise ValueError("it has no {passages}, the place of what was found")
        return value

    @model_validator(mode="after")
    def _one_rule_for_replicas(self) -> ServeSettings:
        if self.autoscaling is not None and self.replicas != 1:
            raise ValueError("replicas and autoscaling both decide how many there are; give one of them")
        return self
