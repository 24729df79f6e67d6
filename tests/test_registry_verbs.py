"""`qwen-ray registry ...` as a user types it, in this process."""

from __future__ import annotations

import argparse
import io
import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from qwen_ray import registry_verbs, watch_verbs
from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK, UserError
from qwen_ray.registry import CANDIDATE, PRODUCTION, Registry
from qwen_ray.registry.records import promote_against, record_evaluation, record_verdict
from qwen_ray.storage import update
from qwen_ray.verbs import Output

LINEAGE = {"base": {"id": "tiny", "fingerprint": "f" * 64}}
Run = Callable[..., Any]


@pytest.fixture(params=["folder", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QWEN_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOGNAME", "ada")
    return str(tmp_path / "registry") if request.param == "folder" else f"memory://{secrets.token_hex(8)}"


@pytest.fixture
def run(place: str) -> Run:
    """Runs a verb; its JSON, or its text, and the exit code if it is not 0."""

    def run(*words: str, text: bool = False, code: int = EXIT_OK) -> Any:
        parser = argparse.ArgumentParser()
        registry_verbs.add(parser.add_subparsers(required=True))
        as_json = [] if text else ["--json"]
        args = parser.parse_args(["registry", *words, *as_json, "--registry", place])
        out = io.StringIO()
        assert args.verb(args, Output(out, as_json=args.json)) == code
        return out.getvalue() if text or code else json.loads(out.getvalue())

    return run


def weights(value: float) -> bytes:
    return save({"lora_magnitude_vector": torch.tensor([1.0, value])})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights(1))
    (folder / "lineage.json").write_text(json.dumps(LINEAGE))
    return folder


@pytest.fixture
def two(place: str, adapter: Path, run: Run) -> Registry:
    """Version 1 in production, version 2 the candidate."""
    for value in (1, 2):
        (adapter / "adapter_model.safetensors").write_bytes(weights(value))
        run("add", "bio", str(adapter))
    registry = Registry(place)
    registry.point("bio", PRODUCTION, 1, reason="first")
    registry.point("bio", CANDIDATE, 2, reason="new")
    return registry


def test_add_and_list(run: Run, adapter: Path) -> None:
    assert run("list", text=True) == "no adapter registered\n"
    assert run("add", "bio", str(adapter))["ref"] == "bio@1"
    assert run("add", "bio", str(adapter))["ref"] == "bio@1"
    assert run("list") == [{"name": "bio", "versions": [1], "aliases": {}}]
    (adapter / "lineage.json").unlink()
    with pytest.raises(UserError, match=r"no lineage\.json") as e:
        run("add", "bio", str(adapter))
    assert "registry import" in e.value.fix
    (adapter / "lineage.json").write_text("[]")
    with pytest.raises(UserError, match="no base fingerprint"):
        run("add", "bio", str(adapter))


@pytest.mark.parametrize(
    ("data", "message"),
    [(weights(math.nan), "NaN or infinity"), (weights(-math.inf), "NaN or infinity"), (b"1", "damaged")],
)
def test_broken_weights_are_neither_added_nor_promoted(
    run: Run, place: str, adapter: Path, data: bytes, message: str
) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=message):
        run("add", "bio", str(adapter))
    registry = Registry(place)
    assert registry.names() == []
    registry.publish("bio", adapter, LINEAGE)  # as another program may have
    with pytest.raises(UserError, match=message):
        run("promote", "bio@1", "--override", "--reason", "why not")
    assert registry.aliases("bio") == {}


