"""The app on a real socket, over a service in this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from fastapi import FastAPI

from qwen_ray.serving.launch import free_port


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The URL at which ``app`` answers until the block ends."""
    import uvicorn

    port = free_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
