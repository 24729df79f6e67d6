from __future__ import annotations

import pytest

from qwen_ray.errors import UserError
from qwen_ray.serving.model_id import ModelId, parse


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("tiny", ModelId("tiny")),
        ("qwen2.5-3b:biology", ModelId("qwen2.5-3b", "biology")),
        ("qwen2.5-3b:bio_2.x@12", ModelId("qwen2.5-3b", "bio_2.x", "12")),
        ("a:b@candidate", ModelId("a", "b", "candidate")),
        ("tiny:auto", ModelId("tiny", "auto")),
        ("tiny+rag", ModelId("tiny", rag=True)),
        ("tiny:b@3+rag", ModelId("tiny", "b", "3", rag=True)),
        ("tiny:auto+rag", ModelId("tiny", "auto", rag=True)),
    ],
)
def test_good_ids_come_back_as_they_went_in(text: str, want: ModelId) -> None:
    assert parse(text) == want
    assert str(want) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "tiny:",
        "tiny:@1",
        "tiny:geo@",
        "tiny:..",
        "tiny:../geo",
        "tiny:/etc/passwd",
        "/etc/passwd",
        "..",
        "tiny:geo/../law",
        "tiny:%2e%2e",
        "tiny:geo@..",
        "tiny:geo@../1",
        "tiny:geo\\x",
        "tiny:GEO",
        "tiny:.geo",
        "tiny:geo law",
        "tiny:geo\n",
        "tiny:geo\x00",
        "tiny:a:b",
        "tiny:a@b@c",
        "tiny@3",
        "tiny:" + "a" * 65,
        "tiny:é",
        "tiny+",
        "tiny+rag+rag",
        "tiny+web",
        "tiny+rag:geo",
        "tiny:auto@1",
    ],
)
def test_names_that_cannot_exist_are_404(text: str) -> None:
    with pytest.raises(UserError) as e:
        parse(text)
    assert e.value.status == 404
    assert all(c.isprintable() for c in e.value.what)
    assert len(e.value.what) < 300
