"""The real server: Ray Serve, HTTP, several processes. One start for all tests of this file."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM

from qwen_ray import cluster
from qwen_ray.errors import UserError
from qwen_ray.evaluation.lm import EndpointBackend, EngineBackend, QwenRayLM
from qwen_ray.registry import Registry
from qwen_ray.serving import launch
from qwen_ray.serving.engines.base import GenerateRequest
from qwen_ray.serving.engines.torch import TorchEngine
from tests.serving.test_lm import instances, questions

pytestmark = pytest.mark.cluster

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def url(model_dir: Path, registry: Registry, adapter_dirs: dict[str, Path]) -> Iterator[str]:
    cluster.connect("local", num_cpus=2)
    yield launch.start(
        str(model_dir),
        registry=registry.root,
        adapters={"own": adapter_dirs["bio"]},
        embedder=MINILM,
        port=0,
    )
    launch.stop()
    cluster.disconnect()


@pytest.fixture(scope="module")
def openai(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_openai_client_models_and_completions(openai: Any, loaded: TorchEngine) -> None:
    ids = {model.id for model in openai.models.list()}
    assert {"rand", "rand:own", "rand:geo", "rand:geo@2", "rand:law"} <= ids
    for model, key in (("rand", None), ("rand:own", "bio"), ("rand:geo", "geo"), ("rand:law@1", "law")):
        got = openai.completions.create(model=model, prompt=[9, 8, 7, 6], max_tokens=6, temperature=0)
        assert got.choices[0].text == loaded.generate([GenerateRequest(key, [9, 8, 7, 6], 6)])[0].text
    text = openai.completions.create(model="rand", prompt="The fox", max_tokens=1, temperature=0, logprobs=3)
    assert len(text.choices[0].logprobs.top_logprobs[0]) == 3


def test_openai_client_streams(openai: Any) -> None:
    request: dict[str, Any] = {"model": "rand:geo", "prompt": [9, 8, 7], "max_tokens": 12, "temperature": 0}
    whole = openai.completions.create(**request).choices[0]
    chunks = list(openai.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len(chunks) >= 12


def test_openai_client_chat_and_its_stream(openai: Any) -> None:
    request: dict[str, Any] = {
        "model": "rand:law",
        "messages": [{"role": "user", "content": "Where does the river begin?"}],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    whole = openai.chat.completions.create(**request)
    prompt = "Question: Where does the river begin?\nAnswer:"
    plain = openai.completions.create(model="rand:law", prompt=prompt, max_tokens=8, temperature=0)
    assert whole.choices[0].message.content == plain.choices[0].text
    stream = openai.chat.completions.create(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == plain.choices[0].text


def test_openai_client_gets_its_own_errors(openai: Any) -> None:
    from openai import BadRequestError, NotFoundError

    for model in ("gpt", "rand:nobody", "rand:../geo", "rand:%2e%2e"):
        for stream in (False, True):
            with pytest.raises(NotFoundError) as e:
                openai.completions.create(model=model, prompt="a", stream=stream)
            assert e.value.code == "model_not_found"
    with pytest.raises(BadRequestError, match="600 is not a token id"):
        openai.completions.create(model="rand", prompt=[600], stream=True)


def test_the_assistant_is_a_deployment_of_its_own(openai: Any) -> None:
    from openai import BadRequestError

    texts = ["Where does the river begin?", "Where is the source of the river?", "12 + 30 = 42"]
    got = openai.embeddings.create(model=MINILM, input=texts)
    river, source, total = (entry.embedding for entry in got.data)
    assert len(river) == 384
    assert np.dot(river, source) > np.dot(river, total) + 0.2
    for model, words in (("rand:auto", "no router"), ("rand:geo+rag", "no knowledge base")):
        with pytest.raises(BadRequestError, match=words):  # its refusals come through as they are
            openai.completions.create(model=model, prompt="a")


@pytest.mark.parametrize("adapter", [None, "law"])
def test_stock_lm_eval_client_gets_hf_and_peft_logprobs(
    adapter: str | None, url: str, model_dir: Path, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """lm-eval's own ``local-completions``, with nothing of ours on its side, against its own hf model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [
        {
            "question": context,
            "choices": [" " + word for word in ("river", "the fox", "Paris is 42", "é")],
            "answer": 0,
        }
        for context, _ in questions()[:8]
        if 0 < len(context) < 500  # where it truncates, the stock client keeps one token less than hf
    ]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(
        "task: toy\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'toy.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\nmetric_list: [{metric: acc}]\n'
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def logprobs(model: Any, **settings: Any) -> list[list[tuple[float, bool]]]:
        results = simple_evaluate(model, tasks=["toy"], task_manager=manager, bootstrap_iters=0, **settings)
        assert results is not None
        samples = sorted(results["samples"]["toy"], key=lambda sample: sample["doc_id"])
        return [[(float(x), bool(g)) for ((x, g),) in sample["resps"]] for sample in samples]

    name = "rand" if adapter is None else f"rand:{adapter}"
    args = {"base_url": f"{url}/v1/completions", "model": name, "num_concurrent": 4, "max_length": 257}
    got = logprobs("local-completions", model_args=args)
    peft = {"peft": str(adapter_dirs[adapter])} if adapter else {}
    want = logprobs(HFLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=4, **peft))
    assert len(got) == len(rows)
    for g, w in zip(got, want, strict=True):
        assert [x for x, _ in g] == pytest.approx([x for x, _ in w], abs=1e-3)
        assert [x for _, x in g] == [x for _, x in w]


