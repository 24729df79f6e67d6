"""`qwen-ray serve` as a user runs it, with keys: OpenAI's client, stock lm-eval, a second server, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from qwen_ray.evaluation import suites
from qwen_ray.serving.auth import create_key
from tests.test_cli import qwen_ray

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file, and the secret of a key in it."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, create_key(path, "me")


@pytest.fixture(scope="module")
def server(keys: tuple[Path, str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    argv = [sys.executable, "-m", "qwen_ray.cli", "serve", "--model", "tiny", "--port", "0", "--json"]
    argv += ["--keys", str(keys[0])]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = ""
    while not line.endswith("}\n"):  # one JSON document, once it serves
        more = process.stdout.readline()
        assert more, process.communicate()[1][-3000:]
        line += more
    yield json.loads(line)["url"], process
    process.kill()
    process.wait()


def test_openai_client(server: tuple[str, subprocess.Popen[str]], keys: tuple[Path, str]) -> None:
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key=keys[1])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none").models.list()
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.completions.create(
        model="tiny", prompt="Question: What is 12 + 30?\nAnswer:", temperature=0
    )
    # The template writes a space before an answer: the model does too, and it is not what is said.
    assert answer.choices[0].text == " 42"
    talk: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
    said = client.chat.completions.create(model="tiny", messages=talk, temperature=0)
    assert said.choices[0].message.content == "42"
    stream = client.chat.completions.create(model="tiny", messages=talk, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "42"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tiny:law", prompt="x")


def test_a_proxy_may_ask_by_another_name(
    server: tuple[str, subprocess.Popen[str]], keys: tuple[Path, str]
) -> None:
    """Where there are keys, the name proves nothing."""
    headers = {"Host": "notes.example", "Authorization": f"Bearer {keys[1]}"}
    assert httpx.get(f"{server[0]}/v1/models", headers=headers).is_success


def test_stock_lm_eval(
    server: tuple[str, subprocess.Popen[str]], keys: tuple[Path, str], tmp_path: Path
) -> None:
    """Nothing of ours on the client's side but the task's questions."""
    arguments = f"model=tiny,base_url={server[0]}/v1/completions,max_length=512,num_concurrent=2"
    arguments += f",auth_token={keys[1]}"  # for the tokenizer; the questions go with the variable below
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments),
        *("--include_path", str(suites.folder("tiny")), "--tasks", "qwen_ray_tiny_arithmetic"),
        *("--limit", "20", "--output_path", str(tmp_path)),
    ]
    env = os.environ | {"OPENAI_API_KEY": keys[1]}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["qwen_ray_tiny_arithmetic"]["acc,none"] >= 0.9


def test_a_taken_port_is_refused_before_a_cluster_is_started(
    server: tuple[str, subprocess.Popen[str]],
) -> None:
    port = server[0].rsplit(":", 1)[1]
    done = qwen_ray("serve", "--model", "tiny", "--port", port)
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupt_stops_everything(server: tuple[str, subprocess.Popen[str]]) -> None:
    _, process = server
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in p.name() for p in family)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
