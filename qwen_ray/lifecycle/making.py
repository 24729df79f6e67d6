"""The stages of a pipeline that make a version: train or sweep, and register."""

from __future__ import annotations

from pathlib import Path

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, sha256_json
from qwen_ray.lifecycle.stages import Context, Json, Made
from qwen_ray.lifecycle.state import digest, hashes
from qwen_ray.registry import LINEAGE, Registry

# -- train


def train_inputs(context: Context) -> Json:
    """Without what decides nothing about the result, such as the number of machines."""
    from qwen_ray.training.driver import decides

    spec, data = context.spec, context.outputs["prepare"]["data"]
    return {
        "config": decides(spec.train_config(data, spec.folder())),
        "data": [digest(Path(path)) for path in data],
        "base": models.fingerprint(spec.model),
    }


def train(context: Context, inputs: Json) -> Made:
    from qwen_ray.training.driver import ProgressBar, run_training

    spec, key = context.spec, sha256_json(inputs)[:16]
    config = spec.train_config(context.outputs["prepare"]["data"], spec.folder("train", key))
    if spec.run_on and "train" in spec.run_on.stages:
        from qwen_ray.lifecycle.remote import run_job

        tree = config.model_dump(mode="json")
        run_job(context, "train", tree, ["train", "--config"], key, leaves=Path(config.out, "adapter"))
    bar = ProgressBar()

    def progress(row: Json) -> None:
        bar(row)
        context.reached("train: step")

    try:
        trained = run_training(config, progress=progress)
    finally:
        bar.close()
    context.note(f"  {trained.steps} steps, loss {trained.loss:.4f}")
    cost = {"seconds": trained.seconds, "gpus": trained.gpus}
    outputs = {
        "adapter": str(trained.artifact),
        "steps": trained.steps,
        "loss": trained.loss,
        "cost": cost,
    }
    return Made(outputs, hashes(trained.artifact))


# -- sweep


def sweep_inputs(context: Context) -> Json:
    data = context.outputs["prepare"]["data"]
    return {
        "sweep": context.spec.sweep_spec().model_dump(mode="json", exclude={"out"}),
        "data": [digest(Path(path)) for path in data],
        "base": models.fingerprint(context.spec.model),
    }


def sweep(context: Context, inputs: Json) -> Made:
    """The winner's version in the sweep's own registry; no adapter if no trial kept the strengths."""
    from qwen_ray.sweeps.driver import REGISTRY, run_sweep
    from qwen_ray.sweeps.folder import STATE
    from qwen_ray.sweeps.outcome import RESULT

    spec, key = context.spec, sha256_json(inputs)[:16]
    out = spec.folder("sweep", key)
    data = context.outputs["prepare"]["data"]
    settings = spec.sweep_spec(data).model_copy(update={"out": str(out)})
    if spec.run_on and "sweep" in spec.run_on.stages:
        from qwen_ray.lifecycle.remote import run_job

        resume = ["--resume"] if (out / STATE).is_file() else []
        tree = settings.model_dump(mode="json")
        run_job(context, "sweep", tree, ["sweep", *resume], key, leaves=out / RESULT)
    begun = (out / STATE).is_file()
    done = run_sweep(settings, resume=begun, note=context.note, address=spec.endpoint.address)
    if done.winner is None:
        return Made({"adapter": None})
    found = Registry(out / REGISTRY).get(spec.name, int(done.result["registered"].rpartition("@")[2]))
    return Made({"adapter": str(found.path), "sweep": done.result["id"]}, hashes(found.path))


# -- register


def register_inputs(context: Context) -> Json:
    spec = context.spec
    making = context.outputs["sweep" if spec.sweep else "train"]
    return {
        "registry": spec.registry,
        "name": spec.name,
        "adapter": digest(Path(making["adapter"])),
        "manifests": context.outputs["prepare"]["manifests"],
    }


def register(context: Context, inputs: Json) -> Made:
    """Publishing the same files and lineage again gives the version that is there."""
    making = context.outputs["sweep" if context.spec.sweep else "train"]
    adapter = Path(making["adapter"])
    lineage = read_json(adapter / LINEAGE)
    if inputs["manifests"]:
        lineage["prepared"] = inputs["manifests"]
    version = context.registry.publish(context.spec.name, adapter, lineage)
    notes = context.registry.events(version.name, version=version.version, kind="note")
    if "cost" in making and not any("cost" in note.value for note in notes):
        # Not in the lineage: the same training again takes other seconds, and is the same version.
        context.registry.record(version.name, version.version, "note", {"cost": making["cost"]})
    context.reached("register: published")
    context.note(f"  {version.ref}")
    return Made({"version": version.version, "ref": version.ref})


def there(context: Context, name: str) -> bool:
    """Whether a registered version is still in the registry."""
    try:
        context.registry.get(context.spec.name, int(name))
    except UserError as e:
        if e.status != 404:
            raise
        return False
    return True
