"""What facts of machines mean: ok, a warning, or a failure with what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen_ray.doctor.ranges import misfits

State = Literal["ok", "warn", "fail"]
Facts = Mapping[str, Mapping[str, Any]]
"""What :meth:`Probe.facts` found, by node."""
_GIB = 2**30
_CLOCK_WARN, _CLOCK_FAIL = 1.0, 10.0  # seconds; leases and tokens compare the clocks of nodes


@dataclass(frozen=True)
class Check:
    """One question and its answer. ``fix``: what to do, empty where it is ok."""

    name: str
    state: State
    found: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.state:4}  {self.name:9}  {self.found}"
        return f"{text}\n                 do: {self.fix}" if self.fix else text


def judge(facts: Facts, ranges: Mapping[str, str], needed: Sequence[str]) -> list[Check]:
    """The checks that look at one machine at a time. ``needed``: secrets that must be there."""
    return [
        *_versions(facts, ranges),
        _python(facts),
        _gpus(facts),
        _disk(facts),
        _shm(facts),
        _open_files(facts),
        *_secrets(facts, needed),
        _hub(facts),
    ]


def clocks(skews: Mapping[str, float]) -> Check:
    """``skews``: how many seconds each node's clock is ahead of this one's."""
    node, skew = max(skews.items(), key=lambda item: abs(item[1]))
    state: State = "ok" if abs(skew) < _CLOCK_WARN else "warn" if abs(skew) < _CLOCK_FAIL else "fail"
    found = f"{node} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    if state == "ok":
        return Check("clocks", state, f"{len(skews)} nodes agree within {_CLOCK_WARN:g} s")
    return Check("clocks", state, found, "let the nodes keep time (chrony, systemd-timesyncd)")


def network(broken: Mapping[str, str], count: int) -> Check:
    """``broken``: what went wrong, by ``from -> to``."""
    if not broken:
        return Check("network", "ok", f"{count} nodes reach one another on free ports")
    return Check(
        "network",
        "fail",
        listed(broken),
        "allow TCP between the nodes on all ports above 1023: the ranks of a run choose free ones",
    )


def nccl(versions: Mapping[str, str | None]) -> Check:
    """``versions``: NCCL's, of each node with GPUs."""
    if not versions:
        return Check("nccl", "ok", "not needed: no GPU")
    if without := [node for node, found in versions.items() if found is None]:
        fix = "install a torch that was built for CUDA; the driver must be as new as that CUDA asks"
        return Check("nccl", "fail", f"torch has no NCCL, or cannot load it, on {', '.join(without)}", fix)
    different = sorted({str(found) for found in versions.values()})
    if len(different) > 1:
        return Check(
            "nccl", "fail", f"versions {', '.join(different)}", "install the same torch on all nodes"
        )
    return Check("nccl", "ok", different[0])


def storage(location: str, wrote: str | None, problems: Mapping[str, str], count: int) -> Check:
    """``wrote``: what went wrong on the node that wrote; ``problems``: on those that read."""
    if wrote is not None:
        fix = "check the path or URI, its permissions and the keys in the nodes' environment"
        return Check("storage", "fail", f"{location} cannot be written: {wrote}", fix)
    if problems:
        fix = "mount the same file system on every node, or name an object store (s3://, gs://, az://)"
        return Check("storage", "fail", f"{location}: {listed(problems)}", fix)
    return Check("storage", "ok", f"{location}: what one node writes, {count} nodes read")


def _versions(facts: Facts, ranges: Mapping[str, str]) -> list[Check]:
    wrong = {
        node: "; ".join(found) for node, one in facts.items() if (found := misfits(ranges, one["packages"]))
    }
    if wrong:
        fix = "install qwen-ray with its requirements there, or use its image"
        return [Check("versions", "fail", listed(wrong), fix)]
    different = [
        f"{name} {', '.join(sorted(map(str, versions)))}"
        for name in ("qwen-ray", *sorted(ranges))
        if len(versions := {one["packages"].get(name) for one in facts.values()}) > 1
    ]
    if different:
        fix = "use one image, or one lock file, for all nodes"
        return [Check("versions", "warn", f"nodes differ: {'; '.join(different)}", fix)]
    some = next(iter(facts.values()))["packages"]
    shown = ", ".join(f"{name} {some[name]}" for name in ("qwen-ray", "ray", "torch") if some.get(name))
    return [Check("versions", "ok", f"{shown} and {max(0, len(some) - 3)} others on {len(facts)} nodes")]


