"""Prompts that begin alike, in one row or from the prefix cache, have the scores of each alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from qwen_ray import models
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem, ScoreResult, prompt_item
from qwen_ray.serving.engines.packing import plan
from qwen_ray.serving.engines.prefix import BLOCK, Marks, PrefixCache
from qwen_ray.serving.engines.torch import TorchEngine

KEYS = [None, "geo", "law", "bio"]


@pytest.fixture
def engine(model_dir: Path, adapter_dirs: dict[str, Path]) -> TorchEngine:
    """All adapters, and a cache with nothing in it."""
    engine = TorchEngine.load(models.resolve(str(model_dir)), threads=1)
    for name, folder in adapter_dirs.items():
        engine.add_adapter(name, folder)
    return engine


def cache(engine: TorchEngine) -> PrefixCache:
    assert engine.prefixes is not None
    return engine.prefixes


def ids(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(1, 512) for _ in range(rng.randint(low, high))]


def questions(rng: random.Random, count: int) -> list[ScoreItem]:
    """Contexts from a few beginnings, as whole prompts and as continuations, with every adapter."""
    starts = [ids(rng, 1, 70) for _ in range(3)]
    items: list[ScoreItem] = []
    for _ in range(count):
        start = rng.choice(starts)
        context = start[: rng.randint(1, len(start))] + ids(rng, 0, 20)
        choices = [ids(rng, 1, 6) for _ in range(3)]
        key, top = rng.choice(KEYS), rng.choice([0, 1, 5])
        if rng.random() < 0.5:
            items.append(ScoreItem(key, context, choices, top=top))
        else:
            notes = ids(rng, 20, 40) if rng.random() < 0.2 else ()
            items += [prompt_item(key, context + choice, top=top, prefix=notes) for choice in choices]
    return items


def assert_exact(engine: TorchEngine, items: list[ScoreItem], results: list[ScoreResult]) -> None:
    """Each continuation against one forward of its own."""
    for item, result in zip(items, results, strict=True):
        for tokens, got in zip(item.continuations, result.continuations, strict=True):
            whole = [*item.context, *tokens]
            with torch.no_grad(), engine.lora.select([item.adapter]):
                every = engine.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            want = every[len(item.context) - 1 : -1]
            assert got.logprobs == pytest.approx(want[range(len(tokens)), list(tokens)].tolist(), abs=1e-4)
            assert got.greedy == (want.argmax(-1).tolist() == list(tokens))
            if item.top:
                assert [[t for t, _ in top] for top in got.top] == want.topk(item.top).indices.tolist()
            else:
                assert got.top == []
            if item.next_token:
                assert result.next_token is not None
                assert result.next_token[0] == (
                    int(every[-1].argmax()),
                    pytest.approx(float(every[-1].max()), abs=1e-4),
                )


def test_scores_stay_exact_while_the_cache_fills(engine: TorchEngine) -> None:
    rng = random.Random(1)
    items = questions(rng, 60)
    for _ in range(3):
        rng.shuffle(items)
        before = cache(engine).reused
        for start in range(0, len(items), 25):
            part = items[start : start + 25]
            assert_exact(engine, part, engine.score(part))
    assert cache(engine).reused - before > 2000, "the third round should hardly read anything"


def test_one_questions_choices_share_a_row_whoever_sends_them(engine: TorchEngine) -> None:
    """lm-eval's stock client sends each choice as a prompt of its own."""
    rng = random.Random(2)
    context = ids(rng, 50, 50)
    choices = [[9, 4, 1], [9, 5], [7], [9, 4, 1, 3]]
    items = [prompt_item("geo", context + choice) for choice in choices] + [prompt_item("law", context)]
    (batch,) = engine.plan_score(items)
    assert sorted(len(row.tokens) for row in batch.rows) == [50, 50 + 6]  # 9 4 1 3, 5, 7
    assert_exact(engine, items, engine.score(items))


def test_a_little_in_common_does_not_make_a_long_row(engine: TorchEngine) -> None:
    rng = random.Random(3)
    items = [ScoreItem(None, [5, 6, 7, *ids(rng, 40, 40)], [[1]]) for _ in range(8)]
    assert {len(row.tokens) for batch in engine.plan_score(items) for row in batch.rows} == {43}


def test_later_rows_find_what_the_first_wave_has_read(engine: TorchEngine) -> None:
    """A long common beginning (worked examples) of more questions than fit into one row."""
    rng = random.Random(4)
    shots = ids(rng, 160, 160)
    items = [ScoreItem("law", shots + ids(rng, 30, 40), [[1, 2], [3]]) for _ in range(80)]
    batches = engine.plan_score(items)
    assert [row.wave for row in batches[0].rows] == [0]
    assert {row.wave for batch in batches[1:] for row in batch.rows} == {1}
    assert_exact(engine, items, engine.score(items))
    rows = sum(len(batch.rows) for batch in batches)
    assert cache(engine).reused == 160 * (rows - 1)


def test_a_replaced_adapters_prompts_are_forgotten(
    engine: TorchEngine, adapter_dirs: dict[str, Path]
) -> None:
    rng = random.Random(5)
    prompt = ids(rng, 64, 64)
    items = [prompt_item(key, prompt, top=1) for key in KEYS]
    first = engine.score(items)
    size, nbytes = len(cache(engine)), cache(engine).nbytes
    engine.add_adapter("geo", adapter_dirs["bio"])
    assert len(cache(engine)) == size * 3 // 4
    second = engine.score(items)
    assert second[1].continuations[0].logprobs == pytest.approx(first[3].continuations[0].logprobs, abs=1e-4)
    for key in ("geo", "law", "bio"):
        engine.remove_adapter(key)
    assert len(cache(engine)) == size // 4
    assert cache(engine).nbytes == nbytes // 4


