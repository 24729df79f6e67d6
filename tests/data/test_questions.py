"""Questions made of definitions and sentences: what is asked, what is left out, and that it never varies."""

import re
from collections import Counter

import pytest

from qwen_ray.data.passages import independent_sentences, sentences, stands_alone
from qwen_ray.data.questions import (
    BLANK,
    Term,
    as_sentence,
    cloze_questions,
    lay_out,
    multiple_choice,
    pick_distractors,
    term_questions,
    year_questions,
)

OSMOSIS = Term("osmosis", "movement of water through a membrane; reverse osmosis needs pressure", "cells")


def choices(question: str) -> list[str]:
    return [line[3:] for line in question.split("\n") if re.match(r"[A-D]\. ", line)]


# --- terms -----------------------------------------------------------------------------------------


def test_a_term_is_asked_both_ways_with_its_name_blanked_out():
    (define, definition), (which, name) = term_questions(OSMOSIS, kind="term", seed_text="x")
    assert "“osmosis”" in define
    assert definition == "Movement of water through a membrane; reverse osmosis needs pressure."
    assert which.endswith("Movement of water through a membrane; reverse ____ needs pressure.")
    assert name == "osmosis"


def test_a_definition_that_is_little_more_than_the_name_is_not_asked_for_it():
    assert len(term_questions(Term("alga", "a green alga or algae", "t"), kind="term", seed_text="x")) == 2
    assert len(term_questions(Term("alga", "any of algae", "t"), kind="term", seed_text="x")) == 1


def test_phrasings_vary_over_terms_and_never_for_one():
    asked = [term_questions(OSMOSIS, kind="term", seed_text=f"t{i}") for i in range(60)]
    assert asked == [term_questions(OSMOSIS, kind="term", seed_text=f"t{i}") for i in range(60)]
    assert len({pairs[0][0] for pairs in asked}) >= 3
    assert len({pairs[1][0] for pairs in asked}) >= 3
    weakness = term_questions(Term("XSS", "Input is put into a page", "t"), kind="weakness", seed_text="x")
    assert all("weakness" in question for question, _ in weakness)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("thin layer", "Thin layer."),
        ("mRNA copy", "mRNA copy."),
        ("a layer?", "A layer?"),
        ("He said “no.”", "He said “no.”"),
        ("", ""),
    ],
)
def test_as_sentence(text, sentence):
    assert as_sentence(text) == sentence


# --- multiple choice -------------------------------------------------------------------------------


def test_multiple_choice_has_one_layout():
    question, answer = multiple_choice("Which?", "b", ["a", "c", "d", "e"], key="k")
    assert question == lay_out("Which?", choices(question))
    assert sorted(choices(question)) == ["a", "b", "c", "d"]
    assert answer in question.split("\n")
    assert answer.endswith(". b")
    assert (question, answer) == multiple_choice("Which?", "b", ["a", "c", "d", "e"], key="k")


def test_every_letter_is_right_as_often():
    # The same key draws the distractors: the two draws must not go together.
    letters = Counter()
    for i in range(2000):
        wrong = pick_distractors("bx", ["ay", "cz", "dw", "ev", "fu"], key=f"k{i}")
        letters[multiple_choice("Which?", "bx", wrong, key=f"k{i}")[1][0]] += 1
    assert set(letters) == set("ABCD")
    assert all(420 < n < 580 for n in letters.values()), letters


@pytest.mark.parametrize("wrong", [["a", "c"], ["a", "A", "c"], ["a", " ", "c"], ["B", "a", "c"], []])
def test_no_multiple_choice_of_fewer_than_four(wrong):
    assert multiple_choice("Which?", "b", wrong, key="k") is None


def test_distractors_are_never_the_answer_or_a_part_of_it():
    pool = [
        "Osmosis",
        "reverse osmosis",
        "osmo",
        "diffusion",
        "Diffusion",
        "simple diffusion",
        "mitosis",
        "gene",
    ]
    for i in range(50):
        picked = pick_distractors("osmosis", pool, key=f"k{i}", count=5)
        assert {p.casefold() for p in picked} in (
            {"diffusion", "mitosis", "gene"},
            {"simple diffusion", "mitosis", "gene"},
        )


