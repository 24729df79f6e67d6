"""Keys of repeats, MinHash, and near-duplicates that are none: records of one template."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from qwen_ray.data.quality import duplicates
from qwen_ray.data.quality.duplicates import keys, near_duplicates, signature
from qwen_ray.data.records import Message, Record
from tests.conftest import record

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rt", "lk", "sh", "mp", "st")]
QUESTION = "Which organelle makes most of a cell's energy?"
CHOICES = [
    f"{QUESTION}\nA. Nucleus\nB. Mitochondrion\nC. Ribosome",
    f"{QUESTION}\nA. Mitochondrion\nB. Ribosome\nC. Nucleus",
]


def prose(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(words)]


def near(records: list[Record], threshold: float = 0.8, **more: object) -> list[duplicates.Pair]:
    texts = [duplicates.text(json.dumps(r.to_dict()).encode()) for r in records]
    stacked = np.stack([signature(r) for r in records])
    return near_duplicates(stacked, threshold=threshold, text_of=lambda i: texts[i], **more)  # type: ignore[arg-type]


def jaccard(one: str, other: str) -> float:
    shingles = []
    for words in (one.split(), other.split()):
        shingles.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


# --- keys ------------------------------------------------------------------------------------------


def test_keys_ignore_case_width_spaces_and_the_last_stop() -> None:
    one, other = record("What is  DNA?", "A molecule."), record("what is ｄna", "a\nmolecule")
    assert keys(one) == keys(other)
    assert [len(key) for key in keys(one)] == [16, 16]
    assert keys(one)[0] != keys(record("What is RNA?", "A molecule."))[0]
    assert keys(one)[1] != keys(record("What is DNA?", "An acid."))[1]


def test_keys_of_multiple_choice_do_not_depend_on_the_order_of_the_choices() -> None:
    same = [
        keys(record(CHOICES[0], "B. Mitochondrion")),
        keys(record(CHOICES[1], "A. Mitochondrion")),
        keys(record(CHOICES[0], "B")),
        keys(record(CHOICES[1], "(A)")),
        keys(record(CHOICES[1], "mitochondrion")),
    ]
    assert len(set(same)) == 1
    wrong = keys(record(CHOICES[1], "B. Ribosome"))
    assert wrong[0] == same[0][0]
    assert wrong[1] != same[0][1]
    assert keys(record(QUESTION, "Mitochondrion"))[0] != same[0][0]


def test_keys_tell_conversations_apart() -> None:
    def talk(first: str) -> Record:
        said = [("user", first), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "Because.")]
        return Record("t", tuple(Message(*m) for m in said), "general", "test", "MIT")

    assert keys(talk("Is it so?"))[0] != keys(talk("Is it otherwise?"))[0]
    assert keys(talk("Is it so?"))[1] == keys(talk("Is it otherwise?"))[1]


# --- signatures ------------------------------------------------------------------------------------


def test_signature_is_the_same_everywhere() -> None:
    found = signature(record("What is the capital of France?", "Paris."))
    assert found.shape == (64,)
    assert found.dtype == np.uint32
    assert found[:4].tolist() == [1388146382, 1353943667, 963738494, 1808571078]
    again = signature(record("what is the CAPITAL of france", "Paris"))
    assert (found == again).all()


def test_share_of_equal_hashes_estimates_the_jaccard_index() -> None:
    rng = random.Random(0)
    errors = []
    for _ in range(200):
        words = prose(rng, 60)
        changed = [w if rng.random() > 0.05 else rng.choice(WORDS) for w in words]
        one, other = (record(" ".join(w[:30]), " ".join(w[30:])) for w in (words, changed))
        errors.append(
            (signature(one) == signature(other)).mean() - jaccard(" ".join(words), " ".join(changed))
        )
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.08  # at most sqrt(J (1 - J) / 64) = 0.0625 each


@pytest.mark.parametrize("text", ["", "∑", "a", "a b", "日本", "!?"])
def test_texts_of_few_words_have_signatures_too(text: str) -> None:
    assert signature(record(text, text)).shape == (64,)
    assert (signature(record(text, "")) != signature(record("something else", ""))).any()


# --- near-duplicates -------------------------------------------------------------------------------


def planted(count: int, rng: random.Random) -> tuple[list[Record], set[tuple[int, int]]]:
    """``count`` different records, then copies of every tenth with a word or two exchanged."""
    texts = [(prose(rng, 25), prose(rng, 60)) for _ in range(count)]
    pairs = set()
    for i in range(0, count, 10):
        question, answer = list(texts[i][0]), list(texts[i][1])
        answer[rng.randrange(60)] = rng.choice(WORDS)
        question.append("indeed")
        pairs.add((len(texts), i))
        texts.append((question, answer))
    return [record(" ".join(q), " ".join(a), id=str(i)) for i, (q, a) in enumerate(texts)], pairs


def test_planted_copies_are_found_and_nothing_else() -> None:
    records, pairs = planted(300, random.Random(1))
    found = near(records)
    assert {(p.repeat, p.kept) for p in found} == pairs
    for p in found:
        texts = [" ".join(m.content for m in records[i].messages) for i in (p.repeat, p.kept)]
        assert p.similarity == pytest.approx(jaccard(*texts))


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_search_finds_what_comparing_all_pairs_finds(threshold: float) -> None:
    """By estimate alone, so that both mean the same; a few pairs at the very threshold may never meet."""
    rng = random.Random(2)
    seeds = [prose(rng, 40) for _ in range(60)]
    texts = [
        [w if rng.random() > 0.03 else rng.choice(WORDS) for w in seed] for seed in seeds for _ in range(4)
    ]
    stacked = np.stack([signature(record(" ".join(t[:15]), " ".join(t[15:]))) for t in texts])
    later, earlier, shares = duplicates._candidates(stacked, threshold, duplicates._rows(threshold))
    every = {
        (j, i): (stacked[i] == stacked[j]).mean()
        for i, j in combinations(range(len(texts)), 2)
        if (stacked[i] == stacked[j]).mean() >= threshold
    }
    found = dict(zip(zip(later.tolist(), earlier.tolist(), strict=True), shares.tolist(), strict=True))
    assert found.items() <= every.items()
    assert len(found) >= 0.97 * len(every) > 20


def test_result_depends_on_ranks_and_not_on_the_order_of_the_input() -> None:
    records, _ = planted(100, random.Random(3))
    records += [
        record(r.messages[0].content, r.messages[1].content + " too", id=f"x{r.id}") for r in records[:30]
    ]
    ranks = list(range(len(records)))
    random.Random(4).shuffle(ranks)

    def by_id(order: list[int]) -> list[tuple[str, str, float]]:
        found = near([records[i] for i in order], ranks=[ranks[i] for i in order])
        return [(records[order[p.repeat]].id, records[order[p.kept]].id, p.similarity) for p in found]

    forward = by_id(list(range(len(records))))
    assert len(forward) >= 40
    assert by_id(list(range(len(records)))[::-1]) == forward
    rank = {r.id: ranks[i] for i, r in enumerate(records)}
    assert all(rank[kept] < rank[repeat] for repeat, kept, _ in forward)
    assert not {kept for _, kept, _ in forward} & {repeat for repeat, _, _ in forward}


def templated() -> list[Record]:
    """Families of records that share nearly all of their words."""
    rng = random.Random(5)
    names = [f"{a}{b}" for a in WORDS[:20] for b in WORDS[40:42]]
    records = []
    due = (
        "Apply mitigations per vendor instructions, follow the applicable guidance for cloud services, or "
        "discontinue use of the product if mitigations are unavailable, and report it without delay."
    )
    for i, name in enumerate(names):
        year, number = 2000 + i % 25, rng.randint(1000, 99999)
        records += [
            record(
                f"What must be done about CVE-{year}-{number}, which is known to be exploited by attackers?",
                due,
            ),
            record(
                f"What is the flaw in {name} fixed in {i % 4}.{i % 7}.{i}?",
                f"A crafted request to {name} {due}",
            ),
            record(
                f"Which versions of {name} are affected by the flaw?",
                f"All before {i % 4}.{i % 7}.{i}. {due}",
            ),
            record(f"How can a user of the package {name} be kept safe from this kind of attack?", due),
            record(f"What does King {name.capitalize()} have to do with the founding of the city?", due),
            record(
                f"What is {number} + {i}, and how do you add these two numbers by hand?",
                f"{number + i}. {due}",
            ),
            record(f"CVE-{i}: which product has a flaw that is not that of CVE-{i ^ 1}?", f"{due} {due}"),
            record(f"What is the weakness 'path/{'../' * (i % 9)}{name}' in short?", due),
        ]
    return records


def test_records_of_one_template_are_no_repeats() -> None:
    records = templated()
    stacked = np.stack([signature(r) for r in records])
    assert len(near_duplicates(stacked, threshold=0.8)) > 100  # the trap: their shingles are nearly the same
    assert near(records) == []


def test_copies_are_found_among_records_of_one_template() -> None:
    records = templated()
    copies = [
        record(r.messages[0].content.replace("What", "Well, what"), r.messages[1].content + " That is all.")
        for r in records[::40]
    ]
    found = near([*records, *copies])
    assert [(p.repeat, p.kept) for p in found] == [(len(records) + i, i * 40) for i in range(len(copies))]


def test_the_same_question_with_another_answer_is_no_repeat() -> None:
    passage = " ".join(prose(random.Random(6), 80))
    yes, no = record(f"{passage}. Is this true?", "Yes, it is."), record(f"{passage}. Is this false?", "No.")
    assert near([yes, no]) == []
    assert len(near([yes, record(f"{passage}. Is this truly true?", "Yes, it is.")])) == 1


@pytest.mark.parametrize(
    ("one", "other"), [("in 1914", "in 1915"), ("by King Otto", "by King Karl"), ("at a/b", "at a/c")]
)
def test_long_texts_that_differ_in_a_name_a_number_or_code_are_no_repeats(one: str, other: str) -> None:
    rng = random.Random(8)
    passage, answer = " ".join(prose(rng, 60)), " ".join(prose(rng, 60))
    records = [record(f"{passage} {what} {answer}?", answer, id=what) for what in (one, other)]
    assert len(near_duplicates(np.stack([signature(r) for r in records]))) == 1
    assert near(records) == []


def test_a_bucket_of_any_size_is_searched() -> None:
    """Five hundred copies of one text: every one meets the first, though few meet each other."""
    text = " ".join(prose(random.Random(7), 50))
    records = [record(text, text.upper(), id=str(i)) for i in range(500)]
    assert [(p.repeat, p.kept) for p in near(records)] == [(i, 0) for i in range(1, 500)]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_records(count: int) -> None:
    stacked = np.zeros((count, 64), dtype=np.uint32)
    assert len(near_duplicates(stacked)) == max(0, count - 1)


@pytest.mark.shared
def test_real_templates_are_kept(shared_data: Path) -> None:
    """The KEV catalogue: by shingles alone dozens would go, among them different vulnerabilities."""
    from qwen_ray.data.sources import get_source

    records = list(get_source("cisa_kev").read(shared_data / "cisa_kev"))
    by_shingles = near_duplicates(np.stack([signature(r) for r in records]))
    assert len(by_shingles) > 20
    assert len(near(records)) <= 2
