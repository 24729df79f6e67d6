"""Build, update, roll back and search real knowledge bases."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lancedb
import pytest

from qwen_ray.embedder import Embedder
from qwen_ray.errors import UserError
from qwen_ray.retrieval import build as kb
from qwen_ray.retrieval.chunks import Chunk
from qwen_ray.retrieval.documents import Origin
from qwen_ray.retrieval.knowledge_base import WAYS, KnowledgeBases
from qwen_ray.retrieval.store import Store

SLEEP, NILE, GLACIER = "Where do swifts sleep?", "How long is the Nile?", "What is the Alps' biggest glacier?"
Texts = Callable[..., list[list[str]]]


@pytest.fixture
def store(embedder: Embedder, tmp_path: Path) -> Store:
    return Store(tmp_path / "knowledge")


@pytest.fixture
def built(store: Store, notes: Path, embedder: Embedder) -> KnowledgeBases:
    kb.build(store, "nature", [Origin("text", str(notes), "CC0-1.0")], embedder)
    return KnowledgeBases(store.root, refresh_s=0)


@pytest.mark.parametrize("by", WAYS)
def test_the_passage_that_answers_comes_first(built: KnowledgeBases, texts: Texts, by: str) -> None:
    found = texts(built, "nature", SLEEP, NILE, GLACIER, by=by)
    assert [first[:10] for (first,) in found] == ["Swifts sle", "The Nile i", "Aletsch is"]


def test_words_find_a_name_that_meaning_does_not_know(
    store: Store, embedder: Embedder, tmp_path: Path, texts: Texts
) -> None:
    """Both ways together need the best of each."""
    codes = tmp_path / "codes"
    codes.mkdir()
    for number in range(40):
        (codes / f"{number}.txt").write_text(f"Part QX-{7000 + number} weighs {number} grams.")
    kb.build(store, "parts", [Origin("text", str(codes))], embedder)
    bases = KnowledgeBases(store.root, refresh_s=0)
    assert texts(bases, "parts", "weight of 7013", by="text") == [["Part QX-7013 weighs 13 grams."]]
    ((first, *_),) = texts(bases, "parts", "weight of 7013", k=4)
    assert first == "Part QX-7013 weighs 13 grams."


def test_a_passage_says_where_it_comes_from(built: KnowledgeBases, embedder: Embedder) -> None:
    ((passage,),) = built.search("nature", [NILE], embedder.embed([NILE]), 1)
    citation = passage.citation()
    assert citation.pop("score") > 0
    assert citation.pop("id").startswith("notes/rivers/rivers/length#")
    assert citation == {
        "text": "The Nile is 6,650 km long.",
        "knowledge_base": "nature",
        "version": 1,
        "source": "notes",
        "license": "CC0-1.0",
        "title": "Rivers > Length",
    }


def test_an_update_embeds_only_what_changed(
    built: KnowledgeBases, store: Store, notes: Path, embedder: Embedder, texts: Texts
) -> None:
    (notes / "rivers.md").write_text("# Rivers\n\nThe Okavango ends in a delta.\n")
    (notes / "glaciers.txt").write_text("Jostedalsbreen is the largest glacier of mainland Europe.\n")
    embedded: list[str] = []

    def embed(missing: Sequence[Chunk]) -> Iterator[tuple[Sequence[Chunk], Any]]:
        embedded.extend(chunk.text for chunk in missing)
        return iter(kb.here(embedder)(missing))

    manifest = kb.update(store, "nature", embedder, embed=embed)
    assert embedded == ["Jostedalsbreen is the largest glacier of mainland Europe."]
    counts = (manifest.version, manifest.parent, manifest.chunks, manifest.embedded, manifest.removed)
    assert counts == (2, 1, 3, 1, 2)
    every = texts(built, "nature", "Europe", k=10)[0]
    assert sorted(text[:8] for text in every) == ["Jostedal", "Swifts s", "The Okav"]
    assert texts(built, "nature", "Jostedalsbreen", by="text") == [embedded]  # the index of words has it
    assert kb.update(store, "nature", embedder) == manifest  # nothing changed: no new version


def test_rollback_and_the_update_after_it(
    built: KnowledgeBases, store: Store, notes: Path, embedder: Embedder, texts: Texts
) -> None:
    (notes / "glaciers.txt").unlink()
    kb.update(store, "nature", embedder)
    assert "Aletsch" not in texts(built, "nature", GLACIER)[0][0]
    assert store.rollback("nature", 1).version == 1
    assert "Aletsch" in texts(built, "nature", GLACIER)[0][0]
    (notes / "new.txt").write_text("Lake Baikal is the deepest lake.")
    manifest = kb.update(store, "nature", embedder)
    assert (manifest.version, manifest.parent) == (3, 1)
    assert sorted(text[:7] for text in texts(built, "nature", "a", k=9)[0]) == [
        "Lake Ba", "Swifts ", "The Nil", "The Oka",
    ]  # fmt: skip
    assert [one.version for one in store.versions("nature")] == [1, 2, 3]
    with pytest.raises(UserError, match="no version 9") as e:
        store.rollback("nature", 9)
    assert "1, 2, 3" in e.value.fix


def test_a_knowledge_base_that_is_older_than_a_week_still_changes(
    built: KnowledgeBases, store: Store, notes: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LanceDB removes old states when it merges files, by default those of a week ago: here, all of them."""
    asked = lancedb.table._optimize_cleanup_since_ms
    monkeypatch.setattr(
        lancedb.table,
        "_optimize_cleanup_since_ms",
        lambda age, retrain: 0 if age is None else asked(age, retrain),
    )
    (notes / "glaciers.txt").write_text("Jostedalsbreen is a glacier.")
    assert kb.update(store, "nature", embedder).version == 2
    assert kb.build(store, "nature", [Origin("text", str(notes / "birds"))], embedder).version == 3
    for version, first in ((1, "Aletsch"), (2, "Jostedals"), (3, "Swifts")):
        store.rollback("nature", version)
        ((passage,),) = built.search("nature", [GLACIER], embedder.embed([GLACIER]), 1)
        assert passage.text.startswith(first)


