"""The JSON that the server takes, as OpenAI's clients and lm-eval send it.

Strict: a string is not a number, and a field that changes the answer and is not served is refused rather
than ignored. Fields that OpenAI's clients send and that change nothing here are listed and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from qwen_ray.serving.engines.base import MAX_TOP

MAX_PROMPTS, MAX_CHOICES, MAX_ITEMS, MAX_STOPS, MAX_MODELS = 1024, 16, 4096, 64, 64
# Sent by OpenAI's clients for the provider's book-keeping.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Accepted where they ask for what is done anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}

_MAX_FIELDS = 100  # of one object; the largest request has 20


def _unicode(text: str) -> str:
    """JSON can carry half of a surrogate pair, a tokenizer cannot. Pydantic sees it where a length is set."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not Unicode text: it has half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
TokenId = Annotated[int, Field(ge=0)]
# A long list ends at its first mistake: an error object for each element would take gigabytes.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
SomeTokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, data: Any) -> Any:
        """A null means the default; so does a neutral value of a field that is not served."""
        if not isinstance(data, dict):
            return data
        if len(data) > _MAX_FIELDS:
            raise ValueError(f"more than {_MAX_FIELDS} fields")
        return {
            key: value
            for key, value in data.items()
            if value is not None and key not in _IGNORED and value not in _NEUTRAL.get(key, ())
        }


class StreamOptions(_Request):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Sampling(_Request):
    model: str = Field(max_length=200)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: Seed | None = None
    stop: list[Annotated[str, Field(max_length=1000)]] = Field(
        default_factory=list, max_length=MAX_STOPS, fail_fast=True
    )
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class CompletionRequest(_Sampling):
    """``POST /v1/completions``. ``logprobs`` k: k alternatives a token; with ``echo`` also of the prompt."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | SomeTokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)


class TextPart(_Request):
    type: Literal["text"]
    text: Text


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = ""
    name: str | None = None

    @field_validator("role")
    @classmethod
    def _known_to_templates(cls, role: str) -> str:
        """Models know OpenAI's newer name of the system's role by its older one; others' would be lost."""
        return "system" if role == "developer" else role

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart])
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """Content may come as a list of text parts; other kinds of part are refused."""
        if isinstance(value, list):
            return "".join(TextPart.model_validate(part).text for part in value)
        return value


class ChatRequest(_Sampling):
    """``POST /v1/chat/completions``. ``top_logprobs`` needs ``logprobs``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)


class ScoreItemBody(_Request):
    context: SomeTokenIds
    continuations: list[TokenIds] = Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)


class ScoreRequest(_Request):
    """``POST /v1/score``: token ids in, one log-probability a continuation out, of one or several models."""

    model: str | None = Field(None, max_length=200)
    models: list[Annotated[str, Field(max_length=200)]] = Field(
        default_factory=list, max_length=MAX_MODELS, fail_fast=True
    )
    items: list[ScoreItemBody] = Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)

    @model_validator(mode="after")
    def _one_form(self) -> ScoreRequest:
        if (self.model is None) == (not self.models):
            raise ValueError("give either model or models")
        if len(set(self.models)) < len(self.models):
            raise ValueError("models names one twice")
        return self


class EmbeddingsRequest(_Request):
    """``POST /v1/embeddings``: the model that retrieval and the router use."""

    model: str = Field(max_length=200)
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        ]
    )
    encoding_format: Literal["float", "base64"] = "float"


class ModelRequest(_Request):
    """``GET /v1/models/{id}``."""

    model: str


class TokenizeRequest(_Request):
    """``POST /tokenize``; a list of texts gives a list of lists."""

    model: str | None = None
    prompt: Text | Annotated[list[Text], Field(max_length=MAX_ITEMS, fail_fast=True)]
    add_special_tokens: bool = True


class DetokenizeRequest(_Request):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds
