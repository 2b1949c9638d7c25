"""The command line, as a person meets it."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace as replace_fields

import pytest
from typer.testing import CliRunner

from skfac.service.main import app
from skfac.wire.session import LayerSpec
from tests.support.authority import Authority, replace
from tests.support.raw_client import RawClient, spec_of
from tests.support.servers import LONG_S, ServerProcess, serving

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
        "layers",
        "fc0",
        "fc1",
    ):
        assert text in result.output
    (row,) = [line.split() for line in result.output.splitlines() if " fc1 " in line]
    assert row == ["mnist", "fc1", "4", "4", "0"]  # version, rows, steps behind


def test_looking_at_a_server_does_not_wait_for_torch(server):
    program = (
        "import sys; from skfac.service.main import app; "
        "app(standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "status", server.address, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answer, loaded = done.stdout.splitlines()
    assert json.loads(answer)["sessions"]
    assert loaded == "False"


def test_top_is_shown_once_where_there_is_no_terminal(server):
    result = runner.invoke(app, ["top", server.address])

    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert [line for line in result.output.splitlines() if " fc1 " in line]


def test_status_as_json_is_one_object(server):
    result = runner.invoke(app, ["status", server.address, "--json"])

    (session,) = json.loads(result.output)["sessions"]
    assert session["job"] == "mnist"
    assert session["solved"] == 2  # a number, though protobuf's JSON has it as text
    assert session["failed"] == 0  # and what is zero is there
    assert session["inversion"]["p99_s"] >= session["inversion"]["p50_s"] > 0
    assert [layer["newest_step"] for layer in session["layers"]] == [4, 4]


def test_status_of_many_layers_is_shown():
    layers = tuple((f"{number:06}{'x' * 990}", 2, 2) for number in range(4096))
    named = tuple(LayerSpec(name, "linear", *sizes, False) for name, *sizes in layers)
    spec = replace_fields(spec_of("mnist"), layers=named)
    with serving() as server, RawClient(server.address, spec):
        result = runner.invoke(app, ["status", server.address, "--json"])

    (session,) = json.loads(result.output)["sessions"]
    assert len(session["layers"]) == 4096
    assert session["layers"][0]["newest_step"] is None


def test_an_interrupted_question_is_no_success(server, monkeypatch):
    def interrupt(answer):
        raise KeyboardInterrupt

    monkeypatch.setattr("skfac.service.main.plain_message", interrupt)
    result = runner.invoke(app, ["status", server.address, "--json"])

    assert result.exit_code == 130


def test_a_server_that_is_stopped_while_it_starts_never_serves(monkeypatch):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return

    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr("skfac.service.main.configure_logs", signalled)
    try:
        result = runner.invoke(app, ["serve", "--address", "127.0.0.1:0"])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)

    assert result.exit_code == 0
    assert "Serving" not in result.output


def test_handshakes_that_fail_write_no_lines(tmp_path):
    settings = Authority(tmp_path).server()
    address = settings.pop("address")
    with ServerProcess(address, **settings) as server:
        host, port = server.address.split(":")
        for _ in range(3):
            with socket.create_connection((host, int(port)), LONG_S) as plain:
                plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
                plain.settimeout(LONG_S)
                while plain.recv(100):
                    pass
        code, output = server.interrupt(signal.SIGTERM)

    assert code == 0
    assert "andshake" not in output


@pytest.mark.parametrize("command", ["status", "top"])
def test_status_without_a_server_says_who_does_not_answer(command):
    with serving() as server:
        address = server.address
    result = runner.invoke(app, [command, address])

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


def test_a_token_is_made_for_the_list_and_status_uses_it(tmp_path):
    token = tmp_path / "mnist.token"
    made = runner.invoke(app, ["token", "mnist-*", str(token)])
    assert made.exit_code == 0
    assert token.stat().st_mode & 0o777 == 0o600
    secret = token.read_text().strip()
    assert len(secret) >= 43  # 256 bits
    assert secret not in made.output

    ca = Authority(tmp_path)
    replace(tmp_path / "access", made.output)
    settings = {**ca.server(), "access_file": str(tmp_path / "access")}
    with serving(**settings) as server:
        arguments = ["status", server.address, "--root-ca", str(ca.file)]
        shown = runner.invoke(app, [*arguments, "--token-file", str(token), "--json"])
        assert json.loads(shown.output)["version"]
        refused = runner.invoke(app, arguments)
        assert refused.exit_code == 1
        assert "This server wants a token" in refused.output
        plain = runner.invoke(app, ["status", server.address])
        assert "give credentials a root_ca" in plain.output

    again = runner.invoke(app, ["token", "mnist-*", str(token)])
    assert again.exit_code == 2
    assert "File exists" in again.output
    assert token.read_text().strip() == secret
    wrong = runner.invoke(app, ["token", "two words", str(tmp_path / "x")])
    assert wrong.exit_code == 2


def test_a_server_without_its_files_says_which(tmp_path):
    arguments = ["serve", "--set", f"access_file={tmp_path}/gone"]
    result = runner.invoke(app, arguments)

    assert result.exit_code == 2
    assert "Cannot read" in result.output


def test_help_teaches():
    serve = runner.invoke(app, ["serve", "--help"]).output
    for text in ("SIGTERM", "SKFAC_", "lease_s", "Example: skfac serve"):
        assert text in serve
    assert "--refresh" in runner.invoke(app, ["top", "--help"]).output


@pytest.mark.parametrize("command", ["status", "top"])
def test_an_address_without_a_port_is_refused(command):
    result = runner.invoke(app, [command, "127.0.0.1"])

    assert result.exit_code == 2
    assert "'127.0.0.1' has no port: use host:port or unix:/path." in result.output


def refused(*arguments: str, **environment: str) -> str:
    result = runner.invoke(app, ["serve", *arguments], env=environment)
    assert result.exit_code == 2, result.output
    return result.output


def test_wrong_settings_are_told_in_plain_words(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("lease_s = \n")

    assert "There is no setting 'lease'; did you mean lease_s?" in refused(
        "--set", "lease=3"
    )
    assert "There is no setting 'zzz'; `skfac serve --help`" in refused(
        "--set", "zzz=3"
    )
    assert str(file) in refused("--config", str(file)).replace("\n", "")
    said = refused(SKFAC_FOO="1")
    assert "SKFAC_FOO is no setting of the server" in said
    assert "Value error" not in said
    assert "(got" not in said


def test_help_of_serve_has_the_defaults():
    output = runner.invoke(app, ["serve", "--help"]).output

    for default in ("127.0.0.1:50051", "127.0.0.1:9464", "cpu"):
        assert f"[default: ({default})]" in output


def test_help_names_what_ray_needs():
    assert "needs Ray." in runner.invoke(app, ["--help"]).output


def test_a_busy_address_says_why_and_the_way_out(tmp_path):
    with serving() as server:
        said = refused("--address", server.address, "--metrics-address", "")
    flat = " ".join(said.replace("│", " ").split())
    assert "Address already in use. Choose another; port 0 picks a free one." in flat
    missing = f"unix:{tmp_path}/missing/socket"
    said = refused("--address", missing, "--metrics-address", "")
    assert "No such file or directory." in " ".join(said.replace("│", " ").split())
