"""WatchSpec: the typed tree that says what is watched, what starts a pipeline, and who is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from qwen_ray.config import Section, read_settings, validate
from qwen_ray.errors import UserError
from qwen_ray.lifecycle.cron import Schedule

PAGE = "docs/watch.md"
Start = Literal["run", "alert"]
Level = Literal["info", "warning", "critical"]
LEVELS: tuple[Level, ...] = ("info", "warning", "critical")
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class DataTrigger(Section):
    page: ClassVar[str] = PAGE
    sources: Annotated[list[str], Field(min_length=1)]
    """Files, folders, patterns such as data/*.jsonl, or one object's URI such as s3://bucket/manifest.json."""
    start: Start = "run"
    """What a change does: start the pipeline, or only alert."""


class AccuracyTrigger(Section):
    page: ClassVar[str] = PAGE
    suite: str
    """Suite of benchmarks (see `qwen-ray eval`)."""
    cron: str = "0 3 * * 1"
    """When production is benchmarked through the endpoint. Default: Mondays at 3."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Alert where a category's score is below this share of the baseline in the registry."""
    retrain: Literal["always", "significant", "never"] = "always"
    """Whether such a fall starts the pipeline: significant means that the interval of the fall excludes 0."""
    limit: Count | None = None
    """Items of each task (all). Must be as in the evaluation that is the baseline."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples in the prompt (the suite's own). Must be as in the baseline."""
    data_dir: Path | None = None
    """The suite's original files, where there is no hub."""
    concurrency: Count = 4
    """Requests to the endpoint at a time."""


class DriftTrigger(Section):
    page: ClassVar[str] = PAGE
    window_seconds: Annotated[float, Field(gt=0)] = 3600
    """Shares and latency are taken over so long."""
    min_requests: Count = 100
    """A window with fewer requests goes on until it has so many."""
    abstained: Share | None = 0.5
    """Most questions for :auto on which the router may abstain, as a share. null: not watched."""
    p95_seconds: Annotated[float, Field(gt=0)] | None = None
    """Longest 95th percentile of the time of a request, in seconds."""
    rejected: Share | None = 0.05
    """Most requests answered 429, as a share."""
    client_errors: Share | None = None
    """Most requests answered 4xx other than 429, as a share."""
    server_errors: Share | None = 0.01
    """Most requests answered 5xx, as a share."""
    start: Start = "alert"
    """What a passed limit does."""


class ScheduleTrigger(Section):
    page: ClassVar[str] = PAGE
    cron: str
    """When: minute, hour, day of the month, month, day of the week."""
    pipeline: Path | None = None
    """Pipeline that is run. Default: the watch's own."""


class CanaryRules(Section):
    page: ClassVar[str] = PAGE
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Give this share of the router's traffic to the version that the alias candidate means, once its verdict
    is promote. Default: canaries are started by hand only (`qwen-ray canary start`)."""
    requests: Count = 200
    """How many of its requests decide."""
    max_error_rate: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """More failures than this share of `requests` stop the canary, at once."""
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = 1.5
    """Most that its 95th percentile of latency may be, over production's in the same time."""
    max_hours: Annotated[float, Field(gt=0)] = 72
    """A canary that had too few requests by then is stopped."""
    on_pass: Literal["promote", "stop"] = "promote"
    """What happens to one that passed: it becomes production, or it only ends."""


class Channel(Section):
    page: ClassVar[str] = PAGE
    kind: Literal["log", "webhook", "slack", "email"]
    """log: this program's own log. webhook: POST of JSON. slack: an incoming webhook. email: SMTP."""
    at_least: Level = "warning"
    """Least level of what is sent here: info, warning or critical."""
    url_env: str | None = None
    """webhook, slack: the environment variable that holds the URL."""
    token_env: str | None = None
    """webhook: the environment variable that holds a bearer token."""
    host: str | None = None
    """email: the mail server."""
    port: Annotated[int, Field(ge=1, le=65535)] = 587
    """email: its port."""
    starttls: bool = True
    """email: encrypt before anything is said. A server that cannot is a failure, not an exception."""
    ca_file: Path | None = None
    """email: certificates that are trusted instead of the system's."""
    sender: str | None = None
    """email: the address it comes from."""
    to: list[str] = Field(default=[])
    """email: the addresses it goes to."""
    username_env: str | None = None
    """email: the environment variable that holds the user name."""
    password_env: str | None = None
    """email: the environment variable that holds the password."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 10
    """How long one attempt may take."""

    @model_validator(mode="after")
    def _complete(self) -> Channel:
        needed = {"webhook": ("url_env",), "slack": ("url_env",), "email": ("host", "sender", "to")}
        for name in needed.get(self.kind, ()):
            if not getattr(self, name):
                raise ValueError(f"{self.kind} needs {name}")
        if (self.username_env is None) != (self.password_env is None):
            raise ValueError("username_env and password_env belong together")
        if self.password_env and not self.starttls:
            raise ValueError("a password is not sent without starttls")
        return self

    def secret(self, field: str) -> str | None:
        """What the environment variable named in ``field`` holds; None where none is named."""
        name = getattr(self, field)
        if name is None:
            return None
        if not (value := os.environ.get(name)):
            raise UserError(
                f"the environment variable {name} is not set",
                where=f"alerts: {field}",
                fix=f"export {name}=...",
            )
        return value

    def check(self) -> None:
        """:class:`UserError` unless every secret that is named is there."""
        for field in ("url_env", "token_env", "username_env", "password_env"):
            self.secret(field)


class WatchSpec(Section):
    """Everything that decides a watch."""

    page: ClassVar[str] = PAGE
    model: str
    """What is watched, as the API spells it: BASE:ADAPTER, at its production version."""
    registry: str
    """Folder or URI of the registry."""
    storage: str = "runs/watch"
    """Folder or URI for the watch's state and history."""
    pipeline: Path | None = None
    """The pipeline that triggers start. Needed unless all of them only alert."""
    endpoint: str | None = None
    """The server where accuracy, drift and canaries are watched. Its key: $QWEN_RAY_API_KEY."""
    every_seconds: Annotated[float, Field(gt=0)] = 60
    """How often everything is looked at."""
    time_zone: str = "UTC"
    """Of the cron expressions, such as Europe/Berlin."""
    data: DataTrigger | None = None
    """New data."""
    accuracy: AccuracyTrigger | None = None
    """Production's accuracy falls."""
    drift: DriftTrigger | None = None
    """What the server's /metrics say."""
    schedules: dict[str, ScheduleTrigger] = Field(default={})
    """Runs by the clock, each with a name."""
    canary: CanaryRules = CanaryRules()
    """When a canary is stopped or promoted."""
    debounce_seconds: Seconds = 600
    """A pipeline starts when so long no further trigger has come."""
    longest_wait_seconds: Seconds = 7200
    """It starts after so long even if triggers keep coming."""
    rest_seconds: Seconds = 0
    """Least time from the end of a pipeline run to the next start."""
    attempts: Count = 3
    """How often a pipeline that failed is tried in all; it goes on where it failed."""
    retry_seconds: Seconds = 600
    """Before the second attempt; doubled before each further one."""
    repeat_hours: Annotated[float, Field(ge=0)] = 24
    """An alert about the same thing is not sent again within this time."""
    lease_seconds: Annotated[float, Field(ge=1)] = 60
    """How long a watch that died keeps another one from going on."""
    alerts: dict[str, Channel] = Field(default={})
    """Who is told, each with a name. Without any: the log."""

    @property
    def adapter(self) -> str:
        """The adapter's name."""
        return self.model.partition(":")[2]

    @classmethod
    def read(cls, file: Path, *, sets: list[str] | None = None) -> WatchSpec:
        """From a YAML file; ``sets``: ``key=value`` over it. :class:`UserError` names what is wrong."""
        tree, origin = read_settings(file, sets=sets)
        return validate(cls, tree, where=str(file), origin=origin)

    @field_validator("model")
    @classmethod
    def _of_an_adapter(cls, value: str) -> str:
        from qwen_ray.serving.model_id import parse

        try:
            parsed = parse(value)
        except UserError as e:
            raise ValueError(e.what) from None
        if parsed.adapter is None or parsed.auto or parsed.at or parsed.rag:
            raise ValueError("not BASE:ADAPTER")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> WatchSpec:
        starting = [name for name, trigger in (("data", self.data), ("drift", self.drift))
                    if trigger is not None and trigger.start == "run"]  # fmt: skip
        if self.accuracy is not None and self.accuracy.retrain != "never":
            starting.append("accuracy")
        starting += [f"schedules.{name}" for name, one in self.schedules.items() if one.pipeline is None]
        if starting and self.pipeline is None:
            raise ValueError(f"{starting[0]} starts a pipeline, and none is given")
        watched = [name for name in ("accuracy", "drift") if getattr(self, name) is not None]
        if (watched or self.canary.share) and self.endpoint is None:
            raise ValueError(f"{[*watched, 'canary'][0]} needs an endpoint")
        crons = [one.cron for one in self.schedules.values()]
        for cron in [*crons, *([self.accuracy.cron] if self.accuracy else [])]:
            Schedule(cron, self.time_zone)
        return self