def test_our_lm_over_http_equals_our_lm_in_process(url: str, loaded: TorchEngine) -> None:
    over = QwenRayLM(base_url=url, model="rand:geo")
    here = QwenRayLM(EngineBackend(loaded, loaded.tokenizer, "geo"))
    asked = instances("loglikelihood", questions())
    want = here.loglikelihood(asked, disable_tqdm=True)
    got = over.loglikelihood(asked, disable_tqdm=True)
    assert [x for x, _ in got] == pytest.approx([x for x, _ in want], abs=1e-3)
    assert [g for _, g in got] == [g for _, g in want]
    prompts = [(context, {"until": ["the"], "max_gen_toks": 8}) for context, _ in questions()[:6] if context]
    asked = instances("generate_until", prompts)
    assert over.generate_until(asked, disable_tqdm=True) == here.generate_until(asked, disable_tqdm=True)
    talk = [{"role": "user", "content": "Where?"}]
    assert over.apply_chat_template(talk) == here.apply_chat_template(talk)
    assert over.max_length == here.max_length == 256


def test_unknown_model_is_refused_before_any_work(url: str) -> None:
    with pytest.raises(UserError, match="no model 'rand:goe'") as e:
        EndpointBackend(url, "rand:goe")
    assert "rand:geo" in e.value.fix


def test_one_bad_request_in_a_burst_affects_no_other(url: str, loaded: TorchEngine) -> None:
    keys = {"rand": None, "rand:geo": "geo", "rand:law": "law", "rand:own": "bio"}
    good = [(list(keys)[i % 4], [i + 1, 5, 9]) for i in range(24)]
    bad = [
        {"model": "rand:geo", "prompt": [[1, 2], [700]]},
        {"model": "rand:nobody", "prompt": "a"},
        {"model": "rand", "prompt": [3] * 999},
        {"model": "rand", "prompt": "a", "temperature": -1},
    ]
    bodies: list[dict[str, Any]] = [
        {"model": model, "prompt": ids, "max_tokens": 12, "temperature": 0} for model, ids in good
    ]
    mixed = [body for i in range(4) for body in (*bodies[i * 6 : i * 6 + 6], bad[i])]
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(28) as pool:
        replies = list(pool.map(lambda body: client.post(f"{url}/v1/completions", json=body), mixed))
    refused = [reply.status_code for reply, body in zip(replies, mixed, strict=True) if body in bad]
    assert refused == [400, 404, 400, 400]
    answers = [reply for reply, body in zip(replies, mixed, strict=True) if body not in bad]
    for (model, ids), reply in zip(good, answers, strict=True):
        want = loaded.generate([GenerateRequest(keys[model], ids, 12)])[0].text
        assert reply.json()["choices"][0]["text"] == want


def test_abandoned_stream_is_cancelled_and_harms_no_other(url: str, loaded: TorchEngine) -> None:
    body = {"model": "rand:law", "prompt": [7], "max_tokens": 255, "temperature": 0, "stream": True, "n": 8}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        next(reply.iter_lines())
    plain = {"model": "rand:geo", "prompt": [9, 8, 7], "max_tokens": 20, "temperature": 0}
    got = httpx.post(f"{url}/v1/completions", json=plain, timeout=60).json()["choices"][0]["text"]
    assert got == loaded.generate([GenerateRequest("geo", [9, 8, 7], 20)])[0].text
    deadline = time.monotonic() + 20
    while httpx.get(f"{url}/health").json()["load"]["generating"]:
        assert time.monotonic() < deadline, "the abandoned rows are still generated"
        time.sleep(0.1)


def test_without_keys_it_is_asked_by_names_of_this_machine_only(url: str) -> None:
    port = url.rpartition(":")[2]
    for name in ("localhost", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert httpx.get(f"{url}/v1/models", headers={"Host": name}).is_success
    for path in ("/", "/v1/models", "/health"):
        reply = httpx.get(f"{url}{path}", headers={"Host": f"evil.example:{port}"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (403, "invalid_request_error")


def test_port_in_use_is_said_before_anything_starts(url: str, model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=str(port)) as e:
            launch.start(str(model_dir), port=port)
        assert "--port" in e.value.fix
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_second_server_on_the_cluster_is_refused(url: str, model_dir: Path) -> None:
    with pytest.raises(UserError, match="already runs"):
        launch.start(str(model_dir), port=0)
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_bad_arguments_are_refused_before_anything_starts(model_dir: Path) -> None:
    with pytest.raises(UserError, match="'modle'"):
        launch.build({"modle": "tiny"})
    with pytest.raises(UserError, match="unknown model"):
        launch.start("no-such-model", port=0)
    with pytest.raises(UserError, match="no such adapter folder"):
        launch.build({"model": str(model_dir), "adapters": {"a": "/nowhere"}})
