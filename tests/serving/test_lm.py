"""Our lm-eval model, in this process, against lm-eval's own hf model with PEFT."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qwen_ray.errors import UserError
from qwen_ray.evaluation.lm import EndpointBackend, EngineBackend, QwenRayLM
from qwen_ray.serving.engines.base import GenerateRequest
from qwen_ray.serving.engines.torch import TorchEngine


def instances(kind: str, args: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(args)]  # type: ignore[arg-type]


def questions() -> list[tuple[str, str]]:
    """Pairs with the awkward cases: trailing spaces, no context, a context that starts with end of text."""
    rng = random.Random(0)
    words = ["capital", "France", "river", "mountain", "42", "fox", "Paris", "é", "日本", "the"]
    out: list[tuple[str, str]] = []
    for i in range(12):
        context = "Question: " + " ".join(rng.choices(words, k=rng.randint(3, 30))) + "\nAnswer:"
        context = ("<|endoftext|>" if i == 3 else "") + context + ("  " if i % 4 == 1 else "")
        out += [(context, " " + " ".join(rng.choices(words, k=rng.randint(1, 4)))) for _ in range(4)]
    out += [("", "The fox"), ("", "<|endoftext|>The fox"), ("snow " * 300, "melts")]
    rng.shuffle(out)
    return out


@pytest.fixture(scope="module", params=[None, "law"])
def both(
    request: pytest.FixtureRequest, model_dir: Path, adapter_dirs: dict[str, Path], loaded: TorchEngine
) -> tuple[QwenRayLM, HFLM]:
    peft = {"peft": str(adapter_dirs[request.param])} if request.param else {}
    hf = HFLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=8, **peft)
    return QwenRayLM(EngineBackend(loaded, loaded.tokenizer, request.param)), hf


def test_loglikelihood(both: tuple[QwenRayLM, HFLM]) -> None:
    ours, hf = both
    requests = instances("loglikelihood", questions())
    want, got = hf.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests, disable_tqdm=True)
    assert [g for _, g in got] == [g for _, g in want]
    assert [x for x, _ in got] == pytest.approx([x for x, _ in want], abs=1e-3)
    assert len({round(x, 3) for x, _ in got}) > 40, "the scores hardly differ, so equality proves little"


def test_rolling(both: tuple[QwenRayLM, HFLM]) -> None:
    ours, hf = both
    requests = instances("loglikelihood_rolling", [("The river begins.",), ("snow and rain " * 150,)])
    want = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(want, rel=1e-4)


def test_generate_until(both: tuple[QwenRayLM, HFLM]) -> None:
    ours, hf = both
    settings = [
        {"until": ["\n", "the"], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 5, "do_sample": False},
    ]
    args = [(context, settings[i % 2]) for i, (context, _) in enumerate(questions()[:14]) if context]
    requests = instances("generate_until", args)
    want = hf.generate_until(requests, disable_tqdm=True)
    assert any(want)
    assert ours.generate_until(requests, disable_tqdm=True) == want


def test_chat_template_and_names(both: tuple[QwenRayLM, HFLM]) -> None:
    ours, hf = both
    talk = [{"role": "user", "content": "Where?"}]
    assert ours.apply_chat_template(talk) == hf.apply_chat_template(talk) == "Question: Where?\nAnswer:"
    assert ours.tokenizer_name == hf.tokenizer_name
    assert ours.chat_template(True) == hf.chat_template(True)


def test_unknown_generation_setting_is_refused(both: tuple[QwenRayLM, HFLM]) -> None:
    with pytest.raises(UserError, match="num_beams"):
        both[0].generate_until(instances("generate_until", [("a", {"num_beams": 3})]), disable_tqdm=True)


def test_unreachable_server_is_said_at_once() -> None:
    with pytest.raises(UserError, match="does not answer") as e:
        EndpointBackend("http://127.0.0.1:9", "tiny")
    assert "qwen-ray serve" in e.value.fix


def test_engine_without_the_adapter_says_so(loaded: TorchEngine) -> None:
    lm = QwenRayLM(EngineBackend(loaded, loaded.tokenizer, "missing"))
    with pytest.raises(UserError, match="'missing' is not loaded"):
        lm.loglikelihood(instances("loglikelihood", [("a", "b")]), disable_tqdm=True)
    assert loaded.generate([GenerateRequest(None, [1], 1)])[0].ids  # and the engine goes on
