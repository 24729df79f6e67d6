"""A pipeline in a process of its own, so that the watch goes on looking, and outlives it.

``python -m qwen_ray.lifecycle.child FILE`` reads what triggered it from stdin (JSON), and prints its result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_ray.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UserError

_STOP_SECONDS = 30.0
_ENDING = (signal.SIGTERM, signal.SIGINT)
_TAIL = 500  # characters of what a failed run said last


class Child:
    """Implements :class:`~qwen_ray.lifecycle.runs.Running`."""

    def __init__(self, file: Path, trigger: dict[str, Any]) -> None:
        # Into files: nobody reads a pipe between two looks.
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(file)],
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=self._err,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(trigger).encode())
        self._process.stdin.close()

    def poll(self) -> dict[str, Any] | None:
        code = self._process.poll()
        if code is None:
            return None
        out, err = self._read(self._out), self._read(self._err)
        try:
            return dict(json.loads(out))
        except ValueError:
            return {"error": f"exit code {code}: {err[-_TAIL:].strip() or 'it said nothing'}"}

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @staticmethod
    def _read(file: Any) -> str:
        file.seek(0)
        return file.read().decode(errors="replace")


def main(file: str) -> int:
    """Run the pipeline; its result, or why there is none, as one JSON object on stdout."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Ray, lm-eval and wandb print to stdout as they like
    for number in _ENDING:
        signal.signal(number, _interrupt)
    code, outcome = EXIT_OK, {}
    try:
        from qwen_ray.lifecycle.pipeline import run_pipeline
        from qwen_ray.lifecycle.spec import PipelineSpec

        trigger = json.load(sys.stdin)
        note = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        outcome = asdict(run_pipeline(PipelineSpec.read(Path(file)), note=note, trigger=trigger))
    except UserError as e:
        code, outcome = EXIT_BAD_INPUT, {"busy" if e.status == 409 else "error": str(e)}
    except KeyboardInterrupt:
        code, outcome = EXIT_INTERRUPTED, {"error": "it was interrupted"}
    except Exception as e:
        code, outcome = EXIT_FAILED, {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(outcome), file=stdout, flush=True)
    return code


def _interrupt(_signal: int, _frame: object) -> None:
    """End in order, so that a server that was started is stopped; a second signal does not disturb that."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
