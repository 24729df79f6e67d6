"""The verb `qwen-ray manifests check`: what it takes and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK
from qwen_ray.options import example, group, verb
from qwen_ray.verbs import Output

if TYPE_CHECKING:
    from qwen_ray.manifests.check import Report


def add(verbs: Any) -> None:
    manifests = group(verbs, "manifests", "Kubernetes manifests, Serve configs, cluster-launcher files")
    p = verb(manifests, "check", check, "what a cluster would refuse, or should; exit 3: there is something")
    example(
        p,
        "qwen-ray manifests check k8s/overlays/gpu serve cluster",
        "qwen-ray manifests check job.yaml --profile api",
        "qwen-ray manifests check - < rendered.yaml",
    )
    p.add_argument("path", nargs="+", help="files, folders (kustomizations are rendered), - for stdin")
    p.add_argument(
        "--profile",
        choices=["api", "production"],
        default="production",
        help="api: what is refused; production: also what is unsafe or unsound (%(default)s)",
    )
    p.add_argument(
        "--operator-values",
        metavar="FILE",
        help="values of the KubeRay operator's Helm chart, for its feature gates (the chart's defaults)",
    )


def check(args: argparse.Namespace, output: Output) -> int:
    from qwen_ray.manifests.check import check

    values = Path(args.operator_values) if args.operator_values else None
    report = check(args.path, profile=args.profile, operator_values=values)
    output.result(report.to_dict(), _text(report))
    return EXIT_GATE_SAID_NO if report.faults else EXIT_OK


def _text(report: Report) -> str:
    lines = [str(fault) for fault in report.faults]
    lines += [f"not checked: {what}" for what in report.not_checked]
    if report.secrets:
        lines.append(f"Secrets to make before: {', '.join(report.secrets)}")
    faults = f"{len(report.faults)} fault{'' if len(report.faults) == 1 else 's'}"
    lines.append(f"{len(report.checked)} checked ({report.profile}), {faults}")
    return "\n".join(lines)