def test_distractors_are_near_in_topic_and_length():
    near, far = [f"topical{i:02d}" for i in range(8)], [f"distant{i:02d}" for i in range(200)]
    long = ["x" * 200 + str(i) for i in range(8)]
    picked = Counter(
        p for i in range(200) for p in pick_distractors("answer", [*long, *near, *far], key=str(i))
    )
    assert sum(picked[name] for name in near) > 2 * sum(picked[name] for name in far[100:])
    assert sum(picked[name] for name in long) < 30


# --- sentences -------------------------------------------------------------------------------------


def test_sentences_end_at_stops_that_end_them():
    text = (
        "In the U.S. Army, Dr. Smith served. J. P. Morgan lent money! Was it World War I? It was. "
        "“No,” he said. E. coli grows (see Fig. 2). The end"
    )
    assert list(sentences(text)) == [
        "In the U.S. Army, Dr. Smith served.",
        "J. P. Morgan lent money!",
        "Was it World War I?",
        "It was.",
        "“No,” he said.",
        "E. coli grows (see Fig. 2).",
        "The end",
    ]


GOOD = "In 1848, James Marshall discovered gold at the sawmill he had built with John Sutter in California."


@pytest.mark.parametrize(
    "bad",
    [
        "He discovered gold in 1848 at the sawmill of John Sutter on the American River in California.",
        "In 1848, he discovered gold at the sawmill of John Sutter on the American River in California.",
        "This discovery of gold in 1848 at the sawmill of John Sutter changed California for all time.",
        "In 1848, James Marshall discovered gold in California, which the same paper told all the world.",
        "However much James Marshall wished to hide it, gold was discovered in California in January 1848.",
        "In 1848, James Marshall discovered gold, as the map ~ of the American River in California shows.",
        "In 1848, James Marshall discovered gold; the figure tells how many people went to California.",
        "In 1848, James Marshall discovered gold [sic] at the sawmill he had built with John Sutter.",
        "In 1848, as we know, James Marshall discovered gold at the sawmill he had built in California.",
        "In 1848, James Marshall discovered “gold at the sawmill of John Sutter in California.",
        "In 1848, where did James Marshall discover gold, and with whom had he built the sawmill there?",
        "In 1848, James Marshall found gold.",
        GOOD[:-1] + ", " + "and many people came there to look for more of it, " * 5 + "as they had hoped.",
        "james Marshall discovered gold at the sawmill he had built with John Sutter in California.",
    ],
)
def test_a_sentence_that_leans_on_others_does_not_stand_alone(bad):
    assert stands_alone(GOOD)
    assert not stands_alone(bad)


def test_what_ties_a_sentence_to_others_is_taken_off():
    assert independent_sentences("Yes. However, " + GOOD[0].lower() + GOOD[1:]) == (GOOD,)
    assert independent_sentences(GOOD.replace("Marshall ", "Marshall, for example, ")) == (GOOD,)


# --- years -----------------------------------------------------------------------------------------


def test_a_year_is_asked_for_openly_or_among_four():
    seen = set()
    for i in range(40):
        ((question, answer),) = year_questions(GOOD, key=f"k{i}")
        blanked = GOOD.replace("1848", BLANK)
        assert blanked in question
        offered = choices(question)
        seen.add(bool(offered))
        if not offered:
            assert answer == "1848"
            continue
        assert answer.endswith(". 1848")
        assert answer in question.split("\n")
        off = [abs(int(year) - 1848) for year in offered if year != "1848"]
        assert len(off) == len(set(offered)) - 1 == 3
        assert all(5 <= years <= 60 for years in off)
    assert seen == {True, False}
    assert year_questions(GOOD, key="k") == year_questions(GOOD, key="k")


def test_the_right_year_is_as_often_first_as_last_and_none_is_in_the_future():
    for year, ranks in (("1848", 4), ("2012", 2)):
        place = Counter()
        for i in range(600):
            ((question, _),) = year_questions(GOOD.replace("1848", year), key=f"k{i}")
            if offered := sorted(choices(question)):
                assert offered[-1] <= "2020"
                assert len(set(offered)) == 4
                place[offered.index(year)] += 1
        assert len(place) == ranks, (year, place)
        assert min(place.values()) > 40, (year, place)


