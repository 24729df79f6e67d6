"""What a watch reads off a server's ``/metrics``: counters, and what happened between two readings."""

from __future__ import annotations

import math
import os
from collections import defaultdict

from qwen_ray.errors import UserError
from qwen_ray.serving.client import KEY_VARIABLE

Counters = dict[str, float]
"""By name: ``status/200``, ``seconds/0.5`` (requests that took so long or less), ``routed/abstained``; of an
adapter ``facts@3/seconds/0.5``, of a canary ``facts@3/canary/failed``."""

_TIMEOUT = 10.0
_MODEL_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/score")


def scrape(endpoint: str) -> Counters:
    """The counters of the server at this URL. :class:`UserError` if it does not give them."""
    import httpx

    url = endpoint.rstrip("/").removesuffix("/v1") + "/metrics"
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.get(url, headers=headers, timeout=_TIMEOUT)
    except (httpx.TransportError, httpx.InvalidURL) as e:
        raise UserError(f"nobody answers ({type(e).__name__})", where=url, fix="start the server") from None
    if not reply.is_success:
        fix = f"set {KEY_VARIABLE}" if reply.status_code == 401 else "is this a qwen-ray server?"
        raise UserError(f"answered {reply.status_code}", where=url, fix=fix)
    return counters(reply.text)


def counters(text: str) -> Counters:
    """Of Prometheus's text format."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Counters = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "qwen_ray_requests_total" and labels["route"] in _MODEL_ROUTES:
                found[f"status/{labels['status']}"] += sample.value
            elif sample.name == "qwen_ray_request_seconds_bucket" and labels["route"] in _MODEL_ROUTES:
                found[f"seconds/{float(labels['le'])}"] += sample.value
            elif sample.name == "qwen_ray_adapter_seconds_bucket":
                found[f"{labels['adapter']}/seconds/{float(labels['le'])}"] += sample.value
            elif sample.name == "qwen_ray_canary_requests_total":
                found[f"{labels['adapter']}/canary/{labels['outcome']}"] += sample.value
            elif sample.name == "qwen_ray_routed_total":
                found[f"routed/{labels['outcome']}"] += sample.value
    return dict(found)


def since(before: Counters, now: Counters) -> Counters:
    """What was counted between two readings. A counter that fell was started again from 0."""
    return {
        name: value - before.get(name, 0.0) if value >= before.get(name, 0.0) else value
        for name, value in now.items()
    }


def requests(seen: Counters) -> float:
    """How many requests there were for models."""
    return sum(value for name, value in seen.items() if name.startswith("status/"))


def shares(seen: Counters) -> dict[str, float]:
    """What drift is judged by: shares from 0 to 1, and ``p95_seconds``. 0 where there was nothing."""
    total = requests(seen)
    by_class: Counters = defaultdict(float)
    for name, value in seen.items():
        if name.startswith("status/"):
            status = name.removeprefix("status/")
            by_class["429" if status == "429" else status[0]] += value
    routed = {name: seen.get(f"routed/{name}", 0.0) for name in ("adapter", "base", "abstained")}
    return {
        "requests": total,
        "abstained": _share(routed["abstained"], sum(routed.values())),
        "rejected": _share(by_class["429"], total),
        "client_errors": _share(by_class["4"], total),
        "server_errors": _share(by_class["5"], total),
        "p95_seconds": quantile(seen, "seconds/", 0.95),
    }


def quantile(seen: Counters, prefix: str, q: float) -> float:
    """A quantile of a histogram, interpolated within its bucket as Prometheus's ``histogram_quantile`` does;
    0 if it is empty, the last finite bound if it lies beyond that."""
    buckets = sorted(
        (float(name.removeprefix(prefix)), value) for name, value in seen.items() if name.startswith(prefix)
    )
    if not buckets or buckets[-1][1] <= 0:
        return 0.0
    rank, low, below = q * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and math.isfinite(bound):
            return low + (bound - low) * (rank - below) / (count - below)
        if math.isfinite(bound):
            low, below = bound, count
    return low


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
