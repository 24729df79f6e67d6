"""RunConfig: layers, unknown keys, YAML both ways, the exported schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from qwen_ray.config import RunConfig, build_config, json_schema, read_config
from qwen_ray.errors import UserError


def test_defaults_are_the_guides() -> None:
    config = build_config(flags={"model.name": "3b"})
    assert (config.method.r, config.method.alpha, config.method.dropout) == (16, 32, 0.05)
    assert config.method.targets == "all-linear"
    assert (config.optim.learning_rate, config.optim.epochs, config.optim.warmup_steps) == (2e-4, 3, 100)
    assert (config.optim.batch_size, config.optim.gradient_accumulation) == (4, 8)
    assert config.optim.max_grad_norm == 1.0


def test_full_fine_tuning_has_a_lower_rate() -> None:
    assert build_config(flags={"model.name": "3b", "method.name": "full"}).optim.learning_rate == 2e-5


def test_layers_override_in_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: tiny}\noptim: {learning_rate: 1e-3, epochs: 2}\nmethod: {r: 4}\n")
    preset = build_config(flags={"model.name": "tiny"})
    config = build_config(file, flags={"method.r": 8}, sets=["optim.epochs=5"])
    assert config.optim.learning_rate == 1e-3  # the file over the preset; "1e-3" is a number
    assert config.method.r == 8  # a flag over the file
    assert config.optim.epochs == 5  # --set over the file
    assert (
        config.method.alpha == preset.method.alpha != RunConfig().method.alpha
    )  # the preset over the default


@pytest.mark.parametrize(
    ("item", "message", "fix"),
    [
        ("optim.learning_rat=1", "unknown key 'optim.learning_rat'", "optim.learning_rate"),
        ("modle.name=tiny", "unknown key 'modle'", "'model'"),
        ("epochs=3", "unknown key 'epochs'", "optim.epochs"),
        ("method.r=0", "'method.r'", ""),
        ("method.name=lorra", "'method.name'", ""),
        ("data.weights.biology=-1", "'data.weights.biology'", ""),
        ("cluster.labels.gpu=!h100", "no value of a label", ""),
        ("cluster={workers: 0, labels: {gpu: h100}}", "workers is 0", ""),
        ("cluster={min_workers: 1, labels: {gpu: h100}}", "either labels or min_workers", ""),
        ("cluster={workers: 2, min_workers: 3}", "is 2, and min_workers is 3", ""),
        ("cluster={workers: 0, min_workers: 1}", "is 0, and min_workers is 1", ""),
        ("cluster.min_workers=1", "is not given, and min_workers is 1", ""),
        ("cluster.gpus_per_worker=2", "a worker drives one GPU", ""),
        ("cluster.gpus_per_worker=0.5", "a worker drives one GPU", ""),
        ("optim.max_grad_norm=.inf", "finite", ""),
        ("data.weights.biology=.nan", "finite", ""),
        ("optim.betas=[1.0, 0.9]", "'optim.betas.0'", ""),
        ("optim.betas=[0.9, -0.1]", "'optim.betas.1'", ""),
        ("method.targets=[]", "needs a layer", ""),
        ("learning rate", "not key=value", "--set"),
        ("out=s3://bucket/run", "URI", ""),
    ],
)
def test_bad_settings_are_refused_in_words(item: str, message: str, fix: str) -> None:
    with pytest.raises(UserError) as e:
        build_config(sets=[item])
    assert message in e.value.what
    assert fix in e.value.fix
    assert item in e.value.where or e.value.where in ("--set", "configuration")


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("method.name", "--method"),
        ("data.train", "--data"),
        ("data.max_length", "--sequence-length"),
        ("optim.max_steps", "--steps"),
        ("cluster.workers", "--workers"),
    ],
)
def test_a_bad_option_is_named_as_it_is_typed(key: str, option: str) -> None:
    with pytest.raises(UserError) as e:
        build_config(flags={key: {"no": "value"}})
    assert e.value.where == option


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  packng: true\n")
    with pytest.raises(UserError, match=r"unknown key 'data\.packng'") as e:
        build_config(file)
    assert str(file) in e.value.where
    assert "data.packing" in e.value.fix


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  epochs: [1\n")
    with pytest.raises(UserError, match="not valid YAML") as e:
        build_config(file)
    assert e.value.where.startswith(f"{file}:")


def test_yaml_there_and_back(tmp_path: Path) -> None:
    config = build_config(
        sets=["method.targets=[q_proj]", "data.weights={a: 0.2, b: 0.8}", "optim.max_steps=7"]
    )
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    assert file.read_text().startswith("# qwen-ray train --config")
    assert read_config(file) == config


def test_a_bare_off_is_a_word(tmp_path: Path) -> None:
    assert build_config(sets=["tracking.wandb=off"]).tracking.wandb == "off"
    with pytest.raises(UserError):
        build_config(sets=["tracking.wandb=on"])


def test_schema_accepts_what_we_write_and_refuses_unknown_keys() -> None:
    schema = json.loads(json.dumps(json_schema()))
    document = yaml.safe_load(RunConfig().to_yaml())
    jsonschema.validate(document, schema)
    document["optim"]["learning_rat"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)
    assert "rank" in schema["$defs"]["MethodConfig"]["properties"]["r"]["description"]
