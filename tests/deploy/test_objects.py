"""Every object that can be rendered is one that Kubernetes and the operators know."""

import copy

import pytest

from tests.support.chart import CHART, ROOT, errors_of, helm, objects, only, rendered

CASES = sorted((CHART / "ci").glob("*-values.yaml"))
RAY = ROOT / "deploy/ray/skfac.yaml"


@pytest.fixture(scope="module")
def everything():
    return rendered("-f", CHART / "ci/everything-values.yaml")


def test_lint():
    values = [flag for case in CASES for flag in ("-f", str(case))]
    for arguments in ([], ["-f", CHART / "ci/insecure-values.yaml"], values):
        ran = helm("lint", "--strict", CHART, *arguments)
        assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_every_object_is_valid(case):
    found = rendered("-f", case)
    assert errors_of(found) == []
    assert len({(o["kind"], o["metadata"]["name"]) for o in found}) == len(found)


def test_everything_is_everything(everything):
    assert {o["kind"] for o in everything} == {
        "ConfigMap", "NetworkPolicy", "Pod", "PodDisruptionBudget", "PrometheusRule",
        "ScaledObject", "Service", "ServiceAccount", "ServiceMonitor", "StatefulSet",
    }  # fmt: skip


def test_the_manifest_for_kuberay_is_valid():
    found = objects(RAY.read_text())
    assert [o["kind"] for o in found] == ["RayCluster", "RayJob"]
    assert errors_of(found) == []


BREAKS = {
    "StatefulSet": ("template", "spec", "containers", 0, "readinessProbe"),
    "NetworkPolicy": ("ingress", 0),
    "PodDisruptionBudget": (),
    "Service": ("ports", 0),
    "ServiceMonitor": ("endpoints", 0),
    "PrometheusRule": ("groups", 0, "rules", 0),
    "ScaledObject": ("triggers", 0),
    "RayCluster": ("workerGroupSpecs", 0, "template", "spec", "containers", 0),
    "RayJob": (),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_misspelt_field_is_found(kind, everything):
    known = [*everything, *objects(RAY.read_text())]
    one = copy.deepcopy(next(o for o in known if o["kind"] == kind))
    place = one["spec"]
    for key in BREAKS[kind]:
        place = place[key]
    place["colour"] = "red"

    (error,) = errors_of([one])
    assert "colour" in error


@pytest.mark.parametrize("kind", BREAKS)
def test_a_value_of_the_wrong_type_is_found(kind, everything):
    known = [*everything, *objects(RAY.read_text())]
    one = next(o for o in known if o["kind"] == kind)
    first = next(iter(one["spec"]))
    assert errors_of([{**one, "spec": {**one["spec"], first: 1.5}}])


def test_an_unknown_kind_is_no_valid_one(everything):
    service = {**only(everything, "Service", "prod-skfac"), "kind": "Serving"}
    with pytest.raises(AssertionError, match="no schema of v1 Serving"):
        errors_of([service])
