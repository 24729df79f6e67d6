"""Documents cut into passages that questions are written about."""

from pathlib import Path

import pytest

from qwen_ray.data.generation.documents import LONGEST, TOO_SHORT, read_passages
from qwen_ray.data.sources import Drops
from qwen_ray.errors import UserError

PARAGRAPH = "The heart of a frog has three chambers, and its two atria keep the blood apart. " * 4


def test_sections_become_passages_with_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "frogs.md").write_text(
        f"# Frogs\n\n{PARAGRAPH}\n\n## Short\n\nToo little.\n\n## Hearts\n\n{PARAGRAPH}\n"
    )
    drops = Drops()
    found = list(read_passages(folder, domain="biology", license="CC0-1.0", drops=drops))
    assert [p.id for p in found] == ["notes/frogs/frogs-1", "notes/frogs/hearts-1"]
    assert found[1].where == f"{folder / 'frogs.md'}:9"
    assert found[0].text == PARAGRAPH.strip()
    assert {p.license for p in found} == {"CC0-1.0"}
    assert [(d.reason, d.where) for d in drops.log] == [(TOO_SHORT, f"{folder / 'frogs.md'}:5")]


def test_long_sections_are_cut_between_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(f"{i}. {PARAGRAPH}" for i in range(40)))
    found = list(read_passages(file, domain="biology", license="CC0-1.0", drops=Drops()))
    assert len(found) > 2
    assert all(len(p.text) <= LONGEST for p in found)
    assert sum(p.text.count("The heart of a frog") for p in found) == 160
    assert len({p.id for p in found}) == len(found)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .md file"):
        list(read_passages(tmp_path, domain="biology", license="CC0-1.0", drops=Drops()))