def _python(facts: Facts) -> Check:
    minors = {".".join(one["python"].split(".")[:2]) for one in facts.values()}
    if len(minors) > 1:
        fix = "use one image for all nodes: Ray refuses what another Python pickled"
        return Check("python", "fail", f"versions {', '.join(sorted(minors))}", fix)
    return Check("python", "ok", next(iter(facts.values()))["python"])


def _gpus(facts: Facts) -> Check:
    promised = {node: one["ray_gpus"] for node, one in facts.items() if one.get("ray_gpus")}
    if without := [node for node in promised if not facts[node]["gpus"]]:
        fix = "install the NVIDIA driver and container toolkit there, or start Ray with --num-gpus 0"
        return Check("gpus", "fail", f"Ray counts GPUs where nvidia-smi sees none: {', '.join(without)}", fix)
    found = [gpu for one in facts.values() for gpu in one["gpus"]]
    if not found:
        return Check("gpus", "ok", "none: training and serving use CPUs")
    unused = [node for node, one in facts.items() if one["gpus"] and not one.get("ray_gpus", 1)]
    if unused:
        return Check("gpus", "warn", f"not known to Ray on {', '.join(unused)}", "start Ray with --num-gpus")
    if len(drivers := sorted({gpu["driver"] for gpu in found})) > 1:
        return Check("gpus", "warn", f"drivers {', '.join(drivers)}", "install one driver everywhere")
    kinds = sorted({gpu["name"] for gpu in found})
    return Check("gpus", "ok", f"{len(found)} ({', '.join(kinds)}), driver {drivers[0]}")


def _disk(facts: Facts) -> Check:
    node, path, free = min(
        ((node, path, free) for node, one in facts.items() for path, free in one["disk"].items()),
        key=lambda row: row[2],
    )
    found = f"{free / _GIB:.1f} GiB free in {path} of {node}"
    if free < 10 * _GIB:
        fix = "make room: models and Ray's session are kept there (HF_HOME and --temp-dir move them)"
        return Check("disk", "fail" if free < _GIB else "warn", found, fix)
    return Check("disk", "ok", f"at least {found}")


def _shm(facts: Facts) -> Check:
    sizes = {node: one["shm"] or 0 for node, one in facts.items()}
    node = min(sizes, key=lambda key: sizes[key])
    found = f"{sizes[node] / _GIB:.1f} GiB free in /dev/shm of {node}"
    if sizes[node] < _GIB:
        fix = (
            "give the container more shared memory (--shm-size, or an emptyDir of medium Memory at /dev/shm)"
        )
        return Check("shm", "warn", found, fix)
    return Check("shm", "ok", f"at least {found}")


def _open_files(facts: Facts) -> Check:
    limits = {node: one["open_files"] for node, one in facts.items()}
    node = min(limits, key=lambda key: limits[key] if limits[key] >= 0 else float("inf"))
    found = f"{'no limit' if limits[node] < 0 else limits[node]} on {node}"
    if 0 <= limits[node] < 4096:
        return Check("ulimit", "warn", f"open files: {found}", "ulimit -n 65536 before `ray start`")
    return Check("ulimit", "ok", f"open files: at least {found}")


def _secrets(facts: Facts, needed: Sequence[str]) -> list[Check]:
    checks = []
    for name in next(iter(facts.values()))["secrets"]:
        without = [node for node, one in facts.items() if not one["secrets"][name]]
        if not without:
            checks.append(Check("secret", "ok", f"{name} is set on {len(facts)} nodes"))
        elif name in needed or len(without) < len(facts):
            fix = "start Ray with it in its environment, or mount a file of that name in /run/secrets"
            state: State = "fail" if name in needed else "warn"
            checks.append(Check("secret", state, f"{name} is not set on {', '.join(without)}", fix))
        else:
            checks.append(Check("secret", "ok", f"{name} is not set: what asks for it is not used"))
    return checks


def _hub(facts: Facts) -> Check:
    answers = {node: one["hub"] for node, one in facts.items()}
    if all(answer == "offline" for answer in answers.values()):
        return Check("hub", "ok", "offline: models come from the nodes' cache or from folders")
    if wrong := {node: answer for node, answer in answers.items() if answer not in {"reachable", "offline"}}:
        fix = "allow HTTPS to the hub, or name a mirror (HF_ENDPOINT); without one: HF_HUB_OFFLINE=1"
        return Check("hub", "warn", listed(wrong), fix)
    return Check("hub", "ok", "reachable")


def listed(by_node: Mapping[str, str]) -> str:
    """``a, b: why; c: why else``."""
    nodes: dict[str, list[str]] = {}
    for node, why in by_node.items():
        nodes.setdefault(why, []).append(node)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in nodes.items())
