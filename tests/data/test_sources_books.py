"""The readers of the OpenStax books, on small books of every shape they meet."""

import gzip
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from qwen_ray.data.records import Record
from qwen_ray.data.sources.base import Drops
from qwen_ray.data.sources.kramdown import marked_terms, paragraphs, plain_text
from qwen_ray.data.sources.openstax import BOOK, FIGURE, UNSOLVED, VARY
from qwen_ray.data.sources.openstax_biology import SOURCE as BIOLOGY
from qwen_ray.data.sources.openstax_us_history import SOURCE as US_HISTORY
from qwen_ray.data.sources.openstax_world_history import SOURCE as WORLD_HISTORY
from qwen_ray.data.sources.openstax_world_history import UNSOLVED as NO_TEXT
from qwen_ray.data.sources.textbook import AGAIN, CROWDED, MOST_CLOZE, MOST_YEARS, SHORT
from qwen_ray.errors import UserError

SUMMARY = """---
title: "Book"
---

1.  {: .preface} [Preface](contents/m1.md)
2.  {: .part} Unit 1
    1.  {: .chapter} [Cells](contents/m2.md)
        1.  [Membranes](contents/m3.md)
    2.  {: .chapter} [Genes](contents/m4.md)
3.  {: .appendix} [Units](contents/m8.md)
"""


def exercise(problem: str, solution: str | None) -> str:
    solved = (
        f'<div data-type="solution" markdown="1">\n{solution}\n\n</div>\n' if solution is not None else ""
    )
    asked = f'<div data-type="problem" markdown="1">\n{problem}\n\n</div>\n'
    return f'<div data-type="exercise">\n{asked}{solved}</div>\n\n'


