"""What is true of one machine. Standard library only: it is sent whole to nodes whose qwen-ray, if they have
one, may be another."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_SECONDS = 5.0  # for a connection


class Probe:
    """One for each node."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def facts(self, packages: Sequence[str], secrets: Sequence[str], *, hub: bool = True) -> dict[str, Any]:
        """Versions, GPUs, sizes (bytes), limits, which of ``secrets`` are there (never their values), and
        with ``hub`` whether the model hub can be reached."""
        return {
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "prefix": sys.prefix,
            "packages": {name: _version(name) for name in packages},
            "gpus": _gpus(),
            "disk": {path: shutil.disk_usage(path).free for path in (tempfile.gettempdir(), _home())},
            "shm": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "secrets": {name: _has_secret(name) for name in secrets},
            "hub": _hub() if hub else None,
        }

    def clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def nccl(self) -> str | None:
        """NCCL's version in this torch; None without it. Takes seconds: it imports torch."""
        try:
            import torch

            if not torch.distributed.is_nccl_available():
                return None
            return ".".join(map(str, torch.cuda.nccl.version()))
        except Exception:  # whatever stops torch from loading CUDA's libraries stops a run too
            return None

    def listen(self, host: str) -> int:
        """Open a free port, as a rank does for its neighbours; returns it."""
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def connect(self, host: str, port: int) -> str | None:
        """Connect to another node's port; what went wrong, or None."""
        try:
            socket.create_connection((host, port), timeout=_SECONDS).close()
        except OSError as e:
            return str(e)
        return None

    def write(self, location: str, key: str, data: bytes) -> str | None:
        """Write a new document into a storage; what went wrong, or None."""
        try:
            from qwen_ray.storage import open_storage

            return None if open_storage(location).create(key, data) else "it says that the document exists"
        except Exception as e:
            return str(e)

    def read(self, location: str, key: str) -> bytes | str:
        """The document, or what went wrong."""
        try:
            from qwen_ray.storage import Missing, open_storage

            try:
                return open_storage(location).read(key).data
            except Missing:
                return "what another node wrote is not there"
        except Exception as e:
            return str(e)

    def delete(self, location: str, key: str) -> None:
        """Remove the document."""
        from qwen_ray.storage import open_storage

        open_storage(location).delete(key)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _home() -> str:
    """The home folder, or the nearest one above it that is there: it would be made in that."""
    path = os.path.abspath(os.path.expanduser("~"))
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each GPU, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(("name", "driver", "memory"), row, strict=False)) for row in rows]


def _has_secret(name: str) -> bool:
    """Whether a job would find it: an empty file holds no secret."""
    folder = Path(os.environ.get("QWEN_RAY_SECRETS", "/run/secrets"))
    try:
        return bool(os.environ.get(name) or (folder / name).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False


def _hub() -> str:
    """``offline`` where it is not to be asked, ``reachable``, or why it is not."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        return "offline"
    parts = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_SECONDS).close()
    except OSError as e:
        return f"{parts.hostname}: {e}"
    return "reachable"