def test_promote_asks_what_the_gate_said(run: Run, two: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    version = two.get("bio", 2)
    said = {"verdict": "hold", "reasons": ["biology gains 2.1 points, not 5"], "gate": {}, "categories": []}
    record_verdict(two, version, said, baseline="bio@1", run="run-7")
    run("promote", "bio@candidate", "--reason", "hope", code=EXIT_GATE_SAID_NO)
    assert "biology gains 2.1 points" in capsys.readouterr().err
    assert two.aliases("bio")[PRODUCTION] == 1
    done = run("promote", "bio@candidate", "--reason", "checked by hand", "--override")
    assert done == {"name": "bio", "production": 2}
    (override,) = two.events("bio", kind="override")
    assert override.version == 2
    assert override.value == {"verdict": "hold", "reason": "checked by hand", "by": "ada"}
    run("promote", "bio@1", "--reason", "no gate asked", "--by", "bob")
    assert two.events("bio", kind="alias")[-1].value["by"] == "bob"
    for ref, what in (
        ("bio", "not NAME@VERSION"),
        ("bio@9", "no version 9"),
        ("bio@²", "no '²' version"),
        ("law@1", "unknown adapter"),
    ):
        with pytest.raises(UserError, match=what):
            run("promote", ref, "--reason", "typo")


def test_an_override_is_kept_with_the_move_or_not_at_all(run: Run, two: Registry) -> None:
    with pytest.raises(UserError, match="needs a reason"):
        run("promote", "bio@2", "--reason", " ", "--override")
    two.unpoint("bio", CANDIDATE, reason="refused")
    two.archive("bio", 2, reason="refused")
    with pytest.raises(UserError, match="is archived"):
        run("promote", "bio@2", "--reason", "needed now", "--override")
    with pytest.raises(UserError, match="means version 1 now"):
        promote_against(two, two.get("bio", 2), verdict="hold", reason="needed", by="ada", was=None)
    assert two.events("bio", kind="override") == []
    assert two.aliases("bio") == {PRODUCTION: 1}
    two.restore("bio", 2, reason="needed")
    run("promote", "bio@2", "--reason", "needed now", "--override")
    text = run("show", "bio", text=True)
    assert "override: ada decided without a verdict: needed now" in text[text.index("in production: bio@2") :]


def test_a_canary_without_a_share_is_stopped(place: str, two: Registry) -> None:
    """As a rollback of earlier releases left it."""
    update(
        two.storage,
        "bio/state.json",
        lambda state: {**(state or {}), "aliases": {"canary": 2}, "share": None},
    )
    args = argparse.Namespace(registry=place, name="bio", reason="stuck")
    assert watch_verbs.canary_stop(args, Output(io.StringIO(), as_json=True)) == EXIT_OK
    assert Registry(place).aliases("bio") == {}


def test_show_says_why_it_is_in_production(run: Run, two: Registry) -> None:
    result = {
        "schema": "qwen-ray/eval-result/1", "model": "tiny", "adapter": "bio@2", "suite": "facts",
        "suite_version": 3, "settings": {}, "categories": {"biology": {"score": 0.8125, "n": 96}},
        "controls": {}, "items": [{"id": "x"}],
    }  # fmt: skip
    version = two.get("bio", 2)
    evaluation = record_evaluation(two, version, result, location="runs/7/after.json")
    assert "items" not in evaluation.value
    assert evaluation.value["location"] == "runs/7/after.json"
    said = {"verdict": "promote", "reasons": ["biology gains 12 points"]}
    record_verdict(two, version, said, baseline="bio@1", run="run-7")
    run("promote", "bio@2", "--reason", "pipeline run-7")
    text = run("show", "bio", text=True)
    why = text[text.index("in production: bio@2") :]
    assert "production 1 -> 2: pipeline run-7 (ada)" in why
    assert "promote against bio@1: biology gains 12 points" in why
    assert "candidate, production" in text
    shown = run("show", "bio")
    assert shown["aliases"] == {"candidate": 2, "production": 2}
    one = run("show", "bio@candidate")
    assert one["lineage"] == LINEAGE
    assert [event["kind"] for event in one["events"]] == [
        "published",
        "alias",
        "evaluation",
        "verdict",
        "alias",
    ]
    assert "facts 3: biology 81.2% of 96 (runs/7/after.json)" in run("show", "bio@2", text=True)
    assert [event["kind"] for event in run("log", "bio", "--kind", "verdict")] == ["verdict"]
    assert len(run("log", "bio", text=True).splitlines()) == 7
    assert run("log", "bio", "--kind", "override") == []
    with pytest.raises(UserError, match="'verdcit' is no kind") as e:
        run("log", "bio", "--kind", "verdcit")
    assert e.value.fix == "did you mean 'verdict'?"
    with pytest.raises(UserError, match="unknown adapter 'law'"):
        run("show", "law")


def test_archive_gc_and_rollback(run: Run, two: Registry) -> None:
    run("promote", "bio@2", "--reason", "better")
    run("archive", "bio@1", "--reason", "replaced by 2")
    assert "(archived: 1)" in run("list", text=True)
    assert run("rollback", "bio", "--reason", "wrong dates") == {"name": "bio", "production": 1}
    assert two.archived("bio") == []
    with pytest.raises(UserError, match="'candidate'"):
        run("archive", "bio@2", "--reason", "wrong dates")
    two.unpoint("bio", CANDIDATE, reason="refused")
    run("archive", "bio@2", "--reason", "wrong dates")
    run("restore", "bio@2", "--reason", "to compare")
    run("archive", "bio@2", "--reason", "compared")
    assert "1 -> 2" in run("show", "bio@2", text=True)
    everything = ("gc", "--archived-days", "0", "--rollbacks", "0")
    planned = run(*everything, "--dry-run")
    assert [removal["what"] for removal in planned["removed"]] == ["bio@2"]
    assert two.versions("bio") == [1, 2]
    assert run("gc")["removed"] == []
    assert run(*everything)["removed"] == planned["removed"]
    assert two.versions("bio") == [1]
    assert "files removed" in run("show", "bio", text=True)
    assert "1 -> 2" in run("show", "bio@2", text=True)
    with pytest.raises(UserError, match="NAME@VERSION"):
        run("archive", "bio", "--reason", "typo")
    with pytest.raises(UserError, match="archived_days"):
        run("gc", "--archived-days", "-1")


def test_import_and_export(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags:\n- trl\n---\n")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "/home/me/qwen"})
    )
    from qwen_ray import models

    hidden = models.model_config(models.resolve("tiny"))["hidden_size"]
    layer = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    save_file(
        {f"{layer}A.weight": torch.ones(2, hidden), f"{layer}B.weight": torch.ones(hidden, 2)},
        folder / "adapter_model.safetensors",
    )
    assert run("import", "bio", str(folder), "--base", "tiny")["ref"] == "bio@1"
    assert "saved by trl for '/home/me/qwen'; 1 other files are not taken" in capsys.readouterr().err
    out = run("export", "bio@1", "--to", str(tmp_path / "peft"))
    assert out == {"ref": "bio@1", "out": str(tmp_path / "peft")}
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="no format"):
        run("export", "bio@1", "--to", str(tmp_path / "other"), "--format", "gguf")


def test_records_that_say_nothing_are_refused(two: Registry) -> None:
    with pytest.raises(UserError, match="no verdict"):
        record_verdict(two, two.get("bio", 1), {"verdict": "maybe"}, baseline="base", run=None)
    with pytest.raises(UserError, match="needs a reason"):
        promote_against(two, two.get("bio", 1), verdict="hold", reason=" ", by="ada")
