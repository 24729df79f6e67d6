"""Mixture and rows: exact shares, exact resume, nothing lost, documents isolated."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from qwen_ray import models
from qwen_ray.data.mixture import Mixture
from qwen_ray.data.packing import RowStream, block_mask, collate, pack
from qwen_ray.data.tokenise import IGNORE, Example, tokenise
from qwen_ray.errors import UserError
from tests.conftest import sums

ONES = {"a": [1] * 1000, "b": [1] * 10, "c": [1] * 300}


def test_shares_hold_in_every_prefix_whatever_the_sizes() -> None:
    mixture = Mixture(ONES, {"a": 0.5, "b": 0.3, "c": 0.2})
    counts: Counter[str] = Counter()
    for n in range(1, 3001):
        counts[mixture.draw()[0]] += 1
        for domain, share in mixture.shares.items():
            assert abs(counts[domain] - share * n) < 2


def test_shares_by_tokens() -> None:
    sizes = {"long": [90, 110, 100], "short": [9, 11, 10, 10]}
    mixture = Mixture(sizes, {"long": 0.5, "short": 0.5})
    tokens: Counter[str] = Counter()
    for _ in range(2000):
        domain, index = mixture.draw()
        tokens[domain] += sizes[domain][index]
        assert abs(tokens["long"] - tokens["short"]) <= 220
    assert mixture.served == sum(tokens.values())


def test_without_weights_by_size() -> None:
    shares = Mixture(ONES).shares
    assert shares == {d: len(s) / 1310 for d, s in ONES.items()}


def test_each_pass_of_a_domain_is_every_example_once_in_a_new_order() -> None:
    mixture = Mixture({"a": [1] * 50}, seed=3)
    passes = [[mixture.draw()[1] for _ in range(50)] for _ in range(3)]
    assert all(sorted(p) == list(range(50)) for p in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_pass_ends_when_the_first_domain_is_used_up() -> None:
    mixture = Mixture(ONES, {"a": 0.5, "b": 0.3, "c": 0.2})
    assert mixture.pass_length == pytest.approx(10 / 0.3)


def test_state_goes_through_json_and_continues_exactly() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    whole = Mixture(ONES, weights, seed=7)
    stream = [whole.draw() for _ in range(400)]
    first = Mixture(ONES, weights, seed=7)
    for _ in range(123):
        first.draw()
    second = Mixture(ONES, weights, seed=7)
    second.load_state(json.loads(json.dumps(first.state())))
    assert [second.draw() for _ in range(277)] == stream[123:]


def test_seed_changes_the_order_only() -> None:
    one, two = Mixture(ONES, seed=1), Mixture(ONES, seed=2)
    draws = [(one.draw(), two.draw()) for _ in range(200)]
    assert [a[0] for a, _ in draws] == [b[0] for _, b in draws]
    assert [a[1] for a, _ in draws] != [b[1] for _, b in draws]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": 1, "c": 1, "law": 1}, "domain 'law' has weight 1 but no data"),
        ({"a": 1, "b": 1}, "domain 'c' has data but no weight"),
        ({"a": 0, "b": 0, "c": 0}, "all weights are zero"),
    ],
)
def test_weights_that_do_not_fit_the_data(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(ONES, weights)


def test_zero_leaves_a_domain_out() -> None:
    mixture = Mixture(ONES, {"a": 1, "b": 0, "c": 1})
    assert {mixture.draw()[0] for _ in range(100)} == {"a", "c"}


def _stream(packing: bool = True) -> tuple[RowStream, dict[str, list[Example]]]:
    tokenizer = models.load_tokenizer(models.resolve("tiny"))
    examples, _ = tokenise([*sums(200), *sums(50, seed=1, domain="more")], tokenizer, 64)
    by_domain = {d: [e for e in examples if e.domain == d] for d in ("sums", "more")}
    mixture = Mixture({d: [1] * len(es) for d, es in by_domain.items()}, {"sums": 0.5, "more": 0.5})
    return RowStream(by_domain, mixture, max_length=64, packing=packing), by_domain


def test_rows_are_full_and_lose_nothing() -> None:
    stream, by_domain = _stream()
    twin, _ = _stream(packing=False)
    rows = [stream.next_row() for _ in range(60)]
    longest = max(len(e.ids) for es in by_domain.values() for e in es)
    assert all(64 - longest < row.tokens <= 64 for row in rows)
    packed = [e.id for row in rows for e in row.examples]
    assert packed == [twin.next_row().examples[0].id for _ in packed]


def test_rows_resume_between_any_two() -> None:
    whole, _ = _stream()
    rows = [whole.next_row() for _ in range(40)]
    for cut in (1, 17, 39):
        first, second = _stream()[0], _stream()[0]
        for _ in range(cut):
            first.next_row()
        second.load_state(first.state())
        assert [second.next_row() for _ in range(40 - cut)] == rows[cut:]


def test_counting_rows_does_not_move_the_stream() -> None:
    stream, _ = _stream()
    before = stream.state()
    rows = stream.rows_in(2.0)
    assert stream.state() == before
    for _ in range(rows - 1):
        stream.next_row()
    assert stream.mixture.served < 2 * stream.mixture.pass_length
    stream.next_row()
    assert stream.mixture.served >= 2 * stream.mixture.pass_length


def test_packed_documents_do_not_see_one_another() -> None:
    """The logits of a packed row are those of its documents alone."""
    ref = models.resolve("tiny")
    model, tokenizer = models.load_model(ref, dtype=torch.float32), models.load_tokenizer(ref)
    examples, _ = tokenise(sums(8), tokenizer, 256)
    row, other = (
        pack(examples[:6], max_length=256, packing=True),
        pack(examples[6:], max_length=256, packing=True),
    )
    batch = collate([*row, *other], tokenizer.pad_token_id)  # the second row is padded
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=block_mask(batch["segments"]),
        ).logits
        at = 0
        for example in examples[:6]:
            alone = model(input_ids=torch.tensor([example.ids])).logits[0]
            torch.testing.assert_close(packed[0, at : at + len(example.ids)], alone, atol=2e-5, rtol=1e-4)
            at += len(example.ids)


def test_labels_are_ids_or_ignored() -> None:
    stream, _ = _stream()
    batch = collate([stream.next_row() for _ in range(4)], 0)
    supervised = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])
    assert not supervised[batch["position_ids"] == 0].any()
