"""The HTTP side: metrics, the page and its data, and clients that mean no good."""

import http.client
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from hashlib import sha256

import pytest
from prometheus_client import CollectorRegistry

from skfac.service import web
from skfac.service.engine import EngineStatus, LayerStatus, LoadStatus, SessionStatus
from skfac.service.stages import summary
from skfac.service.status_page import LAYERS_SHOWN, StatusPage, plain
from skfac.service.web import CONNECTIONS, Answer, WebServer
from skfac.v1 import preconditioning_pb2 as pb
from tests.support.raw_client import TIMEOUT_S, RawClient, spec_of
from tests.support.servers import serving


def fetch(address: str, path: str) -> tuple[http.client.HTTPMessage, bytes]:
    answer = urllib.request.urlopen(f"http://{address}{path}", timeout=TIMEOUT_S)
    return answer.headers, answer.read()


@contextmanager
def web_server(**pages):
    paths = {f"/{name}": page for name, page in pages.items()}
    server = WebServer("127.0.0.1", 0, CollectorRegistry(), paths)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.close()


def layers(*behind: int | None) -> tuple[LayerStatus, ...]:
    return tuple(
        LayerStatus(f"fc{i}", None if b is None else 9, 0, b)
        for i, b in enumerate(behind)
    )


def status_of(*sessions: tuple[LayerStatus, ...]) -> EngineStatus:
    described = tuple(
        SessionStatus("job", 1, 1, 2.0, own, 0, 0, 0, 0, 0, summary([]), 0)
        for own in sessions
    )
    return EngineStatus("1", "cpu", 1.0, described, LoadStatus(0, 0, 0, 0, 0), (), ())


def test_the_data_of_the_page_is_that_of_get_status():
    with serving() as server, RawClient(server.address, spec_of("mnist")) as client:
        client.versions_of(4)
        _, body = fetch(server.metrics_address, "/status.json")
        answer = client.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)

    told = json.loads(body)
    (session,) = told["sessions"]
    assert session.pop("layer_count") == 2
    message = pb.GetStatusResponse(**told)
    for one in (message, answer):  # what changes from one question to the next
        one.uptime_s = one.sessions[0].age_s = 0.0
        one.load.busy_share = one.load.memory_bytes = 0
    assert message == answer
    assert {"receive", "assemble", "queue", "solve"} <= {
        stage["stage"] for stage in told["stages"]
    }


def test_the_page_allows_its_own_style_and_script_and_nothing_else():
    with serving() as server:
        headers, body = fetch(server.metrics_address, "/")

    page, policy = body.decode(), headers["Content-Security-Policy"]
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_the_page_can_be_turned_off(path):
    with serving(status_page=False) as server:
        with pytest.raises(urllib.error.HTTPError) as refusal:
            fetch(server.metrics_address, path)
        refusal.value.close()
        assert refusal.value.code == 404
        assert b"skfac_sessions" in fetch(server.metrics_address, "/metrics")[1]


def test_a_path_that_is_not_there_says_what_is():
    with serving() as server:
        with pytest.raises(urllib.error.HTTPError) as refusal:
            fetch(server.metrics_address, "/../etc/passwd")
        assert refusal.value.code == 404
        assert refusal.value.read().endswith(b"/metrics, /, /status.json\n")
        refusal.value.close()


def test_only_get_is_answered():
    with web_server(page=lambda: Answer("text/plain", b"x")) as address:
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        connection.request("POST", "/page", body=b"x")
        assert connection.getresponse().status == 501
        connection.close()


def test_a_bug_in_a_page_is_logged_and_the_next_request_answered(caplog):
    def broken():
        raise ZeroDivisionError

    with web_server(broken=broken, good=lambda: Answer("text/plain", b"x")) as address:
        with pytest.raises(http.client.RemoteDisconnected):
            fetch(address, "/broken")
        assert fetch(address, "/good")[1] == b"x"
    assert "ZeroDivisionError" in caplog.text


def test_too_many_connections_are_closed_and_leave_room_again():
    with (
        web_server(page=lambda: Answer("text/plain", b"x")) as address,
        ExitStack() as s,
    ):
        host, port = address.split(":")
        for _ in range(CONNECTIONS):
            s.enter_context(socket.create_connection((host, int(port)), TIMEOUT_S))
        with pytest.raises((OSError, http.client.RemoteDisconnected)):
            fetch(address, "/page")
        s.close()
        assert eventually(lambda: fetch(address, "/page")[1] == b"x")


def test_a_request_that_drips_is_cut(monkeypatch):
    monkeypatch.setattr(web, "CONNECTION_S", 0.5)
    with web_server() as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), TIMEOUT_S) as slow:
            assert eventually(lambda: breaks(slow))


def test_a_client_that_reads_nothing_is_cut(monkeypatch):
    monkeypatch.setattr(web, "CONNECTION_S", 0.5)
    large = Answer("text/plain", bytes(64 * 1024 * 1024))
    with web_server(page=lambda: large) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), TIMEOUT_S) as slow:
            slow.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            time.sleep(0.1)
            assert eventually(lambda: web_threads() == 0)


def test_many_pollers_describe_the_engine_once():
    asked = []

    def status():
        asked.append(time.monotonic())
        return status_of(layers(1))

    page = StatusPage(status)
    ask = page.pages()["/status.json"]
    pollers = [threading.Thread(target=ask) for _ in range(20)]
    for poller in pollers:
        poller.start()
    for poller in pollers:
        poller.join()

    assert len(asked) == 1


def test_a_status_that_takes_long_is_asked_for_seldom(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("skfac.service.status_page.time.monotonic", lambda: clock[0])
    asked = []

    def status():
        asked.append(clock[0])
        clock[0] += 0.1
        return status_of(layers(1))

    ask = StatusPage(status).pages()["/status.json"]
    for _ in range(1000):
        ask()
        clock[0] += 0.01

    busy_s = 0.1 * len(asked)
    assert len(asked) > 2
    assert busy_s / clock[0] < 0.06


def test_of_many_layers_the_stalest_are_told():
    behind = [index % 7 for index in range(LAYERS_SHOWN)]
    told = plain(status_of(layers(*behind, 100, None), layers(0)))

    many, one = told["sessions"]
    assert many["layer_count"] == LAYERS_SHOWN + 2
    assert len(many["layers"]) == LAYERS_SHOWN
    assert [layer["behind_steps"] for layer in many["layers"][:3]] == [None, 100, 6]
    assert one["layers"] == (asdict(layers(0)[0]),)
    assert one["layer_count"] == 1


def test_what_is_told_of_few_layers_is_in_their_order():
    told = plain(status_of(layers(0, 5, 1)))

    assert [layer["behind_steps"] for layer in told["sessions"][0]["layers"]] == [
        0,
        5,
        1,
    ]
    json.dumps(told, allow_nan=False)


def eventually(is_so, within_s: float = TIMEOUT_S) -> bool:
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        try:
            if is_so():
                return True
        except OSError:
            pass
        time.sleep(0.02)
    return False


def breaks(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"G")
    except OSError:
        return True
    return False


def web_threads() -> int:
    return sum(
        "process_request_thread" in thread.name for thread in threading.enumerate()
    )


def test_a_status_keeps_its_other_fields():
    status = replace(status_of(layers(1)), version="2")

    assert plain(status)["version"] == "2"