@pytest.mark.parametrize(
    "passage",
    [
        GOOD.replace("1848", "1848 and 1849"),
        GOOD.replace("In 1848", "In 848"),
        GOOD.replace("In 1848", "In 1848 BCE"),
        GOOD.replace("In 1848", "In the 1840s"),
        GOOD.replace("In 1848", "With 1848 men"),
        GOOD.replace("In 1848", "In the nineteenth century, or in 1848"),
        GOOD.replace("In 1848", "In 2048"),
        "In 1848, a man discovered gold at the sawmill which was built by another man near the river.",
    ],
)
def test_no_question_where_there_is_not_one_year_of_something_named(passage):
    assert year_questions(passage, key="k") == []


# --- cloze -----------------------------------------------------------------------------------------

CELLS = [
    *(Term(name, "", "cells") for name in ("membrane", "nucleus", "ribosome", "vacuole", "lysosome")),
    Term("membrane protein", "", "cells"),
    Term("Golgi apparatus", "", "cells"),
    Term("organelles", "", "cells"),
    Term("petal", "", "plants"),
    Term("sepal", "", "plants"),
]
SENTENCE = "The cell keeps all of its chromosomes within a membrane and copies them before the cell divides."


def test_the_term_of_a_sentence_is_blanked_out_among_four_of_its_kind():
    ((question, answer),) = cloze_questions(SENTENCE, CELLS, key="k")
    assert SENTENCE.replace("a membrane", "a(n) ____") in question
    assert answer[3:] == "membrane"
    offered = set(choices(question))
    assert len(offered) == 4
    # Neither the capital, nor the plural, nor what contains the answer.
    assert offered <= {t.name for t in CELLS} - {"Golgi apparatus", "organelles", "membrane protein"}
    assert cloze_questions(SENTENCE, CELLS, key="k") == cloze_questions(SENTENCE, CELLS, key="k")


@pytest.mark.parametrize(
    "sentence",
    [
        SENTENCE.replace("a membrane", "its membranes"),  # the choices are in the singular
        SENTENCE.replace("a membrane and", "a membrane envelope and"),  # describes another noun
        SENTENCE.replace("the cell divides", "the membrane divides"),  # the answer is told
        SENTENCE.replace("The cell", "It"),
        SENTENCE.replace("membrane", "wall"),
    ],
)
def test_no_cloze_where_the_blank_would_tell_or_tell_nothing(sentence):
    assert cloze_questions(sentence, CELLS, key="k") == []


def test_the_longest_term_is_meant_and_others_of_the_sentence_are_no_choices():
    sentence = SENTENCE.replace("a membrane and", "a membrane protein, or in the nucleus, and")
    asked = [cloze_questions(sentence, CELLS, key=f"k{i}") for i in range(30)]
    answers = {pairs[0][1][3:] for pairs in asked}
    assert answers == {"membrane protein", "nucleus"}
    for ((question, answer),) in asked:
        assert {"membrane protein", "nucleus"} & set(choices(question)) == {answer[3:]}


def test_names_used_otherwise_and_parts_of_names_are_no_blanks():
    towns = [Term(name, "", "x", "place") for name in ("Elmina", "Kilwa", "Sofala", "Mombasa")]
    rulers = [Term(name, "", "x", "bare") for name in ("Gezo", "Afonso", "Agaja", "Nzinga")]
    sentence = "Traders from Portugal bought gold and ivory in {} until the Dutch took the fort from them."
    for i in range(10):
        ((question, _),) = cloze_questions(sentence.format("Kilwa"), [*towns, *rulers], key=f"k{i}")
        assert set(choices(question)) == {t.name for t in towns}
    assert cloze_questions(sentence.format("Kilwa"), [towns[0], towns[1], *rulers], key="k") == []
    assert cloze_questions(sentence.format("Fort Kilwa"), towns, key="k") == []