def test_a_build_again_is_the_next_version_with_all_embedded(
    built: KnowledgeBases, store: Store, notes: Path, embedder: Embedder
) -> None:
    manifest = kb.build(store, "nature", [Origin("text", str(notes / "birds"))], embedder)
    assert (manifest.version, manifest.parent, manifest.chunks, manifest.embedded) == (2, 1, 1, 1)
    store.rollback("nature", 1)
    assert built.describe()[0]["chunks"] == 4


def test_a_write_that_breaks_off_changes_nothing_for_readers(
    built: KnowledgeBases, store: Store, notes: Path, embedder: Embedder, texts: Texts
) -> None:
    (notes / "glaciers.txt").write_text("Vatnajökull is a glacier.")

    def breaks(missing: Sequence[Chunk]) -> Iterator[tuple[Sequence[Chunk], Any]]:
        yield from kb.here(embedder)(missing)  # written, then:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        kb.update(store, "nature", embedder, embed=breaks)
    with pytest.raises(OSError, match="no space"):
        kb.build(store, "other", [Origin("text", str(notes))], embedder, embed=breaks)
    assert built.names() == ["nature"]
    assert "Aletsch" in texts(built, "nature", GLACIER)[0][0]
    assert kb.update(store, "nature", embedder).version == 2
    assert sum("glacier" in text for text in texts(built, "nature", GLACIER, k=9)[0]) == 1
    assert kb.build(store, "other", [Origin("text", str(notes))], embedder).version == 1


def test_a_second_writer_is_refused(built: KnowledgeBases, store: Store, embedder: Embedder) -> None:
    with store.writing("nature"), pytest.raises(UserError, match="another process is writing") as e:
        kb.update(Store(store.root), "nature", embedder)
    assert e.value.status == 409
    assert kb.update(store, "nature", embedder).version == 1


def test_without_a_lock_the_second_writer_is_noticed(
    store: Store, notes: Path, embedder: Embedder, texts: Texts
) -> None:
    """As on an object store, which has no locks: the one that comes first is published, whole."""
    remote = Store(f"file://{store.root}")
    kb.build(remote, "nature", [Origin("text", str(notes))], embedder)
    (notes / "glaciers.txt").write_text("Vatnajökull is a glacier.")

    def meanwhile(missing: Sequence[Chunk]) -> Iterator[tuple[Sequence[Chunk], Any]]:
        kb.update(Store(remote.root), "nature", embedder, origins=[Origin("text", str(notes / "birds"))])
        yield from kb.here(embedder)(missing)

    with pytest.raises(UserError, match="another process is writing"):
        kb.update(remote, "nature", embedder, embed=meanwhile)
    bases = KnowledgeBases(remote.root, refresh_s=0)
    assert texts(bases, "nature", GLACIER, k=9) == [["Swifts sleep on the wing and land only to nest."]]
    assert kb.update(remote, "nature", embedder, origins=[Origin("text", str(notes))]).version == 3
    assert len(texts(bases, "nature", GLACIER, k=9)[0]) == 4


