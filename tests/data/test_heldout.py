"""Held-out sets: what becomes an item, what is left out and why, and that sets are apart from training."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_ray.data.heldout import items as items_
from qwen_ray.data.heldout.build import (
    SHOTS,
    HeldoutReport,
    build_heldout,
    check_disjoint,
)
from qwen_ray.data.heldout.items import CUES, MAX_CUE, Item, Placed, fault, guessed, read_item
from qwen_ray.data.heldout.subjects import belongs
from qwen_ray.data.questions import lay_out
from qwen_ray.data.records import Message, Record, write_records
from qwen_ray.data.sources.base import Drops, Found
from qwen_ray.errors import UserError
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.statistics import smallest_difference
from tests.data.quiz import quiz


def asked(question: str, *choices: str, answer: int = 0, source: str = "test", id: str = "test/x") -> Record:
    letter = "ABCDEF"[answer]
    messages = (
        Message("user", lay_out(question, choices)),
        Message("assistant", f"{letter}. {choices[answer]}"),
    )
    return Record(id, messages, "law", source, "CC0-1.0")


def item(question: str, *choices: str, answer: int = 0) -> Item:
    found = read_item(asked(question, *choices, answer=answer))
    assert found is not None
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def build(folder: Path, records: list[Record], out: str = "set", **settings: Any) -> HeldoutReport:
    folder.mkdir(exist_ok=True)
    write_records(folder / "quiz.jsonl", records)
    return build_heldout("law", {"file": folder / "quiz.jsonl"}, folder / out, **settings)


def dropped(folder: Path) -> dict[str, str]:
    """Id of each record left out (the shown text begins with it, after a cue) and why."""
    lines = (folder / "set" / "dropped.jsonl").read_text().splitlines()
    return {row["shown"].split(": ")[-2].split()[-1]: row["reason"] for row in map(json.loads, lines)}


# --- the set ---------------------------------------------------------------------------------------


def test_a_set_holds_the_questions_with_letters_in_turn(tmp_path: Path) -> None:
    source = quiz(50)
    report = build(tmp_path, source)
    listed = rows(tmp_path / "set")
    assert len(listed) == 50
    assert [row["split"] for row in listed] == ["dev"] * SHOTS + ["test"] * 45
    assert set(listed[0]) == {"id", "split", "question", "choices", "answer", "source", "license", "topic"}
    by_id = {record.id: record for record in source}
    for row in listed:
        text = by_id[row["id"]].messages
        assert text[0].content.startswith(row["question"])
        assert text[1].content[3:] == row["choices"][row["answer"]]
        assert all(choice in text[0].content for choice in row["choices"])
    for start in range(0, 48, 4):
        assert sorted(row["answer"] for row in listed[start : start + 4]) == [0, 1, 2, 3]
    assert listed[3]["answer"] != listed[7]["answer"] or listed[0]["answer"] != listed[4]["answer"]
    assert report.items == 45
    assert report.sources["file"]["kept"] == report.sources["file"]["read"] == 50
    assert json.loads((tmp_path / "set" / "heldout.json").read_text())["items"] == 45
    assert "fewer than 500" in str(report)


def test_same_input_same_bytes_and_a_larger_size_only_adds(tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    build(tmp_path, quiz(60), "set", size=20)
    small = rows(tmp_path / "set")
    write_records(tmp_path / "quiz.jsonl", quiz(60)[::-1])  # another order of the same records
    build_heldout("law", {"file": tmp_path / "quiz.jsonl"}, tmp_path / "again" / "set", size=20)
    assert rows(tmp_path / "again" / "set") == small
    build(tmp_path / "third", quiz(60), "set", size=20)
    assert content(tmp_path / "third" / "set") == content(tmp_path / "set")
    build(tmp_path, quiz(60), "set", size=40)  # over the old set
    assert len(small) == 25
    assert rows(tmp_path / "set")[:25] == small
    build(tmp_path, quiz(60), "set", size=20, seed=1)
    assert {row["id"] for row in rows(tmp_path / "set")} != {row["id"] for row in small}


def test_the_suite_counts_the_task_and_changes_its_version_with_the_items(tmp_path: Path) -> None:
    build(tmp_path, quiz(30))
    suite = suites.load(str(tmp_path / "set"))
    assert (suite.name, suite.categories[0].tasks) == ("heldout-law", ("qwen_ray_heldout_law",))
    assert suite.categories[0].role == "target"
    build(tmp_path, quiz(31))
    assert suites.load(str(tmp_path / "set")).version != suite.version


# --- what is fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (item("Which is right?", "Dogs", "All of these", "Cats", "Cows"), items_.OTHERS),
        (item("Which is right?", "Dogs", "Both A and B", "Cats", "Cows"), items_.OTHERS),
        (item("Which is right?", "None of the above", "Dogs", "Cats", "Cows"), items_.OTHERS),
        (
            item("How long do they live?", "Varies by species", "9 years", "2 years", "3 years"),
            items_.UNCLEAR,
        ),
        (item("They can fly.", "Somewhat true", "Perhaps", "In part", "By night"), items_.UNCLEAR),
        (item("How many subspecies are left nowadays?", "6", "8", "2", "3"), items_.DATED),
        (item("Which city?", "The old town", "Old Town.", "Rome", "Oslo"), items_.ALIKE),
        (item("What do they eat?", "Leaves", "Leaf litter", "leaves", "Grass"), items_.ALIKE),
        (
            item(
                "Where do they live?", "Mexico, Central America and South America", "Asia", "Africa", "Peru"
            ),
            items_.LONG,
        ),
        (item("What is an adult male rooster called?", "Rooster", "Buck", "Hen", "Cob"), items_.TOLD),
        (item("Which one is it?", "The ____ of law", "Rome", "Oslo", "Bern"), items_.BLANKED),
    ],
)
def test_unfit_items_have_a_reason(unfit: Item, reason: str) -> None:
    assert fault(unfit, "law") == reason


@pytest.mark.parametrize(
    "fit",
    [
        item("Which king was meant?", "Louis XIV", "Louis XV", "Louis XVI", "Louis X"),
        item("In which year?", "1914", "1915", "1916", "1917"),
        item("Which empire came next?", "The Eastern Empire", "The Western Empire", "Greece", "Italy"),
        item("Slavery ended there in this year.", "1834", "1812", "1912", "1738"),
        item("What does 400 lbs of food, in one day, give?", "40%", "One day", "60%", "20%"),
        item("Where is it?", "On each side of the head", "On its upper back", "In its tail", "On its legs"),
        item("Which vitamin is it?", "Vitamin A", "Vitamin B", "Vitamin C", "Vitamin D"),
    ],
)
def test_fit_items_have_none(fit: Item) -> None:
    assert fault(fit, "law") is None


def test_only_four_choices_with_one_answer_are_items() -> None:
    good = asked("Which of them?", "one", "two", "three", "four", answer=2)
    assert read_item(good) is not None
    user = good.messages[0]
    assert read_item(asked("Which of them?", "one", "two", "three")) is None
    assert read_item(asked("Which of them?", "one", "two", "three", "four", "five")) is None
    assert read_item(replace(good, messages=(user, Message("assistant", "five")))) is None
    assert read_item(replace(good, messages=(Message("system", "Be brief."), *good.messages))) is None
    by_letter = read_item(replace(good, messages=(user, Message("assistant", "C"))))
    assert by_letter is not None
    assert by_letter.answer == 2


def test_words_of_the_choices_are_blanked_in_a_description() -> None:
    told = item(
        "Which attack is described here? An adversary injects commands into the shell of a host, and "
        "a spoofed label is never used for it.",
        *("Command Injection", "Label Spoofing", "Flooding", "Shoulder Surfing"),
    )
    assert told.question == (
        "Which attack is described here? An adversary ____ into the shell of a host, and "
        "a ____ is never used for it."
    )
    assert guessed(told, "most words of the question") == 0.25
    stays = item("Which command is it? Say so.", "Command A", "Rome", "Oslo", "Bern")
    assert stays.question == "Which command is it? Say so."


def test_every_faulty_record_is_left_out_with_its_reason_and_place(tmp_path: Path) -> None:
    extra = [
        asked("Which is right?", "Dogs", "All of these", "Cats", "Cows", id="test/others"),
        asked("Is this only a question?", "yes it is", "no it is not", id="test/two"),
        asked("Which river did the Quellon treaty name?", "Arno", "Ebro", "Oder", "Ruhr", id="test/once"),
        asked("Which river did the Quellon Treaty name?", "Arno", "Elbe", "Oder", "Ruhr", id="test/twice"),
        asked("Who signed the Zubrin accord first?", "Ann", "Bob", "Cid", "Dan", id="test/yes"),
        asked("Who signed the Zubrin accord first?", "Dan", "Cid", "Ann", "Bob", id="test/no"),
    ]
    report = build(tmp_path, [*quiz(20), *extra])
    assert dropped(tmp_path) == {
        "test/others": items_.OTHERS,
        "test/two": items_.NOT_FOUR,
        "test/twice": items_.REPEATED,
        "test/yes": items_.CONTRADICTION,
        "test/no": items_.CONTRADICTION,
    }
    assert report.sources["file"]["read"] == 26
    assert report.items + SHOTS == 21
    lines = [json.loads(line) for line in (tmp_path / "set" / "dropped.jsonl").read_text().splitlines()]
    assert f"{tmp_path / 'quiz.jsonl'}:21" in {row["where"] for row in lines}


def test_broad_sources_give_only_what_is_about_the_subject() -> None:
    def told(domain: str, category: str, question: str, answer: str = "x") -> bool:
        return belongs(domain, "opentriviaqa", category, question, answer)

    assert told("biology", "animals", "How fast can a zebra run?")
    assert told("biology", "science-technology", "Which organ makes insulin?")
    assert not told("biology", "science-technology", "Who built the first nuclear power station?")
    assert not told("biology", "animals", "Which cartoon dog is this?")
    assert not told("biology", "history", "Which animal did he ride?")
    assert told("history", "history", "Which battle was it?")
    assert not told("history", "history", "Who directed the 1986 movie Platoon?")
    assert belongs("history", "other", "film", "Who directed the movie?", "x")


# --- cues ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cue", CUES)
def test_no_cue_finds_many_answers_in_any_beginning(cue: str) -> None:
    def biased(i: int) -> Item:
        names = [f"town{i}", f"land{i}", f"hill{i}", f"lake{i}"]
        if cue == "longest":
            names[0] += "ville"
        elif cue == "shortest":
            names = [names[0], *(name + "ville" for name in names[1:])]
        question = (
            f"Who saw number {i} near {names[0]}?" if cue.startswith("most") else f"Who saw number {i}?"
        )
        return item(question, *names)

    fair = [item(f"Who heard number {i}?", f"town{i}", f"land{i}", f"hill{i}", f"lake{i}") for i in range(60)]
    placed = [
        Placed(one, Found(asked("Who?", "a", "b", "c", "d"), f"x:{n}"), "file")
        for n, one in enumerate([biased(i) for i in range(40)] + fair)
    ]
    drops = Drops()
    kept = [one.item for one in items_.without_cues(placed, drops)]
    for n in range(1, len(kept) + 1):
        assert sum(guessed(one, cue) for one in kept[:n]) <= MAX_CUE * n + 1
    assert len(kept) + len(drops.log) == 100
    assert drops.counts == {items_.CUED: 100 - len(kept)}
    assert kept[-1] == fair[-1]
    assert cue in drops.log[0].shown


def test_the_report_tells_how_often_a_guess_is_right(tmp_path: Path) -> None:
    report = build(tmp_path, quiz(80))
    listed = [row for row in rows(tmp_path / "set") if row["split"] == "test"]
    longest = 0.0
    for row in listed:
        lengths = [len(choice) for choice in row["choices"]]
        if lengths[row["answer"]] == max(lengths):
            longest += 1 / lengths.count(max(lengths))
    assert report.cues["longest"] == pytest.approx(longest / len(listed))
    assert max(report.cues.values()) < 0.35


# --- apart from benchmarks and training ------------------------------------------------------------


def test_items_of_a_benchmark_are_left_out(tmp_path: Path) -> None:
    planted = quiz(1, seed=9)[0]
    question, *choices = planted.messages[0].content.split("\n")
    (tmp_path / "mmlu").mkdir()
    cells = [question.upper(), *(choice[3:] for choice in choices), planted.messages[1].content[0]]
    text = ",".join(f'"{cell}"' for cell in cells) + "\n"
    (tmp_path / "mmlu" / "law_test.csv").write_text(text)
    report = build(tmp_path, [*quiz(30), replace(planted, id="test/planted")], benchmarks=tmp_path / "mmlu")
    assert list(report.drops) == ["asks a benchmark's question"]
    assert dropped(tmp_path) == {"test/planted": "asks a benchmark's question"}
    assert build(tmp_path, [*quiz(30), replace(planted, id="test/planted")]).items + SHOTS == 31


def test_training_and_heldout_may_share_no_source(tmp_path: Path) -> None:
    named = [replace(record, source="my_quiz") for record in quiz(20)]
    build(tmp_path, named)
    folder = tmp_path / "set"
    check_disjoint({"sources": ["openstax_biology", "file"]}, folder)
    with pytest.raises(UserError, match="'my_quiz' is held out") as e:
        check_disjoint({"sources": ["gsm8k", "my_quiz"]}, folder)
    assert e.value.where == str(folder)
    same = {"file": [json.loads((folder / "heldout.json").read_text())["inputs"][0]]}
    with pytest.raises(UserError, match="'file' is held out"):
        check_disjoint({"sources": ["file"], "inputs": same}, folder)
    check_disjoint({"sources": ["file"], "inputs": {"file": ["0" * 64]}}, folder)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "heldout.json").write_text("{}")
    with pytest.raises(UserError, match="not a held-out set"):
        check_disjoint({"sources": []}, tmp_path / "else")


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'law' has 5 items, of which 5"):
        build(tmp_path, quiz(5))
    with pytest.raises(UserError, match="unknown source 'fil'"):
        build_heldout("law", {"fil": tmp_path}, tmp_path / "set")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else than a held-out set"):
        build(tmp_path, quiz(20), "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# --- what it can show ------------------------------------------------------------------------------


def test_smallest_difference_is_seen_four_times_in_five() -> None:
    """By simulation: McNemar's test at 5% on 600 items of which a fifth change."""
    n, changed = 600, 0.2
    gain = smallest_difference(n, changed=changed)
    rng = np.random.default_rng(0)
    shares = [(changed + gain) / 2, (changed - gain) / 2, 1 - changed]
    gained, lost, _ = rng.multinomial(n, shares, size=20_000).T
    seen = np.abs(gained - lost) / np.sqrt(gained + lost) > 1.96
    assert seen.mean() == pytest.approx(0.8, abs=0.02)
    assert smallest_difference(100) > 2 * gain


