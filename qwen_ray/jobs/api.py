"""A cluster's job server, over the Ray Jobs REST API (docs.ray.io, "Ray Jobs REST API").

Ray's own client waits for ever for a head that accepts a connection and says nothing; here every request
has a time limit, and what goes wrong is said in words that name the address.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.jobs.where import auth_token, server_address

NAME, ATTEMPT, VERB, OUT, COMMAND = (
    f"qwen_ray.{key}" for key in ("name", "attempt", "verb", "out", "command")
)
"""Keys of a job's metadata."""
_QUICK, _SLOW = 10.0, 120.0  # seconds a request may take; the slow ones carry packages or start something
_HEARTBEAT = 20.0  # seconds between pings of a followed log


class Unreachable(UserError):
    """Nothing answers, or not in time. It may be over in a moment."""


@dataclass(frozen=True)
class Job:
    """What the cluster knows of a job. Times are seconds since the epoch."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    error_type: str | None
    exit_code: int | None
    """Of the entry point, once it has ended by itself."""
    entrypoint: str
    started: float | None
    ended: float | None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.metadata.get(NAME, self.id)

    @property
    def attempt(self) -> int:
        return int(self.metadata.get(ATTEMPT, "1"))

    @property
    def over(self) -> bool:
        return self.status in {"STOPPED", "SUCCEEDED", "FAILED"}


class JobsApi:
    """The job server at ``address`` (see :func:`server_address`). Every call raises :class:`Unreachable`
    where nothing answers, :class:`UserError` where the token or the address is wrong, ``RuntimeError`` where
    the server failed."""

    def __init__(self, address: str | None = None) -> None:
        import httpx

        self.address = server_address(address)
        self._token = auth_token()
        self._client = httpx.Client(base_url=self.address, headers=self._headers(), timeout=_QUICK)
        self._has_answered = False

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> JobsApi:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> str:
        """Ray's version on the cluster; :class:`UserError` if it is not the one installed here."""
        answer = self._call("GET", "/api/version")
        theirs = answer.get("ray_version") if isinstance(answer, dict) else None
        if theirs is None:
            raise UserError("what answers there is not Ray's job server", where=self.address, fix=_PORT)
        if theirs != (ours := version("ray")):
            raise UserError(
                f"the cluster runs Ray {theirs}, this machine has {ours}",
                where=self.address,
                fix=f"install ray=={theirs} and the qwen-ray that goes with it here, or Ray {ours} there",
            )
        return str(theirs)

    def jobs(self) -> list[Job]:
        """Every submitted job that the cluster remembers, oldest first."""
        rows = self._call("GET", "/api/jobs/")
        found = [_job(row) for row in rows if row.get("submission_id")]
        return sorted(found, key=lambda job: (job.started or 0.0, job.id))

    def job(self, job_id: str) -> Job:
        """One job, by its id."""
        return _job(self._call("GET", f"/api/jobs/{job_id}"))

    def submit(self, request: dict[str, Any]) -> bool:
        """Start a job. ``request``: entrypoint, submission_id, runtime_env, metadata and the entry point's
        resources, as the REST API has them. False: there is a job of this id."""
        try:
            self._call("POST", "/api/jobs/", json=request, seconds=_SLOW)
        except RuntimeError as e:
            if "already exists" in str(e):
                return False
            raise
        return True

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; returns at once. False: it was not running."""
        return bool(self._call("POST", f"/api/jobs/{job_id}/stop", seconds=_SLOW)["stopped"])

    def logs(self, job_id: str) -> str:
        """All that a job has printed."""
        return str(self._call("GET", f"/api/jobs/{job_id}/logs", seconds=_SLOW)["logs"])

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        """What a job prints, from its beginning until it ends, in pieces. The stream ends early where the
        connection breaks."""
        import aiohttp

        url = f"{self.address}/api/jobs/{job_id}/logs/tail"
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers()) as session,
                session.ws_connect(url, heartbeat=_HEARTBEAT, max_msg_size=0) as socket,
            ):
                async for piece in socket:
                    if piece.type == aiohttp.WSMsgType.TEXT:
                        yield piece.data
        except (aiohttp.ClientError, OSError):
            return

    def upload(self, uri: str, data: bytes) -> bool:
        """Put a package, ``gcs://NAME``, on the cluster. False: it has it already."""
        path = f"/api/packages/{uri.replace('://', '/')}"
        if self._send("GET", path, seconds=_SLOW).status_code == 200:
            return False
        self._answer(self._send("PUT", path, content=data, seconds=_SLOW))
        return True

    def resources(self) -> list[dict[str, float]]:
        """What each living node has in all, the head included: CPU, GPU, memory (bytes) and others."""
        answer = self._call("GET", "/api/v0/nodes", params={"detail": "1", "limit": "10000"})
        rows = answer["data"]["result"]["result"]
        return [row["resources_total"] for row in rows if row["state"] == "ALIVE"]

    def autoscales(self) -> bool:
        """Whether something adds nodes to the cluster when it is full. Where that cannot be told, True."""
        kinds = self._report("autoscalerReport").get("nodeTypeMapping")
        # A node that was started by hand is of no kind: Ray makes one of its id.
        return not kinds or any(kind != f"node_{node}" for node, kind in kinds.items())

    def in_use(self) -> dict[str, tuple[float, float]]:
        """How much of each resource of the whole cluster is in use, and how much there is."""
        usage = self._report("loadMetricsReport").get("usage") or {}
        return {kind: (used, total) for kind, (used, total) in usage.items()}

    def _report(self, part: str) -> dict[str, Any]:
        """A part of what Ray's autoscaler last wrote down; it does so without scaling anything, too."""
        status = self._call("GET", "/api/cluster_status")["data"].get("clusterStatus")
        return (status.get(part) or {}) if isinstance(status, dict) else {}

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return self._answer(self._send(method, path, **options))

    def _send(self, method: str, path: str, *, seconds: float = _QUICK, **options: Any) -> Any:
        """The response, once it is known that Ray's job server gave it to somebody it knows."""
        import httpx

        try:
            response = self._client.request(method, path, timeout=seconds, **options)
        except httpx.RemoteProtocolError as e:
            if self._has_answered:  # then it is a web server, and died while it was asked
                raise Unreachable(f"no head answers ({e})", where=self.address, fix=_REACH) from e
            raise UserError(
                f"what answers there is no web server ({e})", where=self.address, fix=_PORT
            ) from e
        except httpx.TimeoutException as e:
            raise Unreachable(
                f"the head did not answer within {seconds:g} s", where=self.address, fix=_REACH
            ) from e
        except httpx.TransportError as e:
            raise Unreachable(f"no head answers ({e})", where=self.address, fix=_REACH) from e
        self._has_answered = True
        if response.status_code in {401, 403}:
            raise self._unauthorised()
        return response

    def _unauthorised(self) -> UserError:
        where = f"the head at {self.address}"
        if self._token is None:
            return UserError(
                "it asks for a token, and there is none here",
                where=where,
                fix="put the cluster's token into ~/.ray/auth_token, or name its file: RAY_AUTH_TOKEN_PATH "
                "(`ray get-auth-token` prints it on the head)",
            )
        source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else "the token file"
        return UserError(
            f"it does not accept the token of {source}",
            where=where,
            fix="`ray get-auth-token` on the head prints the right one",
        )

    def _answer(self, response: Any) -> Any:
        if response.status_code == 200:
            try:
                return response.json() if response.content else None
            except json.JSONDecodeError:
                raise UserError(
                    "what answers there is not Ray's job server", where=self.address, fix=_PORT
                ) from None
        path = response.request.url.path
        if response.status_code == 404 and path.startswith("/api/jobs/"):
            raise UserError(
                f"no job {path.split('/')[3]}", where=self.address, fix="`qwen-ray status` shows the jobs"
            )
        if response.status_code == 404:
            raise UserError("what answers there is not Ray's job server", where=self.address, fix=_PORT)
        # Ray answers with a traceback; what it was about is in its last line.
        lines = [line for line in response.text.splitlines() if line.strip()]
        raise RuntimeError(
            f"{self.address} answered {response.status_code}: {lines[-1][:500] if lines else path}"
        )


_REACH = (
    "check that the head is up and that its dashboard can be reached from here: `ray start --head "
    "--dashboard-host 0.0.0.0`, or a tunnel to port 8265"
)
_PORT = "give the port of Ray's dashboard, 8265 unless chosen otherwise; 6379 and 10001 are for other things"


def _job(row: dict[str, Any]) -> Job:
    start, end = row.get("start_time"), row.get("end_time")
    return Job(
        id=str(row["submission_id"]),
        status=str(row["status"]),
        message=row.get("message") or "",
        error_type=row.get("error_type"),
        exit_code=row.get("driver_exit_code"),
        entrypoint=row.get("entrypoint") or "",
        started=start / 1000 if start else None,
        ended=end / 1000 if end else None,
        metadata=row.get("metadata") or {},
    )
