"""Runs as a user starts them: alone, on Ray with two workers, killed, interrupted, misconfigured."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from qwen_ray import models
from qwen_ray.config import RunConfig, build_config
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, write_json
from qwen_ray.planner.hardware import GPUS
from qwen_ray.training import driver
from qwen_ray.training.driver import _decided, _planned_alone, _resolve_strategy
from qwen_ray.training.nodes import Gpu, this_gpu
from qwen_ray.training.tracking import MetricsTail, Tracker, read_metrics, wandb_mode
from tests.training.test_loop import config

SETTINGS = ["data.max_length=96", "optim.warmup_steps=2", "checkpoint.every_steps=8", "method.dropout=0.1"]


def command(data: Path, out: Path, *more: str, workers: int = 2, steps: int = 40) -> list[str]:
    sets = [part for item in SETTINGS for part in ("--set", item)]
    options = ["--model", "tiny", "--data", str(data), "--workers", str(workers), "--steps", str(steps)]
    return [
        sys.executable,
        "-m",
        "qwen_ray.cli",
        "train",
        *options,
        "--out",
        str(out),
        "--json",
        *sets,
        *more,
    ]


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    return dict(json.loads(stdout))


def start(argv: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while not any(row["step"] >= step for row in read_metrics(out)):
        assert time.monotonic() < deadline, "training did not get under way"
        time.sleep(0.02)


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.cluster
@pytest.mark.long
def test_killed_and_interrupted_runs_end_as_the_undisturbed_one(tmp_path: Path, data_file: Path) -> None:
    """kill -9 of a worker: it resumes by itself. Ctrl-C and the same command again: it resumes.

    Both end with the very bytes of the run that nobody touched.
    """
    undisturbed = finish(start(command(data_file, tmp_path / "whole")))
    assert undisturbed["steps"] == 40
    assert undisturbed["resumed_from"] == 0

    killed = start(command(data_file, tmp_path / "killed"))
    step = int.from_bytes(os.urandom(1), "big") % 22 + 12  # any step from 12 to 33
    wait_for_step(tmp_path / "killed", step)
    workers = [
        p
        for p in psutil.Process(killed.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2
    workers[step % 2].kill()
    assert finish(killed)["resumed_from"] >= 8, f"killed at step {step}"
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole"), f"killed at step {step}"

    interrupted = start(command(data_file, tmp_path / "interrupted"))
    wait_for_step(tmp_path / "interrupted", 12)
    interrupted.send_signal(signal.SIGINT)
    _, stderr = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130, stderr[-3000:]
    assert "the same command goes on" in stderr
    own = [line for line in stderr.splitlines() if "pid=" not in line]  # Ray relays its actors' complaints
    assert not any("Traceback" in line for line in own), stderr
    assert read_json(tmp_path / "interrupted" / "run.json")["state"] == "interrupted"
    assert finish(start(command(data_file, tmp_path / "interrupted")))["resumed_from"] >= 8
    assert adapter_bytes(tmp_path / "interrupted") == adapter_bytes(tmp_path / "whole")

    metrics = [read_metrics(tmp_path / name) for name in ("whole", "killed", "interrupted")]
    losses = [[row["loss"] for row in rows] for rows in metrics]
    assert losses[0] == losses[1] == losses[2]
    assert [row["step"] for row in metrics[1]] == list(range(1, 41))


def test_alone_leaves_an_adapter_for_plain_peft(tmp_path: Path, data_file: Path) -> None:
    """The folder loads in PEFT, and its logits are those of our own engine."""
    from peft import PeftModel

    from qwen_ray.serving.engines.base import ScoreItem
    from qwen_ray.serving.engines.torch import TorchEngine
    from qwen_ray.training.driver import run_training

    run = run_training(config(data_file, tmp_path / "run"))
    ref = models.resolve("tiny")
    tokenizer = models.load_tokenizer(ref)
    lineage = read_json(run.artifact / "lineage.json")
    assert lineage["base"]["fingerprint"] == models.fingerprint(ref)
    assert lineage["data"]["train_records"]["sums"] > 100
    ids, rest = tokenizer("Question: What is 1 + 2?\nAnswer:").input_ids, tokenizer(" 3 or so").input_ids
    base = models.load_model(ref, dtype=torch.float32)
    with torch.no_grad():
        plain = base(input_ids=torch.tensor([ids + rest])).logits[0].log_softmax(-1)
        peft = PeftModel.from_pretrained(base, str(run.artifact)).eval()
        logprobs = peft(input_ids=torch.tensor([ids + rest])).logits[0].log_softmax(-1)
    expected = [float(logprobs[len(ids) - 1 + i, token]) for i, token in enumerate(rest)]
    untrained = [float(plain[len(ids) - 1 + i, token]) for i, token in enumerate(rest)]
    engine = TorchEngine.load(ref)
    engine.add_adapter("a", run.artifact)
    ours = engine.score([ScoreItem("a", ids, [rest])])[0].continuations[0].logprobs
    assert ours == pytest.approx(expected, abs=1e-4)
    assert ours != pytest.approx(untrained, abs=1e-2)


def test_the_same_command_again_is_done_at_once(tmp_path: Path, data_file: Path) -> None:
    from qwen_ray.training.driver import run_training

    settings = config(data_file, tmp_path / "run", "optim.max_steps=4")
    first = run_training(settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = run_training(settings)
    assert again == first
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def test_a_driver_lost_after_the_last_step_only_has_to_finish(tmp_path: Path, data_file: Path) -> None:
    """Killed between the last checkpoint and the adapter's folder."""
    from qwen_ray.training.driver import run_training

    settings = config(data_file, tmp_path / "run", "optim.max_steps=4")
    first = run_training(settings)
    weights = adapter_bytes(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    run = read_json(tmp_path / "run" / "run.json")
    write_json(tmp_path / "run" / "run.json", {**run, "state": "running", "result": None})
    again = run_training(settings)
    assert (again.resumed_from, again.loss, again.eval_loss) == (4, first.loss, first.eval_loss)
    assert adapter_bytes(tmp_path / "run") == weights


BAD = [
    (["--set", "optim.epoch=1"], "unknown key 'optim.epoch'"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--set", "data.weights.law=1"], "domain 'law' has weight 1 but no data"),
    (["--model", "no-such-model"], "unknown model 'no-such-model'"),
    (["--config", "missing.yaml"], "missing.yaml"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_message_and_exit_2(
    tmp_path: Path, data_file: Path, more: list[str], message: str
) -> None:
    process = start(command(data_file, tmp_path / "run", *more))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    assert stdout == ""
    assert message in stderr
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr
    assert "fix:" in stderr


def test_a_malformed_record_names_its_line(tmp_path: Path, data_file: Path) -> None:
    lines = data_file.read_text().splitlines()
    lines[6] = lines[6][:-5]
    data_file.write_text("\n".join(lines))
    process = start(command(data_file, tmp_path / "run"))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"{data_file}:7" in stderr
    assert not (tmp_path / "run").exists()


def test_another_configuration_does_not_overwrite_a_run(tmp_path: Path, data_file: Path) -> None:
    out = tmp_path / "run"
    finish(start(command(data_file, out, workers=0, steps=4)))
    before = adapter_bytes(out)
    process = start(command(data_file, out, "--set", "method.r=4", workers=0, steps=4))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "another configuration" in stderr
    assert adapter_bytes(out) == before


def test_without_a_cluster_the_default_is_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def workers(**changes: Any) -> int | None:
        return _decided(build_config(flags=changes)).cluster.workers

    assert workers() == 0
    assert workers(**{"cluster.workers": 2}) == 2
    assert workers(**{"strategy.name": "fsdp"}) == 1
    assert workers(**{"cluster.gpus_per_worker": 1}) == 1
    assert workers(**{"cluster.address": "somewhere:6379"}) == 1
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert workers() == 1


def test_workers_get_whole_paths_and_aliases_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "7b", "mine"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", {})
    for name, means in {"tiny": "tiny", "7b": "7b", "./tiny": str(tmp_path / "tiny")}.items():
        assert driver.absolute(build_config(flags={"model.name": name})).model.name == means
    relative = build_config(
        flags={
            "model.name": "mine",
            "data.train": ["a"],
            "data.validation": ["b"],
            "evaluate.suites": ["tiny", "mine", "./tiny", "absent"],
            "evaluate.suites_data_dir": "files",
            "strategy.nvme_path": "disk",
            "out": "run",
        }
    )
    whole = driver.absolute(relative)
    assert whole.model.name == str(tmp_path / "mine")
    assert [whole.data.train, whole.data.validation] == [[str(tmp_path / "a")], [str(tmp_path / "b")]]
    assert whole.evaluate.suites == ["tiny", str(tmp_path / "mine"), str(tmp_path / "tiny"), "absent"]
    assert whole.evaluate.suites_data_dir == str(tmp_path / "files")
    assert whole.strategy.nvme_path == str(tmp_path / "disk")
    assert driver.absolute(whole) == whole
    out = tmp_path / "run"
    write_json(out / "run.json", {"id": "x", "state": "interrupted"})
    (out / "config.yaml").write_text(relative.to_yaml())  # as older versions wrote it
    assert driver._open_run(out, whole)["id"] == "x"


def test_on_one_gpu_it_trains_as_it_is_planned(caplog: pytest.LogCaptureFixture) -> None:
    """What the planner sets beside ddp is taken; what takes Ray is said."""
    gpu = Gpu(GPUS["h100-80gb"].memory, bf16=True)

    def planned(**flags: Any) -> RunConfig:
        sets = {"data.max_length": 4096, "optim.batch_size": 4, **flags}
        return _planned_alone(build_config(flags=sets), gpu)

    lora = planned(**{"model.name": "7b"})
    assert (lora.strategy.name, lora.compute.activation_checkpointing) == ("ddp", True)
    assert not caplog.records
    full = planned(**{"model.name": "7b", "method.name": "full"})
    assert (full.strategy.name, full.strategy.offload_optimizer) == ("ddp", "none")
    assert "--workers 1" in caplog.text


def test_auto_is_planned_in_fp16_where_a_gpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsdp, which would refuse fp16 when it starts, is not chosen."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 * 10**9)
    )
    monkeypatch.setattr("qwen_ray.training.driver.workers_gpu", lambda *_: this_gpu())
    chosen = []
    for bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=bf16: has)
        sets = {"model.name": "7b", "data.max_length": 2048, "optim.batch_size": 1, "cluster.workers": 2}
        resolved = _resolve_strategy(build_config(flags=sets), 1)
        chosen.append(resolved.strategy.name)
        assert resolved.precision == "auto"
    assert chosen == ["fsdp", "deepspeed"]


def test_a_failure_in_this_process_is_one_line_and_a_note(tmp_path: Path, data_file: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoints").write_text("in the way")
    process = start(command(data_file, out, workers=0))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr[-3000:]
    assert stderr.splitlines()[-1].startswith("failed: training failed: "), stderr[-3000:]
    assert "Traceback" in read_json(out / "errors" / "rank-00000.json")["traceback"]


def test_what_is_raised_is_why_it_failed_though_the_disk_is_full(
    tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, value: dict[str, Any]) -> None:
        if value["state"] == "failed":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, value)

    monkeypatch.setattr(driver, "write_json", write)
    with pytest.raises(UserError, match="fsdp shards over workers"):
        driver.run_training(config(data_file, tmp_path, "strategy.name=fsdp"))
    assert read_json(tmp_path / "run.json")["state"] == "running"


def test_where_no_folder_can_be_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="there can be no folder here") as e, driver.locked(out):
            pass
        assert (e.value.where, e.value.fix) == (str(out), "choose another --out")


@pytest.mark.cluster
def test_more_than_the_cluster_has_is_refused_not_awaited(tmp_path: Path, data_file: Path) -> None:
    """Ray itself would wait for the resources for ever."""
    more = ["--set", "cluster.gpus_per_worker=1"]
    process = start(command(data_file, tmp_path / "run", *more, workers=64))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "64 workers with 1 GPU each need 64" in stderr
    assert "fewer workers" in stderr


def test_two_processes_do_not_share_a_run(tmp_path: Path, data_file: Path) -> None:
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    with open(out / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        process = start(command(data_file, out, workers=0))
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "another process is writing" in stderr


def test_a_run_that_fails_does_not_exit_0(tmp_path: Path, data_file: Path) -> None:
    more = [part for s in ("optim.learning_rate=1e30", "optim.max_grad_norm=1e30") for part in ("--set", s)]
    process = start(command(data_file, tmp_path / "run", *more, workers=0))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stdout == ""
    assert "the loss is nan" in stderr or "the loss is inf" in stderr
    assert read_json(tmp_path / "run" / "run.json")["state"] == "failed"


def test_metrics_are_read_as_they_are_appended(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path)
    assert tail.rows() == []
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in tail.rows()] == [1, 2]
    assert tail.rows() == []
    with open(file, "a") as f:
        f.write('ep": 3}\n')
    assert [row["step"] for row in tail.rows()] == [3]
    assert tail.rows() == []


def test_wandb_offline_holds_the_metrics(
    tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    settings = config(data_file, tmp_path, "tracking.wandb=offline")
    tracker = Tracker(tmp_path, settings, "abc123")
    tracker({"step": 1, "loss": 2.5, "eval_loss": 1.25})
    tracker.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/run-abc123.wandb")
    deadline = time.monotonic() + 30  # wandb's own process does the writing
    while b"eval_loss" not in log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"eval_loss" in log.read_bytes()
    assert b"1.25" in log.read_bytes()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [2.5]


def test_wandb_mode_asks_for_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode("auto") == "online"
    assert wandb_mode("off") == "off"


def test_metrics_survive_a_torn_line_and_repeated_steps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    tracker = Tracker(tmp_path, config(tmp_path, tmp_path, "tracking.wandb=off"), "x")
    tracker({"step": 2, "loss": 2.5})
    tracker.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 3), (2, 2.5)]
