"""What Prometheus reads at ``/metrics``: of the ingress itself, and what replicas said with their answers.

No label holds text of a request: adapters are named as the service names them, routes as the app does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from qwen_ray.serving.usage import NONE, UNKNOWN, Usage

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OK, _SERVER_ERROR, _BUSY = 200, 500, 503
_SILENT_SECONDS = 300.0  # after which a replica that said nothing is taken for gone


class Metrics:
    """The counters of one ingress, in a registry of their own."""

    def __init__(
        self, in_flight: Callable[[], float] = lambda: 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``in_flight``: how many requests run now. ``clock``: seconds, from any start."""
        self._registry = CollectorRegistry()
        self._replicas = _Replicas(clock)
        self._registry.register(self._replicas)
        self._requests = Counter(
            "qwen_ray_requests",
            "Requests by what answered; one that several adapters answered counts for each. A stream that "
            "failed counts with the status of its error.",
            ["adapter", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "qwen_ray_request_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "qwen_ray_first_token_seconds",
            "From the head of a streamed request to its first token.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._prompt = Counter(
            "qwen_ray_prompt_tokens", "Tokens read, scored ones too.", ["adapter"], registry=self._registry
        )
        self._completion = Counter(
            "qwen_ray_completion_tokens", "Tokens generated.", ["adapter"], registry=self._registry
        )
        self._rejected = Counter(
            "qwen_ray_rejected",
            "Requests answered 429, by the limit that they met.",
            ["reason"],
            registry=self._registry,
        )
        self._adapter_seconds = Histogram(
            "qwen_ray_adapter_seconds",
            "Of requests that succeeded, from head to end of the answer, by what answered.",
            ["adapter"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._routed = Counter(
            "qwen_ray_routed",
            "Questions for :auto by the router's choice: an adapter, the base as the domain has no adapter "
            "that is served, or abstained.",
            ["domain", "outcome"],
            registry=self._registry,
        )
        self._canary = Counter(
            "qwen_ray_canary_requests",
            "Requests that a canary was to answer. failed: it could not be loaded, and production answered; "
            "or the answer was an error of the server, other than 503.",
            ["adapter", "outcome"],
            registry=self._registry,
        )
        running = Gauge("qwen_ray_requests_in_flight", "Requests that run now.", registry=self._registry)
        running.set_function(in_flight)

    def finished(
        self,
        route: str,
        status: int,
        seconds: float,
        answered: Sequence[Usage],
        *,
        prompts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """A request has ended. ``prompts``: what its response says of each."""
        self._seconds.labels(route).observe(seconds)
        for usage in answered:
            self._requests.labels(usage.adapter, route, status).inc()
            if usage.prompt:
                self._prompt.labels(usage.adapter).inc(usage.prompt)
            if usage.completion:
                self._completion.labels(usage.adapter).inc(usage.completion)
            if status == _OK and usage.adapter not in (NONE, UNKNOWN):
                self._adapter_seconds.labels(usage.adapter).observe(seconds)
        for prompt in prompts:
            if "route" in prompt:
                domain = prompt["route"]["domain"]
                chosen = "abstained" if domain is None else "adapter" if prompt["adapter"] else "base"
                self._routed.labels(domain or "", chosen).inc()
        canaries = {prompt["canary"]: prompt["adapter"] for prompt in prompts if "canary" in prompt}
        for canary, adapter in canaries.items():
            if adapter != canary or (status >= _SERVER_ERROR and status != _BUSY):
                self._canary.labels(canary, "failed").inc()
            elif status == _OK:
                self._canary.labels(canary, "answered").inc()

    def first_token(self, route: str, seconds: float) -> None:
        """A stream has begun."""
        self._first.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was answered 429."""
        self._rejected.labels(reason).inc()

    def heard(self, envelope: Mapping[str, Any]) -> None:
        """What the replica that sent this envelope says of itself, if it does."""
        if (replica := envelope.get("replica")) is not None:
            self._replicas.heard(replica)

    def text(self) -> bytes:
        """In Prometheus's text format, version 0.0.4."""
        return generate_latest(self._registry)


@dataclass(frozen=True)
class _Heard:
    at: float
    load: dict[str, int]
    adapters: list[str]


class _Replicas(Collector):
    """The last words of each replica."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: dict[str, _Heard] = {}

    def heard(self, replica: Mapping[str, Any]) -> None:
        self._last[str(replica["id"])] = _Heard(self._clock(), replica["load"], replica["adapters"])

    def collect(self) -> Iterator[Metric]:
        oldest = self._clock() - _SILENT_SECONDS
        self._last = {name: heard for name, heard in self._last.items() if heard.at >= oldest}
        load = GaugeMetricFamily(
            "qwen_ray_replica_load",
            "What is queued, running and kept in a replica.",
            labels=["replica", "of"],
        )
        loaded = GaugeMetricFamily(
            "qwen_ray_replica_adapters", "Adapters in a replica's memory.", labels=["replica"]
        )
        adapter = GaugeMetricFamily(
            "qwen_ray_adapter_loaded",
            "1 for an adapter in a replica's memory.",
            labels=["replica", "adapter"],
        )
        for name, heard in self._last.items():
            for of, count in heard.load.items():
                load.add_metric([name, of], count)
            loaded.add_metric([name], len(heard.adapters))
            for one in heard.adapters:
                adapter.add_metric([name, one], 1)
        yield from (load, loaded, adapter)
