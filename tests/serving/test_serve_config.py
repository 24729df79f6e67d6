from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from qwen_ray import models
from qwen_ray.serving import launch

CONFIGS = sorted((Path(__file__).parents[2] / "serve").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_config_is_valid_and_builds(path: Path) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert (module, getattr(launch, name)) == (launch.__name__, launch.build)
    assert isinstance(launch.build(application.args), Application)
    models.resolve(application.args["model"])
    assert f"serve deploy serve/{path.name}" in path.read_text()


def test_there_are_configs() -> None:
    assert "tiny.yaml" in [path.name for path in CONFIGS]
