"""Repair of text, language, licences, and the reasons to leave a record out."""

from __future__ import annotations

import html
import re
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ray.data.quality import checks as quality
from qwen_ray.data.quality.checks import Limits, check, language, licences
from qwen_ray.data.quality.text_repair import repair
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import SHOWN, Drop, Found
from qwen_ray.errors import UserError
from tests.conftest import record

# --- repair ----------------------------------------------------------------------------------------

SOUND = [
    "Plain English, with “quotes” – and dashes… it’s fine.",
    "Ça a coûté 20 € à l’été; « où ? » Noël, œuvre, ÉTÉ… CAFÉ™",
    "Größe, Straße, „süß“, MÜẞ, Gruß“, und Ä“ am Ende",
    "“MAÇÔ, MAÇÃ”, IRMÃ—não, São Paulo, AMANHÃ…",
    "1.54 Å², 3 Å³ and 10 Å–12 Å; på Å; 37 °C ± 2 µm × 4 ≤ 5",
    "Ñandú, «Ñ», ¿qué? ¡Sí! ª º",
    "Łódź, żółw, Dvořák, Åse, Øst, Þór, Ðakovo, Šibenik",
    "Привет, как дела? «Ёлка» – № 5",
    "Ελληνικά: τί κάνεις;",
    "日本語のテキスト。「引用」、中文，한국어",
    "שלום עולם، مرحبا بالعالم می‌خواهم",
    "हिन्दी क्ष श्र‍ी ไทย မြန်မာ",
    "Việt Nam: tiếng Việt, được, ĐÃ",
    "👩‍👩‍👧 🏳️‍🌈 emoji ✓ → ∀x∈ℝ: x² ≥ 0",
    "In HTML write &lt; for < and &amp; for &.",
    "Escape the output: & becomes &amp; and ' becomes &#39;.",
    "&lt;",
    "if (a &amp;&amp; b) // in a template: `a &amp; b`",
    "R&D, AT&T; a&b;",
    "def f(x):\n\treturn x & 1  # & ok",
]
DAMAGED = {
    "cafÃ© crÃ¨me": "café crème",
    "It â€™ s itâ€™s â€œsoâ€\x9d": "It ’ s it’s “so”",
    "It\x92s \x93so\x94": "It’s “so”",
    "naÃƒÂ¯ve": "naïve",
    "ÃœberraschungsgrÃ¶ÃŸe": "Überraschungsgröße",
    "37Â\xa0Â°C": "37 °C",
    "zaÅ¼Ã³Å‚Ä‡": "zażółć",
    "ÐŸÑ€Ð¸Ð²ÐµÑ‚": "Привет",
    "æ—¥æœ¬èªž": "日本語",
    "ðŸ˜€ ok": "😀 ok",
    "x â‰¤ 5 â†’ y": "x ≤ 5 → y",
    "ï»¿Start": "Start",
    "\ufeffStart": "Start",
    "zero\u200bwidth soft\u00adhyphen join\u200der": "zerowidth softhyphen joiner",
    "a\r\nb\rc\u2028d": "a\nb\nc\nd",
    "nul\x00 bell\x07 \x1b[31mred\x1b[0m": "nul bell red",
    "10\u00a0000\u202fkm": "10 000 km",
    "e\u0301te\u0301": "été",
    "don&#39;t say &quot;no&quot; to AT&amp;T": 'don\'t say "no" to AT&T',
    "caf&eacute; &mdash; it&rsquo;s fine": "café — it’s fine",
}


@pytest.mark.parametrize("text", SOUND)
def test_sound_text_stays(text: str) -> None:
    assert repair(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(("damaged", "sound"), DAMAGED.items())
def test_damage_is_repaired(damaged: str, sound: str) -> None:
    assert repair(damaged) == sound


@pytest.mark.parametrize("text", [t for t in SOUND if any(ord(c) > 0xFF for c in t)])
def test_sound_text_read_as_windows_1252_comes_back(text: str) -> None:
    """As most software does: bytes that Windows-1252 has no character for become Latin-1's."""
    damaged = "".join(
        bytes([b]).decode("cp1252" if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else "latin-1")
        for b in text.encode()
    )
    assert damaged != text
    assert repair(damaged) == repair(text)


_SCRIPTS = [
    "abcdefghijklmnopqrstuvwxyzàâçéèêëîïôûùüÿœæ",
    "abcdefghijklmnopqrstuvwxyzäöüß",
    "abcdefghijklmnopqrstuvwxyzãõáéíóúâêôç",
    "abcdefghijklmnopqrstuvwxyząćęłńóśźżåäöøæčřšž",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "あいうえおかきくけこ日本語漢字中文",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "कखगघचछजझटठडढतथदधन",
    "กขคงจฉชซญฎฏฐ",
    "가나다라마바사아자차",
]
_OPEN, _CLOSE = ["", "", "“", "„", "«", "‘", "("], ["", "", "”", "“", "»", "’", ")", ",", ".", "…", " –", "?"]


@st.composite
def _sentences(draw: st.DrawFn) -> str:
    """Words of two or more letters of one script, as they are written, with punctuation around them."""
    letters = draw(st.sampled_from(_SCRIPTS))
    words = draw(st.lists(st.text(letters, min_size=2, max_size=9), min_size=1, max_size=8))
    cased = [draw(st.sampled_from([word, word.capitalize(), word.upper()])) for word in words]
    return " ".join(draw(st.sampled_from(_OPEN)) + w + draw(st.sampled_from(_CLOSE)) for w in cased)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_sentences())
