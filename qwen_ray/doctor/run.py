"""Asking this machine, or every node of a cluster, what :mod:`qwen_ray.doctor.checks` judges."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen_ray import __version__
from qwen_ray.doctor import checks, probe
from qwen_ray.doctor.checks import Check
from qwen_ray.doctor.ranges import required
from qwen_ray.errors import UserError

SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
"""Looked for on every node, whether or not they are needed."""
_SECONDS = 120.0  # for one question to all nodes
Note = Callable[[str], None]


def examine(
    address: str | None, *, storage: str | None, needed: Sequence[str], note: Note, python: str = "python"
) -> list[Check]:
    """Every check. ``address``: a Ray cluster that this machine is part of (``HOST:6379``, ``auto``;
    default $RAY_ADDRESS), or the job server of another (``http://HEAD:8265``), where the checks then run as
    a job under ``python``. Without one: this machine alone.
    """
    if storage is not None and "://" not in storage and not Path(storage).is_absolute():
        raise UserError(
            f"'{storage}' is another folder on each node", where="--storage", fix="an absolute path, or a URI"
        )
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return _here(storage, needed)
    if address.startswith(("http://", "https://")):
        return _as_job(address, storage, needed, note, python)
    return _on_cluster(address, storage, needed, note)


def _packages(ranges: dict[str, str]) -> list[str]:
    return ["qwen-ray", *ranges]


def _secrets(needed: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*needed, *SECRETS]))


def _here(storage: str | None, needed: Sequence[str]) -> list[Check]:
    ranges, one = required(), probe.Probe()
    facts = one.facts(_packages(ranges), _secrets(needed))
    host = facts["host"]
    found = checks.judge({host: facts}, ranges, needed)
    found.append(checks.nccl({host: one.nccl()} if facts["gpus"] else {}))
    if storage is not None:
        key, data = _document()
        wrote = one.write(storage, key, data)
        back = one.read(storage, key) if wrote is None else data
        if wrote is None:
            one.delete(storage, key)
        found.append(checks.storage(storage, wrote, {} if back == data else {host: str(back)}, 1))
    return found


def _on_cluster(address: str, storage: str | None, needed: Sequence[str], note: Note) -> list[Check]:
    from qwen_ray import cluster

    cluster.prepare(address)
    import ray

    try:
        cluster.connect(address)
        return _of_nodes(storage, needed, note)
    except ray.exceptions.RayError as e:  # such as a node that is lost meanwhile, or a wrong token
        raise RuntimeError(f"the checks were broken off: {str(e).strip().splitlines()[-1]}") from e


def _of_nodes(storage: str | None, needed: Sequence[str], note: Note) -> list[Check]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _names([node for node in ray.nodes() if node["Alive"]])
    note(f"asking {len(nodes)} nodes")
    ray.cloudpickle.register_pickle_by_value(probe)
    try:
        kind = ray.remote(num_cpus=0)(probe.Probe)
        probes = {
            name: kind.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for name, node in nodes.items()
        }
        ranges = required()
        asked = {name: p.facts.remote(_packages(ranges), _secrets(needed)) for name, p in probes.items()}
        facts, silent = _answers(asked)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(probe)
    found = [Check("nodes", "ok", f"{len(facts)} answer")]
    if silent:
        fix = "look at `ray status` and at the logs of that node"
        found = [Check("nodes", "fail", checks.listed(silent), fix)]
    if not facts:
        return found
    for name, one in facts.items():
        one["ray_gpus"] = nodes[name]["Resources"].get("GPU", 0)
    probes = {name: probes[name] for name in facts}
    found += checks.judge(facts, ranges, needed)
    found.append(checks.clocks({name: _skew(p) for name, p in probes.items()}))
    found.append(_network(probes, nodes))
    found.append(
        checks.nccl(_answers({n: p.nccl.remote() for n, p in probes.items() if facts[n]["gpus"]})[0])
    )
    if storage is not None:
        found.append(_storage(storage, probes))
    return found


def _names(nodes: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Nodes by host, with a part of the node's id where a host has several."""
    hosts = [node["NodeManagerHostname"] for node in nodes]
    return {
        host if hosts.count(host) == 1 else f"{host}/{node['NodeID'][:6]}": node
        for host, node in zip(hosts, nodes, strict=True)
    }


def _answers(asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The answers that came in time, and why the others did not."""
    import ray

    answers, silent, deadline = dict[str, Any](), dict[str, str](), time.monotonic() + _SECONDS
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            silent[name] = f"no answer within {_SECONDS:g} s"
        except ray.exceptions.RayError as e:
            silent[name] = str(e).strip().splitlines()[-1][:300]
    return answers, silent


def _skew(node: Any) -> float:
    """How many seconds a node's clock is ahead, of three tries the one that took least."""
    import ray

    tries = []
    for _ in range(3):
        before = time.time()
        there = ray.get(node.clock.remote(), timeout=_SECONDS)
        after = time.time()
        tries.append((after - before, there - (before + after) / 2))
    return float(min(tries)[1])


def _network(probes: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> Check:
    """Each node connects to the next one."""
    import ray

    hosts = {name: nodes[name]["NodeManagerAddress"] for name in probes}
    ports = ray.get([p.listen.remote(hosts[name]) for name, p in probes.items()], timeout=_SECONDS)
    names = list(probes)
    pairs = {f"{a} to {b}": (a, b) for a, b in zip(names, [*names[1:], names[0]], strict=True)}
    port = dict(zip(names, ports, strict=True))
    asked = {pair: probes[a].connect.remote(hosts[b], port[b]) for pair, (a, b) in pairs.items()}
    answers, silent = _answers(asked)
    return checks.network({**{k: why for k, why in answers.items() if why}, **silent}, len(names))


def _storage(location: str, probes: dict[str, Any]) -> Check:
    """One node writes, the others read."""
    import ray

    key, data = _document()
    (_, writer), *others = probes.items()
    wrote = ray.get(writer.write.remote(location, key, data), timeout=_SECONDS)
    if wrote is not None:
        return checks.storage(location, wrote, {}, 0)
    readers = dict(others) or dict(probes)
    answers, silent = _answers({name: p.read.remote(location, key) for name, p in readers.items()})
    ray.get(writer.delete.remote(location, key), timeout=_SECONDS)
    problems = {name: str(back) for name, back in answers.items() if back != data}
    return checks.storage(location, None, {**problems, **silent}, len(readers))


def _document() -> tuple[str, bytes]:
    name = uuid.uuid4().hex
    return f"doctor-{name}", name.encode()


def _as_job(address: str, storage: str | None, needed: Sequence[str], note: Note, python: str) -> list[Check]:
    """The checks on the cluster's nodes, run there as a job."""
    from qwen_ray.jobs.api import JobsApi
    from qwen_ray.jobs.follow import follow, outcome
    from qwen_ray.jobs.submit import shell_command

    words = [python, "-m", "qwen_ray.cli", "doctor", "--json"]
    words += ["--storage", storage] if storage else []
    words += [word for name in needed for word in ("--env", name)]
    with JobsApi(address) as api:
        try:
            theirs = api.check()
        except UserError as e:
            return [Check("server", "fail", f"{e.where}: {e.what}", e.fix)]
        job_id = f"doctor-{uuid.uuid4().hex[:8]}"
        api.submit({"entrypoint": shell_command(words), "submission_id": job_id, "runtime_env": {}})
        note(f"{job_id} asks the nodes")
        log: list[str] = []
        job = follow(api, api.job(job_id), write=log.append, note=note)
    text = "".join(log)
    rows = _result(text)
    if rows is None:
        raise RuntimeError(f"the checks could not be run on the cluster: {outcome(job, text)[1]}")
    reached = Check("server", "ok", f"{api.address} answers, with Ray {theirs}")
    mine = [Check(**row) for row in rows]
    return [reached, *_same_qwen_ray(mine), *mine]


def _result(log: str) -> list[dict[str, Any]] | None:
    """What the verb printed as JSON, among whatever else is in its log: it begins at a line that is "["."""
    for start in reversed([found.start() for found in re.finditer(r"^\[$", log, re.MULTILINE)]):
        try:
            rows: list[dict[str, Any]] = json.JSONDecoder().raw_decode(log, start)[0]
        except json.JSONDecodeError:
            continue
        return rows
    return None


def _same_qwen_ray(there: Sequence[Check]) -> list[Check]:
    """Whether the cluster has the qwen-ray that is here: the jobs of another are refused there."""
    versions = next((check for check in there if check.name == "versions"), None)
    if versions is None or versions.state != "ok" or f"qwen-ray {__version__}" in versions.found:
        return []
    fix = "install the same version on both sides, or submit with --install"
    return [Check("versions", "fail", f"here is qwen-ray {__version__}, there: {versions.found}", fix)]
