from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem, TokenEvent
from qwen_ray.serving.engines.text import TextStream
from qwen_ray.serving.engines.torch import TorchEngine
from tests.serving.conftest import make_model

KEYS = [None, "geo", "law", "bio"]


def naive(
    engine: TorchEngine, adapter: str | None, context: list[int], tokens: list[int]
) -> tuple[list[float], bool]:
    """One forward of one sequence, truncated as lm-eval's hf backend does."""
    whole = (context + tokens)[-(engine.context_length + 1) :]
    with torch.no_grad(), engine.lora.select([adapter]):
        logprobs = engine.model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)[-len(tokens) :]
    return logprobs[range(len(tokens)), tokens].tolist(), logprobs.argmax(-1).tolist() == tokens


def random_items(count: int, seed: int) -> list[ScoreItem]:
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(512) for _ in range(rng.randint(low, high))]

    return [
        ScoreItem(rng.choice(KEYS), ids(1, 60), [ids(1, 9) for _ in range(rng.randint(1, 5))])
        for _ in range(count)
    ]


def assert_scores(engine: TorchEngine, items: list[ScoreItem]) -> None:
    for item, result in zip(items, engine.score(items), strict=True):
        assert len(result.continuations) == len(item.continuations)
        for tokens, got in zip(item.continuations, result.continuations, strict=True):
            want, greedy = naive(engine, item.adapter, list(item.context), list(tokens))
            assert got.logprobs == pytest.approx(want, abs=1e-4)
            assert got.greedy == greedy


def test_packed_scores_equal_one_by_one(loaded: TorchEngine) -> None:
    items = random_items(60, seed=1)
    batches = loaded.plan_score(items)
    assert any(b.packed and len({r.adapter for r in b.rows}) == 4 for b in batches), (
        "nothing was mixed or packed"
    )
    assert_scores(loaded, items)


def test_greedy_continuation_is_recognised(loaded: TorchEngine) -> None:
    for key in KEYS:
        tokens = loaded.generate([GenerateRequest(key, [7, 8, 9], 4)])[0].ids
        wrong = [*tokens[:-1], (tokens[-1] + 1) % 512]
        got = loaded.score([ScoreItem(key, [7, 8, 9], [tokens, wrong])])[0].continuations
        assert [c.greedy for c in got] == [True, False]


def test_long_contexts_are_cut_on_the_left_as_lm_eval_does(loaded: TorchEngine) -> None:
    rng = random.Random(3)
    long = [rng.randrange(512) for _ in range(400)]
    items = [
        ScoreItem("geo", long, [[1, 2, 3], [4] * 40]),
        ScoreItem(None, long[:254], [[1, 2, 3], [4, 5, 6, 7]]),  # the first fits exactly
        ScoreItem(None, long[:10], [long[:256]]),
    ]
    assert [r.truncated for r in loaded.score(items)] == [True, True, True]
    assert not loaded.score([ScoreItem(None, long[:254], [[1, 2, 3]])])[0].truncated
    assert_scores(loaded, items)


def test_prompt_logprobs_top_and_next(loaded: TorchEngine) -> None:
    ids = [5, 9, 200, 31, 77, 401]
    got = loaded.prompt_logprobs("law", ids, top=5)
    with torch.no_grad(), loaded.lora.select(["law"]):
        want = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    score = got.continuations[0]
    assert score.logprobs == pytest.approx(want[range(5), ids[1:]].tolist(), abs=1e-4)
    assert [[t for t, _ in top] for top in score.top] == want[:5].topk(5).indices.tolist()
    assert got.next_token is not None
    assert got.next_token[0] == (int(want[5].argmax()), pytest.approx(float(want[5].max()), abs=1e-4))


def test_likeliest_tokens_logprob_is_the_same_bits_as_its_entry(loaded: TorchEngine) -> None:
    ids = loaded.generate([GenerateRequest("geo", [3, 1, 4], 12)])[0].ids
    score = loaded.prompt_logprobs("geo", [3, 1, 4, *ids], top=1).continuations[0]
    assert len(ids) == 12
    for logprob, top in list(zip(score.logprobs, score.top, strict=True))[2:]:
        assert logprob == top[0][1]