def test_sentences_of_any_script_stay(text: str) -> None:
    assert repair(text) == text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text())
def test_any_text_is_repaired_to_composed_text_without_controls(text: str) -> None:
    result = repair(text)
    assert unicodedata.is_normalized("NFC", result)
    assert not [c for c in result if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not set("\ufeff\u200b\u00a0\r") & set(result)


def test_escaped_prose_that_quotes_markup_stays() -> None:
    page = "Use <b> & <i>."
    assert repair(html.escape(page)) == html.escape(page)  # nothing in it says that prose was escaped
    assert repair("don&#39;t write <br>") == "don&#39;t write <br>"


# --- language --------------------------------------------------------------------------------------

OTHER = {
    "fr": "La photosynthèse est le processus par lequel les plantes convertissent la lumière du soleil en "
    "énergie chimique, qui est ensuite stockée sous forme de sucres dans les feuilles.",
    "de": "Die Photosynthese ist der Vorgang, bei dem Pflanzen das Licht der Sonne in chemische Energie "
    "umwandeln, die dann in Form von Zucker in den Blättern gespeichert wird.",
    "es": "La fotosíntesis es el proceso por el cual las plantas convierten la luz del sol en energía "
    "química, que luego se almacena en forma de azúcares en las hojas.",
    "ru": "Фотосинтез — это процесс, при котором растения преобразуют солнечный свет в химическую энергию, "
    "которая затем запасается в листьях в виде сахаров.",
    "zh": "光合作用是植物利用太阳光将二氧化碳和水转化为糖类并释放氧气的过程。" * 4,
}
ENGLISH = [
    "Photosynthesis turns light into chemical energy, which is then stored in the leaves as sugar.",
    "Streptococcus pneumoniae, Escherichia coli, Drosophila melanogaster, Arabidopsis thaliana, Homo sapiens",
    "Benito Mussolini, Giuseppe Garibaldi, Camillo Benso di Cavour, Niccolò Machiavelli",
    "Mycobacterium tuberculosis, Plasmodium falciparum, Caenorhabditis elegans, Canis lupus",
    "Leonardo da Vinci, Michelangelo Buonarroti, Raffaello Sanzio, Sandro Botticelli, Donatello",
    "Tokugawa Ieyasu, Oda Nobunaga, Toyotomi Hideyoshi, Minamoto no Yoritomo, Ashikaga Takauji,",
    "SELECT name, address FROM customers WHERE id = 1 UNION SELECT username, password FROM users LIMIT 10;",
    "```python\nfor element in itertools.chain.from_iterable(zip(alpha, beta)):\n    print(element)\n```",
    "$\\int_0^\\infty e^{-x^2} dx = \\frac{\\sqrt{\\pi}}{2}$ and $\\nabla \\times E = -\\partial_t B$",
    "14 July 1789; 4 July 1776; 9 November 1989; 28 June 1914; 11 November 1918; 1 September 1939",
    "What does “Liberté, égalité, fraternité” mean, and who first said it in a speech to the National Guard?",
    "Quel?",
    "",
    "12345 67890",
]


@pytest.mark.parametrize("code", OTHER)
def test_long_text_in_another_language_is_told(code: str) -> None:
    assert language.is_other(OTHER[code], "en") == code == language.detect(OTHER[code])[0]
    assert language.is_other(OTHER[code], code) is None


@pytest.mark.parametrize("text", ENGLISH)
def test_english_names_code_formulas_and_dates_are_not_refused(text: str) -> None:
    assert language.is_other(text, "en") is None


def test_english_is_another_language_too() -> None:
    text = "This is the answer that was written for the people of England. " * 2
    assert language.is_other(text, "fr") == "en"
    with pytest.raises(UserError, match="unknown language 'xx'"):
        language.is_other(OTHER["fr"], "xx")


# --- licences --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["CC-BY-NC-4.0", "cc by-nc-sa 3.0", "CC-BY-ND-4.0", "cc_by_nc_nd", "MIT AND CC-BY-NC-4.0", "Proprietary",
     "CC BY-NonCommercial 4.0", "all rights reserved", "CC-BY-NC"],
)  # fmt: skip
def test_restricted_licences_are_refused_by_default(name: str) -> None:
    assert not licences.is_allowed(name)
    assert licences.is_allowed(name, ["*"])
    assert not licences.is_allowed(name, ["CC*", "MIT*", "prop*ry-but-not-this", "all*"])