MEMBRANES = (
    'A **plasma membrane**{: data-type="term"} surrounds each of the cells ([\\[link\\]](#f1)) of a frog.\n\n'
    + exercise(
        'What crosses \\_\\_\\_\\_?\n\n1.  water\n2.  CO<sub>2</sub>\n3.  all of the above\n{: type="a"}',
        "C",
    )
    + exercise("Why do *E. coli* matter?", "Answers will vary. They help digestion.")
    + exercise("[[link]](#fig-1) What is shown?", "[[link]](#fig-1) A cell.")
    + exercise("Name the steps.", "Answers will vary.")
    + exercise("In Section 4.2, what was said?", "Much.")
    + exercise('Two lists.\n\n1.  a\n2.  b\n^\n\n1.  c\n2.  d\n{: type="a"}', "B")
    + exercise("No answer is given.", None)
    + """<div data-type="glossary" markdown="1">
### Glossary
{: data-type="glossary-title"}

plasma membrane
: (also, *cell membrane*) thin layer around a plasma membrane
^

cation
: positive ion, such as Ca<sup>2+</sup>
{: data-label=""}

frog
: Anura

</div>
"""
)
GENES = """<div data-type="glossary" markdown="1">
### Glossary
{: data-type="glossary-title"}
Cation
: again the positive ion
^

FtsZ
: \\- protein (*Z* ring) in 10<sup>6</sup> cells
</div>
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    book = tmp_path / "book"
    (book / "contents").mkdir(parents=True)
    (book / "SUMMARY.md").write_text(SUMMARY)
    pages = {"m1": "Welcome.", "m2": "Cells.", "m3": MEMBRANES, "m4": GENES, "m8": GOLD, "m9": "Loose."}
    for name, text in pages.items():
        (book / "contents" / f"{name}.md").write_text(text)
    return book


GOLD = "In 1848, James Marshall discovered gold at the sawmill he had built with John Sutter in California.\n"


def read(source, path: Path) -> tuple[dict[str, Record], Drops]:
    drops = Drops()
    found = list(source.find(path, drops=drops))
    records = {f.record.id.removeprefix(f"{source.name}/"): f.record for f in found}
    assert len(records) == len(found)
    # The place names the file and ends as the id does.
    assert all(f.where.startswith(str(path)) for f in found)
    assert all(f.where.rsplit("/", 1)[1] == f.record.id.rsplit("/", 1)[1] for f in found)
    return records, drops


def text(record: Record) -> tuple[str, str]:
    return record.messages[0].content, record.messages[1].content


# --- kramdown --------------------------------------------------------------------------------------


def test_exercises_and_glossary(checkout):
    records, drops = read(BIOLOGY, checkout)
    assert text(records["ch01/m3/choice-1"]) == (
        "What crosses ____?\nA. water\nB. CO2\nC. all of the above",
        "C. all of the above",
    )
    assert text(records["ch01/m3/question-2"]) == ("Why do E. coli matter?", "They help digestion.")
    # The other name comes last, and the name is blanked out where it is asked for.
    question, answer = text(records["ch01/m3/define-plasma-membrane"])
    assert "“plasma membrane”" in question
    assert answer == "Thin layer around a plasma membrane (also, cell membrane)."
    question, answer = text(records["ch01/m3/name-plasma-membrane"])
    assert question.endswith("Thin layer around a ____.")
    assert answer == "plasma membrane"
    assert text(records["ch01/m3/define-cation"])[1] == "Positive ion, such as Ca2+."
    assert "rotein (Z ring) in 10^6 cells" in text(records["ch02/m4/define-ftsz"])[1]
    assert {(r.domain, r.source, r.license) for r in records.values()} == {
        ("biology", "openstax_biology", "CC-BY-3.0")
    }
    assert drops.counts == {
        "refers to a figure": 1,
        "the solution only says that answers vary": 1,
        "refers to another place in the book": 1,
        "exercise of a layout that is not understood": 1,
        "exercise without a solution": 1,
        "glossary entry without a definition": 1,
        "term defined before in the book": 1,
    }
    figure = next(drop for drop in drops.log if drop.reason == "refers to a figure")
    assert figure.where == f"{checkout}/contents/m3.md/exercise-3"
    assert figure.shown == "What is shown?"


def glossary(**entries: str) -> str:
    listed = "".join(f"{name}\n: {definition}\n^\n\n" for name, definition in entries.items())
    return f'<div data-type="glossary" markdown="1">\n### Glossary\n{listed}\n</div>\n'


PLANTS = glossary(
    stoma="opening in the skin of a leaf",
    xylem="tissue that carries water up a plant",
    phloem="tissue that carries sugar through a plant",
    axil="angle between a leaf and its stem",
    node="place of a stem where a leaf grows",
)


def test_terms_with_four_choices_of_the_book_and_sentences_with_one_blanked_out(checkout):
    sentence = "Sugars made in the leaves of an oak are carried down to its roots through the {}."
    used = "All of the stoma, the xylem, the phloem, the axil and the node grow."
    (checkout / "contents" / "m3.md").write_text(f"{sentence.format('phloem')}\n\n{used}\n\n{PLANTS}")
    (checkout / "contents" / "m4.md").write_text(f"{sentence.format('xylem')}\n")
    (checkout / "contents" / "m8.md").write_text(f"{sentence.format('xylem')}\n\n{PLANTS}")
    records, _ = read(BIOLOGY, checkout)
    chosen = [record for item, record in records.items() if "/choose-" in item]
    assert len(chosen) == 5
    for record in chosen:
        question, answer = text(record)
        assert len(re.findall(r"^[A-D]\. ", question, re.M)) == 4
        assert answer in question.split("\n")
    clozes = {item: text(record) for item, record in records.items() if "/cloze-" in item}
    # The other chapter does not know the word, and an appendix is no running text.
    assert set(clozes) == {"ch01/m3/cloze-1-1"}
    question, answer = clozes["ch01/m3/cloze-1-1"]
    assert sentence.format("____") in question
    assert answer[3:] == "phloem"


def test_years_are_asked_for_in_history_alone_and_not_in_the_preface(checkout):
    for page in ("m1", "m3", "m9"):
        (checkout / "contents" / f"{page}.md").write_text(GOLD)
    assert not any("/year-" in item for item in read(BIOLOGY, checkout)[0])
    records, _ = read(US_HISTORY, checkout)
    assert [item for item in records if "/year-" in item] == ["ch01/m3/year-1-1"]
    question, answer = text(records["ch01/m3/year-1-1"])
    assert GOLD.strip().replace("1848", "____") in question
    assert answer.endswith("1848")


def test_no_section_floods_the_book_and_what_is_too_much_is_told(checkout):
    many = "\n\n".join(GOLD.replace("1848", str(1800 + i)) for i in range(MOST_YEARS + 3))
    (checkout / "contents" / "m3.md").write_text(many)
    records, drops = read(US_HISTORY, checkout)
    assert len(records) - sum("/m3/" not in item for item in records) == MOST_YEARS
    assert drops.counts["more questions made of a section's text than are taken"] == 3


def test_one_book_from_checkout_archive_and_folder_with_archive(checkout, tmp_path):
    archive = tmp_path / "held" / "book.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(checkout, arcname="book-cf3dc8c")
    expected, drops = read(US_HISTORY, checkout)
    assert expected["ch01/m3/choice-1"].domain == "history"
    for path in (archive, archive.parent):
        records, dropped = read(US_HISTORY, path)
        assert list(records.items()) == list(expected.items())
        assert dropped.counts == drops.counts


def test_a_page_that_is_not_text_is_left_out_and_the_rest_read(checkout):
    (checkout / "contents" / "m4.md").write_bytes(b"\xff\xfe\x00")
    records, drops = read(BIOLOGY, checkout)
    assert any("/m3/" in item for item in records)
    assert [drop.where for drop in drops.log if "UTF-8" in drop.reason] == [f"{checkout}/contents/m4.md"]


def test_what_is_no_book(tmp_path):
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(gzip.compress(b"x" * 2000)[:15])
    (tmp_path / "bare").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("Not a book.")
    for path, says in (
        (damaged, "damaged archive"),
        (tmp_path / "absent", "no such"),
        (tmp_path / "bare", r"no \.md file here"),
        (tmp_path / "other", r"no contents/\*\.md here"),
    ):
        with pytest.raises(UserError, match=says):
            read(BIOLOGY, path)


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ('**membrane**{: data-type="term"} of *E. coli*', "membrane of E. coli"),
        ("<em>E. coli </em>bacteria &amp; H<sub>2</sub>O", "E. coli bacteria & H2O"),
        ('see [a page][1] or [b](http://x.org){: target="_window"}', "see a page or b"),
        (
            "<sup>15</sup>N, Ca<sup>2+</sup>, 10<sup>-6</sup>, *p*<sup>2</sup> + q<sup>2</sup>",
            "15N, Ca2+, 10^-6, p^2 + q^2",
        ),
        ("1s<sup>2</sup>2s<sup>2</sup>", "1s^2 2s^2"),
        ("(8*2 + 4)/48 = .42; q = (12*2 + 4)", "(8*2 + 4)/48 = .42; q = (12*2 + 4)"),
        ("5\\'-3\\' and \\*this\\*", "5'-3' and *this*"),
        ("has\\_\\_\\_\\_\\_\\_ the number, are \\_\\_\\_.", "has ____ the number, are ____."),
        (
            '<math><mtext> CO</mtext><mn>2</mn><mo stretchy="false">→</mo><mtext>G3P</mtext></math>',
            "CO2 → G3P",
        ),
        ('one<span data-type="newline"><br /></span>two([\\[link\\]](#fig))', "one two()"),
    ],
)
def test_plain_text(markup, plain):
    assert plain_text(markup) == plain


def test_paragraphs_are_the_running_text_of_a_page():
    page = (
        "---\ntitle: x\n---\n\n### Heading\n\n"
        'One **cell**{: data-type="term"} is shown ([\\[link\\]](#f)).\n\n'
        ' ![Alt text.](a.jpg)\n\n* item\n1.  item\n\n<div data-type="note">\nA note.\n<div>\nInner.\n</div>\n'
        "Still the note.\n</div>\n\n**Two** are in [\\[link\\]](/m1#f).\n\n| a | table |\n"
    )
    assert paragraphs(page) == ["One cell is shown.", "Two are in ~."]
    assert marked_terms(page) == ["cell"]


# --- CNXML -----------------------------------------------------------------------------------------

COLLECTION = """<col:collection xmlns:col="http://cnx.rice.edu/collxml"><col:content>
<col:module document="m1"/>
<col:subcollection><col:content>
 <col:subcollection><col:content><col:module document="m2"/></col:content></col:subcollection>
 <col:subcollection><col:content><col:module document="m3"/></col:content></col:subcollection>
