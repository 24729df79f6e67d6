"""Preparing a domain: what is kept, what is left out and told, and how the draw is spread."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.config import read_settings, validate
from qwen_ray.data.preparation.prepare import PrepareConfig, Prepared, prepare
from qwen_ray.data.records import Message, Record, read_records, write_records
from qwen_ray.data.sources import SOURCES
from qwen_ray.errors import UserError
from qwen_ray.fsio import beside

Run = Callable[..., Prepared]


def record(id: str, question: str, answer: str, **more: str) -> Record:
    given = {"domain": "biology", "source": "book", "license": "CC0-1.0", **more}
    return Record(id, (Message("user", question), Message("assistant", answer)), **given)


def run(sources: dict[str, Any], out: Path, **more: Any) -> Prepared:
    given = {"domain": "biology", "near_duplicates": None, **more}
    paths = {name: str(path) for name, path in sources.items()}
    return prepare(PrepareConfig(sources=paths, out=str(out), **given))


def dropped(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in beside(out, "dropped.jsonl").read_text().splitlines()]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Two chapters: ch1 has one section of 20 questions, ch2 two sections of 4."""
    path = tmp_path / "book.jsonl"
    sizes = {"ch1/s1": 20, "ch2/s1": 4, "ch2/s2": 4}
    write_records(
        path,
        (
            record(f"book/{place}/q{i}", f"What is {place} number {i}?", f"It is {i}.")
            for place, n in sizes.items()
            for i in range(n)
        ),
    )
    return path


def test_draw_is_even_over_chapters_and_sections_and_repeatable(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    card = run({"file": book}, out, size=12).card
    assert (card["written"], card["short_by"], card["not_drawn"]) == (12, 0, 16)
    assert Counter(r.id.rsplit("/", 1)[0] for r in read_records(out)) == {
        "book/ch1/s1": 6,
        "book/ch2/s1": 3,
        "book/ch2/s2": 3,
    }
    first = out.read_bytes()
    run({"file": book}, tmp_path / "again.jsonl", size=12)
    assert (tmp_path / "again.jsonl").read_bytes() == first
    run({"file": book}, out, size=12, seed=1)
    assert out.read_bytes() != first


def test_what_is_read_is_never_written_over(book: Path, tmp_path: Path) -> None:
    before = book.read_bytes()
    notes, heldout = tmp_path / "notes", tmp_path / "heldout"
    for sources, out, more in (
        ({"file": book}, book, {}),
        ({"file": notes}, notes / "new" / "out.jsonl", {}),
        ({"file": book}, heldout / "out.jsonl", {"benchmarks": str(heldout)}),
        ({"file": book}, heldout / "out.jsonl", {"heldout": (str(heldout),)}),
    ):
        for folder in (notes, heldout):
            folder.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"which is read|this is what is read"):
            run(sources, out, **more)
    assert book.read_bytes() == before
    assert not beside(book, "parts").exists()


def test_a_larger_draw_only_adds(book: Path, tmp_path: Path) -> None:
    run({"file": book}, tmp_path / "small.jsonl", size=10)
    run({"file": book}, tmp_path / "large.jsonl", size=20)
    assert read_records(tmp_path / "large.jsonl")[:10] == read_records(tmp_path / "small.jsonl")


def test_draw_is_even_over_sources_and_the_rest_fills_up(book: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(
            json.dumps({"question": f"How much is {i} + 1?", "answer": f"It is.\n#### {i + 1}"}) + "\n"
            for i in range(5)
        )
    )
    card = run({"file": book, "gsm8k": train}, tmp_path / "out.jsonl", size=20).card
    assert {name: (s["read"], s["kept"]) for name, s in card["sources"].items()} == {
        "file": (28, 15),
        "gsm8k": (5, 5),
    }
    assert card["per_license"] == {"CC0-1.0": 15, "MIT": 5}