@pytest.mark.parametrize(
    "name",
    ["CC0-1.0", "CC-BY-SA-4.0", "MIT", "Apache-2.0", "NCSA", "unknown", "MIT AND BSD", "MITRE terms", ""],
)
def test_other_licences_are_allowed_by_default(name: str) -> None:
    assert licences.is_allowed(name)


def test_patterns_say_what_is_allowed() -> None:
    assert licences.is_allowed("CC-BY-4.0", ["cc-by-*"])
    assert licences.is_allowed("CC BY 4.0", ["CC-BY-[0-9]*"])
    assert not licences.is_allowed("MIT", ["cc-by-*"])
    assert not licences.is_allowed("unknown", ["CC*", "MIT"])
    assert licences.is_allowed("CC-BY-NC-4.0", ["CC-BY-NC-*"])
    assert not licences.is_allowed("CC-BY-NC-4.0", ["CC-BY-*"])


# --- the check -------------------------------------------------------------------------------------

QUESTION = "Which organelle makes most of a cell's energy?"
CHOICES = f"{QUESTION}\nA. Nucleus\nB. Mitochondrion\nC. Golgi apparatus\nD. E. coli"


def turns(*messages: tuple[str, str], license: str = "CC0-1.0", domain: str = "general") -> Record:
    return Record("id", tuple(Message(*m) for m in messages), domain, "test", license)


def result(one: Record, **limits: object) -> str | Record:
    """The reason, or the record as it is kept."""
    checked = check(Found(one, "data.jsonl:7"), Limits(**limits), "general")  # type: ignore[arg-type]
    assert checked.where == "data.jsonl:7"
    return checked.reason if isinstance(checked, Drop) else checked.record


FAULTY = {
    quality.OTHER_DOMAIN: turns(("user", QUESTION), ("assistant", "Mitochondria."), domain="history"),
    quality.LICENCE: turns(("user", QUESTION), ("assistant", "Mitochondria."), license="CC-BY-NC-4.0"),
    "more than 20000 characters": record(QUESTION, "word " * 5000),
    "more than 50 turns": turns(*[("user", QUESTION), ("assistant", "Mitochondria.")] * 26),
    quality.ROLES: turns(("assistant", "Mitochondria."), ("user", QUESTION)),
    quality.EMPTY: record(QUESTION, " \u200b\n"),
    quality.UNREADABLE: record(QUESTION, "The mitochondri\ufffdn makes it."),
    "question of fewer than 8 characters": record("Why?", "Because of evolution."),
    "answer of fewer than 2 characters": record(QUESTION, "x"),
    quality.PLACEHOLDER: record("Who are you, please?", "I am {{name}}, by {{ author }}."),
    quality.REPEATS: record(QUESTION, f" {QUESTION.upper().rstrip('?')}. "),
    quality.NOT_LISTED: record(CHOICES, "B. Ribosome"),
    "in another language than 'en'": record("Qu'est-ce que la photosynthèse ?", OTHER["fr"]),
}


@pytest.mark.parametrize("reason", FAULTY)
def test_every_fault_has_its_reason(reason: str) -> None:
    assert result(FAULTY[reason]) == reason


def test_a_drop_is_shown_in_a_line_with_its_place() -> None:
    dropped = check(Found(record(QUESTION, "y" * 30_000, id="book/7"), "f.jsonl:3"), Limits(), "general")
    assert isinstance(dropped, Drop)
    assert dropped.where == "f.jsonl:3"
    assert dropped.shown.startswith(f"30046 characters: book/7: {QUESTION}")
    assert len(dropped.shown) <= SHOWN


