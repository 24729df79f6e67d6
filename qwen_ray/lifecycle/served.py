"""The endpoint that a pipeline's benchmark goes through: one that runs, or one started for the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.lifecycle.spec import PipelineSpec

_PROMPT, _TOKENS, _WARM_UP = "Question: What is 12 + 30?\nAnswer:", 16, 3
_APPEARS_SECONDS = 30.0


@dataclass
class Served:
    """Starts the server when its URL is first asked for; :meth:`stop` ends what was started."""

    spec: PipelineSpec
    note: Callable[[str], None]
    _started: str | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        """Where the models answer."""
        if self.spec.endpoint.url is not None:
            return self.spec.endpoint.url
        if self._started is None:
            self._started = self._start()
        return self._started

    def stop(self) -> None:
        """Take down what :attr:`url` started."""
        if self._started is not None:
            from qwen_ray.serving import launch

            launch.stop()
            self._started = None

    def check(self, model: str) -> None:
        """:class:`UserError` unless the running server has the same base and answers for ``model``. It may
        have read the registry a moment ago, and is given some time."""
        from qwen_ray.serving.backends import EndpointBackend

        deadline = time.monotonic() + _APPEARS_SECONDS
        backend = EndpointBackend(self.url, self.spec.model.id)
        try:
            if backend.served[self.spec.model.id].get("fingerprint") != models.fingerprint(self.spec.model):
                raise UserError(
                    f"the endpoint's {self.spec.model.id} has other weights than the model here",
                    where=self.url,
                    fix="serve the model that the pipeline trains",
                )
            while True:
                try:
                    backend.check(model)
                    return
                except UserError as e:
                    if e.status not in (400, 404) or time.monotonic() > deadline:
                        raise UserError(
                            f"the endpoint does not serve {model} ({e.what})",
                            where=self.url,
                            fix=f"start it with this pipeline's registry: --registry {self.spec.registry}",
                        ) from None
                time.sleep(1)
        finally:
            backend.close()

    def latency(self, ids: list[str], requests: int) -> list[float]:
        """Seconds a request at p95, of each model: a short completion, the models in turn, one at a time."""
        from qwen_ray.serving.client import Client

        client = Client(self.url, concurrency=1)
        took: dict[str, list[float]] = {model: [] for model in ids}
        try:
            for _ in range(_WARM_UP + requests):
                for model in ids:
                    began = time.perf_counter()
                    body: dict[str, Any] = {"model": model, "prompt": _PROMPT, "max_tokens": _TOKENS}
                    client.request("POST", "/v1/completions", {**body, "temperature": 0})
                    took[model].append(time.perf_counter() - began)
        finally:
            client.close()
        return [sorted(took[model][_WARM_UP:])[-(-95 * requests // 100) - 1] for model in ids]

    def _start(self) -> str:
        from qwen_ray import cluster
        from qwen_ray.serving import launch
        from qwen_ray.serving.settings import ServeSettings

        settings = {"model": self.spec.model.location, **self.spec.endpoint.serve}
        if self.spec.model.id == "tiny":
            settings["model"] = "tiny"
        replicas = ServeSettings.of(settings).replicas
        self.note("  starting a server")
        cluster.connect(self.spec.endpoint.address, num_cpus=replicas + 1)
        return launch.start(**settings, registry=self.spec.registry, port=0)
