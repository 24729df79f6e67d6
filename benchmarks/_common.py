"""What every benchmark script shares: arguments, the facts about the machine, and writing the result."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_ray.fsio import write_json


def arguments(description: str) -> argparse.Namespace:
    """``--quick`` (a small run that only shows that the script works) and ``--out FILE``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small and short; its figures mean little")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON result goes")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """CPU, logical cores, memory in GiB, and the load average before the run."""
    cpu = platform.processor()
    memory = 0.0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
        memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    except OSError:
        pass  # not Linux
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load_before": load,
        "gpu": _gpu(),
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the named packages, and Python's."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def commit() -> str | None:
    """The checked-out commit, marked when the tree differs from it; None outside a repository."""
    folder = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" + local changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result, and its headline to the terminal."""
    write_json(path, result)
    headline = result["headline"]
    print(f"{result['name']}: {headline['ratio']:.2f}x {headline['what']} -> {path}", file=sys.stderr)
