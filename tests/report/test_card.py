"""The model card of a version: front matter that the hub reads, and text that tells what is known."""

import io
from typing import Any

import pytest
import yaml
from registry_example import HOSTILE, adapter_folder, play_year

from qwen_ray.cli import build_parser
from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.registry import Registry
from qwen_ray.report.card import escaped, model_card
from qwen_ray.verbs import Output
from tests.registry.conftest import Clock


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return play_year(tmp_path_factory.mktemp("year"), versions=10)


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def test_front_matter_has_what_the_hub_reads(year):
    front = front_matter(model_card(year, year.get("facts", 1), license="apache-2.0"))
    assert front["base_model"] == "Qwen/Qwen2.5-3B"
    assert (front["library_name"], front["license"]) == ("peft", "apache-2.0")
    assert front["tags"] == ["qwen-ray", "lora", "biology", "replay"]
    (index,) = front["model-index"]
    assert index["name"] == "facts@1"
    biology = index["results"][0]
    assert biology["dataset"] == {"name": "mmlu: biology", "type": "mmlu", "revision": "1"}
    (metric,) = biology["metrics"]
    assert metric["type"] == "acc"
    low, high = metric["args"]["interval"]
    assert metric["args"]["n"] == 160
    assert low < metric["value"] < high


def test_the_hubs_own_reader_takes_it(year):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    data = hub.ModelCard(model_card(year, year.get("facts", 1))).data
    first = data.eval_results[0]
    assert (first.dataset_name, first.metric_type, first.metric_args["n"]) == ("mmlu: biology", "acc", 160)


def test_sections_tell_what_is_known(year):
    card = model_card(year, year.get("facts", 1))
    for part in (
        "A LoRA adapter of rank 16 for `Qwen/Qwen2.5-3B`, trained to do better at biology.",
        "In production since 2026-01-06, until ",
        "| biology | 801 | 70.0 % | CC-BY-3.0 (800 records), MIT (9 records) | openstax\\_biology |",
        "| replay | 300 | 30.0 % | not recorded |",
        "| `optim.learning_rate` | 0.0002 |",
        "with 95 % intervals of the change",
        "| biology | target | 160 | 24.0 |",
        "| history | 52.0 | ",
        "Control, untaught facts: 27.0 before, 27.0 after (unchanged, as it should be).",
        "The smallest category has 60 items",
        "Nobody has chosen a licence.",
        "| pipeline run | `0001-ab` |",
        "| base fingerprint | `b0d11b31",
        "base = 'Qwen/Qwen2.5-3B'",
        "ask for the model `qwen2.5-3b:facts@1`",
    ):
        assert part in card, part
    digest = year.events("facts", version=1, kind="published")[0].value["digest"]
    assert f"`{digest}`" in card
    titles = [line[3:] for line in card.splitlines() if line.startswith("## ")]
    assert titles[:4] == ["What it is for", "Training data", "Settings", "Results"]
    assert titles[4:] == ["Forgetting", "Limits", "Lineage", "How to load it"]
    assert "Nobody has chosen a licence." not in model_card(year, year.get("facts", 1), license="mit")


def test_an_override_and_a_refusal_are_not_hidden(year):
    card = model_card(year, year.get("facts", 10))
    assert "**Promoted against the gate** (which said hold) by ana: needed now" in card
    assert "The gate said **hold**, against facts@9:" in card
    assert "The gate said **regress**" in model_card(year, year.get("facts", 7))


def test_what_comes_from_outside_is_no_markup(year):
    body = model_card(year, year.get("facts", 10)).split("---\n", 2)[2]
    assert "alert" in body
    assert "<script" not in body
    assert "**bold**" not in body
    rows = [line for line in body.splitlines() if "alert" in line and line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} <= {6, 9}  # no cell is split
    assert escaped("a\n# b") == "a \\# b"
    assert HOSTILE not in body


def test_what_is_not_recorded_is_said(tmp_path):
    registry = Registry(tmp_path / "registry", clock=Clock())
    base = {"id": "tiny", "location": str(tmp_path), "fingerprint": "f" * 64}
    made = registry.publish("bare", adapter_folder(tmp_path / "a", "a"), {"base": base})
    card = model_card(registry, made)
    front = front_matter(card)
    assert front["base_model"] == "tiny"  # a folder of this machine is no name on the hub
    assert "model-index" not in front
    for part in (
        "It was never in production.",
        "No comparison with the base model was recorded.",
        "No strength was compared with the base model.",
        "## Settings\n\nNot recorded.",
    ):
        assert part in card
    assert str(tmp_path) not in card


def test_verb_prints_or_writes_the_card(year, tmp_path):
    def cli(*words: str) -> str:
        stdout = io.StringIO()
        args = build_parser().parse_args(["registry", "card", *words, "--registry", str(year.root)])
        assert args.verb(args, Output(stdout, as_json=False)) == EXIT_OK
        return stdout.getvalue()

    assert cli("facts@7").rstrip() == model_card(year, year.get("facts", 7)).rstrip()
    out = tmp_path / "README.md"
    assert cli("facts", "--license", "mit", "--out", str(out)) == f"{out}\n"
    assert out.read_text() == model_card(year, year.resolve("facts"), license="mit")
    with pytest.raises(UserError, match="unknown adapter 'nobody'"):
        cli("nobody")
