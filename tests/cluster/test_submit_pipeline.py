"""A pipeline as a job: stopped while it trains, the same command goes on and nothing is done twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from qwen_ray.data.records import write_records
from qwen_ray.fsio import files_under, read_json
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.lifecycle.telling import status
from qwen_ray.registry import Registry
from qwen_ray.training.tracking import read_metrics
from tests.cluster.nodes import Cluster
from tests.cluster.test_submit import User, ended, wait
from tests.conftest import sums

pytestmark = [pytest.mark.cluster, pytest.mark.long]
STEPS = 100
STAGES = ["collect", "prepare", "train", "register"]


class Place:
    """Storage of one pipeline, as every node mounts it."""

    def __init__(self, folder: Path) -> None:
        self.work, self.registry = folder / folder.name, Registry(folder / "registry")

    def write(self, user: User) -> list[str]:
        """Write the pipeline into the user's folder; returns the command that submits it."""
        tree = {
            "name": "sums",
            "work": str(self.work),
            "registry": self.registry.location,
            "data": {"sums": {"sources": {"file": "data/*.jsonl"}, "decontaminate": {"enabled": False}}},
            "train": {
                "model": {"name": "tiny"},
                "cluster": {"workers": 1},
                "optim": {"max_steps": STEPS},
                "checkpoint": {"every_steps": 4},
                "tracking": {"wandb": "off"},
            },
            "benchmark": {"suites": ["tiny"]},
        }
        file = f"{self.work.name}.yaml"
        (user.folder / file).write_text(yaml.safe_dump(tree))
        return ["submit", "pipeline", "run", file, "--until", "register"]

    @property
    def run(self) -> Path | None:
        """Folder of the training run, once it has a checkpoint."""
        return next(
            (path.parent for path in self.work.glob("train/*/checkpoints") if any(path.iterdir())), None
        )

    def adapter(self) -> bytes:
        """The weights of the registered version."""
        assert self.registry.versions("sums") == [1]
        return (self.registry.get("sums", 1).path / "adapter_model.safetensors").read_bytes()

    def left(self) -> dict[Path, tuple[int, bytes]]:
        """What the stages before training have left: files, when they were written, and what is in them."""
        files = {
            self.work / rel
            for rel in files_under(self.work)
            if rel.parts[0] in {"collected", "data"} or {rel.stem, rel.parent.name} & {"collect", "prepare"}
        }
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_pipeline_is_stopped_while_it_trains_and_ends_as_one_that_was_not(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Both at one time and from one folder, so nodes of this machine unpack the same files in one place."""
    user = User(cluster, tmp_path / "user")
    (user.folder / "data").mkdir()
    write_records(user.folder / "data" / "sums.jsonl", sums(60))
    stopped, alone = Place(tmp_path / "stopped"), Place(tmp_path / "alone")
    commands = [stopped.write(user), alone.write(user)]
    first, other = (user.start(*command) for command in commands)
    wait(lambda: stopped.run is not None, first, other)
    before = stopped.left()
    with user.api() as api:
        assert api.stop("pipeline-stopped")
    _, said = ended(first, 1)
    assert "failed: pipeline-stopped was stopped; the same submit goes on" in said
    assert stopped.run is not None
    assert read_json(stopped.run / "run.json")["state"] == "interrupted"
    (row,) = status(PipelineSpec.read(user.folder / "stopped.yaml"))["runs"]
    assert (row["done"], row["next"], row["end"]) == (["collect", "prepare"], "train", None)

    printed, said = user(*commands[0], "--json")
    result = json.loads(printed)
    assert (result["id"], result["attempt"], result["status"]) == ("pipeline-stopped.2", 2, "SUCCEEDED")
    assert f"going on with run {row['run']}" in said
    assert re.findall(f"^({'|'.join(STAGES)})$", said, re.MULTILINE) == ["train", "register"]
    assert stopped.left() == before
    assert 0 < read_json(stopped.run / "run.json")["result"]["resumed_from"] < STEPS
    (row,) = status(PipelineSpec.read(user.folder / "stopped.yaml"))["runs"]
    assert row["done"] == STAGES

    ended(other)
    assert alone.run is not None
    losses = [[row["loss"] for row in read_metrics(run)] for run in (stopped.run, alone.run)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
    assert stopped.adapter() == alone.adapter()
    assert len(stopped.registry.events("sums", kind="published")) == 1
