"""A job server that only remembers: the REST API's answers, without a cluster that would run anything."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from aiohttp import web


class JobServer:
    """``jobs``: rows by id, as the API has them. ``log``: of every job; None: it cannot be read.
    ``begins_as``: the state of a new job."""

    def __init__(self) -> None:
        self.address = ""
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log: str | None = ""
        self.begins_as: dict[str, Any] = {"status": "RUNNING"}
        self.app = web.Application()
        self.app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{id}", self._job),
                web.get("/api/jobs/{id}/logs", self._logs),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
                web.get("/api/packages/{name:.*}", self._package),
                web.get("/api/v0/nodes", self._nodes),
                web.get("/api/cluster_status", self._status),
            ]
        )

    def end(self, job_id: str, status: str, exit_code: int | None = None) -> None:
        """From now on the job is over."""
        self.jobs[job_id] |= {"status": status, "driver_exit_code": exit_code, "end_time": 2000}

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"ray_version": version("ray")})

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        row = await request.json()
        if row["submission_id"] in self.jobs:
            return web.Response(status=500, text="ValueError: it already exists")
        self.jobs[row["submission_id"]] = row | {"start_time": 1000} | self.begins_as
        return web.json_response({})

    async def _job(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["id"]])

    async def _logs(self, _: web.Request) -> web.Response:
        if self.log is None:
            return web.Response(status=500, text="RuntimeError: no agent")
        return web.json_response({"logs": self.log})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(self.log or "")
        await socket.close()
        return socket

    async def _package(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def _nodes(self, _: web.Request) -> web.Response:
        row = {"state": "ALIVE", "resources_total": {"CPU": 8}}
        return web.json_response({"data": {"result": {"result": [row]}}})

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response({"data": {"clusterStatus": None}})


@contextmanager
def job_server() -> Iterator[JobServer]:
    """A :class:`JobServer` that listens."""
    server, loop = JobServer(), asyncio.new_event_loop()
    runner = web.AppRunner(server.app, shutdown_timeout=1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
