"""docs/deploy.md says what is so."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest

from qwen_ray.cli import build_parser
from qwen_ray.planner.hardware import hardware
from tests.conftest import ROOT
from tests.k8s.rendered import OVERLAYS, objects

TEXT = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")


def commands() -> Iterator[str]:
    """Command lines of the code blocks, whole, without comments and prompts."""
    for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield line.partition("  #")[0].strip()


def test_our_commands_are_understood() -> None:
    found = [re.split(r"(?:^|-- )qwen-ray ", line)[1:] for line in commands()]  # not `-n qwen-ray`
    ours = [rest[0] for rest in found if rest]
    assert len(ours) > 5
    for rest in ours:
        build_parser().parse_args(shlex.split(rest))  # exits where it is not


def test_paths_and_parts_exist() -> None:
    for path in set(re.findall(r"(?<![\w/.-])(?:k8s|cluster|docker|configs)/[\w./-]+\w", TEXT)):
        assert (ROOT / path).exists(), path
    parts = {
        tree["metadata"]["labels"]["app.kubernetes.io/component"] for tree in objects("dev-cpu").values()
    }
    named = set(re.findall(r"app\.kubernetes\.io/component=([\w-]+)", TEXT))
    assert named <= parts
    assert parts - named == {"redis", "benchmark"}  # named otherwise
    for overlay in OVERLAYS:
        assert f"`{overlay}`" in TEXT, overlay


def test_secrets_of_the_docs_are_those_that_pods_ask_for() -> None:
    made = set(re.findall(r"create secret generic ([\w-]+)", TEXT))
    keys = dict.fromkeys(made, "")
    for line in commands():
        if match := re.search(r"create secret generic ([\w-]+)(.*)", line):
            keys[match[1]] = match[2]
    asked: set[tuple[str, str]] = set()

    def look(tree: object) -> None:
        if isinstance(tree, dict):
            reference = tree.get("secretKeyRef") or tree.get("credentials")
            if isinstance(reference, dict):
                asked.add((reference["name"], reference["key"]))
            if "secretName" in tree:
                asked.add((tree["secretName"], ""))
            for value in tree.values():
                look(value)
        elif isinstance(tree, list):
            for value in tree:
                look(value)

    for tree in objects("gpu").values():
        look(tree)
    assert {name for name, _ in asked} == made
    for name, key in asked:
        assert key in keys[name], f"{name} has no {key}"


def rows() -> list[list[str]]:
    table = TEXT.partition("<!-- costs -->")[2].partition("<!-- end -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]} {row[1]}")
def test_costs_are_the_planners(row: list[str]) -> None:
    from qwen_ray.config import build_config
    from qwen_ray.planner.plan import plan

    model, gpu, memory, _, hours, cost = row
    config = build_config(flags={"model.name": model, "method.name": "lora", "optim.epochs": 3})
    told = plan(config, hardware(gpu), 20e6).to_dict()["best"]
    assert f"{told['memory']['total'] / 1e9:.1f} GB" == memory
    assert f"{told['hours']:.1f}" == hours
    assert f"${told['dollars']:.2f}" == cost


def test_the_first_example_fits_the_group_that_is_on() -> None:
    from qwen_ray.config import build_config
    from qwen_ray.planner.plan import plan

    words = next(line for line in commands() if line.startswith("qwen-ray submit train")).split()
    given = {words[i]: words[i + 1] for i in range(3, len(words) - 1)}
    l40s = hardware("l40s-48gb")
    for sets, fits in (([given["--set"]], True), ([], False)):
        config = build_config(ROOT / given["--config"], sets=sets)
        as_written = config.optim.batch_size, config.compute.activation_checkpointing
        told = plan(config, l40s, 1e6).to_dict(every=True)["layouts"]
        (layout,) = [
            row
            for row in told
            if (row["batch_size"], row["activation_checkpointing"]) == as_written
            and row["strategy"]["name"] == config.strategy.name
        ]
        assert layout["fits"] is fits
        assert f"{layout['memory']['total'] / 1e9:.1f} GB" in TEXT
    assert "qwen-ray plan --config configs/7b-lora-1x80gb.yaml --gpu l40s-48gb --all" in TEXT