def test_twenty_records_of_every_fault_are_named_with_their_line(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def line(**changes: Any) -> bytes:
        given = {"domain": "biology", "source": "book", "license": "CC0-1.0", **changes}
        return json.dumps(given).encode()

    def turns(*texts: str, roles: str = "ua") -> list[dict[str, str]]:
        names = {"u": "user", "a": "assistant"}
        return [{"role": names[r], "content": t} for r, t in zip(roles, texts, strict=True)]

    kinds: dict[str, Callable[[int], bytes]] = {
        "JSON": lambda i: b'{"messages": [{"role": "user", "content": "What is number %d' % i,
        "UTF-8": lambda i: f'{{"messages": "Was heißt Nummer {i}'.encode("latin-1"),
        "empty": lambda i: line(messages=turns(f"What is ribosome number {i} made of?", " ")),
        "order": lambda i: line(
            messages=turns(f"What is vacuole {i}?", "And a plastid?", "A bag.", roles="uua")
        ),
        "more than": lambda i: line(messages=turns(f"What is in genome {i}, all of it?", "acgt" * 6_000)),
        "earlier": lambda i: line(messages=turns(f"Which organ number {i} pumps the blood?", f"Heart {i}.")),
        "another answer": lambda i: line(
            messages=turns(f"What colour is leaf number {i // 2}?", ["Green.", "Blue."][i % 2])
        ),
        "licence": lambda i: line(
            messages=turns(f"What is Golgi body {i} for?", "For sorting."), license="CC-BY-NC-4.0"
        ),
        "domain": lambda i: line(messages=turns(f"Who was king {i}?", "Nobody knows."), domain="history"),
    }
    good = [kinds["earlier"](i) for i in range(20)]
    faults = [(words, make(i)) for words, make in kinds.items() for i in range(20)]
    path.write_bytes(b"\n".join([*good, *(fault for _, fault in faults)]) + b"\n")
    card = run({"file": path}, out).card
    assert card["written"] == len(good) == len(read_records(out))
    reasons = {drop["where"]: drop["reason"] for drop in dropped(out)}
    assert len(reasons) == len(dropped(out)) == len(faults) == 180
    for number, (words, _) in enumerate(faults, start=len(good) + 1):
        assert words in reasons[f"{path}:{number}"]
    assert len(card["dropped"]) == len(kinds)
    assert all(drop["count"] == 20 for drop in card["dropped"].values())
    assert card["sources"]["file"]["read"] == 200


def test_the_same_input_again_does_nothing(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first = run({"file": book}, out, size=12)
    assert not first.unchanged
    files = [out, *(beside(out, e) for e in ("manifest.json", "card.json", "card.html", "dropped.jsonl"))]
    before = [(f.stat().st_mtime_ns, f.read_bytes()) for f in files]
    book.touch()
    again = run({"file": book}, out, size=12)
    assert again.unchanged
    assert again.manifest == first.manifest
    assert [(f.stat().st_mtime_ns, f.read_bytes()) for f in files] == before
    assert not beside(out, "parts").exists()

    moved = tmp_path / "moved.jsonl"
    book.rename(moved)
    assert run({"file": moved}, tmp_path / "other.jsonl", size=12).manifest == first.manifest

    with open(moved, "a") as f:
        f.write(json.dumps(record("book/ch3/s1/q1", "What is new in the book?", "This.").to_dict()) + "\n")
    changed = run({"file": moved}, out, size=12)
    assert not changed.unchanged
    assert changed.manifest["data"] != first.manifest["data"]


def test_a_file_that_was_tampered_with_is_made_again(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run({"file": book}, out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-10])
    assert not run({"file": book}, out).unchanged
    assert out.read_bytes() == whole


def test_conversations_that_only_begin_alike_are_not_repeats(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    start = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A model."}]
    ends = (
        [{"from": "human", "value": f"Question {i}?"}, {"from": "gpt", "value": f"Answer {i}."}]
        for i in range(2)
    )
    path.write_text(json.dumps([{"conversations": start + end} for end in ends]))
    assert run({"file": path}, tmp_path / "out.jsonl", domain="general").card["written"] == 2


def test_ids_of_two_files_are_made_unique(tmp_path: Path) -> None:
    for name in "ab":
        write_records(tmp_path / f"{name}.jsonl", [record("x/1", f"What is in file {name}?", "Text.")])
    config = PrepareConfig(
        domain="biology",
        sources={"file": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]},
        out=str(tmp_path / "out.jsonl"),
    )
    prepare(config)
    assert sorted(r.id for r in read_records(tmp_path / "out.jsonl")) == ["x/1", "x/1#2"]


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(path, [record("a", "What was in 1776?", "A year.", domain="history")])
    with pytest.raises(UserError, match="domain 'biology' has no data: 1 x belongs to another domain"):
        run({"file": path}, out)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_arguments(book: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown source 'gsm8'"):
        run({"file": book, "gsm8": book}, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="no such"):
        run({"file": tmp_path / "missing.jsonl"}, tmp_path / "out.jsonl")


def test_questions_of_a_benchmark_are_left_out_and_named(tmp_path: Path) -> None:
    bench = tmp_path / "mmlu" / "test"
    bench.mkdir(parents=True)
    asked = "Which of the four small bones in the ear of a frog touches the drum first of all"
    (bench / "anatomy_test.csv").write_text(f'"{asked}?",the first,the second,the third,the fourth,A\n')
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(
        path,
        [
            record("a", f"{asked.upper()}!", "The first."),
            record("b", "Which bone is the longest of them all?", "The femur."),
        ],
    )
    card = run({"file": path}, out, benchmarks=str(tmp_path / "mmlu")).card
    assert [r.id for r in read_records(out)] == ["b"]
    hit = card["contamination"]["hits"][0]
    assert (hit["record"], hit["where"], hit["part"]) == ("a", f"{path}:1", "question")
    assert dropped(out)[0]["where"] == f"{path}:1"
    without = run({"file": path}, out)
    assert without.card["written"] == 2
    assert "for MMLU and GSM8K give --benchmarks" in str(without)
    assert run({"file": path}, out, decontaminate={"enabled": False}).card["contamination"]["checked"] == []


def test_shipped_settings_are_headed_by_their_command_and_valid() -> None:
    shipped = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
    assert len(shipped) == 4
    for file in shipped:
        assert file.read_text().startswith(f"# qwen-ray data prepare --config configs/data/{file.name}\n")
        tree, origin = read_settings(file)
        config = validate(PrepareConfig, tree, where=str(file), origin=origin)
        assert set(config.sources) <= set(SOURCES)
        assert config.domain == file.stem


def test_a_misspelt_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("domain: biology\nsources: {file: a.jsonl}\nout: b.jsonl\nlimits: {min_anser: 3}\n")
    tree, origin = read_settings(file)
    with pytest.raises(UserError, match=r"unknown key 'limits.min_anser'(.|\n)*limits.min_answer"):
        validate(PrepareConfig, tree, where=str(file), origin=origin)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("domain", "names"),
    [
        ("biology", ["openstax_biology"]),
        ("history", ["openstax_us_history", "openstax_world_history"]),
        (
            "security",
            [
                "mitre_attack",
                "mitre_cwe",
                "cisa_kev",
                "pypa_advisories",
                "rustsec_advisories",
                "owasp_cheatsheets",
            ],
        ),
    ],
)
def test_five_thousand_real_records_of_each_domain(
    shared_data: Path, tmp_path: Path, domain: str, names: list[str]
) -> None:
    out = tmp_path / "out.jsonl"
    sources = {name: str(shared_data / name) for name in names}
    settings: dict[str, Any] = {"domain": domain, "sources": sources, "benchmarks": str(shared_data)}
    card = prepare(PrepareConfig(out=str(out), **settings)).card
    assert card["written"] >= 5000
    assert {name for name, s in card["sources"].items() if s["kept"]} == set(names)
    again = prepare(
        PrepareConfig(out=str(tmp_path / "2.jsonl"), **{**settings, "sources": {"file": str(out)}})
    )
    assert [hit for hit in again.card["contamination"]["hits"] if hit["part"] != "answer"] == []
    assert again.card["written"] == card["written"]