@pytest.mark.parametrize(
    "one",
    [
        record("What is 2 + 2?", "4"),
        record(CHOICES, "B"),
        record(CHOICES, "(b) Mitochondrion".replace("b", "B")),
        record(CHOICES, "B. Mitochondrion"),
        record(CHOICES, "mitochondrion."),
        record(CHOICES, "E. coli"),
        record(CHOICES, "The answer is B, as it makes ATP."),
        record(CHOICES, "B. Mitochondrion\nIt makes ATP by oxidative phosphorylation."),
        record(CHOICES, "That would be the mitochondrion."),
        record("Summarise: what is said of plans A. and B. below?", "Nothing is said."),
        record("What is the templating placeholder of Jinja?", "Write `{{ name }}` in the text."),
        turns(
            ("system", "Be brief."),
            ("user", QUESTION),
            ("assistant", "Mitochondria."),
            ("user", "Thank you!"),
        ),
    ],
)
def test_sound_records_stay_as_they_are(one: Record) -> None:
    assert result(one) is one


# Some are none of the choices, some only hold the place of an answer that was never written.
NO_ANSWERS = ["E", "B. Nucleus", "F. Mitochondrion", "Ribosome", "tbd", "N/A", "...", "[Insert answer here]"]


@pytest.mark.parametrize("answer", [*NO_ANSWERS, "to" + "do"])
def test_answers_that_are_none(answer: str) -> None:
    assert result(record(CHOICES, answer)) in (quality.NOT_LISTED, quality.PLACEHOLDER)


@pytest.mark.parametrize(
    "roles",
    ["user user assistant", "user assistant assistant", "assistant user assistant", "system assistant",
     "user system assistant", "user", "system", ""],
)  # fmt: skip
def test_role_order(roles: str) -> None:
    assert (
        result(turns(*[(role, f"{QUESTION} {i}") for i, role in enumerate(roles.split())])) == quality.ROLES
    )


def test_an_empty_turn_in_the_middle_is_found() -> None:
    talk = [
        ("user", QUESTION),
        ("assistant", " "),
        ("user", "Sure? Say it again."),
        ("assistant", "Yes, it is."),
    ]
    assert result(turns(*talk)) == quality.EMPTY


def test_text_is_repaired_before_it_is_judged() -> None:
    kept = result(record("Quâ€™est-ce quâ€™un Ã©tÃ© chaud?\r\n", "Sum\x00mer"))
    assert isinstance(kept, Record)
    assert [m.content for m in kept.messages] == ["Qu’est-ce qu’un été chaud?\n", "Summer"]


def test_binary_and_surrogates_are_unreadable() -> None:
    assert result(record(QUESTION, "PNG\r\n\x1a\x00\x00\x00\x0dIHDR\x01\x02\x03")) == quality.UNREADABLE
    surrogate = check(Found(record(QUESTION, "x" * 9000 + "\ud800"), "f:1"), Limits(), "general")
    assert isinstance(surrogate, Drop)
    assert surrogate.reason == quality.UNREADABLE
    surrogate.shown.encode()
    assert isinstance(
        result(record(QUESTION, "One \ufffd in very many characters. " + "Yes. " * 300)), Record
    )


def test_limits_are_settings() -> None:
    assert isinstance(result(record("Why?", "Yes."), min_question=2), Record)
    assert result(record(QUESTION, "Yes."), min_answer=5) == "answer of fewer than 5 characters"
    assert result(record(QUESTION, "Mitochondria."), max_characters=20) == "more than 20 characters"
    assert isinstance(result(record("Qu'est-ce que c'est ?", OTHER["fr"]), language=None), Record)
    assert isinstance(result(record("Qu'est-ce que c'est ?", OTHER["fr"]), language="fr"), Record)
    assert result(record(QUESTION, "Mitochondria."), licenses=("MIT",)) == quality.LICENCE


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=4), st.text()
)
def test_any_record_is_kept_or_dropped_for_one_reason(messages: list[tuple[str, str]], license: str) -> None:
    one = turns(*messages, license=license)
    first = check(Found(one, "x"), Limits(), "general")
    assert first == check(Found(one, "x"), Limits(), "general")
    if isinstance(first, Found):
        for m in first.record.messages:
            m.content.encode()
    else:
        first.shown.encode()


@pytest.mark.shared
def test_real_records(shared_data: Path) -> None:
    """GSM8K is clean; two entries of the KEV catalogue lost characters before it was published."""
    from qwen_ray.data.sources import get_source

    refused = []
    for name in ("gsm8k", "cisa_kev"):
        for found in islice(get_source(name).find(shared_data / name, domain="general"), 3000):
            if isinstance(checked := check(found, Limits(), "general"), Drop):
                refused.append(checked)
    assert {drop.reason for drop in refused} == {quality.UNREADABLE}
    assert {cve for drop in refused for cve in re.findall(r"CVE-\d+-\d+", drop.shown)} == {
        "CVE-2021-41773",
        "CVE-2020-4428",
    }