</col:content></col:subcollection></col:content></col:collection>"""
MODULE = """<document xmlns="http://cnx.rice.edu/cnxml"><title>T</title><content>
<section class="learning-objectives"><para>In 1066, England lost its king to William.</para></section>
{content}
<figure><caption>In 1492, Columbus reached an island that he named San Salvador.</caption></figure>
<note><para>In 1493, Columbus came back to Spain with gold from Hispaniola.</para></note>
<section class="review-questions">
<exercise><problem><para><link url="#e1"/></para></problem></exercise></section>
</content><glossary>{glossary}</glossary></document>"""
TEXT = (
    "<para>In 1453, the <term>Ottomans</term> of Mehmed II took the city of "
    "<emphasis>Constantinople</emphasis> "
    'after a siege (<link target-id="f1"/>).<footnote>A note.</footnote></para>'
    "<para>In 1526, the Ottomans of Suleiman defeated the king of Hungary, "
    'as <link target-id="f2"/> tells.</para>'
)
DEFINITION = "<definition><term>{}</term><meaning>{}</meaning></definition>"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    root = tmp_path / "world"
    for name, content, defined in (
        ("m1", TEXT, []),
        ("m2", TEXT, [("sultan", "ruler of a Muslim state"), ("hajj", "the pilgrimage to Mecca")]),
        ("m3", "", [("Sultan", "a ruler again"), ("sloop", "boat")]),
    ):
        (root / "modules" / name).mkdir(parents=True)
        entries = "".join(DEFINITION.format(*entry) for entry in defined)
        (root / "modules" / name / "index.cnxml").write_text(MODULE.format(content=content, glossary=entries))
    (root / "collections").mkdir()
    (root / "collections" / "volume-1.collection.xml").write_text(COLLECTION)
    return root


def test_world_history_asks_for_terms_and_years_of_its_running_text(world):
    records, drops = read(WORLD_HISTORY, world)
    assert set(records) == {
        *(f"v1-ch01/m2/{kind}-{name}" for kind in ("define", "name") for name in ("sultan", "hajj")),
        "v1-ch01/m2/year-1-1",
    }
    question, answer = text(records["v1-ch01/m2/year-1-1"])
    assert "In ____, the Ottomans of Mehmed II took the city of Constantinople after a siege." in question
    assert answer.endswith("1453")
    assert text(records["v1-ch01/m2/define-hajj"])[1] == "The pilgrimage to Mecca."
    assert {(r.domain, r.license) for r in records.values()} == {("history", "CC-BY-4.0")}
    assert drops.counts == {
        "exercise whose text and solution are not in the book's files": 3,
        "term defined before in the book": 1,
        "glossary entry without a definition": 1,
    }
    assert drops.log[0].where.startswith(str(world / "modules"))
    assert "later ones are under CC BY-NC-SA" in WORLD_HISTORY.where_to_get


def test_world_history_is_the_same_from_its_archive(world, tmp_path):
    with tarfile.open(tmp_path / "world.tar.gz", "w:gz") as tar:
        tar.add(world, arcname="osbooks-world-history")
    assert read(WORLD_HISTORY, tmp_path / "world.tar.gz")[0] == read(WORLD_HISTORY, world)[0]


def test_damaged_xml_and_xml_that_names_entities_is_left_out(world, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(
        "In 1789, the people of Paris stormed the Bastille, a fortress that held few prisoners."
    )
    evil = f'<!DOCTYPE document [<!ENTITY x SYSTEM "{secret.as_uri()}">]>' + MODULE.format(
        content="<para>&x;</para>", glossary=""
    )
    (world / "modules" / "m3" / "index.cnxml").write_text(evil)
    expected = read(WORLD_HISTORY, world)
    assert expected[1].counts["XML with a document type"] == 1
    assert not any("Bastille" in text(record)[0] for record in expected[0].values())
    (world / "modules" / "m2" / "index.cnxml").write_text("<document")
    records, drops = read(WORLD_HISTORY, world)
    assert not records
    assert next(d.where for d in drops.log if "well-formed" in d.reason).endswith("/m2/index.cnxml")
    shutil.rmtree(world / "modules")
    with pytest.raises(UserError, match="no modules"):
        read(WORLD_HISTORY, world)


# --- the books themselves --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def books(shared_data) -> dict[str, tuple[dict[str, Record], Drops]]:
    """Each book, read once."""
    return {s.name: read(s, shared_data / s.name) for s in (BIOLOGY, US_HISTORY, WORLD_HISTORY)}


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "kinds", "left_out"),
    [
        (
            "openstax_biology",
            {"choice": 677, "question": 435, "define": 2294, "name": 2270, "choose": 2270, "cloze": 1906},
            {FIGURE: 142, VARY: 1, BOOK: 2, AGAIN: 51, SHORT: 5, CROWDED: 772},
        ),
        (
            "openstax_us_history",
            {
                "choice": 280,
                "question": 138,
                "define": 406,
                "name": 406,
                "choose": 406,
                "cloze": 811,
                "year": 850,
            },
            {UNSOLVED: 165, AGAIN: 3, CROWDED: 24},
        ),
        (
            "openstax_world_history",
            {"define": 395, "name": 395, "choose": 395, "cloze": 1537, "year": 691},
            {NO_TEXT: 1158, AGAIN: 27, CROWDED: 1804},
        ),
    ],
)
def test_real_books(books, name, kinds, left_out):
    records, drops = books[name]
    per_section, letters = Counter(), Counter()
    for item, record in records.items():
        section, kind = item.rsplit("/", 1)[0], kind_of(item)
        question, answer = text(record)
        if kind in ("cloze", "year"):
            per_section[section, kind] += 1
            assert question.count("____") == 1
        if re.search(r"^D\. ", question, re.M) and kind != "choice":
            letters[answer[0]] += 1
            assert answer in question.split("\n")
        assert not re.search(r"\[\[|\{:|\\|<su[bp]|<em|&amp;|data-type|  |~", question + answer)
    assert Counter(map(kind_of, records)) == kinds
    assert drops.counts == left_out
    assert all(n <= (MOST_YEARS if kind == "year" else MOST_CLOZE) for (_, kind), n in per_section.items())
    expected = letters.total() / 4
    assert all(abs(letters[letter] - expected) < 4 * expected**0.5 for letter in "ABCD"), letters


def kind_of(item: str) -> str:
    return item.rsplit("/", 1)[1].split("-", 1)[0]


@pytest.mark.shared
def test_real_books_are_enough_for_two_domains(books):
    assert len(books["openstax_biology"][0]) >= 6500
    assert len(books["openstax_us_history"][0]) + len(books["openstax_world_history"][0]) >= 6500


@pytest.mark.shared
def test_a_real_definition_and_a_real_year(books):
    records, _ = books["openstax_world_history"]
    items = {item.rsplit("/", 1)[1]: text(record) for item, record in records.items()}
    assert items["define-hajj"][1] == "The Islamic pilgrimage to Mecca."
    asked = [text(record) for item, record in records.items() if "/year-" in item]
    assert any("Mehmed II conquered Constantinople" in q and a.endswith("1453") for q, a in asked)
