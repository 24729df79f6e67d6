"""Documents as passages: nothing lost, nothing too long, ids that change with the text only."""

from hypothesis import given
from hypothesis import strategies as st

from qwen_ray.retrieval.chunks import Document, chunks, cut


def document(key: str, text: str, title: str = "T") -> Document:
    return Document(key, title, text, "book", "CC0-1.0")


@given(st.text(alphabet="ab. \nC", max_size=400), st.integers(5, 60))
def test_every_word_is_in_a_passage_and_none_is_too_long(text: str, longest: int) -> None:
    passages = list(cut(text, longest))
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(0 < len(passage) <= longest for passage in passages)


def test_cuts_are_between_paragraphs_then_between_sentences() -> None:
    assert list(cut("One two.\n\nThree four.\n\nFive six.", 22)) == ["One two.\n\nThree four.", "Five six."]
    assert list(cut("One is odd. Two is even. Three is odd.", 26)) == [
        "One is odd. Two is even.",
        "Three is odd.",
    ]


def test_an_id_is_the_documents_key_and_changes_with_all_that_is_stored() -> None:
    one = document("a/1", "Text.")
    (same,), (again,) = chunks([one]), chunks([document("a/1", "Text.")])
    assert same.id == again.id
    assert same.id.startswith("a/1#")
    others = [
        document("a/1", "Other text."),
        document("a/1", "Text.", title="U"),
        Document("a/1", "T", "Text.", "book", "MIT"),
        Document("a/1", "T", "Text.", "film", "CC0-1.0"),
    ]
    assert len({same.id, *(chunk.id for other in others for chunk in chunks([other]))}) == 5


def test_a_repeated_passage_is_kept_once() -> None:
    assert [chunk.id[:3] for chunk in chunks([document("a/1", "Same."), document("a/2", "Same.")])] == ["a/1"]


def test_the_title_is_searched_too() -> None:
    (chunk,) = chunks([document("a/1", "It sleeps on the wing.", title="Swift")])
    assert chunk.searched == "Swift\nIt sleeps on the wing."
    assert chunk.text == "It sleeps on the wing."
