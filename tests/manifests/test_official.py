"""KubeRay's own samples, and whether the packed definitions are those of its release."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from qwen_ray.manifests import pack, schema
from qwen_ray.manifests.check import check

SAMPLES = Path(__file__).parent / "kuberay-samples.yaml.gz"
SHARED = Path(__file__).parents[3] / "shared" / "schemas"


def test_all_89_official_samples_pass_as_the_api_server_and_the_operator_take_them(tmp_path):
    file = tmp_path / "samples.yaml"
    file.write_bytes(gzip.decompress(SAMPLES.read_bytes()))

    report = check([str(file)], profile="api")

    assert [str(fault) for fault in report.faults] == []
    assert len(report.checked) == 89
    assert report.not_checked == []


def test_a_sample_with_a_field_that_does_not_exist_does_not_pass(tmp_path):
    file = tmp_path / "samples.yaml"
    text = gzip.decompress(SAMPLES.read_bytes()).decode()
    assert text.count("enableInTreeAutoscaling:") > 1
    file.write_text(text.replace("enableInTreeAutoscaling:", "enableInTreeAutoscalling:", 1))

    faults = check([str(file)], profile="api").faults

    assert [fault.rule for fault in faults] == ["unknown-field"]
    assert "did you mean 'enableInTreeAutoscaling'?" in faults[0].fix


def test_the_production_profile_is_for_production_only(tmp_path):
    file = tmp_path / "samples.yaml"
    file.write_bytes(gzip.decompress(SAMPLES.read_bytes()))

    rules = {fault.rule for fault in check([str(file)], profile="production").faults}

    assert {"run-as-non-root", "token-auth", "disruption-budget", "job-deadline", "feature-gate"} <= rules


# The releases' own files are megabytes, which the repository does not hold: what is packed is made of them,
# and every other test here runs on the packed ones.
@pytest.mark.skipif(not SHARED.is_dir(), reason="the releases' CRD files are not here")
def test_the_packed_definitions_are_those_of_the_releases():
    files = pack.packed(sorted(SHARED.rglob("crds/*.yaml")))

    assert {name: (schema.FOLDER / name).read_bytes() for name in files} == files
    kept = {path.name for path in schema.FOLDER.iterdir()} - {"LICENSE", "NOTICE", "README.md"}
    assert kept == set(files)


def test_there_is_a_definition_for_every_kind_that_we_ship():
    kinds = {kind for _, kind in schema.kinds()}

    assert {"RayCluster", "RayJob", "RayService", "RayCronJob"} <= kinds
    assert {"ClusterQueue", "LocalQueue", "ResourceFlavor", "Queue", "PodMonitor", "PrometheusRule"} <= kinds