# --- the real sources ------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize(
    ("domain", "folders", "least"),
    [
        ("biology", ["opentriviaqa/categories/animals", "opentriviaqa/categories/science-technology"], 1200),
        ("history", ["opentriviaqa/categories/history"], 1100),
        ("security", ["mitre_capec"], 600),
    ],
)
def test_real_sets_of_more_than_500_items(
    shared_data: Path, tmp_path: Path, domain: str, folders: list[str], least: int
) -> None:
    source, paths = folders[0].split("/")[0], [shared_data / folder for folder in folders]
    report = build_heldout(domain, {source: paths}, tmp_path / domain, benchmarks=shared_data)
    assert report.items >= least
    assert report.searched > 4000
    listed = [row for row in rows(tmp_path / domain) if row["split"] == "test"]
    assert len(listed) == report.items
    letters = Counter(row["answer"] for row in listed)
    assert max(letters.values()) - min(letters.values()) <= 2
    assert max(report.cues.values()) < 0.35
    assert report.cues["longest"] < 0.30
    assert not any("all of these" in choice.lower() for row in listed for choice in row["choices"])
    assert {row["license"] for row in listed} == {
        "CC-BY-SA-4.0" if source == "opentriviaqa" else "LicenseRef-MITRE-CAPEC"
    }
    known = {
        "biology": ("What kind of animal is the Spotted wobbegong?", "Fish"),
        "history": (
            "What Celtic chieftain fought Julius Caesar in Gaul, in the first century B.C.?",
            "Vercingetorix",
        ),
        "security": ("Which of these describes the attack pattern “Dumpster Diving”?", None),
    }[domain]
    (found,) = [row for row in rows(tmp_path / domain) if row["question"] == known[0]]
    right = found["choices"][found["answer"]]
    assert right == known[1] if known[1] else "searches through trash bins" in right