def test_the_limit_in_bytes_holds_and_beginnings_outlive_their_continuations(model_dir: Path) -> None:
    engine = TorchEngine.load(models.resolve(str(model_dir)), prefix_bytes=100_000)
    rng = random.Random(6)
    starts = [ids(rng, 48, 48) for _ in range(3)]
    for _ in range(40):
        items = [prompt_item(None, rng.choice(starts) + ids(rng, 20, 60)) for _ in range(3)]
        assert_exact(engine, items, engine.score(items))
        used = cache(engine)._used
        assert (
            50_000 < sum(block.nbytes for block in used) == cache(engine).nbytes <= 100_000 or len(used) < 9
        )
        assert all(block.parent is None or block.parent in used for block in used)


def test_a_prompt_longer_than_the_limit_is_not_kept(model_dir: Path) -> None:
    engine = TorchEngine.load(models.resolve(str(model_dir)), prefix_bytes=1)
    items = [prompt_item(None, [5] * 60, top=1)]
    assert_exact(engine, items, engine.score(items))
    assert (len(cache(engine)), cache(engine).nbytes) == (0, 0)


def test_generation_after_a_known_beginning(engine: TorchEngine) -> None:
    rng = random.Random(7)
    system = ids(rng, 70, 70)
    requests = [GenerateRequest(KEYS[i % 4], system + ids(rng, 0, 30), 12) for i in range(12)]
    fresh = [r.ids for r in engine.generate(requests[:4])]
    assert cache(engine).reused == 0
    again = [r.ids for r in engine.generate(requests)]
    assert cache(engine).reused >= 12 * (70 // BLOCK * BLOCK)
    without = TorchEngine(engine.model, engine.tokenizer)
    without.lora = engine.lora
    want = [r.ids for r in without.generate(requests)]
    assert (fresh, again) == (want[:4], want)
    scored = [ScoreItem(r.adapter, r.prompt, [tokens]) for r, tokens in zip(requests, want, strict=True)]
    assert_exact(engine, scored, engine.score(scored))


def test_more_alternatives_than_were_kept_are_computed(engine: TorchEngine) -> None:
    prompt = ids(random.Random(8), 60, 60)
    for top in (0, 3, 1, 20):
        items = [prompt_item("bio", prompt, top=top)]
        assert_exact(engine, items, engine.score(items))


def test_without_a_cache_nothing_is_kept(model_dir: Path) -> None:
    engine = TorchEngine.load(models.resolve(str(model_dir)), prefix_bytes=0)
    assert engine.prefixes is None
    items = [prompt_item(None, [3] * 40), prompt_item(None, [3] * 39)]
    assert_exact(engine, items, engine.score(items))


def test_plan_is_the_same_for_the_same_items(engine: TorchEngine) -> None:
    items = questions(random.Random(9), 30)
    layouts = [
        [
            [row.tokens for row in batch.rows]
            for batch in plan(items, context_length=256, budget=900, share=True)
        ]
        for _ in range(2)
    ]
    assert layouts[0] == layouts[1]
    assert all(len(rows) * max(map(len, rows)) <= 900 for rows in layouts[0])


def test_adapters_are_mixed_only_where_they_do_not_fill_forwards_of_their_own() -> None:
    rng = random.Random(10)

    def kinds(count: int) -> list[int]:
        items = [ScoreItem(KEYS[i % 4], ids(rng, 30, 60), [[1]]) for i in range(count)]
        batches = plan(items, context_length=256, budget=600, share=True)
        assert sorted(i for batch in batches for i in batch.items) == list(range(count))
        return [len({row.adapter for row in batch.rows}) for batch in batches]

    assert max(kinds(200)) <= 2  # two where one ends and the next begins
    assert kinds(8) == [4]


def test_marks_of_a_part() -> None:
    values = torch.arange(20.0).view(10, 2)
    marks = Marks(4, [float(i) for i in range(4, 14)], [True] * 10, values.long(), values)
    part = marks.part(8, 12)
    assert part is not None
    assert (part.first, part.logprobs, part.top) == (0, [8.0, 9.0, 10.0, 11.0], 2)
    assert part.values.tolist() == values[4:8].tolist()
    begun = marks.part(0, 8)
    assert begun is not None
    assert (begun.first, begun.logprobs) == (4, [4.0, 5.0, 6.0, 7.0])
    assert marks.part(12, 16) is None  # ends before
    assert marks.part(0, 4) is None


def test_memory_of_dropped_blocks_is_used_again_but_not_of_one_in_use() -> None:
    cache, rng = PrefixCache(max_bytes=20_000), random.Random(0)

    def read(fill: float) -> list[int]:
        tokens = [rng.randrange(10**9) for _ in range(BLOCK)]
        cache.store(None, tokens, torch.full((1, 2, 1, BLOCK, 8), fill), 0)
        return tokens

    (held,) = cache.find(None, read(-1.0))
    places = set()
    for number in range(200):
        (block,) = cache.find(None, read(float(number)))
        assert bool((block.kv == number).all())
        places.add(block.kv.data_ptr())
    assert len(cache) < 20
    assert held.kv.data_ptr() not in places
    assert bool((held.kv == -1.0).all())
    assert len(places) <= len(cache) + 2
