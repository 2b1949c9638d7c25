"""The command line, as a person meets it."""

import json

import pytest
from typer.testing import CliRunner

from skfac.service.main import app
from tests.support.raw_client import RawClient, spec_of
from tests.support.servers import serving

runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})


@pytest.fixture
def server():
    with serving() as server, RawClient(server.address, spec_of("mnist")) as client:
        client.versions_of(4)
        yield server


def test_status_shows_sessions_versions_and_latencies(server):
    result = runner.invoke(app, ["status", server.address])

    assert result.exit_code == 0
    for text in (
        "mnist",
        "1/1",
        "inversion latency",
        "p99",
        "layers of mnist",
        "fc0",
        "fc1",
    ):
        assert text in result.output
    (row,) = [line.split() for line in result.output.splitlines() if " fc1 " in line]
    assert row == ["fc1", "4", "4"]  # layer, version, rows


def test_status_as_json_is_one_object(server):
    result = runner.invoke(app, ["status", server.address, "--json"])

    (session,) = json.loads(result.output)["sessions"]
    assert session["job"] == "mnist"
    assert int(session["solved"]) == 2
    assert session["inversion"]["p99_s"] >= session["inversion"]["p50_s"] > 0
    assert [layer["newest_step"] for layer in session["layers"]] == ["4", "4"]


def test_status_without_a_server_says_who_does_not_answer():
    with serving() as server:
        address = server.address
    result = runner.invoke(app, ["status", address])

    assert result.exit_code == 1
    assert f"No answer from {address}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "colour=red"], "colour"),
        (["--set", "lease_s"], "NAME=VALUE"),
        (["--set", "lease_s=-1"], "lease_s"),
        (["--address", "0.0.0.0:0"], "insecure_remote"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
        (["--device", "cuda:7"], "cuda:7"),
    ],
)
def test_a_wrong_setting_is_named(arguments, message):
    result = runner.invoke(app, ["serve", *arguments])

    assert result.exit_code == 2
    assert message in result.output


def test_help_teaches():
    serve = runner.invoke(app, ["serve", "--help"]).output
    for text in ("SIGTERM", "SKFAC_", "lease_s", "Example: skfac serve"):
        assert text in serve
    assert "--watch" in runner.invoke(app, ["status", "--help"]).output
