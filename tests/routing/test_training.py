"""What a router learns of records: the embedded domains, told apart and from everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_ray.errors import UserError
from qwen_ray.routing.evaluation import evaluate
from qwen_ray.routing.questions import OTHER, asked, ending, questions_of, subjects
from qwen_ray.routing.router import METHODS, Router
from qwen_ray.routing.training import least_threshold
from tests.conftest import record
from tests.routing.conftest import ADAPTERS, MATHEMATICS, OTHERS, Remembering, heldout_records, tiny_records


def routes_of(router: Router, embedder: Remembering, *questions: str) -> list[str | None]:
    found = router.route(embedder.embed([ending(question) for question in questions]))
    return [router.chosen(route) for route in found]


def test_the_embedded_domains_mathematics_and_others_are_told_apart(
    router: Router, embedder: Remembering
) -> None:
    """The bar of issue 6: accuracy and abstention AUROC of at least 0.9 on questions not trained on."""
    records = heldout_records()
    routes = router.route(embedder.embed([*map(asked, records), *OTHERS]))
    found = evaluate(router, routes, [r.domain for r in records] + [OTHER] * len(OTHERS))
    assert found.n == 240 + len(OTHERS)
    assert found.accuracy >= 0.9, str(found)
    assert found.auroc is not None
    assert found.auroc >= 0.9, str(found)
    for domain, row in found.confusion.items():
        assert row[domain] >= 0.75 * sum(row.values()), str(found)


def test_a_domain_without_an_adapter_is_the_bases(router: Router, embedder: Remembering) -> None:
    routes = router.route(embedder.embed(["What is 17 + 58?", "Which genus causes malaria?"]))
    assert [router.chosen(route) for route in routes] == [MATHEMATICS, "biology"]
    assert [route.adapter for route in routes] == [None, ADAPTERS["biology"]]


def test_an_empty_question_is_the_bases(router: Router, embedder: Remembering) -> None:
    assert routes_of(router, embedder, "", "   ", "?", "hm") == [None] * 4


def test_the_order_of_the_records_does_not_matter(router: Router, embedder: Remembering) -> None:
    again = Router.train(reversed(tiny_records()), embedder=embedder, adapters=ADAPTERS)
    questions = embedder.embed(OTHERS)
    assert again.route(questions) == router.route(questions)
    assert again.describe() == router.describe()


def test_held_out_questions_are_not_examples(router: Router) -> None:
    asked_of = questions_of(tiny_records(), seed=0)
    for domain in router.domains:
        questions = len(asked_of[domain.name]) + len(subjects()[domain.name])
        assert domain.heldout >= 20
        assert domain.examples + domain.heldout == questions
        assert domain.recall > 0.75


@pytest.mark.parametrize("method", METHODS)
def test_others_set_the_threshold(embedder: Remembering, method: Any) -> None:
    others = [record(question, "?") for question in OTHERS]
    shares = {}
    for share in (0.025, 0.075):
        router = Router.train(
            tiny_records(),
            embedder=embedder,
            adapters=ADAPTERS,
            others=others,
            false_accepts=share,
            method=method,
        )
        let_in = sum(domain is not None for domain in routes_of(router, embedder, *OTHERS))
        assert let_in == share * len(OTHERS)
        assert router.calibration.false_accepts == pytest.approx(share, abs=1e-4)
        assert router.calibration.others == len(OTHERS)
        shares[share] = router.calibration.threshold
    assert shares[0.075] < shares[0.025]


def test_one_domain_is_enough(embedder: Remembering) -> None:
    records = [r for r in tiny_records() if r.domain == "security"]
    router = Router.train(records, embedder=embedder, adapters={"security": "guard"})
    routes = routes_of(
        router, embedder, "Which port does SSH use?", "Which hormone does the pancreas make?", OTHERS[0]
    )
    assert routes == ["security", None, None]


def test_few_examples_are_enough_to_start_with(embedder: Remembering) -> None:
    """Ten questions: eight are learned, and nothing of the built-in subject that is left out."""
    records = [r for r in tiny_records() if r.domain == "biology"][:10]
    router = Router.train(records, embedder=embedder, adapters={"biology": "bio"}, without=["biology"])
    assert (router.domains[0].examples, router.domains[0].heldout) == (8, 2)


def test_what_cannot_be_learned_from_is_refused(embedder: Remembering) -> None:
    records = tiny_records()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapters": {"biologie": "facts"}}, "no record is of the domain 'biologie'"),
        ({"adapters": {"biology": "../facts"}}, "not an adapter's name"),
        (
            {"records": [record(f"q{i}", "?", domain="few") for i in range(9)], "adapters": {}},
            "has 9 different",
        ),
        (
            {"records": [record("again", "?", domain="few", id=str(i)) for i in range(20)], "adapters": {}},
            "has 1",
        ),
        (
            {"records": [record(f"q{i}", "?", domain=OTHER) for i in range(20)], "adapters": {}},
            "cannot be the name",
        ),
        ({"method": "svm"}, "unknown method"),
        ({"false_accepts": 0.0}, "no share"),
        ({"without": ["medicin"]}, "no subject"),
        ({"without": list(subjects())}, "most of the background"),
    ]
    for changes, said in cases:
        settings = {"records": records, "adapters": ADAPTERS, **changes}
        with pytest.raises(UserError, match=said):
            Router.train(settings.pop("records"), embedder=embedder, **settings)


def test_a_long_question_is_read_from_its_end() -> None:
    passage = "It was the best of times, it was the worst of times. " * 40
    question = "Who wrote this passage?\nA. Dickens\nB. Austen\nC. Eliot\nD. Hardy"
    read = ending(passage + question)
    assert len(read) <= 600
    assert read.endswith(question)
    assert not read.startswith(" ")
    assert (passage + question).split()[-len(read.split()) :] == read.split()  # whole words
    assert ending(f"  {question}\n") == question
    assert ending("x" * 1000) == "x" * 600


def test_questions_are_counted_once_and_not_without_text() -> None:
    records = [record(text, "?", domain="d", id=str(i)) for i, text in enumerate(["one", "two", " ", "one"])]
    assert sorted(questions_of(records, seed=0)["d"]) == ["one", "two"]
    assert questions_of(records, seed=0) == questions_of(reversed(records), seed=0)


def test_the_background_is_no_stranger_to_itself_only_by_its_own_texts(router: Router) -> None:
    """Each of its texts is compared with the others: with itself among them, none would be let in."""
    assert router.calibration.others == sum(map(len, subjects().values())) - sum(
        len(subjects()[domain.name]) for domain in router.domains
    )
    assert 0.05 < router.calibration.false_accepts <= 0.2


def test_a_record_is_known_by_its_first_question() -> None:
    assert asked(tiny_records()[0]) == tiny_records()[0].messages[0].content


def test_the_subjects_are_texts_said_once() -> None:
    texts = [text for texts in subjects().values() for text in texts]
    assert all(isinstance(text, str) for text in texts)
    assert len(set(texts)) == len(texts) > 400
    assert {"biology", "history", "security", "mathematics"} <= set(subjects())


def test_the_threshold_is_the_least_that_keeps_to_the_share() -> None:
    margins = np.array([-0.2, -0.1, 0.3, 0.4, 0.4, 0.5], np.float32)
    for share, let_in in ((0.1, 0), (0.2, 1), (0.5, 3), (0.4, 1), (0.7, 4), (0.99, 4)):
        assert (margins >= np.float32(least_threshold(margins, share))).sum() == let_in
    assert least_threshold(margins, 0.7) == 0  # never below: the background is nearer
