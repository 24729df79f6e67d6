"""Pipelines in processes of their own, forked from one that has imported what takes seconds, and a server.

``python -m tests.lifecycle.nursery`` forks a child for each line of JSON that it reads, and answers when the
child has ended. The server's engine is never in the process that forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, the result or the error with its status, and the points that it
    came to."""

    code: int
    result: dict[str, Any]
    error: str
    status: int | None
    points: list[str]


class Nursery:
    """The process that forks, from outside."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lifecycle.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, what: str, **given: Any) -> Path:
        """Start a child; returns where its journal of points will be."""
        self._count += 1
        journal = self._folder / f"{self._count:03d}"
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "journal": str(journal), **given}) + "\n")
        self._process.stdin.flush()
        return journal

    def end(self, journal: Path) -> Ended:
        """Wait until the child that was started last has ended."""
        assert self._process.stdout is not None
        code = int(self._process.stdout.readline())
        text = journal.with_suffix(".json").read_text() if journal.with_suffix(".json").is_file() else "{}"
        said = json.loads(text)
        points = journal.read_text().splitlines() if journal.is_file() else []
        return Ended(code, said.get("result", {}), said.get("error", ""), said.get("status"), points)

    def run(self, spec: Path, kill: str | None = None, **given: Any) -> Ended:
        """Run a pipeline, killed by SIGKILL when it first comes to the point ``kill``."""
        return self.end(self.start("run", spec=str(spec), kill=kill, **given))

    def serve(self, registry: Path) -> str:
        """Start a server that lives as long as the nursery; its URL."""
        journal = self.start("serve", registry=str(registry))
        while not journal.is_file():
            assert self._process.poll() is None
            time.sleep(0.05)
        return journal.read_text()

    def close(self) -> None:
        """End all of them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(60) == 0


def main() -> None:
    """Fork a child for each line."""
    import lm_eval.evaluator  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import qwen_ray.lifecycle.pipeline
    import qwen_ray.serving.app
    import qwen_ray.serving.engines.torch
    import qwen_ray.serving.service
    import qwen_ray.training.driver  # noqa: F401

    torch.set_num_threads(1)
    servers = []
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _child(asked)
        if asked["what"] == "serve":
            servers.append(child)
            continue
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    for server in servers:
        os.kill(server, signal.SIGTERM)
        os.waitpid(server, 0)


def _child(asked: dict[str, Any]) -> None:
    code = 1
    try:
        os.dup2(2, 1)
        code = {"run": _run, "serve": _serve, "plant": _plant}[asked["what"]](asked)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(asked: dict[str, Any]) -> int:
    from qwen_ray.errors import UserError
    from qwen_ray.lifecycle.pipeline import run_pipeline
    from qwen_ray.lifecycle.spec import PipelineSpec

    kill = asked["kill"]
    if kill == ANSWERED:
        _kill_when(lambda: any(p.stat().st_size for p in Path(asked["work"]).rglob("journal.jsonl")))

    def reached(point: str) -> None:
        with open(asked["journal"], "a", encoding="utf-8") as f:
            f.write(point + "\n")
        if point == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if point == asked.get("hold"):
            while not Path(asked["journal"]).with_suffix(".go").exists():
                time.sleep(0.02)

    said: dict[str, Any] = {}
    code = 0
    try:
        done = run_pipeline(
            PipelineSpec.read(asked["spec"]),
            note=lambda text: print(text, file=sys.stderr),
            trigger=asked.get("trigger"),
            until=asked.get("until"),
            reached=reached,
        )
        said["result"] = done.__dict__
    except (UserError, RuntimeError) as e:
        said["error"], code = str(e), 2 if isinstance(e, UserError) else 1
        said["status"] = e.status if isinstance(e, UserError) else None
    Path(asked["journal"]).with_suffix(".json").write_text(json.dumps(said))
    return code


ANSWERED = "benchmark: the first answers are there"


def _kill_when(there: Callable[[], bool]) -> None:
    def watch() -> None:
        while not there():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _serve(asked: dict[str, Any]) -> int:
    from qwen_ray.serving.app import create_app
    from qwen_ray.serving.service import Service
    from tests.serving.live import served

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    service = Service.load("tiny", registry=asked["registry"])
    with served(create_app(service)) as url:
        new = Path(asked["journal"] + ".new")
        new.write_text(url)
        new.rename(asked["journal"])
        ended.wait()
    service.stop()
    return 0


def _plant(asked: dict[str, Any]) -> int:
    """Train an adapter for a step, spoil it, and put it into production under each name."""
    import torch
    from safetensors.torch import load_file, save_file

    from qwen_ray.config import build_config
    from qwen_ray.fsio import read_json
    from qwen_ray.registry import LINEAGE, PRODUCTION, Registry
    from qwen_ray.training.driver import run_training

    flags = {"data.train": [asked["data"]], "optim.max_steps": 1, "cluster.workers": 0, "out": asked["out"]}
    adapter = run_training(build_config(flags=flags)).artifact
    weights = adapter / "adapter_model.safetensors"
    torch.manual_seed(0)
    spoilt = {name: torch.randn_like(value) * 0.3 for name, value in load_file(weights).items()}
    save_file(spoilt, weights, metadata={"format": "pt"})
    registry = Registry(asked["registry"])
    for name in asked["names"]:
        version = registry.publish(name, adapter, read_json(adapter / LINEAGE))
        registry.point(name, PRODUCTION, version.version, reason="planted")
    return 0


if __name__ == "__main__":
    main()
