"""The port with nothing but health, and the probe that asks it."""

import subprocess
import sys
import threading

import grpc
import pytest

from skfac.service import probe
from skfac.service.local_engine import LocalEngine
from skfac.v1 import preconditioning_pb2 as pb
from skfac.v1 import preconditioning_pb2_grpc as rpc
from skfac.wire.channel import SERVICE
from tests.support.raw_client import TIMEOUT_S
from tests.support.servers import LONG_S, serving


@pytest.fixture
def server():
    with serving(health_address="127.0.0.1:0") as server:
        yield server


@pytest.mark.parametrize("name", ["live", "ready", "", SERVICE])
def test_it_knows_the_names_that_kubelets_ask_for(server, name):
    assert probe.probe(server.health_address, name) == "SERVING"


def test_it_tells_nothing_else(server):
    with grpc.insecure_channel(server.health_address) as channel:
        stub = rpc.PreconditioningServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert probe.probe(server.health_address, "mnist").startswith("NOT_FOUND")


def test_a_server_that_stops_is_alive_but_not_ready(monkeypatch):
    drained = threading.Event()
    monkeypatch.setattr(LocalEngine, "drain", lambda *_: drained.wait(LONG_S))
    with serving(health_address="127.0.0.1:0") as server:
        closing = threading.Thread(target=server.close)
        closing.start()
        while probe.probe(server.health_address, "ready") == "SERVING":
            pass
        assert probe.probe(server.health_address, "ready") == "NOT_SERVING"
        assert probe.probe(server.health_address, "live") == "SERVING"
        drained.set()
        closing.join(LONG_S)
    assert probe.probe(server.health_address, "live").startswith("UNAVAILABLE")


def test_silent_calls_keep_no_probe_waiting(server):
    hung = threading.Event()

    def silence():
        hung.wait(LONG_S)
        yield b""

    with grpc.insecure_channel(server.health_address) as channel:
        call = channel.stream_unary("/grpc.health.v1.Health/Check")
        silent = [call.future(silence()) for _ in range(16)]
        assert probe.probe(server.health_address, "ready") == "SERVING"
        codes = {one.exception(LONG_S).code() for one in silent}
        hung.set()
    assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}


def test_without_an_address_there_is_no_such_port():
    with serving() as server:
        assert server.health_address == ""


def test_a_port_that_is_taken_is_named(server):
    with (
        pytest.raises(OSError, match=r"Cannot listen on health_address"),
        serving(health_address=server.health_address),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "code", "answer"), [("ready", 0, "SERVING"), ("nobody", 1, "NOT_FOUND")]
)
def test_the_exit_code_of_the_probe_is_the_answer(server, name, code, answer):
    command = [sys.executable, "-m", "skfac.service.probe", server.health_address, name]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert (ran.returncode, ran.stdout.split(":")[0].strip()) == (code, answer)


def test_the_probe_is_too_light_to_import_the_engine():
    program = "import sys, skfac.service.probe; sys.exit('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], timeout=LONG_S)
    assert ran.returncode == 0
