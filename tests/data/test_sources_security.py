"""The security sources: small files of each layout, damaged ones, and the counts of the real data."""

import gzip
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_ray.data.sources import (
    archive,
    cisa_kev,
    ctf_writeups,
    mitre_attack,
    mitre_capec,
    mitre_cwe,
    osv,
    owasp_cheatsheets,
    pypa_advisories,
    rustsec_advisories,
    stix,
)
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.cwe_text import passage
from qwen_ray.data.sources.entries import leans, whole_sentences
from qwen_ray.data.sources.markdown import plain_text, sections
from qwen_ray.data.sources.weakness_kinds import kind_question
from qwen_ray.errors import UserError

ALL = (
    mitre_attack,
    mitre_capec,
    mitre_cwe,
    cisa_kev,
    pypa_advisories,
    rustsec_advisories,
    owasp_cheatsheets,
    ctf_writeups,
)
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "knoll")


def asked(found: list[Found]) -> dict[str, str]:
    return {f.record.messages[0].content: f.record.messages[1].content for f in found}


def archived(path: Path, files: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            data = text if isinstance(text, bytes) else text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def written(path: Path, value: Any) -> Path:
    data = json.dumps(value).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- ATT&CK ----------------------------------------------------------------------------------------


def technique(number: str, name: str, text: str, *phases: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "attack-pattern",
        "id": f"attack-pattern--{number}",
        "name": name,
        "description": text,
        "external_references": [{"source_name": "mitre-attack", "external_id": number}],
        "kill_chain_phases": [{"kill_chain_name": "mitre-attack", "phase_name": phase} for phase in phases],
        "x_mitre_platforms": ["macOS", "Linux"],
        **more,
    }


def tactic(number: str, name: str) -> dict[str, Any]:
    return {
        "type": "x-mitre-tactic",
        "id": f"x-mitre-tactic--{number}",
        "name": name,
        "description": f"The adversary wants {name}.\n\n{name} consists of steps towards it.",
        "external_references": [{"source_name": "mitre-attack", "external_id": number}],
        "x_mitre_shortname": name.lower().replace(" ", "-"),
    }


@pytest.fixture
def attack(tmp_path: Path) -> Path:
    others = [
        technique(
            f"T20{i:02}",
            f"Other {word}",
            f"Adversaries may take the {word} road to a host.",
            "lateral-movement",
        )
        for i, word in enumerate(WORDS)
    ]
    text = (
        "Adversaries may use [Door Knobs](https://example.org/T1) to enter.(Citation: Somebody 2020) "
        "Door knobs are found on <code>doors</code> of most houses and other buildings.\n\n"
        "The knob is turned by hand. It then opens the door and the adversary walks right in "
        "(Citation: Somebody 2020)."
    )
    objects = [
        *(
            tactic(f"TA{i}", name)
            for i, name in enumerate(["Lateral Movement", "Initial Access", "Impact", "Execution"])
        ),
        tactic("TA9", "Collection"),
        technique("T1000", "Door Knobs", text, "lateral-movement", "initial-access"),
        technique(
            "T1000.001",
            "Round Knobs",
            "Adversaries may turn round knobs, which are smooth.",
            "initial-access",
        ),
        technique("T1001", "Gone", "It was here.", "impact", revoked=True),
        technique("T1002", "Old", "It was here.", "impact", x_mitre_deprecated=True),
        technique("T1003", "Nowhere", "It serves no tactic at all."),
        technique("T1004", "Mute", "", "impact"),
        *others,
        {
            "type": "course-of-action",
            "id": "course-of-action--1",
            "name": "Locks",
            "description": "Lock the doors. This mitigation can be implemented through these measures:\n\n"
            "Doors:\n\n- Fit a lock to every door that leads outside, and keep the key in a safe place.",
            "external_references": [{"source_name": "mitre-attack", "external_id": "M1000"}],
        },
        {
            "type": "relationship",
            "relationship_type": "mitigates",
            "source_ref": "course-of-action--1",
            "target_ref": "attack-pattern--T1000",
            "description": "A lock holds the knob.(Citation: X)",
        },
    ]
    return written(tmp_path / "enterprise-attack.json.gz", {"type": "bundle", "objects": objects})


def test_attack_asks_for_definition_tactics_platforms_and_mitigations(attack: Path) -> None:
    drops = Drops()
    found = list(mitre_attack.SOURCE.find(attack.parent, drops=drops))
    knobs = asked([f for f in found if "/T1000/" in f.record.id])
    definition = (
        "Adversaries may use Door Knobs to enter. "
        "Door knobs are found on `doors` of most houses and other buildings."
    )
    by_answer = {answer: question for question, answer in knobs.items()}
    assert "“Door Knobs”" in by_answer[definition]
    assert "____" in by_answer["Door Knobs"]
    assert "Lateral Movement and Initial Access" in knobs.values()
    assert "Linux and macOS" in knobs.values()
    assert "Round Knobs" in knobs.values()
    assert "- Locks: A lock holds the knob." in knobs.values()
    details = "The knob is turned by hand. It then opens the door and the adversary walks right in."
    assert details in knobs.values()
    round_knobs = asked([f for f in found if "/T1000.001/" in f.record.id])
    assert any("Door Knobs sub-technique" in question for question in round_knobs)
    assert "Door Knobs (T1000)" in round_knobs.values()
    locks = asked([f for f in found if "/mitigations/M1000/" in f.record.id])
    assert "Lock the doors." in locks.values()
    assert any("Fit a lock to every door" in answer for answer in locks.values())
    choice = next(q for q in knobs if "\nD. " in q and "describes" in q)
    assert "Round" not in choice  # a sub-technique is no wrong answer for its parent
    assert found[0].where == f"{attack}:T1000"
    assert all(f.record.id.startswith("mitre_attack/") and f.record.license for f in found)
    assert drops.counts == {
        stix.REVOKED: 1,
        stix.DEPRECATED: 1,
        mitre_attack.NO_TACTIC: 1,
        stix.INCOMPLETE: 1,
    }
    assert {drop.where for drop in drops.log} == {f"{attack}:T100{i}" for i in (1, 2, 3, 4)}


def test_right_choices_stand_at_every_letter(tmp_path: Path) -> None:
    """The draw of the wrong choices and the order of all four must not go by the same number."""
    many = [
        technique(f"T{i}", f"Way {i} of {word}", f"Way {i} of {word} is taken.", "impact")
        for i in range(1000, 1100)
        for word in WORDS[:1]
    ]
    names = ["Impact", "Execution", "Collection", "Discovery", "Exfiltration", "Persistence"]
    tactics = [tactic(f"TA{i}", name) for i, name in enumerate(names)]
    file = written(tmp_path / "enterprise-attack.json", {"objects": [*tactics, *many]})
    answers = [f.record.messages[1].content for f in mitre_attack.SOURCE.find(file)]
    letters = Counter(answer[0] for answer in answers if re.match(r"[A-D]\. Impact$", answer))
    assert sum(letters.values()) == 100
    assert all(letters[letter] >= 12 for letter in "ABCD"), letters


# --- CAPEC -----------------------------------------------------------------------------------------


def test_capec_asks_for_severity_prerequisites_and_mitigations(tmp_path: Path) -> None:
    def pattern(number: int, name: str, text: str, **more: Any) -> dict[str, Any]:
        return {
            "type": "attack-pattern",
            "id": f"attack-pattern--{number}",
            "name": name,
            "description": text,
            "external_references": [{"source_name": "capec", "external_id": f"CAPEC-{number}"}],
            "x_capec_domains": ["Physical Security"],
            **more,
        }

    pick = pattern(
        1,
        "Lock Picking",
        "An attacker opens the lock with a pick.",
        x_capec_typical_severity="High",
        x_capec_likelihood_of_attack="Low",
        x_capec_prerequisites=["<xhtml:p>The lock has pins.</xhtml:p>", "There is time."],
        x_capec_parent_of_refs=["attack-pattern--2"],
    )
    child = pattern(
        2, "Bump Key", "An attacker strikes a bump key.", x_capec_child_of_refs=["attack-pattern--1"]
    )
    old = pattern(3, "Old", "It was here.", x_capec_status="Deprecated")
    rest = [
        pattern(10 + i, f"Trick {word}", f"An attacker employs {word} to get in.")
        for i, word in enumerate(WORDS)
    ]
    measure = {"type": "course-of-action", "name": "coa-1-0", "description": "Use a lock without pins."}
    objects = [pick, child, old, *rest, measure]
    file = written(tmp_path / "stix-capec.json", {"objects": objects})
    drops = Drops()
    found = list(mitre_capec.SOURCE.find(file, drops=drops))
    answers = [f.record.messages[1].content for f in found if "/CAPEC-1/" in f.record.id]
    assert {"High.", "Low.", "- The lock has pins.\n- There is time.", "Use a lock without pins."} <= set(
        answers
    )
    choices = [
        f.record.messages[0].content
        for f in found
        if "/CAPEC-1/" in f.record.id and "\nD. " in f.record.messages[0].content
    ]
    assert len(choices) == 2
    assert not any("bump key" in choice.casefold() for choice in choices)
    assert found[0].record.id == "mitre_capec/physical-security/CAPEC-1/1"
    assert drops.counts == {stix.DEPRECATED: 1}


# --- CWE -------------------------------------------------------------------------------------------


def weakness(number: int, name: str, text: str, parent: int = 0, **more: Any) -> dict[str, Any]:
    relation = {
        "attr": {"@_Nature": "ChildOf", "@_CWE_ID": str(parent), "@_View_ID": "1000", "@_Ordinal": "Primary"}
    }
    return {
        "attr": {"@_ID": str(number), "@_Name": name, "@_Abstraction": "Base", "@_Status": "Stable"},
        "Description": text,
        **({"Related_Weaknesses": {"Related_Weakness": relation}} if parent else {}),
        **more,
    }


def test_cwe_asks_for_consequences_mitigations_detection_and_parents(tmp_path: Path) -> None:
    wall = weakness(
        2,
        "Missing Wall",
        "The product has no wall where one belongs.",
        1,
        Common_Consequences={
            "Consequence": [
                {
                    "Scope": ["Integrity", "Availability"],
                    "Impact": "DoS: Crash, Exit, or Restart",
                    "Note": "It falls.",
                },
                {"Scope": "Other", "Impact": "Other"},
            ]
        },
        Potential_Mitigations={
            "Mitigation": {"Phase": "Implementation", "Description": "Build the wall. [REF-1]"}
        },
        Detection_Methods={
            "Detection_Method": {"Method": "Manual Review", "Description": "Look for the wall."}
        },
        Likelihood_Of_Exploit="High",
        Extended_Description={
            "xhtml:p": [
                "Walls keep out what does not belong inside a house, at any hour of the day or the night."
            ]
        },
        Alternate_Terms={"Alternate_Term": {"Term": "Gap", "Description": "Short."}},
        Observed_Examples={
            "Observed_Example": [
                {
                    "Reference": "CVE-2020-1",
                    "Description": "Castle has no northern wall, so that anybody can walk in.",
                },
                {
                    "Reference": "CVE-2020-2",
                    "Description": "Chain: a missing wall (CWE-2) leads to a missing roof (CWE-3).",
                },
            ]
        },
    )
    raw: dict[str, Any] = {
        "1": weakness(1, "Bad House", "The product is built badly."),
        "2": wall,
        "3": weakness(3, "Missing Roof", "The product has no roof.", 1),
        "4": {"attr": {"@_ID": "4", "@_Name": "Houses", "@_Status": "Stable"}, "Description": "A category."},
        "5": {
            **weakness(5, "DEPRECATED: Gone", "Gone."),
            "attr": {"@_Name": "DEPRECATED: Gone", "@_Abstraction": "Base"},
        },
        "6": "no object",
    }
    for i, word in enumerate(WORDS):
        raw[str(10 + i)] = weakness(10 + i, f"Weak {word.title()}", f"The product relies on {word}.")
    drops = Drops()
    file = written(tmp_path / "cwe-dictionary.json.gz", raw)
    found = list(mitre_cwe.SOURCE.find(file, drops=drops))
    of_wall = [f for f in found if "/CWE-2/" in f.record.id]
    pairs = asked(of_wall)
    assert {
        "The product has no wall where one belongs.",
        "Missing Wall",
        "- Integrity and Availability: DoS: Crash, Exit, or Restart. It falls.",
        "Build the wall.",
        "Manual Review: Look for the wall.",
        "High.",
        "Bad House (CWE-1)",
        "Walls keep out what does not belong inside a house, at any hour of the day or the night.",
    } <= set(pairs.values())
    assert pairs["Which weakness is also called “Gap”?"] == "Missing Wall (CWE-2)"
    assert any("in the phase Implementation" in question for question in pairs)
    examples = [question for question in pairs if "Castle" in question]
    assert len(examples) == 1
    assert "CVE-2020-1" in examples[0]
    assert not any("CVE-2020-2" in question for question in pairs)
    # Its parent describes it as well, so it is no wrong answer.
    assert not any("Bad House" in question for question in pairs if "\nD. " in question)
    assert of_wall[0].record.id == "mitre_cwe/bad-house/CWE-2/1"
    assert {drop.where.rsplit(":", 1)[1]: drop.reason for drop in drops.log} == {
        "CWE-4": "a category or view, not a weakness",
        "CWE-5": "deprecated by its publisher",
        "CWE-6": "no name or description",
    }


def test_a_text_that_stands_with_many_weaknesses_is_given_three_times(tmp_path: Path) -> None:
    advice = {"Mitigation": {"Phase": "Operation", "Description": "Have it looked at by a professional."}}
    raw = {
        str(i): weakness(i, f"Weak {w}", f"Relies on {w}.", Potential_Mitigations=advice)
        for i, w in enumerate(WORDS)
    }
    drops = Drops()
    found = list(mitre_cwe.SOURCE.find(written(tmp_path / "cwe-dictionary.json", raw), drops=drops))
    assert sum("professional" in f.record.messages[1].content for f in found) == 3
    assert drops.counts == {mitre_cwe.BOILERPLATE: len(WORDS) - 3}


def test_a_ring_of_parents_ends(tmp_path: Path) -> None:
    raw = {"1": weakness(1, "Egg", "Comes from a hen.", 2), "2": weakness(2, "Hen", "Comes from an egg.", 1)}
    assert list(mitre_cwe.SOURCE.find(written(tmp_path / "cwe-dictionary.json", raw)))


def test_lists_of_the_dictionary_follow_what_announces_them() -> None:
    one = {"xhtml:p": ["There are two:", "That is all."], "xhtml:ul": {"xhtml:li": ["a\n  b", "c"]}}
    assert passage(one) == "There are two:\n- a b\n- c\n\nThat is all."
    two = {**one, "xhtml:ol": {"xhtml:li": "d"}}
    assert passage(two) == "That is all." or passage(two) == ""  # which list belongs where is not known
    assert (
        passage(
            {
                "xhtml:p": ["First.", "There are two:"],
                "xhtml:ul": {"xhtml:li": {"#text": "x", "xhtml:b": "y"}},
            }
        )
        == "First."
    )


# --- CISA KEV --------------------------------------------------------------------------------------


def test_kev_asks_twice_at_most(tmp_path: Path) -> None:
    def row(cve: str, product: str, text: str, action: str = "Apply updates.") -> dict[str, str]:
        return {
            "cveID": cve,
            "vendorProject": "Acme",
            "product": product,
            "vulnerabilityName": f"Acme {product}",
            "shortDescription": text,
            "requiredAction": action,
            "dateAdded": "2020-01-01",
        }

    rows = [
        row("CVE-1-1", "Anvil", "Acme Anvil contains a SQL injection vulnerability in its login page."),
        row("CVE-1-2", "Acme Rocket", "Acme Rocket flies off without being told to."),
        row(
            "CVE-1-3",
            "Magnet",
            "Acme Magnet attracts.",
            "The product is end-of-life and should be disconnected.",
        ),
        row("CVE-1-4", "Multiple Products", "Acme products explode."),
        row("", "Anvil", "It falls."),
    ]
    drops = Drops()
    file = written(tmp_path / "known_exploited_vulnerabilities.json", {"vulnerabilities": rows})
    found = list(cisa_kev.SOURCE.find(tmp_path, drops=drops))
    pairs = {
        cve: asked([f for f in found if f"/{cve}/" in f.record.id])
        for cve in ("CVE-1-1", "CVE-1-2", "CVE-1-3", "CVE-1-4")
    }
    assert [len(pairs[cve]) for cve in pairs] == [2, 2, 2, 1]
    kind = next(question for question in pairs["CVE-1-1"] if "\nD. " in question)
    assert "____" in kind
    assert "sql" not in kind.split("\n")[0].casefold()
    assert pairs["CVE-1-1"][kind].endswith(". SQL injection")
    assert "Acme Rocket" in pairs["CVE-1-2"].values()
    assert any("disconnected" in answer for answer in pairs["CVE-1-3"].values())
    assert not any("2020-01-01" in f.record.messages[1].content for f in found)
    assert [drop.where for drop in drops.log] == [f"{file}:vulnerability 5"]


def test_no_wrong_choice_of_a_kind_is_of_its_family() -> None:
    for i in range(40):
        pair = kind_question(
            "CVE", "An out-of-bounds write in the parser of long and winding names.", key=str(i)
        )
        assert pair is not None
        assert not re.search(
            r"free|confusion|overflow$|read", pair[0].split("\n", 1)[1].replace("Integer overflow", ""), re.M
        )
    assert (
        kind_question("CVE", "A use after free or a double free can happen in this long function.", key="")
        is None
    )


# --- advisories ------------------------------------------------------------------------------------


def pypa(number: str, package: str, text: str, **more: Any) -> str:
    events = [{"introduced": "0"}, {"fixed": "1.2.3"}]
    affected = {
        "package": {"name": package, "ecosystem": "PyPI"},
        "ranges": [
            {"type": "GIT", "events": [{"fixed": "ca2f2c4e"}]},
            {"type": "ECOSYSTEM", "events": events},
        ],
    }
    row = {
        "id": number,
        "details": text,
        "affected": [affected],
        "aliases": ["GHSA-x", f"CVE-{number[6:]}"],
        **more,
    }
    return yaml.safe_dump(row)


def test_pypa_asks_for_the_flaw_and_its_fix(tmp_path: Path) -> None:
    text = (
        "### Impact\nThe parser of [names](https://x.org) in foo (https://y.org/a) reads too far.\n"
        "### References\nNone."
    )
    files = {
        "vulns/foo-cpu/PYSEC-1-0.yaml": pypa("PYSEC-1-0", "foo-cpu", text),
        "vulns/foo/PYSEC-1-1.yaml": pypa("PYSEC-1-1", "foo", text),
        "vulns/foo/PYSEC-1-2.yaml": pypa(
            "PYSEC-1-2", "foo", "Withdrawn text of an advisory that is no more.", withdrawn="x"
        ),
        "vulns/foo/PYSEC-1-3.yaml": pypa(
            "PYSEC-1-3", "foo", "** REJECT ** This number was never used for any flaw."
        ),
        "vulns/foo/PYSEC-1-4.yaml": "id: [unclosed",
        "vulns/foo/PYSEC-1-5.yaml": b"\xff\xfe",
        "LICENSE": "CC-BY",
    }
    drops = Drops()
    path = archived(tmp_path / "db.tar.gz", files)
    found = list(pypa_advisories.SOURCE.find(tmp_path, drops=drops))
    assert [f.record.messages[1].content for f in found] == [
        "The parser of names in foo reads too far.",
        "foo 1.2.3",
    ]
    assert all(
        "“foo”" in f.record.messages[0].content and "CVE-1-1" in f.record.messages[0].content for f in found
    )
    assert [f.record.id for f in found] == [f"pypa_advisories/foo/PYSEC-1-1/{n}" for n in (1, 2)]
    assert found[0].where == f"{path}:vulns/foo/PYSEC-1-1.yaml"
    reasons = {drop.where.rsplit("-", 1)[1]: drop.reason for drop in drops.log}
    assert reasons == {
        "0.yaml": osv.SAME,
        "2.yaml": osv.WITHDRAWN,
        "3.yaml": osv.REJECTED,
        "4.yaml": osv.MALFORMED,
        "5.yaml": archive.NOT_TEXT,
    }


def test_rustsec_keeps_the_licence_of_each_advisory(tmp_path: Path) -> None:
    def advisory(number: int, more: str, body: str) -> str:
        head = f'[advisory]\nid = "RUSTSEC-{number}"\npackage = "bar"\ndate = "2020-01-01"\n{more}\n'
        return f'```toml\n{head}[versions]\npatched = [">= 0.3.16", "^0.2.9"]\n```\n\n{body}'

    body = (
        "# `bar` trusts [the layout][a]\n\nThe crate casts\none into the other.\n\n"
        "[a]: https://x.org\n\n## Credit\n\nSomebody."
    )
    files = {
        "crates/bar/RUSTSEC-1.md": advisory(1, 'license = "CC-BY-4.0"', body),
        "crates/bar/RUSTSEC-2.md": advisory(
            2, 'informational = "unmaintained"', "# No longer kept\n\nUse `baz` instead of it."
        ),
        "crates/bar/RUSTSEC-3.md": advisory(3, 'withdrawn = "2021-01-01"', body),
        "crates/bar/RUSTSEC-4.md": "```toml\n[broken\n```\n# T\n",
        "LICENSES/CC0-1.0.md": "none",
    }
    archived(tmp_path / "db.tar.gz", files)
    drops = Drops()
    found = list(rustsec_advisories.SOURCE.find(tmp_path, drops=drops))
    assert [(f.record.license, f.record.messages[1].content) for f in found] == [
        ("CC-BY-4.0", "`bar` trusts the layout.\n\nThe crate casts one into the other."),
        ("CC-BY-4.0", "bar 0.3.16 and 0.2.9"),
        ("CC0-1.0", "No longer kept.\n\nUse `baz` instead of it."),
        ("CC0-1.0", "bar 0.3.16 and 0.2.9"),
    ]
    assert "unmaintained" in found[2].record.messages[0].content
    assert drops.counts == {osv.WITHDRAWN: 1, osv.MALFORMED: 2}


# --- Markdown --------------------------------------------------------------------------------------

SHEET = """# Door Security Cheat Sheet

## Introduction

This sheet tells how doors are kept shut, why that matters to those inside, and what it costs them.

## 1. How to Lock a Door

Use a [good lock](https://x.org) *every* time you leave the house, even when it is only for a moment:

```python
# not a heading
door.lock()
```

### Example

The key turns twice to the left and once to the right before it is taken out of it. As the table has it:

| left | right |
|------|-------|

## Should doors be locked at night?

Yes. Doors should be locked at night, because whoever is asleep does not hear them being opened.

## References

- [A book](https://y.org) with many words about doors and locks and everything that goes with them.

## Short

Too short.
"""


def test_owasp_asks_under_each_heading(tmp_path: Path) -> None:
    path = archived(tmp_path / "sheets.tar.gz", {"cheatsheets/Door_Security_Cheat_Sheet.md": SHEET})
    drops = Drops()
    found = list(owasp_cheatsheets.SOURCE.find(path, drops=drops))
    questions = [f.record.messages[0].content for f in found]
    answers = [f.record.messages[1].content for f in found]
    assert len(found) == 4
    assert "Door Security" in questions[0]
    assert "lock a Door" in questions[1]
    assert "How to Lock a Door: Example" in questions[2]
    assert questions[3].startswith("Should doors be locked at night?")
    assert answers[1].startswith("Use a good lock every time you leave")
    assert answers[1].endswith("# not a heading\ndoor.lock()\n```")
    assert "|" not in answers[2]
    assert [f.where.rsplit(":", 1)[1] for f in found] == ["3", "7", "16", "23"]
    assert drops.counts == {owasp_cheatsheets.APPARATUS: 1, owasp_cheatsheets.SHORT: 1}


def test_ctf_asks_how_a_challenge_was_solved(tmp_path: Path) -> None:
    prose = "The flaw lies in the parser, which reads one byte more than it was given. " * 3
    pictures = f"![a](b)\n\n![c](d)\n\n{prose}"
    parts = {
        "# Google CTF: foo": prose,
        "## Heap layout": prose,
        "## License": prose,
        "## Pictures": pictures,
    }
    text = "\n\n".join(f"{heading}\n\n{body}" for heading, body in parts.items())
    files = {"2023/quals/pwn-foo/solution/README.md": text, "README.md": "Elsewhere."}
    drops = Drops()
    found = list(ctf_writeups.SOURCE.find(archived(tmp_path / "a.tgz", files), drops=drops))
    assert all(
        "Google CTF 2023 binary exploitation challenge “foo”" in f.record.messages[0].content for f in found
    )
    assert [f.record.messages[1].content for f in found] == [prose.strip()] * 2
    assert "Heap layout" in found[1].record.messages[0].content
    assert drops.counts == {
        ctf_writeups.APPARATUS: 1,
        ctf_writeups.PICTURES: 1,
        ctf_writeups.NO_CHALLENGE: 1,
    }


def test_plain_text_of_markdown() -> None:
    assert plain_text("One *two*\nthree **four** `a*b*c`.\n* five\n* [`six`](u)\n\n\n<b>x</b>") == (
        "One two three four `a*b*c`.\n- five\n- `six`\n\nx"
    )
    assert plain_text("First. As follows:\n\n![image](x.png)\n\nSecond.") == "First.\n\nSecond."
    assert plain_text("Code:\n\n```\n" + "x\n" * 40 + "```\n\nAfter.") == "After."
    assert [(s.heading, s.above, s.line) for s in sections("a\n# B\n```\n# no\n```\n### C\n\nD\n===\nx")] == [
        ("", (), 1),
        ("B", (), 2),
        ("C", ("B",), 6),
        ("D", (), 9),
    ]


def test_text_is_cut_at_a_sentence() -> None:
    assert whole_sentences("One (e.g. Two) here. Three four. Five", 34) == "One (e.g. Two) here. Three four."
    assert whole_sentences("One (e.g. Two) here. Three", 12) == ""
    assert whole_sentences("All of it:\n- a\n- b", 100) == "All of it:\n- a\n- b"
    assert whole_sentences("Said. As here:\n- aaaaaaaaaaaaaaaaaaaa", 20) == "Said."
    assert leans("This is it.")
    assert not leans("Thistles are plants.")


# --- where the files lie, and what is wrong with them ----------------------------------------------


def test_an_archive_is_read_where_it_lies(tmp_path: Path) -> None:
    """Names that lead out of the folder are only names: nothing is written."""
    inside = tmp_path / "inside"
    inside.mkdir()
    path = archived(
        inside / "a.tar.gz",
        {
            "../../out.yaml": pypa(
                "PYSEC-1-1", "foo", "A text of more than forty characters about a flaw in it."
            )
        },
    )
    before = sorted(tmp_path.rglob("*"))
    assert len(list(pypa_advisories.SOURCE.find(path))) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_and_its_archive_give_the_same(tmp_path: Path) -> None:
    texts = {
        f"vulns/p{i}/PYSEC-1-{i}.yaml": pypa(
            f"PYSEC-1-{i}", f"p{i}", f"A flaw of the kind {i} is in this package."
        )
        for i in range(5)
    }
    for name, text in texts.items():
        (tmp_path / "db" / name).parent.mkdir(parents=True)
        (tmp_path / "db" / name).write_text(text)
    path = archived(tmp_path / "db.tar.gz", dict(texts))
    folder = [f.record for f in pypa_advisories.SOURCE.find(tmp_path / "db")]
    assert folder == [f.record for f in pypa_advisories.SOURCE.find(path)]
    assert len(folder) == 10


def test_a_large_member_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LARGEST", 1000)
    small = pypa("PYSEC-1-1", "foo", "A text of more than forty characters about a flaw in it.")
    path = archived(tmp_path / "a.tar.gz", {"a.yaml": small, "b.yaml": "x" * 2000})
    drops = Drops()
    assert len(list(pypa_advisories.SOURCE.find(path, drops=drops))) == 2
    assert [(drop.reason, drop.where) for drop in drops.log] == [(archive.TOO_LARGE, f"{path}:b.yaml")]


@pytest.mark.parametrize("source", [module.SOURCE for module in ALL], ids=lambda source: source.name)
def test_what_cannot_be_read_is_said(source: Source, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(b"\x1f\x8b damaged")
    for path in (tmp_path / "nowhere", empty, damaged):
        with pytest.raises(UserError) as e:
            list(source.find(path))
        assert str(path) in e.value.where
        assert e.value.fix


KEYS = [
    *("objects", "type", "name", "description", "external_references", "kill_chain_phases"),  # STIX
    *("79", "attr", "@_Name", "@_Abstraction", "Description", "Related_Weaknesses", "Potential_Mitigations"),
    *("vulnerabilities", "cveID", "product", "shortDescription"),  # KEV
    *("id", "affected", "package", "details"),  # OSV
]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.just("attack-pattern"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)
_QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(source: Source, path: Path) -> None:
    """Reads on, or says what is wrong: nothing else is raised."""
    try:
        found = list(source.find(path))
    except UserError:
        return
    assert all(f.record.messages[-1].content.strip() and f.where for f in found)


@_QUIET
@given(value=_JSON)
def test_any_json_is_read_or_refused(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "any.json"
    file.write_text(json.dumps(value))
    for module in (mitre_attack, mitre_capec, mitre_cwe, cisa_kev):
        survives(module.SOURCE, file)
    survives(pypa_advisories.SOURCE, written(tmp_path / "any.yaml", value))


@_QUIET
@given(data=st.binary(max_size=200), text=st.text(alphabet="#`-*[]()<>|=_ \nab:.!\\", max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes, text: str) -> None:
    front = '```toml\n[advisory]\nid = "R"\npackage = "p"\n```\n# T\n'
    for module in ALL:
        file = tmp_path / "any.bin"
        file.write_bytes(data)
        survives(module.SOURCE, file)
    folder = tmp_path / "2023" / "quals" / "pwn-x"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "X_Cheat_Sheet.md").write_text(text)
    survives(owasp_cheatsheets.SOURCE, folder)
    survives(ctf_writeups.SOURCE, folder)
    (tmp_path / "r.md").write_text(front + text)
    survives(rustsec_advisories.SOURCE, tmp_path / "r.md")


# --- the real data ---------------------------------------------------------------------------------

FOLDERS = {module.SOURCE.name: module.SOURCE.name for module in ALL} | {"ctf_writeups": "google_ctf_writeups"}


@pytest.fixture(scope="module")
def real(shared_data: Path) -> dict[str, tuple[list[Found], Drops]]:
    found = {}
    for module in ALL:
        drops = Drops()
        found[module.SOURCE.name] = (
            list(module.SOURCE.find(shared_data / FOLDERS[module.SOURCE.name], drops=drops)),
            drops,
        )
    return found


@pytest.mark.shared
def test_real_counts(real: dict[str, tuple[list[Found], Drops]]) -> None:
    counts = {name: len(found) for name, (found, _) in real.items()}
    assert sum(counts.values()) - counts["mitre_capec"] >= 9_000, counts
    floors = {
        "mitre_attack": 5_000,
        "mitre_capec": 3_500,
        "mitre_cwe": 7_000,
        "cisa_kev": 2_500,
        "pypa_advisories": 3_800,
        "rustsec_advisories": 1_800,
        "owasp_cheatsheets": 2_300,
        "ctf_writeups": 80,
    }
    assert all(counts[name] >= least for name, least in floors.items()), counts
    attack = real["mitre_attack"][1].counts
    assert attack[stix.REVOKED] + attack[stix.DEPRECATED] == 368  # as the data's description says
    assert real["pypa_advisories"][1].counts[osv.WITHDRAWN] == 10
    assert sum(f.record.license == "CC-BY-4.0" for f in real["rustsec_advisories"][0]) >= 21


@pytest.mark.shared
def test_real_records_are_sound(real: dict[str, tuple[list[Found], Drops]]) -> None:
    for name, (found, drops) in real.items():
        ids = [f.record.id for f in found]
        assert len(set(ids)) == len(ids), name
        questions = [f.record.messages[0].content for f in found]
        assert len(set(questions)) == len(questions), name  # so that no question has two answers
        assert all(drop.where for drop in drops.log), name
        for f in found:
            question, answer = (m.content for m in f.record.messages)
            assert answer.strip() == answer, f.record.id
            assert answer, f.record.id
            assert len(answer) <= 1400, f.record.id
            assert not re.search(r"\(Citation:|</?xhtml|\]\(https?:", question + answer), f.record.id
        chosen = [f.record.messages for f in found if "\nD. " in f.record.messages[0].content]
        letters = Counter(answer.content[0] for _, answer in chosen)
        if chosen:
            assert all(0.2 < letters[letter] / len(chosen) < 0.3 for letter in "ABCD"), (name, letters)
            assert all(f"\n{answer.content}" in question.content for question, answer in chosen), name


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def words_of(value: Any) -> set[str]:
    """All words of a JSON value."""
    if isinstance(value, dict):
        return set().union(*map(words_of, value.values()))
    if isinstance(value, list):
        return set().union(*map(words_of, value))
    return words(str(value))


@pytest.mark.shared
def test_real_answers_stand_in_their_entry(
    real: dict[str, tuple[list[Found], Drops]], shared_data: Path
) -> None:
    """No answer has a word that the catalogue's entry has not, but for the names of others it refers to."""
    weaknesses = json.loads(gzip.decompress((shared_data / "mitre_cwe/cwe-dictionary.json.gz").read_bytes()))
    bundle = gzip.decompress((shared_data / "mitre_attack/enterprise-attack-subset.json.gz").read_bytes())
    objects = [item for item in json.loads(bundle)["objects"] if "external_references" in item]
    entries = {f"CWE-{number}": words_of(item) for number, item in weaknesses.items()}
    for item in objects:  # old mitigations have the ids of techniques
        own = entries.setdefault(item["external_references"][0]["external_id"], set())
        own |= words_of(item)
        own |= words(re.sub(r"\]\([^)]*\)|</?code>", "", item["description"]))  # "[Flood](address)s"
    names = {f"CWE-{number}": words_of(item["attr"]) for number, item in weaknesses.items()}
    techniques = set().union(*(words(item["name"]) for item in objects))
    added = {
        "and",
        "cwe",
        "____",
        *"abcd",
    }  # by joining, in ids, where a name is blanked out, letters of choices
    for f in (*real["mitre_cwe"][0], *real["mitre_attack"][0]):
        key, answer = f.record.id.split("/")[2], f.record.messages[1].content
        others = set[str]()
        if match := re.search(r" \((?:(CWE-\d+)|(T\d+))\)$", answer):
            others = names[match[1]] if match[1] else techniques | words(match[2])
        elif re.match(r"(?:Which|Name the) sub-techniques", f.record.messages[0].content):
            others = techniques
        elif "tactic" in f.record.messages[0].content:
            others = words("Command and Control Lateral Movement Defense Evasion")
        new = words(answer) - entries[key] - others - added
        assert not new, (f.record.id, new)


@pytest.mark.shared
def test_real_descriptions_are_those_of_the_catalogue(
    real: dict[str, tuple[list[Found], Drops]], shared_data: Path
) -> None:
    file = shared_data / "cisa_kev/known_exploited_vulnerabilities.json"
    listed = {row["cveID"]: row for row in json.loads(file.read_text())["vulnerabilities"]}
    for f in real["cisa_kev"][0]:
        row = listed[f.record.id.split("/")[2]]
        answer = f.record.messages[1].content
        if f.record.id.endswith("/1"):
            assert (
                answer.rstrip(".").casefold()
                == " ".join(row["shortDescription"].split()).rstrip(".").casefold()
            )
        assert row["dateAdded"] not in answer


@pytest.mark.shared
def test_real_items_that_are_known(real: dict[str, tuple[list[Found], Drops]]) -> None:
    pairs = {name: asked(found) for name, (found, _) in real.items()}
    assert any(
        "Cross-site Scripting" in q and a.startswith("The product does not neutralize")
        for q, a in pairs["mitre_cwe"].items()
    )
    answers = [a for q, a in pairs["mitre_attack"].items() if "“Process Injection” (T1055)" in q]
    assert "Defense Evasion and Privilege Escalation" in answers
    assert any("CVE-2020-5902" in q and "F5 BIG-IP" in q for q in pairs["cisa_kev"])
    assert any("“django”" in q and "5.0.7 and 4.2.14" in a for q, a in pairs["pypa_advisories"].items())


@pytest.mark.shared
def test_real_data_is_read_the_same_again(
    real: dict[str, tuple[list[Found], Drops]], shared_data: Path
) -> None:
    again = list(mitre_attack.SOURCE.find(shared_data / "mitre_attack"))
    assert again == real["mitre_attack"][0]