def test_a_reader_in_another_process_sees_a_new_version(
    built: KnowledgeBases, store: Store, notes: Path, embedder: Embedder
) -> None:
    script = (
        "import sys, numpy\n"
        "from qwen_ray.retrieval.knowledge_base import KnowledgeBases\n"
        "bases = KnowledgeBases(sys.argv[1], refresh_s=0)\n"
        "for question in sys.stdin:\n"
        "    ((p, *_),) = bases.search('nature', [question], numpy.ones((1, 384), 'f4'), 1, by='text')\n"
        "    print(p.version, p.text, flush=True)\n"
    )
    command = [sys.executable, "-c", script, store.root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def ask() -> str:
            print("glacier", file=reader.stdin, flush=True)
            return reader.stdout.readline().strip()  # type: ignore[union-attr]

        assert ask() == "1 Aletsch is the largest glacier of the Alps."
        (notes / "glaciers.txt").write_text("Vatnajökull is a glacier.")
        kb.update(store, "nature", embedder)
        assert ask() == "2 Vatnajökull is a glacier."
        store.rollback("nature", 1)
        assert ask() == "1 Aletsch is the largest glacier of the Alps."
        reader.stdin.close()


def test_all_knowledge_bases_are_searched_as_one(
    built: KnowledgeBases, store: Store, embedder: Embedder, tmp_path: Path, texts: Texts
) -> None:
    other = tmp_path / "law.txt"
    other.write_text("A tort is a civil wrong.")
    kb.build(store, "law", [Origin("text", str(other))], embedder)
    assert built.names() == ["law", "nature"]
    assert texts(built, None, "What is a tort?", SLEEP) == [
        ["A tort is a civil wrong."],
        ["Swifts sleep on the wing and land only to nest."],
    ]
    assert [one["name"] for one in built.describe()] == ["law", "nature"]
    with pytest.raises(UserError, match="no knowledge base 'natur'") as e:
        texts(built, "natur", SLEEP)
    assert e.value.status == 404


def test_storage_that_is_gone_for_a_while_leaves_what_is_open(
    built: KnowledgeBases, store: Store, texts: Texts
) -> None:
    before = texts(built, "nature", SLEEP)
    root, away = Path(store.root), Path(store.root).with_name("away")
    root.rename(away)
    (root).write_text("not a folder")
    assert built.names() == ["nature"]
    root.unlink()
    away.rename(root)
    assert texts(built, "nature", SLEEP) == before


@pytest.mark.parametrize("said", ["no such bucket s3://secret/prefix\nat line 7", ""])
def test_what_the_storage_says_is_not_for_clients(store: Store, said: str) -> None:
    with pytest.raises(UserError) as e, store.reading():
        raise OSError(said)
    assert e.value.status == 503
    assert e.value.what == "the knowledge bases cannot be read"
    assert store.root not in e.value.fix
    assert e.value.where == f"{store.root} ({said.partition(chr(10))[0] or 'OSError'})"


def test_the_reason_of_a_failed_search_is_logged(
    built: KnowledgeBases, store: Store, texts: Texts, caplog: pytest.LogCaptureFixture
) -> None:
    built.names()  # opened, but none of its rows are read yet
    built._refresh_s = 60
    for file in Path(store.root).rglob("*.lance"):
        if file.is_file():
            file.unlink()
    with pytest.raises(UserError, match="cannot be read") as e:
        texts(built, "nature", SLEEP)
    assert e.value.status == 503
    assert store.root in caplog.text


def test_questions_of_any_shape(built: KnowledgeBases, texts: Texts) -> None:
    odd = ["", "?", '"unbalanced AND (x', "a" * 5000, "\x00\n", "日本"]
    assert all(len(found) == 2 for found in texts(built, "nature", *odd, k=2))
    assert texts(built, "nature") == []


def test_another_embedder_is_refused(built: KnowledgeBases, store: Store, embedder: Embedder) -> None:
    other = Embedder(embedder._model, id="other", name="other")
    with pytest.raises(UserError, match="was made with the embedder"):
        built.check_embedder(other.id)
    with pytest.raises(UserError, match="was made with the embedder"):
        kb.update(store, "nature", other)


@pytest.mark.parametrize("name", ["../x", "a/b", "A", "", ".hidden"])
def test_a_name_that_could_leave_the_root(store: Store, notes: Path, embedder: Embedder, name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name"):
        kb.build(store, name, [Origin("text", str(notes))], embedder)


def test_no_documents_no_version(store: Store, tmp_path: Path, embedder: Embedder) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="hold no text"):
        kb.build(store, "empty", [Origin("text", str(tmp_path / "empty.txt"))], embedder)
    assert store.names() == []
