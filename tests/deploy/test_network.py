"""Who finds the servers of the chart, and whom their NetworkPolicies let in."""

import pytest
import yaml

from tests.support.chart import CHART, Object, only, rendered

CASES = sorted((CHART / "ci").glob("*-values.yaml"))
EVERYTHING = CHART / "ci/everything-values.yaml"
NAME, HEADLESS = "prod-skfac", "prod-skfac-headless"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_services_say_clear_text_only_where_it_is(case):
    found = rendered("-f", case)
    expected = (
        None if "tls" in yaml.safe_load(case.read_text()) else "kubernetes.io/h2c"
    )
    for name in (NAME, HEADLESS):
        grpc, *_ = only(found, "Service", name)["spec"]["ports"]
        assert grpc["name"] == "grpc"
        assert grpc.get("appProtocol") == expected


def admitted(policy: Object, labels: dict[str, str]) -> set[str]:
    """The ports that a policy lets a pod of the namespace reach."""
    return {
        port["port"]
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        for port in rule["ports"]
        if set(peer) == {"podSelector"}
        and peer["podSelector"].get("matchLabels", {}).items() <= labels.items()
    }


def test_the_test_is_let_in_while_it_runs_and_nobody_else():
    trainers = "networkPolicy.clients[0].podSelector.matchLabels.role=trainer"
    found = rendered("--set", "insecureRemote=true", "--set", trainers)
    lasting = only(found, "NetworkPolicy", NAME)
    passing = only(found, "NetworkPolicy", f"{NAME}-test")
    test = only(found, "Pod")["metadata"]
    server = only(found, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    stranger = only(found, "ServiceAccount")["metadata"]["labels"]  # of the release

    assert passing["spec"]["podSelector"] == lasting["spec"]["podSelector"]
    assert passing["spec"]["policyTypes"] == ["Ingress"]  # egress stays as it is
    assert admitted(passing, test["labels"]) == {"grpc"}
    assert admitted(lasting, {"role": "trainer"}) == {"grpc"}
    assert not admitted(lasting, test["labels"])
    for others in (server, stranger, {"role": "trainer"}):
        assert not admitted(passing, others)
    made = passing["metadata"]["annotations"]
    assert made["helm.sh/hook"] == test["annotations"]["helm.sh/hook"] == "test"
    weight = int(test["annotations"].get("helm.sh/hook-weight", 0))
    assert int(made["helm.sh/hook-weight"]) < weight
    assert "hook-succeeded" in made["helm.sh/hook-delete-policy"]


def test_without_a_policy_the_test_makes_none():
    found = rendered("-f", CHART / "ci/no-network-policy-values.yaml")
    assert [o for o in found if o["kind"] == "NetworkPolicy"] == []


def test_selectors_find_the_pods_and_nothing_else():
    found = rendered("-f", EVERYTHING)
    labels = only(found, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    test = only(found, "Pod")["metadata"]["labels"]
    selectors = [
        only(found, "Service", n)["spec"]["selector"] for n in (NAME, HEADLESS)
    ]
    selectors += [
        only(found, kind, NAME)["spec"][field]["matchLabels"]
        for kind, field in (
            ("StatefulSet", "selector"),
            ("PodDisruptionBudget", "selector"),
            ("NetworkPolicy", "podSelector"),
        )
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= test.items()


def test_one_service_is_scraped_and_its_job_says_skfac():
    found = rendered("-f", EVERYTHING)
    monitor = only(found, "ServiceMonitor")["spec"]
    services = [
        o
        for o in found
        if o["kind"] == "Service"
        and monitor["selector"]["matchLabels"].items()
        <= o["metadata"]["labels"].items()
    ]
    (service,) = services
    assert service["metadata"]["name"] == HEADLESS
    assert "skfac" in service["metadata"]["labels"][monitor["jobLabel"]]
    ports = [port["name"] for port in service["spec"]["ports"]]
    assert [e["port"] in ports for e in monitor["endpoints"]] == [True]
