"""Rows and batches: best fit, nothing lost or repeated, exact resume inside a window, documents isolated."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from qwen_ray import models
from qwen_ray.data.mixture import Mixture
from qwen_ray.data.packing import Batch, Row, RowStream, best_fit, collate, pack
from qwen_ray.data.tokenise import IGNORE, Example, tokenise
from tests.conftest import sums


def example(id: str, length: int, domain: str = "d") -> Example:
    """Tokens 1, 2, 3 ...; the second half carries loss."""
    ids = list(range(1, length + 1))
    return Example(id, domain, ids, [i if i > length / 2 else IGNORE for i in ids])


def examples(
    n: int, *, mean: float, domain: str = "d", longest: int = 2048, sigma: float = 0.8
) -> list[Example]:
    rng = random.Random(f"{n}/{mean}/{domain}")
    mu = math.log(mean) - sigma**2 / 2
    lengths = [max(2, min(longest, round(rng.lognormvariate(mu, sigma)))) for _ in range(n)]
    return [example(f"{domain}-{i}", length, domain) for i, length in enumerate(lengths)]


DATA = {
    "a": examples(300, mean=30, domain="a", longest=200),
    "b": examples(90, mean=60, domain="b", longest=200),
}


def stream(
    *,
    packing: bool = True,
    window: int = 4,
    unit: str = "examples",
    weights: dict[str, float] | None = None,
    **mixture: Any,
) -> RowStream:
    sizes = {d: [len(e.ids) if unit == "tokens" else 1 for e in es] for d, es in DATA.items()}
    return RowStream(
        DATA, Mixture(sizes, weights, seed=5, **mixture), max_length=256, packing=packing, window=window
    )


def drawn(rows: list[Row]) -> Counter[str]:
    return Counter(id for row in rows for id in row.ids)


def test_best_fit_decreasing() -> None:
    # 7 opens a bin, 5 another, 3 goes where it fits best (7 + 3), 4 into the 5's.
    assert best_fit([3, 7, 4, 5], 10) == [[1, 0], [3, 2]]
    # 6 and 5 open; 4 fills the 6's bin to the brim though the 5's has more room.
    assert best_fit([5, 6, 4], 10) == [[1, 2], [0]]
    assert best_fit([], 10) == []


@pytest.mark.parametrize(
    ("mean", "max_length", "window"), [(120, 2048, 64), (30, 320, 64), (30, 320, 16), (400, 2048, 64)]
)
def test_rows_are_as_full_as_can_be(mean: float, max_length: int, window: int) -> None:
    data = {"d": examples(6000, mean=mean, longest=max_length, sigma=0.5)}
    rows = RowStream(data, Mixture({"d": [1] * 6000}), max_length=max_length, packing=True, window=window)
    n = rows.plan(passes=1)
    best = -(-sum(len(e.ids) for e in data["d"]) // max_length)
    assert n <= best * 1.015 + 1
    out = [rows.next_row() for _ in range(n)]
    assert drawn(out) == dict.fromkeys((e.id for e in data["d"]), 1)
    assert max(row.tokens for row in out) <= max_length


def test_a_window_holds_the_mixture_in_its_order() -> None:
    """Whole windows hold the first draws of the mixture, each once, in the rows asked for."""
    rows, alone = stream(window=4), stream(packing=False)
    for _ in range(12):
        out = [rows.next_row()]
        while rows.state()["given"]:
            out.append(rows.next_row())
        assert len(out) <= 4
        ids = drawn(out)
        assert ids == drawn([alone.next_row() for _ in range(sum(ids.values()))])


def test_a_rows_size_does_not_tell_when_it_comes() -> None:
    """Best fit leaves its emptiest row for last; it must not be given out last."""
    rows = stream(window=16)
    places = []
    for _ in range(6):
        window = [rows.next_row()]
        while rows.state()["given"]:
            window.append(rows.next_row())
        places.append(min(range(len(window)), key=lambda i: window[i].tokens))
    assert len(set(places)) > 2


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("staged", [True, False])
def test_rows_resume_between_any_two(packing: bool, staged: bool) -> None:
    mixture: dict[str, Any] = {"stages": [(0.5, {"a": 1, "b": 0}), (1, {"a": 1, "b": 1})]} if staged else {}
    whole = stream(packing=packing, **mixture)
    n = whole.plan(passes=1.5) + 3
    rows, served, states = [], [], []
    for _ in range(n):
        states.append(json.dumps(whole.state(), sort_keys=True))
        served.append(whole.served)
        rows.append(whole.next_row())
    for cut in random.Random(0).sample(range(n), 8):
        resumed = stream(packing=packing, **mixture)
        resumed.plan(passes=1.5)
        resumed.load_state(json.loads(states[cut]))
        assert resumed.served == served[cut]
        assert json.dumps(resumed.state(), sort_keys=True) == states[cut]
        assert [resumed.next_row() for _ in range(n - cut)] == rows[cut:]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("unit", ["examples", "tokens"])
@pytest.mark.parametrize("passes", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(
    "mixture",
    [
        {},
        {"weights": {"a": 0.5, "b": 0.5}},
        {"stages": [(0.4, {"a": 0, "b": 1}), (0.9, {"a": 1, "b": 1}), (1, {"a": 1, "b": 0})]},
        {"stages": [(0.3, {"a": 1, "b": 0}), (1, {"a": 0, "b": 1})]},
    ],
)
def test_the_epochs_asked_for_are_complete(
    packing: bool, unit: str, passes: float, mixture: dict[str, Any]
) -> None:
    """The planned rows hold every example of a limiting domain once a pass, and hardly anything beyond."""
    rows = stream(packing=packing, unit=unit, **mixture)
    n = rows.plan(passes=passes)
    ids = drawn([rows.next_row() for _ in range(n)])
    assert rows.passes == pytest.approx(passes, rel=0.05)
    costs, shares = rows.mixture.costs, rows.mixture.shares
    limits = [d for d in shares if costs[d] / shares[d] <= rows.mixture.pass_length * 1.000001]
    assert limits
    if passes == 0.5:
        assert max(ids[e.id] for d in limits for e in DATA[d]) == 1
        return
    for domain in limits:
        counts = [ids[e.id] for e in DATA[domain]]
        assert min(counts) == passes
        assert sum(counts) - passes * len(counts) <= 4


def test_planning_does_not_move_the_stream() -> None:
    rows = stream()
    first = [rows.next_row() for _ in range(7)]
    before = rows.state()
    n = rows.rows_in(1.0)
    assert rows.state() == before
    fresh = stream()
    assert [fresh.next_row() for _ in range(7)] == first
    assert [fresh.next_row() for _ in range(20)] == [rows.next_row() for _ in range(20)]
    assert stream().plan(passes=1.0) == n


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_stages_fall_where_they_should_in_a_run_of_so_many_rows(packing: bool, unit: str) -> None:
    rows = stream(packing=packing, unit=unit, stages=[(0.5, {"a": 0, "b": 1}), (1, {"a": 1, "b": 0})])
    n = 64 if packing else 400
    assert rows.plan(rows=n) == n
    assert rows.served == 0
    out = [rows.next_row() for _ in range(n)]
    cost = {
        d: sum(len(e.ids) if unit == "tokens" else 1 for r in out for e in r.examples if e.domain == d)
        for d in "ab"
    }
    assert cost["b"] / sum(cost.values()) == pytest.approx(0.5, abs=0.02)
    assert rows.served == sum(cost.values())
    half = next(i for i, row in enumerate(out) if any(e.domain == "a" for e in row.examples))
    assert all(e.domain == "a" for row in out[half + 2 :] for e in row.examples)


def small(n: int, *, window: int = 64, **mixture: Any) -> RowStream:
    """A data set that would fit into one window."""
    data = {"d": examples(n, mean=60, longest=512)}
    sizes = {"d": [1] * n}
    return RowStream(data, Mixture(sizes, seed=1, **mixture), max_length=512, packing=True, window=window)


def test_passes_over_a_small_data_set_come_one_after_another() -> None:
    rows = small(200)
    n = rows.plan(passes=3)
    seen: Counter[str] = Counter()
    for _ in range(n):
        seen += drawn([rows.next_row()])
        # An example comes again when all have come: but for a window of a few rows, that of the next pass.
        assert max(seen.values()) - (min(seen.values()) if len(seen) == 200 else 0) <= 1
    assert set(seen.values()) == {3}


@pytest.mark.parametrize("window", [64, 2])
def test_a_curriculum_keeps_its_order_in_rows(window: int) -> None:
    rows = small(400, window=window, curriculum="easy_to_hard", difficulty={"d": list(range(400))})
    n = rows.plan(passes=1)
    places = [int(id.split("-")[1]) for _ in range(n) for id in rows.next_row().ids]
    assert sorted(places) == list(range(400))
    # The curriculum itself moves an example by a twentieth, and rows by no more than another.
    assert max(abs(place - difficulty) for place, difficulty in enumerate(places)) <= 400 * 0.15


def test_windows_of_a_small_domain_that_repeats_often_are_not_tiny() -> None:
    data = {"a": examples(4, mean=30, domain="a", longest=200), "b": examples(400, mean=60, domain="b")}
    mixture = Mixture({d: [1] * len(es) for d, es in data.items()}, {"a": 1, "b": 1}, seed=3)
    rows = RowStream(data, mixture, max_length=2048, packing=True)
    tokens = [rows.next_row().tokens for _ in range(60)]
    assert sum(tokens) / len(tokens) > 0.85 * 2048


def test_validation_rows() -> None:
    rows = pack(DATA["a"], max_length=256, packing=True)
    assert drawn(rows) == dict.fromkeys((e.id for e in DATA["a"]), 1)
    assert max(row.tokens for row in rows) <= 256
    assert len(rows) <= sum(len(e.ids) for e in DATA["a"]) / 256 * 1.02 + 1
    assert pack(DATA["a"], max_length=256, packing=False) == [Row((e,)) for e in DATA["a"]]


def test_a_batch_by_hand() -> None:
    one = Example("1", "d", [11, 12, 13], [IGNORE, 12, 13])
    two = Example("2", "d", [21, 22], [21, 22])  # its first label cannot be predicted
    three = Example("3", "d", [31, 32, 33, 34], [IGNORE, IGNORE, 33, IGNORE])
    rows = [Row((one, two)), Row((three,))]
    batch = collate(rows, 0)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33, 34]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch.offsets.tolist() == [0, 3, 5, 9]
    assert batch.lengths == (3, 2, 4)
    assert batch.where.tolist() == [0, 1, 3, 6]
    assert batch.targets.tolist() == [12, 13, 22, 33]
    assert (batch.tokens, batch.supervised) == (9, 4)
    assert [row.supervised for row in rows] == [3, 1]
    types = [
        t.dtype for t in (batch.input_ids, batch.position_ids, batch.offsets, batch.where, batch.targets)
    ]
    assert types == [torch.int64, torch.int64, torch.int32, torch.int64, torch.int64]


def test_padding_is_documents_without_loss() -> None:
    rows = [Row((example("1", 4), example("2", 3)))]
    plain, padded = collate(rows, 9), collate(rows, 9, pad_to=17)
    assert padded.input_ids.shape == padded.position_ids.shape == (1, 17)
    assert padded.input_ids[0, 7:].tolist() == [9] * 10
    assert padded.lengths == (4, 3, 4, 4, 2)
    assert padded.offsets.tolist() == [0, 4, 7, 11, 15, 17]
    assert torch.equal(padded.where, plain.where)
    assert torch.equal(padded.targets, plain.targets)
    assert (padded.tokens, padded.supervised) == (plain.tokens, plain.supervised) == (7, 4)
    with pytest.raises(ValueError, match="7 tokens do not fit into a batch of 6"):
        collate(rows, 9, pad_to=6)
    empty = collate([], 9)
    assert (empty.lengths, empty.tokens, empty.supervised, empty.where.numel()) == ((1,), 0, 0, 0)


def test_a_batch_moves_whole() -> None:
    batch = collate([Row((example("1", 6),))], 0)
    moved = batch.to("meta")
    names = ["input_ids", "position_ids", "offsets", "where", "targets"]
    assert all(getattr(moved, name).device.type == "meta" for name in names)
    assert isinstance(moved, Batch)
    assert (moved.lengths, moved.tokens, moved.supervised) == ((6,), 6, 3)


def test_packed_documents_do_not_see_one_another() -> None:
    """Under a mask made from the offsets alone, a packed document's losses are those it has alone."""
    ref = models.resolve("tiny")
    model, tokenizer = models.load_model(ref, dtype=torch.float32), models.load_tokenizer(ref)
    documents, _ = tokenise(sums(8), tokenizer, 256)
    rows = pack(documents, max_length=128, packing=True)
    batch = collate(rows, int(tokenizer.pad_token_id), pad_to=400)
    lengths = torch.tensor(batch.lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    mask = (document[:, None] == document[None, :]).tril()[None, None]
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask
        ).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[batch.where], batch.targets, reduction="none")
        alone = []
        for e in (e for row in rows for e in row.examples):
            labels = torch.tensor(e.labels[1:])
            one = model(input_ids=torch.tensor([e.ids])).logits[0, :-1]
            alone.append(
                torch.nn.functional.cross_entropy(
                    one[labels != IGNORE], labels[labels != IGNORE], reduction="none"
                )
            )
    torch.testing.assert_close(losses, torch.cat(alone), atol=1e-5, rtol=1e-5)
