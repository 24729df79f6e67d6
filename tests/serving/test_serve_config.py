from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema
from starlette.testclient import TestClient

from qwen_ray import models
from qwen_ray.config import reference
from qwen_ray.errors import UserError
from qwen_ray.registry import Registry
from qwen_ray.serving import launch
from qwen_ray.serving.auth import create_key
from qwen_ray.serving.replicas import Ingress
from qwen_ray.serving.settings import ServeSettings
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "serve").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_config_is_valid_and_builds(path: Path, tmp_path: Path) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert (module, getattr(launch, name)) == (launch.__name__, launch.build)
    models.resolve(application.args["model"])
    assert f"serve deploy serve/{path.name}" in path.read_text()
    settings = ServeSettings.of(application.args)
    assert settings.keys is not None or config.http_options.host == "127.0.0.1", "open to all, without keys"
    assert settings.keys is not None or settings.hosts
    keys = {}
    if settings.keys:
        create_key(tmp_path / "keys.json", "me")
        keys = {"keys": tmp_path / "keys.json"}
    assert isinstance(launch.build(application.args | keys), Application)


def test_commented_settings_are_right() -> None:
    """What a user uncomments is checked as well."""
    for path in CONFIGS:
        lines = path.read_text().splitlines()
        offered = [line.strip().removeprefix("# ") for line in lines if line.startswith("      # ")]
        args = yaml.safe_load("\n".join(offered)) or {}
        ServeSettings.of({"model": "tiny"} | args)


def test_there_are_configs() -> None:
    names = {path.name for path in CONFIGS}
    assert names == {"tiny.yaml", "cpu.yaml", "gpu.yaml", "gpus-autoscaling.yaml"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "'model'"),
        ({"model": "tiny", "replica": 2}, "did you mean 'replicas'"),
        ({"model": "tiny", "replicas": 0}, "'replicas'"),
        ({"model": "tiny", "engine": "tgi"}, "'engine'"),
        ({"model": "tiny", "threads": "many"}, "'threads'"),
        ({"model": "tiny", "autoscaling": {"max_replica": 2}}, "autoscaling.max_replica"),
        ({"model": "tiny", "autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "above max_replicas"),
        ({"model": "tiny", "autoscaling": {"max_replicas": 2}, "replicas": 3}, "give one of them"),
        ({"model": "tiny", "limits": {"in_fligth": 2}}, "limits.in_flight"),
        ({"model": "tiny", "keys": "/nowhere/keys.json"}, "/nowhere/keys.json"),
        ({"model": "tiny", "adapters": {"a": "/nowhere"}}, "no such adapter folder"),
        ({"model": "tiny", "adapters": {"a": "/"}}, "adapter_config.json is missing"),
        ({"model": "tiny", "pinned": ["nobody"]}, "unknown adapter 'nobody'"),
        ({"model": "tiny", "pinned": ["../x"]}, "cannot be the name"),
        ({"model": "tiny", "hosts": ["http://a.example"]}, "not the name of a host"),
        ({"model": "tiny", "notes_template": "Read this."}, "no {passages}"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_deployed(args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as e:
        launch.build(args)
    assert words in str(e.value)


def test_pinned_adapters_are_looked_up_where_the_registry_is(registry: Registry) -> None:
    with pytest.raises(UserError, match="'law' has no version 9"):
        launch.build({"model": "tiny", "registry": registry.root, "pinned": ["geo", "law@9"]})
    launch.build({"model": "tiny", "registry": registry.root, "pinned": ["geo", "law@1"]})
    launch.build({"model": "tiny", "registry": "/mounted/elsewhere", "pinned": ["geo"]})


def test_ingress_has_the_keys_limits_and_origins_of_the_settings(tmp_path: Path) -> None:
    class Unused:
        """A handle: what is refused here reaches no replica."""

        def options(self, **_: object) -> Unused:
            return self

    secret = create_key(tmp_path / "keys.json", "me")
    origin = "https://notes.example"
    settings = {"keys": tmp_path / "keys.json", "limits": {"prompts_per_request": 1}, "cors": [origin]}
    settings["hosts"] = ["testserver"]
    ingress = Ingress(Unused(), ServeSettings.of({"model": "tiny"} | settings))
    http = TestClient(ingress.__serve_build_asgi_app__())
    body = {"model": "tiny", "prompt": ["a", "b"]}
    assert http.post("/v1/completions", json=body).status_code == 401
    headers = {"Authorization": f"Bearer {secret}", "Origin": origin}
    assert http.get("/health", headers={"Host": "other.example"}).status_code == 403
    refused = http.post("/v1/completions", json=body, headers=headers)
    assert refused.status_code == 413
    assert "2 prompts" in refused.json()["error"]["message"]
    assert refused.headers["access-control-allow-origin"] == origin


def test_the_docs_list_every_setting() -> None:
    assert reference(ServeSettings) in (ROOT / "docs" / "serving.md").read_text()
