"""Which replica gets a request: the one that has its adapters in memory, unless it has too much to do.

Replicas tell Serve's controller which adapters they hold, and it tells the routers. For an adapter that
nobody holds, all routers agree on a replica without asking (rendezvous hashing, Thaler and Ravishankar 1998),
so it is loaded once. A replica with more than its share of requests is passed over (bounded loads, Mirrokni,
Thorup and Zadimoghaddam 2018): a popular adapter spreads to the next one, which then holds it too.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from qwen_ray.errors import UserError
from qwen_ray.serving.model_id import parse

BUSY = 32  # requests in a replica that it batches anyway; below it is never passed over
_SHARE = 1.25  # of the mean over replicas, above which one is


class AdapterRouter(RequestRouter):
    """Serve's router for the engine's replicas (``request_router_class``)."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order in which they are tried; within an inner list the least busy is taken."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        adapters = adapters_of(pending_request.args)
        if not adapters:
            return [_ordered(candidate_replicas, pending_request.metadata.internal_request_id)]
        await asyncio.sleep(0)  # requests given to a replica before count in its queue from the next turn on
        queues = {
            r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in candidate_replicas
        }
        busy = max(BUSY, _SHARE * (sum(queues.values()) + 1) / max(1, len(queues)))
        preferred = sorted(
            _ordered(candidate_replicas, ",".join(adapters)),
            key=lambda r: -sum(name in r.routing_stats.get("adapters", ()) for name in adapters),
        )
        free = [[replica] for replica in preferred if queues[replica.replica_id] < busy]
        return [*free, [replica for replica in preferred if queues[replica.replica_id] >= busy]]


def adapters_of(args: Sequence[Any]) -> list[str]:
    """Names of the adapters that a call of the service asks for, of all versions; none of the base's."""
    body = args[1] if len(args) > 1 else None
    ids = [getattr(body, "model", None), *(getattr(body, "models", None) or ())]
    names = set()
    for text in ids:
        if isinstance(text, str):
            try:
                model = parse(text)
            except UserError:
                continue  # any replica can refuse it
            if model.adapter is not None and not model.auto:
                names.add(model.adapter)
    return sorted(names)


def _ordered(replicas: Sequence[RunningReplica], key: str) -> list[RunningReplica]:
    """In an order that depends on ``key`` and is the same in every process."""

    def rank(replica: RunningReplica) -> bytes:
        return hashlib.sha256(f"{key}\n{replica.replica_id.unique_id}".encode()).digest()

    return sorted(replicas, key=rank)
