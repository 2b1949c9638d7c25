"""A real Prometheus scrapes a real server that a trainer uses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch

from skfac.client import Credentials, Preconditioner
from tests.support.authority import Authority
from tests.support.authority import replace as replace_file
from tests.support.models import backward, sgd, small_cnn
from tests.support.prometheus import RULES, prometheus, promtool
from tests.support.raw_client import RawClient, snapshot_of, spec_of
from tests.support.servers import ServerProcess

pytestmark = [pytest.mark.monitoring, pytest.mark.timeout(300)]

DASHBOARD = json.loads(RULES.with_name("dashboard.json").read_text())
LAG, EVERY, STEPS = 1, 4, 48
REPORTED = STEPS - EVERY - LAG  # those before the last snapshot that had versions


def queries() -> dict[str, str]:
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }


def filled(expression: str) -> str:
    """A query of the dashboard as Grafana sends it."""
    return (
        expression.replace("$__rate_interval", "1m")
        .replace("$instance", ".*")
        .replace("$session", ".*")
    )


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A Prometheus and the address of the server that it scrapes, while both train."""
    folder = tmp_path_factory.mktemp("prometheus")
    authority = Authority(folder)
    settings = {**authority.server(), "max_sessions": "2"}
    with (
        ServerProcess(metrics_address="127.0.0.1:0", **settings) as server,
        prometheus(folder, server.metrics_address) as asked,
    ):
        asked.wait_for("skfac_sessions")  # else the first counts have no increase
        credentials = Credentials(root_ca=str(authority.file))
        train(server.address, credentials, asked)
        fail(server.address, credentials, asked)
        asked.wait_for("rate(skfac_outcomes_total{outcome='failed'}[1m]) > 0")
        replace_file(Path(settings["tls_certificate"]), "no certificate")
        yield asked


def train(target: str, credentials: Credentials, asked) -> None:
    model = small_cnn()
    optimizer = sgd(model)
    settings = {"job": "trainer", "lag": LAG, "update_every": EVERY, "on_late": "wait"}
    with Preconditioner(
        model, optimizer, target=target, credentials=credentials, **settings
    ) as pre:
        for step in range(STEPS):
            backward(model, step)
            pre.step()
            optimizer.step()
            optimizer.zero_grad()
            if step == 4:  # the series are there: from now on they increase
                asked.wait_for("skfac_staleness_steps_count{session='trainer'}")
        asked.wait_for(
            "skfac_staleness_steps_count{session='trainer'}",
            lambda found: found[0][1] == REPORTED,
        )


def fail(address: str, credentials: Credentials, asked) -> None:
    """A job with rows that no damping helps, one that is refused, one too many."""
    spec = spec_of("failing")
    with RawClient(address, spec, credentials=credentials) as client:
        asked.wait_for("skfac_outcomes_total{session='failing'}")  # at 0
        sent = snapshot_of(spec, 0)
        huge = tuple(
            replace(
                rows,
                activations=rows.activations * 1e18,
                derivatives=rows.derivatives * 1e18,
            )
            for rows in sent.layers
        )
        client.push(*client.frames(replace(sent, layers=huge)))
        client.outcomes(2)
        bad = replace(sent.layers[0], activations=torch.full((4, 6), math.nan))
        client.push(*client.frames(replace(sent, step=1, layers=(bad,))))
        with (
            RawClient(address, spec_of("second"), credentials=credentials),
            pytest.raises(grpc.RpcError, match="max_sessions = 2"),
        ):
            RawClient(address, spec_of("third"), credentials=credentials)


def test_latency_has_quantiles(watched):
    for share in ("p50", "p99"):
        rule = f"instance_session:skfac_inversion_seconds:{share}_rate5m"
        found = watched.wait_for(
            f"{rule}{{session='trainer'}}",
            lambda samples: samples and samples[0][1] > 0,
        )
        assert 5e-5 / 2 <= found[0][1] <= 30.0
    buckets = "skfac_inversion_seconds_bucket{session='trainer'}"
    direct = f"histogram_quantile(0.5, sum by (le) (rate({buckets}[5m])))"
    assert 0 < watched.query(direct)[0][1] <= 30.0
    ((_, count),) = watched.query("skfac_inversion_seconds_count{session='trainer'}")
    assert count == 4 * STEPS / EVERY


def test_the_parts_of_the_latency_are_there(watched):
    stages = watched.query("skfac_stage_seconds_count{session='trainer'} > 0")
    assert {labels["stage"] for labels, _ in stages} == {
        *("assemble", "queue", "solve", "publish")
    }
    assert watched.query("skfac_receive_seconds_count > 0")
    assert watched.query("skfac_end_to_end_seconds_count{session='trainer'} > 0")


def test_staleness_is_what_the_steps_used(watched):
    # With lag 1 and an update every 4 steps the ages go 1, 2, 3, 4 for ever.
    def at_most(bound: str) -> float:
        buckets = f"skfac_staleness_steps_bucket{{session='trainer', le='{bound}'}}"
        return watched.query(buckets)[0][1]

    found = [at_most(bound) for bound in ("0.0", "1.0", "2.0", "4.0")]
    assert found == [0, 11, 22, REPORTED]
    rule = "instance_session:skfac_staleness_steps:p99_rate5m{session='trainer'}"
    ((_, p99),) = watched.wait_for(rule, lambda found: found and found[0][1] > 0)
    assert 2 < p99 <= 4


def test_failures_and_refusals_are_seen(watched):
    failed = watched.query("skfac_outcomes_total{outcome='failed', session='failing'}")
    assert failed[0][1] == 2
    refused = watched.query("skfac_refused_total{status='INVALID_ARGUMENT'}")
    assert refused[0][1] == 1
    full = watched.query("skfac_call_errors_total{status='RESOURCE_EXHAUSTED'} > 0")
    assert [labels["call"] for labels, _ in full] == ["OpenSession"]
    assert (
        watched.query("skfac_outcomes_total{outcome='failed', session='trainer'}")[0][1]
        == 0
    )


def test_the_alert_about_capacity_comes_from_real_refusals(watched):
    watched.wait_for("ALERTS{alertname='SkfacNoCapacity'}")


def test_the_alert_about_files_comes_from_the_first_that_is_no_good(watched):
    watched.wait_for("ALERTS{alertname='SkfacReloadFails', file='certificate'}")


def test_every_query_of_the_dashboard_has_data(watched):
    empty = [title for title, query in queries().items() if not runs(watched, query)]

    assert not empty


def runs(watched, query: str) -> bool:
    return bool(watched.query(filled(query)))


def test_every_rule_is_evaluated_without_an_error(watched):
    groups = watched.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]

    assert len(rules) == RULES.read_text().count("expr:")
    watched.wait_for("prometheus_rule_evaluations_total or vector(1)")
    assert [rule["name"] for rule in rules if rule.get("lastError")] == []


def test_the_rules_are_right():
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)
    promtool("test", "rules", Path(__file__).with_name("rules_test.yaml"))