def test_one_token_prompt(loaded: TorchEngine) -> None:
    result = loaded.prompt_logprobs(None, [42], top=2)
    assert result.continuations == []
    assert result.next_token is not None
    assert result.next_token[0][0] == loaded.generate([GenerateRequest(None, [42], 1)])[0].ids[0]


def naive_greedy(engine: TorchEngine, key: str | None, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad(), engine.lora.select([key]):
            ids.append(int(engine.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in engine.eos_ids:
            break
    return ids[len(prompt) :]


def test_mixed_greedy_generation_equals_one_by_one(loaded: TorchEngine) -> None:
    rng = random.Random(5)
    requests = [
        GenerateRequest(
            KEYS[i % 4], [rng.randrange(1, 512) for _ in range(rng.randint(1, 40))], rng.randint(1, 25)
        )
        for i in range(14)
    ]
    events: dict[int, list[TokenEvent]] = {i: [] for i in range(len(requests))}
    results = loaded.generate(requests, lambda i, e: events[i].append(e))
    for i, (request, result) in enumerate(zip(requests, results, strict=True)):
        want = naive_greedy(loaded, request.adapter, list(request.prompt), request.max_tokens)
        assert result.ids == want, i
        assert [e.id for e in events[i]] == want
        assert "".join(e.text for e in events[i]) == result.text
        assert [e.finish_reason for e in events[i]][:-1] == [None] * (len(want) - 1)
        assert events[i][-1].finish_reason == result.finish_reason


def test_generated_logprobs_equal_scoring_them(loaded: TorchEngine) -> None:
    result = loaded.generate([GenerateRequest("bio", [9, 8, 7], 6, temperature=1.0, seed=3, logprobs=2)])[0]
    scored = loaded.score([ScoreItem("bio", [9, 8, 7], [result.ids])])[0].continuations[0]
    assert result.logprobs == pytest.approx(scored.logprobs, abs=1e-4)
    assert [len(top) for top in result.top] == [2] * len(result.ids)


def test_sampling_follows_the_seed_and_not_the_batch(loaded: TorchEngine) -> None:
    def sample(seed: int, others: int) -> list[int]:
        requests = [GenerateRequest("geo", [11, 12], 12, temperature=1.0, seed=seed)]
        requests += [
            GenerateRequest("law", [i + 1] * (i + 3), 12, temperature=1.0, seed=i) for i in range(others)
        ]
        return loaded.generate(requests)[0].ids

    assert sample(1, 0) == sample(1, 5)
    assert len({tuple(sample(seed, 0)) for seed in range(4)}) > 1


def test_top_p_keeps_only_the_likeliest(loaded: TorchEngine) -> None:
    greedy = loaded.generate([GenerateRequest(None, [11, 12], 8)])[0].ids
    narrow = GenerateRequest(None, [11, 12], 8, temperature=1.0, top_p=1e-6, seed=1)
    assert loaded.generate([narrow])[0].ids == greedy


def test_stop_string_ends_and_is_cut(loaded: TorchEngine) -> None:
    free = loaded.generate([GenerateRequest(None, [11, 12], 30)])[0]
    assert len(free.text) > 8
    stop = free.text[4:7]
    events: list[TokenEvent] = []
    request = GenerateRequest(None, [11, 12], 30, stop=["never-in-it", stop])
    result = loaded.generate([request], lambda _, e: events.append(e))[0]
    assert result.text == free.text[: free.text.index(stop)]
    assert result.finish_reason == "stop"
    assert "".join(e.text for e in events) == result.text


def test_text_that_may_become_a_stop_string_is_held_back(loaded: TorchEngine) -> None:
    ids = [
        i for part in "The capital of France, ca" for i in loaded.tokenizer.encode(part)
    ]  # one a character
    stream = TextStream(loaded.tokenizer, [5], ["capital of F", "zz"])
    shown = []
    for token in ids:
        text, stopped = stream.push(token)
        shown.append(text)
        if stopped:
            break
    assert shown == ["T", "h", "e", " "] + [""] * 12
    open_end = TextStream(loaded.tokenizer, [5], ["capital of S"])
    pieces = [open_end.push(token)[0] for token in ids]
    assert pieces[15] == "capital of F"[:12]
    assert pieces[-2:] == ["", ""]
    assert "".join(pieces) + open_end.finish() == "The capital of France, ca"


def test_characters_of_several_tokens_come_whole(loaded: TorchEngine) -> None:
    ids = loaded.tokenizer.encode("é日本")
    stream = TextStream(loaded.tokenizer, [5], [])
    pieces = [stream.push(token)[0] for token in ids]
    assert [piece for piece in pieces if piece] == ["é", "日", "本"]
    broken = TextStream(loaded.tokenizer, [5], [])
    assert [broken.push(token)[0] for token in ids[:-1]] == pieces[:-1]
    assert broken.finish().startswith("�")


def test_end_of_text_token_stops(engine: TorchEngine) -> None:
    free = engine.generate([GenerateRequest(None, [11, 12], 10)])[0]
    assert (free.finish_reason, len(free.ids)) == ("length", 10)
    at = next(i for i in range(2, 10) if free.ids[i] not in free.ids[:i])
    engine.eos_ids = frozenset([free.ids[at], 511])
    ended = engine.generate([GenerateRequest(None, [11, 12], 10)])[0]
    assert (ended.ids, ended.finish_reason) == (free.ids[: at + 1], "stop")
    assert free.text.startswith(ended.text)
    assert len(ended.text) < len(free.text)


def test_eos_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert TorchEngine.load(models.resolve(str(folder))).eos_ids == {5, 6}


def test_generation_ends_where_the_context_is_full(loaded: TorchEngine) -> None:
    result = loaded.generate([GenerateRequest(None, [11] * 250, 100)])[0]
    assert (len(result.ids), result.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (ScoreItem(None, [], [[1]]), "context is empty"),
        (ScoreItem(None, [512], [[1]]), "512 is not a token id"),
        (ScoreItem(None, [1], [[-1]]), "-1 is not a token id"),
        (ScoreItem(None, [1], [[1] * 257]), "does not fit"),
        (ScoreItem(None, [1], [[1]], top=21), "at most 20"),
        (ScoreItem("nobody", [1], [[1]]), "'nobody' is not loaded"),
        (ScoreItem(None, [1] * 257, [], next_token=True), "the prompt has 257 tokens"),
    ],
)
def test_bad_score_items(loaded: TorchEngine, item: ScoreItem, words: str) -> None:
    with pytest.raises(UserError, match=words):
        loaded.score([ScoreItem(None, [1], [[2]]), item])


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": [True]},
        {"prompt": [9999]},
        {"prompt": [1] * 256},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"logprobs": 21},
        {"adapter": "nobody"},
    ],
)
def test_bad_generate_requests(loaded: TorchEngine, change: dict[str, object]) -> None:
    settings: dict[str, object] = {"adapter": None, "prompt": [1], "max_tokens": 1} | change
    with pytest.raises(UserError):
        loaded.generate([GenerateRequest(**settings)])  # type: ignore[arg-type]


def test_sliding_window_model_is_scored_without_sharing(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "window", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    engine = TorchEngine.load(models.resolve(str(folder)))
    items = [ScoreItem(None, i.context, i.continuations) for i in random_items(12, seed=2)]
    assert not any(batch.packed for batch in engine.plan_score(items))
    assert_scores(engine, items)
    assert engine.generate([GenerateRequest(None, [5] * 20, 6)])[0].ids == naive_greedy(
        engine, None, [5] * 20, 6
    )


def test_other_architecture_with_capped_logits(tmp_path: Path, model_dir: Path) -> None:
    """Gemma 2 caps its logits after the head and has sliding layers: no shortcut is exact."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        sliding_window=8,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
        attn_implementation="eager",
        query_pre_attn_scalar=16,
    )
    engine = TorchEngine(Gemma2ForCausalLM(config).eval(), AutoTokenizer.from_pretrained(model_dir))
    assert not engine._split
    items = [ScoreItem(None, i.context, i.continuations) for i in random_items(8, seed=4)]
    assert_scores(engine, items)
    assert engine.generate([GenerateRequest(None, [5] * 20, 6)])[0].ids == naive_greedy(
        engine, None, [5] * 20, 6
    )
