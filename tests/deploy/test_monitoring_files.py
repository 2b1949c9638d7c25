"""What is written about the metrics is what there is."""

import json
import re
import runpy
from pathlib import Path

import pytest

from skfac.service.metrics import Metrics
from skfac.v1 import preconditioning_pb2 as pb

ROOT = Path(__file__).parent.parent.parent
RULES = (ROOT / "deploy/helm/skfac/files/rules.yaml").read_text()
RULES_TEST = (ROOT / "tests/monitoring/rules_test.yaml").read_text()
DASHBOARD = (ROOT / "deploy/helm/skfac/files/dashboard.json").read_text()
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
ALERTS = re.findall(r"- alert: (\w+)", RULES)

# Only with TLS: set where the certificate is read.


def exported() -> set[str]:
    """Every name that a query may use."""
    suffixes = {
        "counter": ["_total"],
        "gauge": [""],
        "histogram": ["_bucket", "_sum", "_count"],
    }
    families = Metrics().registry.collect()
    return {f.name + s for f in families for s in suffixes.get(f.type, [])}


@pytest.mark.parametrize(
    ("script", "target"),
    [
        ("metrics_reference.py", "docs/metrics.md"),
        ("dashboard.py", "deploy/helm/skfac/files/dashboard.json"),
    ],
)
def test_what_is_generated_is_fresh(script, target):
    made = runpy.run_path(str(ROOT / "deploy/tools" / script))["written"]()

    assert (ROOT / target).read_text() == made, "run 'make docs'"


@pytest.mark.parametrize(
    "text", [RULES, DASHBOARD, RUNBOOK], ids=["rules", "dashboard", "runbook"]
)
def test_only_metrics_that_exist_are_asked_for(text):
    asked = set(re.findall(r"(?<![:\w])skfac_[a-z_]+[a-z](?![:\w])", text))
    recorded = set(re.findall(r"\w+:(skfac_\w+):", RULES))

    assert len(asked) > 5
    if text is RUNBOOK:  # for people: a histogram as such
        recorded |= {family.name for family in Metrics().registry.collect()}
    assert asked <= exported() | recorded


def test_every_alert_has_an_entry_a_link_and_tests():
    assert len(ALERTS) == 11
    entries = re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)
    assert entries == ALERTS
    links = re.findall(r"runbook_url: docs/runbook.md#(\w+)", RULES)
    assert links == [name.lower() for name in ALERTS]
    for part in RUNBOOK.split("\n## ")[1:]:
        assert re.findall(r"^\*\*(.+?)\*\*", part, re.MULTILINE) == [
            *("Means", "Look at", "Do")
        ]
    for name in ALERTS:
        _, *tests = RULES_TEST.split(f"alertname: {name}\n")
        quiet = ["exp_alerts: []" in t.split("- alertname")[0] for t in tests]
        assert False in quiet, f"{name} is never seen to fire"
        assert True in quiet, f"{name} is never seen not to fire"


def test_calls_that_the_runbook_names_are_those_of_the_protocol():
    services = pb.DESCRIPTOR.services_by_name.values()
    calls = {method.name for service in services for method in service.methods}
    named = set(re.findall(r'call="(\w+)"', RUNBOOK))

    assert named == {"ImportState"}
    assert named <= calls


def test_every_panel_has_its_place():
    panels = json.loads(DASHBOARD)["panels"]
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], sum(map(panel["gridPos"].get, "xw")))
        for y in range(panel["gridPos"]["y"], sum(map(panel["gridPos"].get, "yh")))
    ]

    assert len(set(taken)) == len(taken)
    assert len({panel["id"] for panel in panels}) == len(panels)
